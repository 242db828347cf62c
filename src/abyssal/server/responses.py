"""Builds OpenAI's response objects from the engine's outputs, complete or as chunks of a stream."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable
from typing import Any

from abyssal.engine import Output, ScoredToken
from abyssal.server.generation import Usage
from abyssal.server.output_parser import OutputParser, OutputSegment
from abyssal.server.protocol import ChatCompletionRequest, CompletionRequest
from abyssal.text.tokenizer import Tokenizer

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
#: JSON has no infinity; this stands for the log-probability of an impossible token.
MIN_LOGPROB = -9999.0


class TokenFormatter:
    """Describes tokens as the API shows them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Describe the tokens of this tokenizer."""
        self._tokenizer = tokenizer

    def logprob(self, token: ScoredToken) -> dict[str, Any]:
        """Return a token with its log-probability and those of the likeliest, as chat completions have it."""
        top = [self._entry(other, logprob) for other, logprob in token.top]
        return {**self._entry(token.id, token.logprob), "top_logprobs": top}

    def inspection(self, output: Output, token: ScoredToken) -> dict[str, Any]:
        """Return everything known about a token; `draft` is what the MTP modules proposed in its place, if anything."""
        draft = None if output.draft is None else {"text": self.text(output.draft), "accepted": output.was_draft}
        return {
            "id": token.id,
            "text": self.text(token.id),
            "probability": math.exp(token.logprob),
            "draft": draft,
            "experts": [list(experts) for experts in output.experts],
        }

    def text(self, token: int) -> str:
        """Return the text of one token, U+FFFD where it is not a complete character."""
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelling = self._tokenizer.token_bytes(token)
        text = spelling.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(spelling)}


class ResponseBuilder:
    """Builds one response: an id, a time, a model, and choices that grow with each output."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model_name: str, usage: Usage) -> None:
        """Begin a response; `usage` is counted elsewhere."""
        self.usage = usage
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}

    def chunks(self, number: int, output: Output) -> list[dict[str, Any]]:
        """Add an output of one choice, and return the chunks of a stream that follow from it."""
        return [self._chunk([choice]) for choice in self._choices(number, output)]

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream whose client asked for the usage."""
        return {**self._chunk([]), "usage": self.usage.as_json()}

    def response(self) -> dict[str, Any]:
        """Return the complete response, once all outputs are added."""
        return {**self._head, "object": self.kind, "choices": self._complete_choices(), "usage": self.usage.as_json()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _choices(self, number: int, output: Output) -> Iterable[dict[str, Any]]:
        raise NotImplementedError

    def _complete_choices(self) -> list[dict[str, Any]]:
        raise NotImplementedError


class ChatResponseBuilder(ResponseBuilder):
    """Builds the response to a chat completion request."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self, model_name: str, usage: Usage, body: ChatCompletionRequest, tokens: TokenFormatter, *, in_reasoning: bool
    ) -> None:
        """Begin; `in_reasoning` where the prompt ends with the tag that opens the reasoning."""
        super().__init__(model_name, usage)
        self._body, self._tokens = body, tokens
        self._inspects = body.abyssal is not None and body.abyssal.inspect
        self._messages = [
            _MessageBuilder(OutputParser(in_reasoning=in_reasoning, with_tools=bool(body.offered_tools)))
            for _ in range(body.n or 1)
        ]

    def _choices(self, number: int, output: Output) -> Iterable[dict[str, Any]]:
        message, token = self._messages[number], output.token
        deltas = message.add(output)
        self.usage.reasoning_tokens += message.is_reasoning
        extras: dict[str, Any] = {}
        if self._body.logprobs and token is not None and output.finish_reason != "eos":
            logprobs = [self._tokens.logprob(token)]
            message.logprobs += logprobs
            extras["logprobs"] = {"content": logprobs, "refusal": None}
        if self._inspects and token is not None:
            inspected = [self._tokens.inspection(output, token)]
            message.inspected += inspected
            extras["abyssal"] = {"tokens": inspected}
        if extras and not deltas:
            deltas = [{}]
        for delta in deltas:
            yield {"index": number, "delta": delta, "finish_reason": None, **extras}
            extras = {}
        if output.finish_reason is not None:
            yield {"index": number, "delta": {}, "finish_reason": message.finish_reason}

    def _complete_choices(self) -> list[dict[str, Any]]:
        choices = []
        for number, message in enumerate(self._messages):
            choice = {"index": number, "message": message.message(), "finish_reason": message.finish_reason}
            choice["logprobs"] = {"content": message.logprobs, "refusal": None} if self._body.logprobs else None
            if self._inspects:
                choice["abyssal"] = {"tokens": message.inspected}
            choices.append(choice)
        return choices


