from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.engine.stop_strings import StopStringFilter


def run(pieces: list[str], stop: list[str]) -> tuple[str, str | None]:
    stream = StopStringFilter(stop)
    out = "".join([stream.push(piece) for piece in pieces])
    return out + stream.flush(), stream.matched


def by_hand(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The definition, one character after the other: the first stop string to be complete, of several the longest."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_text_that_cannot_begin_a_stop_string_passes_at_once() -> None:
    stream = StopStringFilter(["\n\n", "END"])
    assert [stream.push(piece) for piece in ("a", "b\n", "c E", "NX", "EN")] == ["a", "b", "\nc ", "ENX", ""]
    assert stream.flush() == "EN"
    assert stream.matched is None


def test_a_stop_string_across_pieces_is_cut_off_with_all_that_follows() -> None:
    stream = StopStringFilter(["stop"])
    assert [stream.push(piece) for piece in ("go s", "to", "p it", "more")] == ["go ", "", "", ""]
    assert stream.flush() == ""
    assert stream.matched == "stop"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("xabcd", ["abcd", "bc"], ("xa", "bc")),  # bc is complete first
        ("xabc", ["c", "abc", "bc"], ("x", "abc")),  # all three at once
        ("aab", ["ab"], ("a", "ab")),
        ("ababac", ["abac"], ("ab", "abac")),
        ("stop", ["stop"], ("", "stop")),
        ("sto", ["stop"], ("sto", None)),
        ("text", [], ("text", None)),
    ],
)
def test_the_stop_string_that_is_complete_first_ends_the_text(
    text: str, stop: list[str], expected: tuple[str, str | None]
) -> None:
    assert run([text], stop) == run(list(text), stop) == expected


letters = st.text("ab", max_size=12)


@given(pieces=st.lists(letters, max_size=6), stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_the_text_depends_on_no_cut_and_loses_nothing(pieces: list[str], stop: list[str]) -> None:
    assert run(pieces, stop) == by_hand("".join(pieces), stop)


@given(pieces=st.lists(letters, max_size=6), stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_what_is_held_back_could_begin_a_stop_string(pieces: list[str], stop: list[str]) -> None:
    stream = StopStringFilter(stop)
    out = taken = ""
    for piece in pieces:
        taken += piece
        out += stream.push(piece)
        if stream.matched is None:
            held = taken.removeprefix(out)
            assert out + held == taken
            assert not held or any(s.startswith(held) and s != held for s in stop)
