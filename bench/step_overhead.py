"""What a training step costs on several ranks beyond the computation of one, part by part.

    python bench/step_overhead.py [--ranks 2 4]

The demo with AdamW, a batch of 16 sequences of random tokens shared among the ranks, a thread a rank. Two baselines
with as many tokens a rank, from the same processes and in turn with the steps that are measured: one rank alone while
the others wait, and all ranks at the same time without a word to each other. The second is what the overhead is stated
over, since ranks share cores, caches and memory without communicating too; where there are more ranks than cores they
share the cores. What ranks wait for each other costs no processor time, so processor time a rank and step is printed
too, and how much of the cores stood idle.

The parts are measured apart, with every collective behind a barrier (bench/parts.py), which forbids what overlap there
is; they add up to a step of that run, not of the one above. A part's `own` time is that of this process, `waiting` that
for ranks that are late, `transfer` that of the collectives themselves; `more` and `CPU more` are what it takes over the
second baseline, measured in the same way, and `sends` counts its collectives. Other programs on the machine lengthen
what the clock says, and count as idle cores; processor time hardly feels them.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from abyssal.config import RunConfig, load_recipe
from abyssal.machine.describe import available_cores
from abyssal.machine.matmul_speed import choose_compute_dtype, measure_matmul
from abyssal.ranks.launch import Launch
from abyssal.ranks.ranks import ALONE, Ranks
from abyssal.train.build import build_run
from abyssal.train.resolve import set_threads
from abyssal.train.signals import StopSignals
from abyssal.train.step import train_step
from parts import KINDS, REST, Parts, tell_apart
from record import record

Step = Callable[[], None]
#: For each number of ranks: fields of `parallel`.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"dp 2, ZeRO-1": {}, "ep 2": {"ep_size": 2}},
    4: {
        "dp 4, ZeRO-1": {},
        "ep 4": {"ep_size": 4},
        "ep 2 * dp 2": {"ep_size": 2},
        "ep 4, nodes of 2": {"ep_size": 4, "dispatch": "node_limited", "node_size": 2},
    },
}
ALONE_NAME, APART = "one rank alone", "all ranks, without a word"


def build(config: RunConfig, ranks: Ranks, parts: Parts | None = None) -> Step:
    """Build a rank's model as a run does, and return its step with what the loop does around it."""
    built, signals = build_run(config, torch.device("cpu"), ranks), StopSignals()
    model, optimizer = built.model, built.optimizer
    if parts is not None:
        parts.know(model)
    own, length = config.batch_size_at(0) // dist.get_world_size(), config.train.sequence_length
    generator, seen = torch.Generator().manual_seed(dist.get_rank()), config.train.tokens // 10

    def run() -> None:
        windows = torch.randint(config.model.vocab_size, (own, length + 1), generator=generator)
        signals.agree(ranks.most)
        train_step(model, optimizer, windows, config, seen, ranks=ranks)

    return run


def timed(step: Step, steps: int) -> tuple[float, float]:
    """Return the milliseconds of a step, by the clock and of this rank's processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return 1e3 * (time.perf_counter() - wall) / steps, 1e3 * (time.process_time() - cpu) / steps


def in_turn(candidates: dict[str, Step], rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Time the candidates one after another in each round; the median round of the ranks' mean, the first left out."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, step in candidates.items():
            dist.barrier()
            times = timed(step, steps) if name != ALONE_NAME or dist.get_rank() == 0 else (0.0, 0.0)
            total = torch.tensor(times, dtype=torch.float64)
            dist.all_reduce(total)
            wall, cpu = (total / (1 if name == ALONE_NAME else dist.get_world_size())).tolist()
            found[name].append((wall, cpu))
    medians = {
        name: [statistics.median(values) for values in zip(*times[1:], strict=True)] for name, times in found.items()
    }
    return {name: {"ms": round(wall, 1), "CPU ms": round(cpu, 1)} for name, (wall, cpu) in medians.items()}


def in_parts(step: Step, parts: Parts, steps: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each part of a step, and its processor time: the mean of the ranks."""
    for _ in range(2):
        step()
    parts.clear()
    dist.barrier()
    for _ in range(steps):
        with parts.part(REST):
            step()
    everyone: list[Any] = [None] * dist.get_world_size()
    mine = {
        name: {**kinds, "CPU": parts.cpu[name], "calls": parts.calls[name] / 1e3} for name, kinds in parts.wall.items()
    }
    dist.all_gather_object(everyone, mine)
    names = [name for name in everyone[0] if name != REST] + [REST]
    scale = 1e3 / steps / len(everyone)
    return {
        name: {what: round(scale * sum(part[name][what] for part in everyone), 2) for what in (*KINDS, "CPU", "calls")}
        for name in names
    }


