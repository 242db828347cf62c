"""DeepSeek's forms are found wherever the text is cut, and no character of it is ever lost."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.server.output_parser import (
    CALL,
    CALLS,
    END_CALL,
    END_CALLS,
    END_FENCE,
    END_THINK,
    FENCE,
    SEPARATOR,
    THINK,
    OutputParser,
    OutputSegment,
)

MARKS = (CALLS, END_CALLS, CALL, END_CALL, SEPARATOR, THINK, END_THINK, FENCE, END_FENCE, "function", "get_weather")
V3_CALL = f'{CALL}function{SEPARATOR}get_weather{FENCE}{{"city": "Paris"}}{END_FENCE}{END_CALL}'
V31_CALL = f'{CALL}get_weather{SEPARATOR}{{"city": "Paris"}}{END_CALL}'


def parse(text: str, cuts: list[int], **options: bool) -> list[OutputSegment]:
    """Return the segments of a text that comes in parts."""
    parser = OutputParser(**options)
    borders = sorted({0, *(cut % (len(text) + 1) for cut in cuts), len(text)})
    segments = [segment for a, b in itertools.pairwise(borders) for segment in parser.push(text[a:b])]
    return segments + parser.flush()


def joined(segments: list[OutputSegment]) -> list[tuple[str, str]]:
    """Return kinds and texts, neighbours of a kind as one, but each call for itself."""
    found: list[tuple[str, str]] = []
    for segment in segments:
        if segment.kind == "mark":
            continue
        if found and found[-1][0] == segment.kind != "call":
            found[-1] = (segment.kind, found[-1][1] + segment.text)
        else:
            found.append((segment.kind, segment.text))
    return found


parts = st.one_of(
    st.sampled_from(MARKS),
    st.sampled_from(MARKS).flatmap(lambda mark: st.integers(1, len(mark)).map(lambda n: mark[:n])),
    st.sampled_from((V3_CALL, V31_CALL, CALLS + V3_CALL, CALLS + V31_CALL, f"{CALLS}{V3_CALL}\n{V31_CALL}{END_CALLS}")),
    st.text('ab{}"` \n<｜é😀', max_size=6),
)
texts = st.lists(parts, max_size=9).map("".join)


@settings(max_examples=400, deadline=None)
@given(texts, st.lists(st.integers(0, 10_000), max_size=30), st.booleans(), st.booleans())
def test_raw_texts_together_are_the_text_however_it_is_cut(
    text: str, cuts: list[int], in_reasoning: bool, with_tools: bool
) -> None:
    segments = parse(text, cuts, in_reasoning=in_reasoning, with_tools=with_tools)
    assert "".join(segment.raw for segment in segments) == text
    assert all(segment.raw for segment in segments)
    for segment in segments:
        assert segment.text in (segment.raw, "") or segment.kind == "call"
    whole = parse(text, [], in_reasoning=in_reasoning, with_tools=with_tools)
    assert joined(segments) == joined(whole)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10_000), max_size=30), st.sampled_from((V3_CALL, V31_CALL)), st.integers(1, 3))
def test_calls_of_both_forms_are_found(cuts: list[int], call: str, count: int) -> None:
    text = f"{THINK}hm{END_THINK}\nLet me see.{CALLS}" + "\n".join([call] * count) + END_CALLS
    found = joined(parse(text, cuts, with_tools=True))
    assert found[:2] == [("reasoning", "hm"), ("content", "\nLet me see.")]
    assert found[2::2] == [("call", "get_weather")] * count
    assert [json.loads(arguments) for kind, arguments in found[3::2]] == [{"city": "Paris"}] * count


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain", [("content", "plain")]),
        (f"a {THINK}b{END_THINK}", [("content", f"a {THINK}b{END_THINK}")]),  # it is spoken about, not opened
        (f"{THINK}never closed", [("reasoning", "never closed")]),
        ("<thin", [("content", "<thin")]),
        (f"{CALLS}no call", [("content", f"{CALLS}no call")]),
        (f"{CALLS}{CALL}function{SEPARATOR}", [("content", f"{CALLS}{CALL}function{SEPARATOR}")]),
        (f"{CALLS}{CALL}two words{SEPARATOR}{{}}", [("content", f"{CALLS}{CALL}two words{SEPARATOR}{{}}")]),
        (f"{CALLS}{CALL}{'n' * 65}{SEPARATOR}", [("content", f"{CALLS}{CALL}{'n' * 65}{SEPARATOR}")]),
        (f"{CALLS}{CALL}function{SEPARATOR}{{}}{END_CALL}", [("call", "function"), ("arguments", "{}")]),
        (
            f"{CALLS}{V31_CALL}and text",
            [("call", "get_weather"), ("arguments", '{"city": "Paris"}'), ("content", "and text")],
        ),
        (f"{CALLS}{V3_CALL[: -len(END_CALL)]}", [("call", "get_weather"), ("arguments", '{"city": "Paris"}')]),
        (f"{CALLS}{CALL}f{SEPARATOR}{{cut", [("call", "f"), ("arguments", "{cut")]),
    ],
)
def test_what_is_incomplete_or_malformed_stays_in_sight(text: str, found: list[tuple[str, str]]) -> None:
    assert joined(parse(text, list(range(len(text))), with_tools=True)) == found
    assert joined(parse(text, [], with_tools=True)) == found


def test_without_tools_a_call_is_content() -> None:
    assert joined(parse(f"{CALLS}{V3_CALL}{END_CALLS}", [3])) == [("content", f"{CALLS}{V3_CALL}{END_CALLS}")]


def test_text_is_given_out_as_soon_as_it_cannot_be_a_mark() -> None:
    parser = OutputParser(with_tools=True)
    assert [segment.text for segment in parser.push("hello <｜to")] == ["hello "]
    assert [segment.text for segment in parser.push("p")] == ["<｜top"]
