"""The bodies of requests: OpenAI's fields, a few of vLLM's, and `abyssal` for our own.

Types are strict and unknown fields are refused, as OpenAI does: a misspelt field would otherwise change nothing, and
nobody would notice. Fields that have no influence on the text are accepted and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class StrictFields(BaseModel):
    """A JSON object with these fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(StrictFields):
    """A part of a message; text is the only kind this model reads."""

    type: Literal["text"]
    text: str


class CalledFunction(StrictFields):
    """A function that the assistant called, with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(StrictFields):
    """A call that an assistant's message made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(StrictFields):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # what clients send back of an answer, without a meaning here
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionDefinition(StrictFields):
    """A function that the model may call, its parameters as a JSON schema."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictFields):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(StrictFields):
    """A function, by name."""

    name: str


class NamedTool(StrictFields):
    """The tool that the model must call."""

    type: Literal["function"]
    function: FunctionName


class PlainFormat(StrictFields):
    """Text without a form, or any JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(StrictFields):
    """A JSON schema; it is always followed, `strict` or not."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    form: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(StrictFields):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(StrictFields):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Extension(StrictFields):
    """Our own extension: `inspect` adds the probability, drafts and experts of every token."""

    inspect: bool = False


class GenerationRequest(StrictFields):
    """The fields that chat completions and completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    abyssal: Extension | None = None
    # without influence on the text
    user: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # other than these values is not supported
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None


class ChatCompletionRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # without influence on the text
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    # other than these values is not supported
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    functions: None = None
    function_call: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _fields_that_need_another(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        wanted = self.tool_choice
        if isinstance(wanted, NamedTool) and wanted.function.name not in names:
            raise ValueError(f"tool_choice: {wanted.function.name!r} is not one of the tools")
        if wanted == "required" and not names:
            raise ValueError("tool_choice: 'required' needs tools")
        return self

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []
