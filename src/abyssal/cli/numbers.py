"""Large numbers for people."""

from __future__ import annotations

from abyssal.report.numbers import short as short


def byte_size(value: float) -> str:
    """Write a number of bytes in decimal units: 287.8 MB, 11.51 GB."""
    text = short(value).replace("B", "G").replace("K", "k")
    return f"{text} B" if text[-1].isdigit() else f"{text[:-1]} {text[-1]}B"