class _MessageBuilder:
    """Builds one message from outputs."""

    def __init__(self, parser: OutputParser) -> None:
        self._parser = parser
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._has_begun = False
        self.finish_reason: str | None = None
        self.is_reasoning = False  # by the latest token
        self.logprobs: list[dict[str, Any]] = []
        self.inspected: list[dict[str, Any]] = []

    def add(self, output: Output) -> list[dict[str, Any]]:
        """Add an output and return what it adds to the message, as deltas."""
        segments = self._parser.push(output.text)
        if output.finish_reason is not None:
            segments += self._parser.flush()
            self.finish_reason = REASONS.get(output.finish_reason, output.finish_reason)
        deltas = [delta for segment in segments if (delta := self._delta(segment))]
        self.is_reasoning = bool(segments) and all(segment.kind == "reasoning" for segment in segments)
        if self._calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        if not self._has_begun:
            self._has_begun = True
            deltas.insert(0, {"role": "assistant", "content": ""})
        return deltas

    def _delta(self, segment: OutputSegment) -> dict[str, Any]:
        """Add a segment to the message and return it as a delta, an empty one for a tag."""
        if segment.kind == "content":
            self._content.append(segment.text)
            return {"content": segment.text}
        if segment.kind == "reasoning":
            self._reasoning.append(segment.text)
            return {"reasoning_content": segment.text}
        if segment.kind == "call":
            function = {"name": segment.text, "arguments": ""}
            self._calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
            index = len(self._calls) - 1
            return {"tool_calls": [{"index": index, **self._calls[-1], "function": dict(function)}]}
        if segment.kind == "arguments":
            self._calls[-1]["function"]["arguments"] += segment.text
            return {"tool_calls": [{"index": len(self._calls) - 1, "function": {"arguments": segment.text}}]}
        return {}

    def message(self) -> dict[str, Any]:
        """Return the complete message."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message |= {"tool_calls": self._calls, "content": content or None}
        return message


class CompletionResponseBuilder(ResponseBuilder):
    """Builds the response to a completion request."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self, model_name: str, usage: Usage, body: CompletionRequest, tokens: TokenFormatter, num_texts: int
    ) -> None:
        """Begin with `num_texts` empty choices."""
        super().__init__(model_name, usage)
        self._wants_logprobs, self._tokens = body.logprobs is not None, tokens
        self._texts: list[list[str]] = [[] for _ in range(num_texts)]
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(num_texts)]
        self._lengths = [0] * num_texts
        self._reasons: list[str | None] = [None] * num_texts

    def _choices(self, number: int, output: Output) -> Iterable[dict[str, Any]]:
        logprobs = None
        if output.finish_reason is not None:
            self._reasons[number] = REASONS.get(output.finish_reason, output.finish_reason)
        if self._wants_logprobs and output.token is not None and output.finish_reason != "eos":
            logprobs = self._token_logprobs(number, output.token)
            self._logprobs[number].append(logprobs)
        self._texts[number].append(output.text)
        self._lengths[number] += len(output.text)
        if output.text or logprobs or output.finish_reason:
            reason = self._reasons[number]
            yield {"index": number, "text": output.text, "logprobs": logprobs, "finish_reason": reason}

    def _token_logprobs(self, number: int, token: ScoredToken) -> dict[str, Any]:
        """Return the log-probabilities of one token, as text completions have it: lists of one."""
        entry = self._tokens.logprob(token)
        top = {other["token"]: other["logprob"] for other in entry["top_logprobs"]}
        return {
            "tokens": [entry["token"]],
            "token_logprobs": [entry["logprob"]],
            "top_logprobs": [top],
            "text_offset": [self._lengths[number]],
        }

    def _complete_choices(self) -> list[dict[str, Any]]:
        choices = []
        for number, parts in enumerate(self._texts):
            joined: dict[str, list[Any]] | None = None
            if self._wants_logprobs:
                joined = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
                for entry in self._logprobs[number]:
                    for name, values in joined.items():
                        values += entry[name]
            reason = self._reasons[number]
            choices.append({"index": number, "text": "".join(parts), "logprobs": joined, "finish_reason": reason})
        return choices
