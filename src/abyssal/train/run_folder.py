"""The folder of one run: resolved recipe, data, metrics, training states, model directory, report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from abyssal.config import RunConfig, load_recipe
from abyssal.errors import CheckpointError, UsageError
from abyssal.files.atomic import write_text
from abyssal.files.faults import os_faults
from abyssal.train.json_lines import append_line, cut_lines, thin_lines

#: Of how many newest steps `expert_load.jsonl` keeps every load, and of how many earlier ones at most.
NEWEST_LOADS, EARLIER_LOADS = 128, 512


@dataclass(frozen=True)
class RunFolder:
    """Where each thing of a run stands."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, with what this machine decided filled in."""
        return self.path / "recipe.toml"

    @property
    def launch(self) -> Path:
        """Which launch of several ranks began the run, or was the last to go on with it."""
        return self.path / "launch.json"

    def data(self, config: RunConfig) -> Path:
        """Tokenizer and shards: in the run's folder, unless the recipe names another."""
        return self.path / "data" if config.data.folder is None else Path(config.data.folder)

    @property
    def metrics(self) -> Path:
        """One JSON object a line: a step without its expert load, or a validation."""
        return self.path / "metrics.jsonl"

    @property
    def loads(self) -> Path:
        """The expert loads of the newest steps and of every n-th before, one JSON object a line."""
        return self.path / "expert_load.jsonl"

    @property
    def states(self) -> Path:
        """Training states."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The model directory that the run ends with."""
        return self.path / "model"

    @property
    def samples(self) -> Path:
        """What the model made of some beginnings: one JSON object a line, with prompt, completion and step."""
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def average_model(self) -> Path:
        """The same of the averaged weights, where the run keeps them."""
        return self.path / "model-ema"

    def export(self, step: int) -> Path:
        """The model directory that is exported after `step`."""
        return self.path / "exports" / f"step-{step:08d}"

    def refuse_another(self) -> None:
        """Raise where a run stands already.

        Raises:
            UsageError: it does.
        """
        if self.recipe.exists():
            raise UsageError(f"{self.path}: a run is here already; --resume continues it, or choose another --out")

    def begin(self, config: RunConfig) -> None:
        """Store the resolved recipe of a new run.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        with os_faults(CheckpointError, self.path, "start a run here"):
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe, tomli_w.dumps(config.model_dump(exclude_none=True)))

    def mark_launch(self, launch_id: str, config: RunConfig) -> None:
        """Store which launch makes the run, and of which recipe, before the machine resolved any of it.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        if launch_id:
            with os_faults(CheckpointError, self.path, "start a run here"):
                self.path.mkdir(parents=True, exist_ok=True)
                write_text(self.launch, json.dumps({"launch": launch_id, "recipe": config.model_dump(mode="json")}))

    def is_of_launch(self, launch_id: str, config: RunConfig) -> bool:
        """Whether this launch has made the run here before, of this recipe: then its processes were started again."""
        if not launch_id or not self.recipe.is_file() or not self.launch.is_file():
            return False
        try:
            mark = json.loads(self.launch.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return False
        return bool(mark == {"launch": launch_id, "recipe": config.model_dump(mode="json")})

    def resolved_config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """Return the recipe that the run was started with, changed by `overrides`.

        Raises:
            UsageError: no run here.
            ConfigError: the stored recipe was changed and does not hold any more.
        """
        if not self.recipe.is_file():
            raise UsageError(f"{self.path}: no run to resume here (it has no recipe.toml)")
        return load_recipe(str(self.recipe), overrides)

    def cut_records(self, step: int) -> None:
        """Drop what metrics and loads say of steps after `step`, which a run that goes on makes again.

        Raises:
            CheckpointError: the disk refused.
        """
        for path in (self.metrics, self.loads):
            with os_faults(CheckpointError, path, "write metrics"):
                cut_lines(path, step)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to the metrics.

        Raises:
            CheckpointError: the disk refused; earlier lines stay.
        """
        with os_faults(CheckpointError, self.metrics, "write metrics"):
            append_line(self.metrics, record)

    def append_load(self, step: int, tokens: int, load: dict[int, list[int]]) -> None:
        """Add the expert load of a step, and thin those of earlier steps where they have become many.

        Raises:
            CheckpointError: the disk refused; earlier lines stay.
        """
        with os_faults(CheckpointError, self.loads, "write metrics"):
            append_line(self.loads, {"step": step, "tokens": tokens, "expert_load": load})
            if step % NEWEST_LOADS == 0:
                thin_lines(self.loads, lambda earlier: keeps_load(earlier, step))

    def write_samples(self, samples: Iterable[dict[str, Any]]) -> None:
        """Store what the model made of some beginnings, in place of earlier ones.

        Raises:
            CheckpointError: the disk refused; earlier ones stay.
        """
        with os_faults(CheckpointError, self.samples, "write samples"):
            write_text(self.samples, "".join(f"{json.dumps(sample)}\n" for sample in samples))

    def write_report(self) -> None:
        """Write the page about the run as far as it has come.

        Raises:
            CheckpointError: the disk refused; an earlier page stays.
        """
        from abyssal.report.page import render_page  # brings matplotlib, which nothing before the end of a run needs
        from abyssal.report.run_record import read_runs

        page = render_page(read_runs([self.path]))
        with os_faults(CheckpointError, self.report, "write the report"):
            write_text(self.report, page)


def keeps_load(step: int, newest: int) -> bool:
    """Whether the load of a step is kept once `newest` is made: always if it is among the newest, else every n-th.

    n is the smallest power of two that leaves at most `EARLIER_LOADS`, so it doubles as the run goes on, and a run that
    was interrupted keeps the same steps.
    """
    spacing = 1
    while newest // spacing > EARLIER_LOADS:
        spacing *= 2
    return step > newest - NEWEST_LOADS or step % spacing == 0
