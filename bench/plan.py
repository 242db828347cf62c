"""The plan against this machine: seconds and memory of a training step of Abyssal, measured and predicted.

    python bench/plan.py

Measures the machine as `abyssal machine` does, then a step of shape S (AdamW) and a step of the demo's recipe (Muon and
AdamW), each in a process of its own. Predictions take the machine's measured limits; of the constants only
`cpu_passes` was fitted here, to shape S, so the demo is held out. Memory by kind counts the bytes of the weights,
gradients and optimizer tensors, and of what autograd keeps of a micro-batch. One process: more ranks do not exist yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tomllib
from typing import Any

import torch

from abyssal.config import RunConfig, ValueSchedule, load_recipe
from abyssal.machine.describe import available_cores
from abyssal.machine.limits import measure_limits
from abyssal.plan.calibration import Calibration
from abyssal.plan.hardware import Chip, Cluster
from abyssal.plan.layout import Layout
from abyssal.plan.training_plan import StepPlan, plan_step
from abyssal.train.build import build_run
from abyssal.train.executor import forward
from abyssal.train.objective import MicroBatch, NextTokenObjective
from abyssal.train.resolve import set_threads
from abyssal.train.step import train_step
from record import record
from shapes import SHAPES

WARM_UP_STEPS, TIMED_STEPS = 2, 4


def runs() -> dict[str, RunConfig]:
    """The measured runs by name."""
    demo = load_recipe("demo", ["train.compute_dtype=bfloat16"])
    values = demo.model_dump()
    shape_s = values | {
        "model": SHAPES["S"]().model_dump(),
        "optimizer": values["optimizer"] | {"name": "adamw"},
        "train": values["train"] | {"sequence_length": 512, "micro_batch_size": 8},
        "schedule": values["schedule"] | {"batch_size": ValueSchedule(start=8).model_dump()},
    }
    return {
        "S": RunConfig.parse(shape_s, "bench"),
        "demo, AdamW": RunConfig.parse(values | {"optimizer": values["optimizer"] | {"name": "adamw"}}, "bench"),
        "demo": demo,
    }


def measure_run(run: RunConfig) -> dict[str, Any]:
    """Seconds of a step, and bytes by kind, in this process."""
    set_threads(available_cores())
    built = build_run(run, torch.device("cpu"))
    model, optimizer = built.model, built.optimizer
    size = (run.batch_size_at(0), run.train.sequence_length + 1)
    windows = torch.randint(run.model.vocab_size, size, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(WARM_UP_STEPS + TIMED_STEPS):
        begin = time.perf_counter()
        train_step(model, optimizer, windows, run, 0)
        times.append(time.perf_counter() - begin)
    parameters = list(model.parameters())
    moments = [value for p in parameters for name, value in _state(optimizer, p).items() if name != "step"]
    return {
        "seconds": min(times[WARM_UP_STEPS:]),
        "memory": {
            "parameters": _bytes(parameters),
            "gradients": _bytes([p.grad for p in parameters if p.grad is not None]),
            "optimizer": _bytes(moments),
            "activations and casts": _kept(model, windows, run, parameters),
        },
    }


def _state(optimizer: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = [optimizer.adamw, *([optimizer.muon] if optimizer.muon else [])]
    return next((part.state[parameter] for part in parts if parameter in part.state), {})


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _kept(model: Any, windows: torch.Tensor, run: RunConfig, parameters: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps of one micro-batch, each storage once, the parameters themselves left out."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    micro_batch = windows[: run.train.micro_batch_size]
    tokens = micro_batch[:, 1:].numel()
    objective = NextTokenObjective(tokens=tokens, sequences=len(micro_batch), mtp=0.3, balance=1e-4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, objective, MicroBatch(micro_batch))
    total = sum(size for size, _ in kept.values())
    del loss
    return total


def predict(run: RunConfig, cluster: Cluster) -> StepPlan:
    """Plan a step of Abyssal's trainer, as `abyssal plan` does on a machine without an accelerator."""
    layout = Layout(precision="bf16", recompute="none", state="trainer", micro_batch_size=run.train.micro_batch_size)
    return plan_step(run, cluster, layout, Calibration(), run.batch_size_at(0))


def main() -> None:
    """Measure, predict, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidate", choices=list(runs()), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.candidate:
        print(json.dumps(measure_run(runs()[arguments.candidate])))
        return
    set_threads(available_cores())
    limits = measure_limits().toml("machine")
    cluster = Cluster("machine", Chip.parse(tomllib.loads(limits)["machine"], "bench"), 1)
    figures: dict[str, Any] = {"machine": tomllib.loads(limits)["machine"]}
    for name, run in runs().items():
        worker = subprocess.run(
            [sys.executable, *sys.argv, "--candidate", name], capture_output=True, text=True, check=True
        )
        measured, step = json.loads(worker.stdout), predict(run, cluster)
        memory = step.memory[0]
        predicted = {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations and casts": memory.activations + memory.buffers,
        }
        figures[name] = {
            "seconds": [round(measured["seconds"], 3), round(step.seconds, 3)],
            "tokens_per_s": [round(step.tokens / measured["seconds"]), round(step.tokens / step.seconds)],
            "memory_mb": {
                kind: [round(size / 1e6, 1), round(predicted[kind] / 1e6, 1)]
                for kind, size in measured["memory"].items()
            },
        }
        print(name, json.dumps(figures[name]), flush=True)
    path = record("plan", " ".join(["python", "bench/plan.py", *sys.argv[1:]]), {"measured, predicted": figures})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
