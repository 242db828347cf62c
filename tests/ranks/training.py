"""Runs of `abyssal train` with a small demo on many ranks, and what they did."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from abyssal.ranks.ranks import Ranks
from ranks import run_ranks

#: The demo with small dims that all differ, two micro-batches for one process, and batches that 8 ranks can share.
SMALL = {
    "data.split_modulus": 4,
    "tokenizer.train_bytes": 100_000,
    "model.vocab_size": 320,
    "model.hidden_size": 48,
    "model.intermediate_size": 80,
    "model.moe_intermediate_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.q_lora_rank": 28,
    "model.kv_lora_rank": 20,
    "model.qk_nope_head_dim": 12,
    "model.qk_rope_head_dim": 8,
    "model.v_head_dim": 16,
    "train.sequence_length": 24,
    "train.micro_batch_size": 2,
    "train.tokens": 20 * 16 * 24,
    "train.threads": 1,
    "evaluation.every_steps": 20,
    "checkpoint.every_steps": 1000,
    "optimizer.name": "adamw",
}


#: For each compute dtype how far a layout may be from one process: each parameter's gradient, by norm, and losses.
LIMITS = {"float64": (1e-9, 1e-8), "float32": (1e-5, 1e-4)}
LOSSES = ("loss", "validation_loss", "balance_loss", "gradient_norm")


@dataclass(frozen=True)
class Error:
    """The worst of many differences, and where it is."""

    size: float
    where: str

    @classmethod
    def worst(cls, sizes: Iterable[tuple[float, str]]) -> Error:
        """Return the largest, for which what is no number counts."""
        return max((cls(size if size == size else math.inf, where) for size, where in sizes), key=lambda e: e.size)


@dataclass(frozen=True)
class Run:
    """What a run did."""

    metrics: list[dict[str, Any]]
    gradients: dict[str, Tensor]  # of the first step, whole

    def of(self, field: str) -> list[Any]:
        """Return what every step, or validation, recorded under a name."""
        return [line[field] for line in self.metrics if field in line]

    def after(self, step: int) -> Run:
        """Return what it did after a step."""
        return Run([line for line in self.metrics if line["step"] > step], self.gradients)

    def gradient_error(self, other: Run) -> Error:
        """Return the worst difference of a parameter's gradient from that of another run, over its norm there."""
        assert self.gradients.keys() == other.gradients.keys()
        assert any("mlp.experts" in name for name in self.gradients), "no experts"
        return Error.worst(
            (float((self.gradients[name] - theirs).norm() / theirs.norm()), name)
            for name, theirs in other.gradients.items()
        )

    def loss_error(self, other: Run) -> Error:
        """Return the worst difference of a loss or norm from that of another run, over it where it is above 1."""
        mtp = self.of("mtp_losses"), other.of("mtp_losses")
        assert all(losses and all(losses) for losses in mtp[0]), "MTP off"
        pairs = [(field, zip(self.of(field), other.of(field), strict=True)) for field in LOSSES]
        pairs.append(("mtp_losses", zip(*(map(sum, losses) for losses in mtp), strict=True)))
        return Error.worst(
            (abs(ours - theirs) / max(1.0, abs(theirs)), f"{field}, number {number}")
            for field, values in pairs
            for number, (ours, theirs) in enumerate(values, 1)
        )


def train_runs(world_size: int, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Run]:
    """Train each case (recipe fields beside `SMALL`) on as many gloo ranks, in `folder/<name>`.

    Each is a command line of its own, in the same processes.
    """
    write_corpus(folder)
    arguments = {
        name: ["train", "demo", "--out", str(folder / name), *options(folder, fields)] for name, fields in cases.items()
    }
    run_ranks(world_size, _train, arguments)
    return {name: Run(read_metrics(folder / name), torch.load(folder / name / "gradients.pt")) for name in cases}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's folder, those of steps with the expert loads that stand apart."""
    records, loads = (
        [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
        for name in ("metrics.jsonl", "expert_load.jsonl")
    )
    load_of_step = {record["step"]: {"expert_load": record["expert_load"]} for record in loads}
    return [record | load_of_step[record["step"]] if "loss" in record else record for record in records]


def options(folder: Path, fields: dict[str, Any]) -> list[str]:
    """Return the --set options of a case."""
    return changes({"data.corpus": [str(folder / "corpus")], "data.folder": str(folder / "data"), **SMALL, **fields})


def changes(fields: dict[str, Any]) -> list[str]:
    """Return recipe fields as --set options."""
    return [part for name, value in fields.items() for part in ("--set", f"{name}={json.dumps(value)}")]


def write_corpus(folder: Path) -> None:
    """Write documents that tests of `folder` train on, some of them for validation, unless they are there."""
    corpus = folder / "corpus"
    if not corpus.exists():
        corpus.mkdir(parents=True)
        for number in range(40):
            words = (f"def f{number * k}(x):\n    return x + {k * k}\n" for k in range(1, 40))
            (corpus / f"{number}.py").write_text("".join(words), encoding="utf-8")


def _train(arguments: dict[str, list[str]]) -> None:
    from abyssal.cli.main import main
    from abyssal.train import step

    leave_out_what_no_test_needs()
    clip, found = step.clip_gradients, list[dict[str, Tensor]]()

    def recorded(model: nn.Module, max_norm: float, ranks: Ranks) -> Tensor:
        if not found:
            found.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        return clip(model, max_norm, ranks)

    step.clip_gradients = recorded  # type: ignore[assignment]
    for line in arguments.values():
        found.clear()
        forget_meshes()
        assert main(line) == 0, line
        if os.environ["RANK"] == "0":
            torch.save(found[0], Path(line[line.index("--out") + 1]) / "gradients.pt")


def leave_out_what_no_test_needs() -> None:
    """Leave out of the runs of this process the report, which is tested alone, the peak for MFU, and what is shown."""
    from abyssal.train import loop
    from abyssal.train.run_folder import RunFolder

    sys.stdout = io.StringIO()
    RunFolder.write_report = lambda self: None  # type: ignore[method-assign]
    loop.peak_flops = lambda config, device: 1e12  # type: ignore[assignment]


def forget_meshes() -> None:
    """Empty DTensor's caches, in which equal meshes of an earlier run of this process stand, with groups now gone."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of all of a tensor that ranks hold parts of; called by all of them."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.clone()  # where one rank holds all of a DTensor, the full tensor is its memory
