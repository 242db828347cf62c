"""Where a benchmark's figures go: one JSON file a run, with device, commit and date."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from abyssal.machine.describe import describe_machine

RESULTS = Path(__file__).parent / "results"


def record(name: str, command: str, figures: Any) -> Path:
    """Write `bench/results/NAME-DATE.json` and return its path."""
    root = Path(__file__).parents[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True).stdout
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True).stdout
    machine = describe_machine()
    path = RESULTS / f"{name}-{datetime.date.today():%Y%m%d}.json"
    path.write_text(
        json.dumps(
            {
                "name": name,
                "command": command,
                "date": f"{datetime.date.today()}",
                "commit": commit.strip() + (" with uncommitted changes" if changed.strip() else ""),
                "device": ", ".join((machine.cpu, *machine.gpus)),
                "cores": machine.cores,
                "flags": machine.flags,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "figures": figures,
            },
            indent=1,
        )
        + "\n"
    )
    return path
