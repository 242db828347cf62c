"""What a resumed run may be given anew, and how the rest is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from abyssal.config.run import RunConfig
from abyssal.errors import UsageError

#: Sections and fields that may change between a run and its resumption.
FREE = ("checkpoint", "description", "evaluation", "guard", "parallel", "train.log_every_steps", "train.threads")
ROUNDING = ("parallel.", "train.threads")  # change the order of sums


def resumed_changes(before: RunConfig, now: RunConfig, source: str) -> list[str]:
    """Return a sentence for each field that is not as it was, all of them among `FREE`.

    Args:
        before: what the run was made with.
        now: what it is to go on with.
        source: what the change comes from; opens the error sentence.

    Raises:
        UsageError: another field has changed.
    """
    old, new = dict(_fields(before.model_dump())), dict(_fields(now.model_dump()))
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    refused = [name for name in changed if not any(f"{name}.".startswith(f"{free}.") for free in FREE)]
    if refused:
        shown = ", ".join(f"{name}={new.get(name)!r} (was {old.get(name)!r})" for name in refused)
        raise UsageError(
            f"{source}: a resumed run keeps the recipe it was started with: {shown}; only {', '.join(FREE)} may change"
        )
    return [
        f"{name}: {new.get(name)!r} from here on, was {old.get(name)!r}"
        + ("; losses may differ in their last digits from now on" if name.startswith(ROUNDING) else "")
        for name in changed
    ]


def _fields(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested dicts."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