def small_messages(ranks: Ranks, repeats: int = 50) -> dict[str, float]:
    """Return the milliseconds of what is too short to be seen in a step."""
    return {
        "a barrier of ranks that come together": round(timed(dist.barrier, repeats)[0], 3),
        "writer.check, while a state is written": round(timed(lambda: ranks.agree(lambda: True, all), repeats)[0], 3),
    }


def rank_main(rank: int, world_size: int, port: int, dtype: str, rounds: int, results: Any) -> None:
    set_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    ranks = Ranks.of_world(Launch(local_world_size=world_size))
    base = ["optimizer.name=adamw", f"train.compute_dtype={dtype}", "train.threads=1"]
    configs = {
        name: load_recipe("demo", [*base, *(f"parallel.{field}={value}" for field, value in fields.items())])
        for name, fields in LAYOUTS[world_size].items()
    }
    alone = load_recipe("demo", base)
    apart = build(alone, ALONE)
    candidates = {ALONE_NAME: apart, APART: apart, **{name: build(config, ranks) for name, config in configs.items()}}
    whole, messages = in_turn(candidates, rounds, 2), small_messages(ranks)
    parts = tell_apart()
    found = {APART: in_parts(build(alone, ALONE, parts), parts, rounds)}
    for name, config in configs.items():
        found[name] = in_parts(build(config, ranks, parts), parts, rounds)
    if rank == 0:
        tokens = alone.batch_size_at(0) * alone.train.sequence_length // world_size
        results.put({"tokens a rank": tokens, "step": whole, "messages": messages, "parts": found})
    dist.barrier()
    dist.destroy_process_group()


def add_overheads(world_size: int, figures: dict[str, Any]) -> None:
    """Add to each layout what follows from its times and the baseline's."""
    cores = min(available_cores(), world_size)
    baseline = figures["step"][APART]
    for found in figures["step"].values():
        found["over"] = round(found["ms"] / baseline["ms"] - 1, 3)
        found["CPU over"] = round(found["CPU ms"] / baseline["CPU ms"] - 1, 3)
        found["idle cores"] = round(1 - world_size * found["CPU ms"] / found["ms"] / cores, 3)
    figures["step"][ALONE_NAME].pop("idle cores")
    for found in figures["parts"].values():
        for name, part in found.items():
            before = figures["parts"][APART].get(name, {})
            part["more"] = round(sum(part[kind] for kind in KINDS) - sum(before.get(kind, 0.0) for kind in KINDS), 2)
            part["CPU more"] = round(part["CPU"] - before.get("CPU", 0.0), 2)


def show(world_size: int, dtype: str, figures: dict[str, Any]) -> None:
    """Print the tables of a number of ranks."""
    cores = available_cores()
    print(f"\n{world_size} ranks on {cores} cores, {figures['tokens a rank']:,} tokens a rank, a thread each, {dtype}")
    print(f"{'a step':28s} {'ms':>8s} {'over':>7s} {'CPU ms':>8s} {'over':>7s} {'cores idle':>11s}")
    for name, found in figures["step"].items():
        idle = f"{found['idle cores']:11.0%}" if "idle cores" in found else ""
        print(
            f"{name:28s} {found['ms']:8.1f} {found['over']:+7.0%} {found['CPU ms']:8.1f} "
            f"{found['CPU over']:+7.0%} {idle}"
        )
    for name, took in figures["messages"].items():
        print(f"{name}: {took:.2f} ms")
    for layout, found in figures["parts"].items():
        columns = (*KINDS, "more", "CPU", "CPU more")
        print(f"\n{layout + ', in parts':28s}" + "".join(f"{name:>10s}" for name in (*columns, "sends")))
        total = {what: sum(part[what] for part in found.values()) for what in (*columns, "calls")}
        for name, part in {**found, "all": total}.items():
            print(f"  {name:26s}" + "".join(f"{part[what]:10.2f}" for what in columns) + f"{part['calls']:10.0f}")


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: what a run would choose here")
    arguments = parser.parse_args()
    dtype = arguments.dtype or str(choose_compute_dtype(measure_matmul()).dtype).removeprefix("torch.")
    figures: dict[str, Any] = {"dtype": dtype}
    for world_size in arguments.ranks:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(rank_main, (world_size, port, dtype, arguments.rounds, results), nprocs=world_size)
        found = results.get()
        add_overheads(world_size, found)
        show(world_size, dtype, found)
        figures[f"{world_size} ranks"] = found
    path = record("step-overhead", " ".join(["python", "bench/step_overhead.py", *sys.argv[1:]]), figures)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
