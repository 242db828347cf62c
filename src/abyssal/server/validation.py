"""Turns pydantic's validation errors into one sentence about one field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from abyssal.errors import nearest
from abyssal.server.faults import ApiError
from abyssal.server.protocol import ChatCompletionRequest, CompletionRequest

#: Where no other value is possible, pydantic can only say that the value should be none.
SENTENCES = {
    "missing": "is needed",
    "none_required": "is not supported here; leave it out",
    "model_attributes_type": "the body must be a JSON object, sent as application/json",
}


def fault_of_fields(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the fault for the first error; for a field of several types, what is wrong with the type that matches."""
    first = _path(errors[0]["loc"])
    matching = (e for e in errors if _path(e["loc"]).startswith(first) and not e["type"].endswith("_type"))
    error = next(matching, errors[0])
    kind = error["type"]
    path = "" if kind == "json_invalid" else _path(error["loc"])  # which would be a position in the text
    if kind == "extra_forbidden":
        known = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
        sentence = f"unknown field{nearest(path, known)}"
    elif kind == "value_error":  # a rule of ours, which names its field
        message = str(error["ctx"]["error"])
        return ApiError(400, message, param=message.partition(":")[0])
    elif kind == "json_invalid":
        sentence = f"the body is not valid JSON{_reason(error)}"
    else:
        sentence = SENTENCES.get(kind) or _lower(error["msg"])
    return ApiError(400, f"{path}: {sentence}" if path else sentence, param=path or None)


def _reason(error: Mapping[str, Any]) -> str:
    """Return what the JSON parser says of a body, and where it stopped, if it could tell."""
    reason, place = error.get("ctx", {}).get("error"), error["loc"][-1]
    return f" ({_lower(reason)}, at character {place})" if reason and isinstance(place, int) else ""


def _path(places: Sequence[str | int]) -> str:
    """Return a path such as `messages[0].content`, without the names of the types that were tried."""
    path = ""
    for before, place in pairwise(places):  # the first is `body`
        if place == before:  # the field of a kind has the kind's name
            continue
        if isinstance(place, int):
            path += f"[{place}]"
        elif place.isidentifier() and not place[0].isupper() and place not in ("str", "int", "list", "dict"):
            path += f".{place}" if path else place
    return path


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
