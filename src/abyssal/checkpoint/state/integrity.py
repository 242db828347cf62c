"""The list of checksums in a training state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

PROGRESS, CHECKSUMS, METADATA = "progress.json", "checksums.json", ".metadata"


def render(sums: Mapping[str, str]) -> str:
    """Return the only text of `checksums.json` that stands for `sums`; `self` covers the list itself."""
    own = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    return json.dumps({"algorithm": "sha256", "files": dict(sorted(sums.items())), "self": own}, indent=1) + "\n"


def parse(data: bytes) -> dict[str, str] | None:
    """Return the checksum of each file of a state, none where `data` is not what `render` makes of them."""
    try:
        sums = json.loads(data)["files"]
        return dict(sums) if render(sums).encode() == data and all(Path(name).name == name for name in sums) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
