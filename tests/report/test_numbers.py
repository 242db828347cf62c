"""Numbers as people read them."""

import pytest

from abyssal.report.numbers import duration, short


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (47.4, "47 s"), (59.7, "1 min"), (485, "8 min 5 s"), (12_000, "3 h 20 min"), (4_672_800, "54 d 2 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(640, "640"), (7766, "7.766K"), (99_999, "100K"), (14.8e12, "14.8T")])
def test_short(value: float, text: str) -> None:
    assert short(value) == text
