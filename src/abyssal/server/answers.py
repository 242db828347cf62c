"""From the engine's outputs to OpenAI's objects, whole or in chunks."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable
from typing import Any

from abyssal.engine import Output, ScoredToken
from abyssal.server.fields import ChatFields, CompletionFields
from abyssal.server.generation import Usage
from abyssal.server.output_parser import OutputParser, Piece
from abyssal.text.tokenizer import Tokenizer

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
#: JSON has no infinity; this is as unlikely as a token gets.
LEAST_LOGPROB = -9999.0


class TokenTexts:
    """How tokens look to a client."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Describe the tokens of this tokenizer."""
        self._tokenizer = tokenizer

    def logprob(self, token: ScoredToken) -> dict[str, Any]:
        """Return a token with its log-probability and those of the likeliest, as chat completions have it."""
        top = [self._one(other, logprob) for other, logprob in token.top]
        return {**self._one(token.id, token.logprob), "top_logprobs": top}

    def inspected(self, output: Output, token: ScoredToken) -> dict[str, Any]:
        """Return all that is known of a token: `draft` is what the MTP modules had said at its place, if anything."""
        draft = None if output.draft is None else {"text": self.text(output.draft), "accepted": output.was_draft}
        return {
            "id": token.id,
            "text": self.text(token.id),
            "probability": math.exp(token.logprob),
            "draft": draft,
            "experts": [list(experts) for experts in output.experts],
        }

    def text(self, token: int) -> str:
        """Return the text of one token, U+FFFD where it is not a whole character."""
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        spelling = self._tokenizer.token_bytes(token)
        text = spelling.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(spelling)}


