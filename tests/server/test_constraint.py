"""Constraints over the tokens of a tokenizer, a token at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from abyssal.engine import LoadedModel, TokenConstraint
from abyssal.errors import UsageError
from abyssal.server.constraint import GrammarCompiler
from abyssal.server.output_parser import END_THINK, SEPARATOR, OutputParser
from abyssal.server.protocol import FunctionDefinition
from abyssal.text.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"é": {"enum": [1, 22]}}, "required": ["é"], "additionalProperties": False}
FUNCTIONS = [FunctionDefinition(name="one", parameters=SCHEMA), FunctionDefinition(name="two")]
RELEASED = Path(__file__).parents[2] / "../shared/data/deepseek_v3_tokenizer"


@pytest.fixture(scope="module")
def grammars(loaded: LoadedModel) -> GrammarCompiler:
    return GrammarCompiler(loaded.tokenizer, loaded.config.vocab_size, loaded.eos_ids)


def accepts(make: Callable[[], TokenConstraint], tokenizer: Tokenizer, text: str) -> bool:
    """Whether a constraint lets the model say this text and then end."""
    constraint = make()
    for token in [*tokenizer.encode(text), tokenizer.eos_id]:
        allowed = constraint.allowed()
        assert allowed is not None
        if not allowed[token]:
            return False
        constraint.advance(token)
    return True


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ('{"é":22}', True),
        ('{ "é" :\n\t1 }', True),
        ('{"é":3}', False),
        ("{}", False),
        ('{"é":1} and more', False),
        ("x", False),
        ('{"é":' + " " * 25 + "1}", False),  # no model fills its context with white space
    ],
)
def test_json_of_a_schema(grammars: GrammarCompiler, loaded: LoadedModel, text: str, is_allowed: bool) -> None:
    assert accepts(grammars.for_json(SCHEMA, after_reasoning=False), loaded.tokenizer, text) == is_allowed
    thought = f"why {'{'} not? <thin </think>\n{text}"
    assert accepts(grammars.for_json(SCHEMA, after_reasoning=True), loaded.tokenizer, thought) == is_allowed


def call(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


CALLS = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"


@pytest.mark.parametrize(
    ("text", "several", "is_allowed"),
    [
        (CALLS.format(call("one", '{"é":1}')), False, True),
        (CALLS.format(call("two", '{"any": [1]}')), False, True),
        (CALLS.format(call("one", '{"é":2}')), False, False),
        (CALLS.format(call("three", "{}")), False, False),
        (CALLS.format(call("two", "{}") + "\n" + call("two", "{}")), False, False),
        (CALLS.format(call("two", "{}") + "\n" + call("one", '{"é":1}')), True, True),
        ("no call", True, False),
    ],
)
def test_calls_of_given_functions(
    grammars: GrammarCompiler, loaded: LoadedModel, text: str, several: bool, is_allowed: bool
) -> None:
    make = grammars.for_tool_calls(FUNCTIONS, several=several, after_reasoning=False)
    assert accepts(make, loaded.tokenizer, text) == is_allowed


def test_texts_of_a_request_do_not_share_their_state(grammars: GrammarCompiler, loaded: LoadedModel) -> None:
    make = grammars.for_json(SCHEMA, after_reasoning=False)
    assert accepts(make, loaded.tokenizer, '{"é":1}')
    assert accepts(make, loaded.tokenizer, '{"é":1}')


@pytest.mark.parametrize("seed", range(4))
def test_random_tokens_under_a_grammar_are_json_of_the_schema(
    grammars: GrammarCompiler, loaded: LoadedModel, seed: int
) -> None:
    source = random.Random(seed)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "array", "items": {"enum": ["x", "ü"]}, "maxItems": 3}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    constraint = grammars.for_json(schema, after_reasoning=False)()
    ids: list[int] = []
    while not ids or ids[-1] not in loaded.eos_ids:
        allowed = constraint.allowed()
        assert allowed is not None
        assert allowed.shape == (loaded.config.vocab_size,)
        ids.append(source.choice(allowed.nonzero()[:, 0].tolist()))
        constraint.advance(ids[-1])
    value = json.loads(loaded.tokenizer.decode(ids))
    assert set(value) == {"a", "b"}
    assert isinstance(value["a"], bool)
    assert set(value["b"]) <= {"x", "ü"}


@pytest.mark.parametrize("schema", [{"type": "objct"}, {"$ref": "#/gone"}, {"type": "string", "pattern": "("}])
def test_a_schema_that_cannot_be_followed_is_refused(grammars: GrammarCompiler, schema: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="response_format: cannot be followed"):
        grammars.for_json(schema, after_reasoning=False)
    with pytest.raises(UsageError, match="tools: cannot be followed"):
        grammars.for_tool_calls([FunctionDefinition(name="f", parameters=schema)], several=False, after_reasoning=False)


def test_marks_that_are_tokens_are_taken_as_such(loaded: LoadedModel) -> None:
    core = tokenizers.Tokenizer.from_str(loaded.tokenizer.to_json())
    core.add_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in (END_THINK, SEPARATOR)])
    tokenizer = Tokenizer(core)
    grammars = GrammarCompiler(tokenizer, 400, frozenset({tokenizer.eos_id}))
    assert len(tokenizer.encode(END_THINK)) == 1
    make = grammars.for_json(SCHEMA, after_reasoning=True)
    for thought in ("", "why not {"):
        assert accepts(make, tokenizer, f'{thought}{END_THINK}\n{{"é":1}}')
        assert not accepts(make, tokenizer, f'{thought}{END_THINK}{{"é":3}}')
    make = grammars.for_tool_calls(FUNCTIONS, several=False, after_reasoning=True)
    assert accepts(make, tokenizer, END_THINK + CALLS.format(call("one", '{"é":1}')))
    assert not accepts(make, tokenizer, CALLS.format(call("one", '{"é":1}')))


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released tokenizer is not there")
def test_the_released_tokenizers_own_tokens_make_a_call() -> None:
    tokenizer = Tokenizer.load(RELEASED)
    text = CALLS.format(call("one", '{"é": 22}'))
    ids = tokenizer.encode(text)
    assert ids[:2] == [tokenizer.encode(mark)[0] for mark in ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")]
    grammars = GrammarCompiler(tokenizer, 129_280, frozenset({1}))
    assert accepts(grammars.for_tool_calls(FUNCTIONS, several=False, after_reasoning=False), tokenizer, text)
    stream, parser = tokenizer.stream(), OutputParser(with_tools=True)
    segments = [segment for token in ids for segment in parser.push(stream.push(token))] + parser.flush()
    assert [segment.text for segment in segments if segment.kind == "call"] == ["one"]
    assert "".join(segment.text for segment in segments if segment.kind == "arguments") == '{"é": 22}'
    assert "".join(segment.raw for segment in segments) == text
