"""A conversation with a model: messages in its chat template, answers over one cache."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

from abyssal.engine.engine import Engine
from abyssal.engine.load import LoadedModel
from abyssal.engine.options import EngineOptions
from abyssal.engine.request import Output, Request
from abyssal.engine.sampling import SamplingParameters
from abyssal.errors import UsageError
from abyssal.text.chat_template import ChatTemplate


class Conversation:
    """Messages by turns, each question rendered with all that came before it.

    What the latent cache holds of the rendered text is not run again: of a turn, the new message and the few tokens
    around it. Where the ids of a rendered answer differ from those that were sampled (the same text can be cut into
    tokens in several ways), the rest runs again from there.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        template: ChatTemplate,
        parameters: SamplingParameters,
        *,
        system: str | None = None,
        num_drafts: int = 0,
    ) -> None:
        """Start with nothing but the system prompt `system`, if there is one, and `num_drafts` behind each token.

        With a seed in `parameters`, turn n draws from that seed + n, n = 0, 1, ...
        """
        self._loaded, self._template, self._parameters = loaded, template, parameters
        self.engine = Engine.of(loaded, EngineOptions.single_stream(num_drafts, share_prefixes=True))
        self._shared_before = 0
        self._answer: Generator[Output] | None = None
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    @property
    def turns(self) -> int:
        """Answers so far."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def reused_tokens(self) -> int:
        """Tokens of the newest prompt that did not run again."""
        return self.engine.statistics().shared_tokens_total - self._shared_before

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, question: str) -> tuple[int, Generator[Output]]:
        """Add a question, and return the tokens of the whole prompt and the answer, token by token.

        The answer is part of the conversation as far as it was taken; one of which nothing was taken is taken back
        together with its question, once the iterator is closed.

        Raises:
            UsageError: the conversation does not fit into the model's context any more; nothing has changed then.
            UsageError, DataError: the chat template refuses the messages, or fails.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt_ids = self._loaded.tokenizer.encode(self._template.render(messages, add_generation_prompt=True))
        room = self._loaded.config.max_position_embeddings
        if len(prompt_ids) >= room:
            raise UsageError(
                f"the conversation has {len(prompt_ids)} tokens with this message, but the model can attend to {room}, "
                "the answer among them; the message was not added: make it shorter, or start a new conversation"
            )
        seed = self._parameters.seed
        parameters = self._parameters if seed is None else replace(self._parameters, seed=seed + self.turns)
        if self._answer is not None:  # one that was left
            self._answer.close()
        self._shared_before = self.engine.statistics().shared_tokens_total
        self._answer = self._recorded(messages, self.engine.stream(Request(prompt_ids, parameters)))
        return len(prompt_ids), self._answer

    def _recorded(self, messages: list[dict[str, str]], outputs: Generator[Output]) -> Generator[Output]:
        """Yield the outputs of an answer to `messages`, and keep its text in the conversation."""
        answer = {"role": "assistant", "content": ""}
        with closing(outputs):
            for output in outputs:
                answer["content"] += output.text
                if output.text or output.finish_reason is not None:
                    self.messages = [*messages, answer]
                yield output
