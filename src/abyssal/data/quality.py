"""Rules that tell documents from which nothing is to be learnt."""

from __future__ import annotations

from typing import Literal

from abyssal.config.run import DataConfig

Fault = Literal["short", "long_line", "repetitive"]


def fault_of(text: str, config: DataConfig) -> Fault | None:
    """Return the first rule of the recipe that a training document breaks, or None."""
    if len(text) < config.min_characters:
        return "short"
    lines = [line for line in text.split("\n") if line.strip()]
    if config.max_line_characters is not None and any(len(line) > config.max_line_characters for line in lines):
        return "long_line"
    if len(lines) - len(set(lines)) > config.max_repeated_lines * len(lines):
        return "repetitive"
    return None
