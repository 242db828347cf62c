"""Numbers as people write them."""

from __future__ import annotations


def short(value: float) -> str:
    """Write a count with four digits at most and a suffix: 671B, 37.55B, 14.8T, 640."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= 0.99995 * factor:
            return f"{value / factor:.4g}{suffix}"
    return f"{value:.4g}"


def byte_size(value: float) -> str:
    """Write a number of bytes in decimal units: 287.8 MB, 11.51 GB."""
    text = short(value).replace("B", "G").replace("K", "k")
    return f"{text} B" if text[-1].isdigit() else f"{text[:-1]} {text[-1]}B"


def duration(seconds: float) -> str:
    """Write a time with its two largest units: 47 s, 8 min 5 s, 3 h 20 min, 54 d 2 h."""
    total = round(seconds)
    for size, unit, lower_size, lower in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            rest = total % size // lower_size
            return f"{total // size:,} {unit}" + (f" {rest} {lower}" if rest else "")
    return f"{total} s"
