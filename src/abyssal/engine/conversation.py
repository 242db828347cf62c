"""A conversation with a model: messages in its chat template, answers over one cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from abyssal.engine.kept_cache import KeptCache
from abyssal.engine.load import LoadedModel
from abyssal.engine.sampling import SamplingParameters
from abyssal.engine.speculate import Speculation
from abyssal.engine.text_stream import Chunk, stream_text
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
        speculation: Speculation | None = None,
    ) -> None:
        """Start with nothing but the system prompt `system`, if there is one.

        With a seed in `parameters`, turn n draws from that seed + n, n = 0, 1, ...
        """
        self._loaded, self._template, self._parameters = loaded, template, parameters
        self._speculation = speculation
        self._cached = KeptCache(loaded.model)
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
        return self._cached.reused

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, question: str) -> tuple[int, Iterator[Chunk]]:
        """Add a question, and return the tokens of the whole prompt and the answer, chunk by chunk.

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
        chunks = stream_text(self._loaded, prompt_ids, parameters, self._speculation, self._cached)
        return len(prompt_ids), self._recorded(messages, chunks)

    def _recorded(self, messages: list[dict[str, str]], chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yield the chunks of an answer to `messages`, and keep it in the conversation."""
        answer = {"role": "assistant", "content": ""}
        for chunk in chunks:
            answer["content"] += chunk.text
            if chunk.text or chunk.finish_reason is not None:
                self.messages = [*messages, answer]
            yield chunk
