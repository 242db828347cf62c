"""Structured output: llguidance's grammars as constraints on the tokens that the engine samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from abyssal.engine import TokenConstraint
from abyssal.errors import UsageError
from abyssal.server.output_parser import (
    CALL,
    CALLS,
    END_CALL,
    END_CALLS,
    END_FENCE,
    END_THINK,
    FENCE,
    FUNCTION,
    SEPARATOR,
)
from abyssal.server.protocol import FunctionDefinition
from abyssal.text.tokenizer import Tokenizer

#: White space between the tokens of JSON is free, but bounded: a model could go on with it for ever.
JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{0,24}"}


class GrammarConstraint:
    """Allows the tokens that a grammar accepts next, and an end token where the text may end."""

    def __init__(self, matcher: LLMatcher) -> None:
        """Take a matcher that nobody else uses."""
        self._matcher = matcher

    def allowed(self) -> Tensor:
        """Return which tokens may come, [V] bool.

        Raises:
            UsageError: the grammar became too large to follow.
        """
        biases = bytearray(self._matcher.compute_logit_bias())
        self._check()
        mask = torch.frombuffer(biases, dtype=torch.uint8) > 0
        if not mask.any():
            raise UsageError("response_format: no token of this model can follow; ask for another form")
        return mask

    def advance(self, token: int) -> None:
        """Take the token that was sampled."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"response_format: cannot be followed any further ({_first_line(self._matcher)})")


class GrammarCompiler:
    """Compiles grammars into constraints for one tokenizer; this can take long, so call it outside the event loop."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> None:
        """Read the vocabulary; `vocab_size` is the model's, [V] of the logits."""
        self._tokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=sorted(end_ids) or None)
        self._encode = tokenizer.encode

    def for_json(self, schema: Mapping[str, Any], *, after_reasoning: bool) -> Callable[[], TokenConstraint]:
        """Return what makes constraints to JSON of a schema, which follows the reasoning where there is any.

        Raises:
            UsageError: the schema cannot be followed.
        """
        return self._compile("response_format", f"start: {_after(after_reasoning)}{_json(schema)}")

    def for_tool_calls(
        self, functions: Sequence[FunctionDefinition], *, several: bool, after_reasoning: bool
    ) -> Callable[[], TokenConstraint]:
        """Return what makes constraints to calls of these functions, at least one.

        Raises:
            UsageError: a schema of parameters cannot be followed.
        """
        calls = 'call ("\\n" call)*' if several else "call"
        choices = " | ".join(
            f"{_literal(f'{function.name}{FENCE}')} {_json(function.parameters or {'type': 'object'})}"
            for function in functions
        )
        lines = (
            f"start: {_after(after_reasoning)}{self._tag(CALLS)} {calls} {self._tag(END_CALLS)}",
            f"call: {self._tag(CALL)} {_literal(FUNCTION)} {self._tag(SEPARATOR)} function {_literal(END_FENCE)} "
            f"{self._tag(END_CALL)}",
            f"function: {choices}",
        )
        return self._compile("tools", "\n".join(lines))

    def _compile(self, field: str, rules: str) -> Callable[[], TokenConstraint]:
        token = self._token(END_THINK)  # any text up to it is reasoning
        reasoning = f'[suffix="{END_THINK}"]: /(?s:.*)/' if token is None else f": /(?s:.*)/ <[{token}]>"
        grammar = LLMatcher.grammar_from_lark(f"{rules}\nreasoning{reasoning}\n")
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"{field}: cannot be followed ({_first_line(matcher)})")
        return lambda: GrammarConstraint(matcher.deep_copy())

    def _tag(self, tag: str) -> str:
        """Return a tag as the tokenizer has it: a special token, which no spelling can stand for, or text."""
        token = self._token(tag)
        return _literal(tag) if token is None else f"<[{token}]>"

    def _token(self, tag: str) -> int | None:
        """Return the special token that is this tag, if there is one."""
        ids = self._encode(tag)
        return ids[0] if len(ids) == 1 and self._tokenizer.is_special_token(ids[0]) else None


def _after(reasoning: bool) -> str:
    return "reasoning /\\s*/ " if reasoning else ""


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _first_line(matcher: LLMatcher) -> str:
    return matcher.get_error().strip().partition("\n")[0][:300]