class Answer:
    """What all answers have: an id, a time, a model, and texts that grow."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model_name: str, usage: Usage) -> None:
        """Begin an answer; `usage` is counted elsewhere."""
        self.usage = usage
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}

    def chunks(self, number: int, output: Output) -> list[dict[str, Any]]:
        """Take an output of a text and return the chunks of a stream that it makes."""
        return [self._chunk([choice]) for choice in self._choices(number, output)]

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream whose client wants to know what was used."""
        return {**self._chunk([]), "usage": self.usage.as_json()}

    def whole(self) -> dict[str, Any]:
        """Return the answer, once all outputs were taken."""
        return {**self._head, "object": self.kind, "choices": self._whole_choices(), "usage": self.usage.as_json()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _choices(self, number: int, output: Output) -> Iterable[dict[str, Any]]:
        raise NotImplementedError

    def _whole_choices(self) -> list[dict[str, Any]]:
        raise NotImplementedError


class ChatAnswer(Answer):
    """The answer to a chat request."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self, model_name: str, usage: Usage, body: ChatFields, tokens: TokenTexts, *, in_reasoning: bool
    ) -> None:
        """Begin; `in_reasoning` where the prompt ends with the mark that opens it."""
        super().__init__(model_name, usage)
        self._body, self._tokens, self._in_reasoning = body, tokens, in_reasoning
        self._inspects = body.abyssal is not None and body.abyssal.inspect
        self._texts = [self._new_text() for _ in range(body.n or 1)]

    def _new_text(self) -> _ChatText:
        return _ChatText(OutputParser(in_reasoning=self._in_reasoning, with_tools=bool(self._body.offered_tools)))

    def _choices(self, number: int, output: Output) -> Iterable[dict[str, Any]]:
        text, token = self._texts[number], output.token
        deltas = text.take(output)
        self.usage.reasoning_tokens += text.is_reasoning
        extras: dict[str, Any] = {}
        if self._body.logprobs and token is not None and output.finish_reason != "eos":
            logprobs = [self._tokens.logprob(token)]
            text.logprobs += logprobs
            extras["logprobs"] = {"content": logprobs, "refusal": None}
        if self._inspects and token is not None:
            inspected = [self._tokens.inspected(output, token)]
            text.inspected += inspected
            extras["abyssal"] = {"tokens": inspected}
        if extras and not deltas:
            deltas = [{}]
        for delta in deltas:
            yield {"index": number, "delta": delta, "finish_reason": None, **extras}
            extras = {}
        if output.finish_reason is not None:
            yield {"index": number, "delta": {}, "finish_reason": text.finish_reason}

    def _whole_choices(self) -> list[dict[str, Any]]:
        choices = []
        for number, text in enumerate(self._texts):
            choice = {"index": number, "message": text.message(), "finish_reason": text.finish_reason}
            choice["logprobs"] = {"content": text.logprobs, "refusal": None} if self._body.logprobs else None
            if self._inspects:
                choice["abyssal"] = {"tokens": text.inspected}
            choices.append(choice)
        return choices


class _ChatText:
    """One message as it grows."""

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

    def take(self, output: Output) -> list[dict[str, Any]]:
        """Add an output and return what it adds to the message, as deltas."""
        pieces = self._parser.push(output.text)
        if output.finish_reason is not None:
            pieces += self._parser.flush()
            self.finish_reason = REASONS.get(output.finish_reason, output.finish_reason)
        deltas = [delta for piece in pieces if (delta := self._delta(piece))]
        self.is_reasoning = bool(pieces) and all(piece.kind == "reasoning" for piece in pieces)
        if self._calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        if not self._has_begun:
            self._has_begun = True
            deltas.insert(0, {"role": "assistant", "content": ""})
        return deltas

    def _delta(self, piece: Piece) -> dict[str, Any]:
        """Add a piece to the message and return it as a delta, an empty one for a mark."""
        if piece.kind == "content":
            self._content.append(piece.text)
            return {"content": piece.text}
        if piece.kind == "reasoning":
            self._reasoning.append(piece.text)
            return {"reasoning_content": piece.text}
        if piece.kind == "call":
            function = {"name": piece.text, "arguments": ""}
            self._calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
            index = len(self._calls) - 1
            return {"tool_calls": [{"index": index, **self._calls[-1], "function": dict(function)}]}
        if piece.kind == "arguments":
            self._calls[-1]["function"]["arguments"] += piece.text
            return {"tool_calls": [{"index": len(self._calls) - 1, "function": {"arguments": piece.text}}]}
        return {}

    def message(self) -> dict[str, Any]:
        """Return the whole message."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message |= {"tool_calls": self._calls, "content": content or None}
        return message


class TextAnswer(Answer):
    """The answer to a request for the continuation of texts."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self, model_name: str, usage: Usage, body: CompletionFields, tokens: TokenTexts, num_texts: int
    ) -> None:
        """Begin `num_texts` texts."""
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
            logprobs = self._described(number, output.token)
            self._logprobs[number].append(logprobs)
        self._texts[number].append(output.text)
        self._lengths[number] += len(output.text)
        if output.text or logprobs or output.finish_reason:
            reason = self._reasons[number]
            yield {"index": number, "text": output.text, "logprobs": logprobs, "finish_reason": reason}

    def _described(self, number: int, token: ScoredToken) -> dict[str, Any]:
        """Return the log-probabilities of one token, as text completions have it: lists of one."""
        one = self._tokens.logprob(token)
        top = {other["token"]: other["logprob"] for other in one["top_logprobs"]}
        return {
            "tokens": [one["token"]],
            "token_logprobs": [one["logprob"]],
            "top_logprobs": [top],
            "text_offset": [self._lengths[number]],
        }

    def _whole_choices(self) -> list[dict[str, Any]]:
        choices = []
        for number, parts in enumerate(self._texts):
            joined: dict[str, list[Any]] | None = None
            if self._wants_logprobs:
                joined = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
                for one in self._logprobs[number]:
                    for name, values in joined.items():
                        values += one[name]
            reason = self._reasons[number]
            choices.append({"index": number, "text": "".join(parts), "logprobs": joined, "finish_reason": reason})
        return choices
