"""The base of all configuration classes, and how their faults become one sentence each."""

from __future__ import annotations

import json
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from abyssal.errors import ConfigError, nearest


class Frozen(BaseModel):
    """An immutable pydantic model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def parse(cls, values: dict[str, Any], source: str) -> Self:
        """Validate `values`; `source` (a path or recipe name) opens the error sentence.

        Raises:
            ConfigError: with every fault, one a line, each naming field, value and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [describe(cls, fault) for fault in error.errors()]
            raise ConfigError(f"{source}: " + "\n".join(lines)) from None


def describe(cls: type[BaseModel], fault: Any) -> str:
    """Turn one of pydantic's error records into a sentence: field, value, what is allowed."""
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{path}: unknown field{nearest(str(fault['loc'][-1]), fields_at(cls, fault['loc'][:-1]))}"
    if fault["type"] == "missing":
        return f"{path}: required, but not given"
    reason = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":  # our own checks name field and value themselves
        return f"{path}.{reason}" if path else reason
    if fault["type"] in ("tuple_type", "list_type"):
        reason = f"must be a list, such as [{json.dumps(fault['input'], default=str)}]"
    return f"{path}={fault['input']!r}: {reason[0].lower()}{reason[1:]}"


def fields_at(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the model class found by walking `path` down from `cls`."""
    current: type[BaseModel] = cls
    for part in path:
        field = current.model_fields.get(str(part))
        if field is None:
            continue  # a list index or a union tag: stay with the class reached so far
        for candidate in (field.annotation, *_nested(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                current = candidate
                break
    return list(current.model_fields)


def _nested(annotation: Any) -> list[Any]:
    """Return every type inside a generic annotation, depth first."""
    types: list[Any] = []
    for argument in get_args(annotation):
        types += [argument, *_nested(argument)]
    return types
