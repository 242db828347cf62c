"""JSON as the server writes it."""

from __future__ import annotations

import json


def to_json(value: object) -> bytes:
    """Return `value` as JSON, in ASCII: so a lone surrogate that a client has sent can be sent back to it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
