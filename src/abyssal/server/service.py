"""Handles a validated request: prompt, sampling parameters, constraint, generation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cached_property

from abyssal.engine import AsyncEngine, EngineOptions, LoadedModel, Request, TokenConstraint
from abyssal.errors import nearest
from abyssal.server.constraint import GrammarCompiler
from abyssal.server.faults import ApiError
from abyssal.server.generation import Generation
from abyssal.server.metrics import ServerMetrics
from abyssal.server.options import ServerOptions
from abyssal.server.output_parser import THINK
from abyssal.server.parameters import sampling_parameters
from abyssal.server.prompt import chat_prompt
from abyssal.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest, NamedTool, SchemaFormat
from abyssal.server.responses import ChatResponseBuilder, CompletionResponseBuilder, TokenFormatter
from abyssal.text.chat_template import ChatTemplate

Constraint = Callable[[], TokenConstraint] | None


class Service:
    """Handles the requests to one model."""

    def __init__(
        self,
        loaded: LoadedModel,
        driver: AsyncEngine,
        engine_options: EngineOptions,
        options: ServerOptions,
        template: ChatTemplate | None,
    ) -> None:
        """Serve `loaded`, which `driver` runs; without a template there is no chat."""
        self.options, self.loaded, self.driver, self.template = options, loaded, driver, template
        self.metrics = ServerMetrics(options.model_name, lambda: driver.statistics)
        self.tokens = TokenFormatter(loaded.tokenizer)
        self.context_length = loaded.config.max_position_embeddings
        self._cache_tokens = driver.statistics.num_pages * engine_options.page_tokens

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.loaded.tokenizer, self.loaded.config.vocab_size, self.loaded.eos_ids)

    async def chat(self, body: ChatCompletionRequest) -> tuple[Generation, ChatResponseBuilder]:
        """Begin a chat completion.

        Raises:
            AbyssalError: the request cannot be, or not now.
        """
        self._check(body, num_prompts=1)
        text, prompt_ids, constraint = await asyncio.to_thread(self._prepare_chat, body)
        generation = await self._start(body, [prompt_ids], constraint)
        in_reasoning = _opens_reasoning(text)
        builder = ChatResponseBuilder(
            self.options.model_name, generation.usage, body, self.tokens, in_reasoning=in_reasoning
        )
        return generation, builder

    async def complete(self, body: CompletionRequest) -> tuple[Generation, CompletionResponseBuilder]:
        """Begin a completion.

        Raises:
            AbyssalError: the request cannot be, or not now.
        """
        prompts = _prompts(body)
        self._check(body, num_prompts=len(prompts))
        ids, constraint = await asyncio.to_thread(
            lambda: ([self._encode(prompt) for prompt in prompts], self._constraint(body, after_reasoning=False))
        )
        generation = await self._start(body, ids, constraint)
        num_texts = len(prompts) * (body.n or 1)
        return generation, CompletionResponseBuilder(
            self.options.model_name, generation.usage, body, self.tokens, num_texts
        )

    def _check(self, body: GenerationRequest, *, num_prompts: int) -> None:
        """Refuse what can be refused before any work."""
        name, texts = self.options.model_name, num_prompts * (body.n or 1)
        if body.model != name:
            raise ApiError(
                404,
                f"model={body.model!r}: this server has {name!r} only{nearest(body.model, [name])}",
                param="model",
                code="model_not_found",
            )
        if texts > self.options.max_texts:
            raise ApiError(400, f"n={body.n or 1}: makes {texts} texts, at most {self.options.max_texts}", param="n")
        if body.ignore_eos and self._is_constrained(body):
            raise ApiError(400, "ignore_eos: not together with an answer of a given form", param="ignore_eos")

    def _is_constrained(self, body: GenerationRequest) -> bool:
        response_format = body.response_format
        return (response_format is not None and response_format.type != "text") or (
            isinstance(body, ChatCompletionRequest) and body.must_call
        )

    def _prepare_chat(self, body: ChatCompletionRequest) -> tuple[str, list[int], Constraint]:
        """Return the prompt of a chat request, its ids and the constraint; can take long."""
        if self.template is None:
            raise ApiError(
                400,
                "this model has no chat template, so it is no chat model; it continues texts at /v1/completions",
                code="no_chat_template",
            )
        text = chat_prompt(self.template, body.messages, body.offered_tools, body.chat_template_kwargs or {})
        constraint = self._constraint(body, after_reasoning=_opens_reasoning(text))
        return text, self.loaded.tokenizer.encode(text), constraint

    def _encode(self, prompt: str | list[int]) -> list[int]:
        return self.loaded.encode_prompt(prompt) if isinstance(prompt, str) else prompt

    def _constraint(self, body: GenerationRequest, *, after_reasoning: bool) -> Constraint:
        """Return what makes the constraints of a request's texts, if it asks for a form."""
        if isinstance(body, ChatCompletionRequest) and body.must_call:
            functions = [tool.function for tool in body.tools or ()]
            if isinstance(body.tool_choice, NamedTool):
                wanted = body.tool_choice.function.name
                functions = [function for function in functions if function.name == wanted]
            several = body.parallel_tool_calls is not False and body.tool_choice == "required"
            return self._grammars.for_tool_calls(functions, several=several, after_reasoning=after_reasoning)
        form = body.response_format
        if form is None or form.type == "text":
            return None
        schema = form.json_schema.form if isinstance(form, SchemaFormat) else {"type": "object"}
        return self._grammars.for_json(schema, after_reasoning=after_reasoning)

    async def _start(self, body: GenerationRequest, prompts: Sequence[list[int]], constraint: Constraint) -> Generation:
        """Queue the texts of a request."""
        wants_experts = isinstance(body, ChatCompletionRequest) and body.abyssal is not None and body.abyssal.inspect
        requests = [
            Request(
                prompt_ids,
                sampling_parameters(body, self.loaded.defaults.parameters, self._num_free(body, len(prompt_ids))),
                body.n or 1,
                frozenset() if body.ignore_eos else None,
                constraint,
                wants_experts,
            )
            for prompt_ids in prompts
        ]
        return await Generation.start(self.driver, requests, self.metrics)

    def _num_free(self, body: GenerationRequest, num_prompt_tokens: int) -> int:
        """Return how many tokens fit behind a prompt.

        Raises:
            ApiError: none does, or the prompt is longer than it may be.
        """
        context = self.context_length
        limit = min(self.options.max_prompt_tokens or context, context - 1, self._cache_tokens)
        if num_prompt_tokens > limit:
            raise ApiError(
                400,
                f"the prompt has {num_prompt_tokens} tokens, at most {limit} are allowed here (the model's context is "
                f"{context} with the answer); shorten it",
                param="messages" if isinstance(body, ChatCompletionRequest) else "prompt",
                code="context_length_exceeded",
            )
        return min(context - num_prompt_tokens, self._cache_tokens - num_prompt_tokens + 1)


def _opens_reasoning(prompt: str) -> bool:
    """Whether a prompt ends with the tag that opens the reasoning, as R1's template does."""
    return prompt.rstrip().endswith(THINK)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts of a request, one for each text or list of ids.

    Raises:
        ApiError: there is none.
    """
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt: must not be empty", param="prompt")
    prompts: list[str | list[int]] = []
    for one in prompt:
        if isinstance(one, int):
            return [[token for token in prompt if isinstance(token, int)]]
        prompts.append(one)
    return prompts
