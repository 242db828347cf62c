"""Quality filters: rules that drop documents of which a model learns nothing."""

from __future__ import annotations

from typing import Literal

from abyssal.config.run import DataConfig

QualityRule = Literal["short", "long_line", "repetitive"]


def broken_rule(text: str, config: DataConfig) -> QualityRule | None:
    """Return the first rule of the recipe that a training document breaks, or None."""
    if len(text) < config.min_characters:
        return "short"
    lines = [line for line in text.split("\n") if line.strip()]
    if config.max_line_characters is not None and any(len(line) > config.max_line_characters for line in lines):
        return "long_line"
    if len(lines) - len(set(lines)) > config.max_repeated_lines * len(lines):
        return "repetitive"
    return None
