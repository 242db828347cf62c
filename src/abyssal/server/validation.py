"""From pydantic's findings to one sentence about one field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from abyssal.errors import nearest
from abyssal.server.faults import ApiError
from abyssal.server.fields import ChatFields, CompletionFields

#: Where no other value is possible, pydantic can only say that the value should be none.
SENTENCES = {
    "missing": "is needed",
    "none_required": "is not supported here; leave it out",
    "model_attributes_type": "the body must be a JSON object, sent as application/json",
}


def fault_of_fields(findings: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the fault that tells of the first finding; of a field of several types, what the type that fits lacks."""
    first = _path(findings[0]["loc"])
    fitting = (one for one in findings if _path(one["loc"]).startswith(first) and not one["type"].endswith("_type"))
    finding = next(fitting, findings[0])
    kind = finding["type"]
    path = "" if kind == "json_invalid" else _path(finding["loc"])  # which would be a place in the text
    if kind == "extra_forbidden":
        known = {*ChatFields.model_fields, *CompletionFields.model_fields}
        sentence = f"unknown field{nearest(path, known)}"
    elif kind == "value_error":  # a rule of ours, which names its field
        message = str(finding["ctx"]["error"])
        return ApiError(400, message, param=message.partition(":")[0])
    elif kind == "json_invalid":
        sentence = f"the body is not valid JSON{_reason(finding)}"
    else:
        sentence = SENTENCES.get(kind) or _lower(finding["msg"])
    return ApiError(400, f"{path}: {sentence}" if path else sentence, param=path or None)


def _reason(finding: Mapping[str, Any]) -> str:
    """Return what the JSON parser says of a body, and where it stopped, if it could tell."""
    reason, place = finding.get("ctx", {}).get("error"), finding["loc"][-1]
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
