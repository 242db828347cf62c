"""Write the tables of docs/plan.md: the plan beside published figures, the fitted constants, and each deleted in turn.

python tools/plan_tables.py           write them between their marks
python tools/plan_tables.py --check   exit 1 where the page is stale
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from abyssal.config import load_recipe
from abyssal.plan.calibration import Calibration
from abyssal.plan.hardware import packaged_chips, parse_cluster
from abyssal.plan.inference import expert_parallel_bound
from abyssal.plan.published import (
    EXTENSION_HOURS,
    HELD_OUT,
    MFU,
    MFU_NOT_CAUSAL,
    POST_TRAINING_HOURS,
    PRETRAINING_HOURS,
    PRICE,
    PUBLISHED,
    STEP_PARTS,
    STEP_S,
    PublishedRun,
)
from abyssal.plan.training_plan import TrainingPlan, plan_phase, plan_step, plan_training

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "plan.md", ROOT / "bench" / "results"
PHASES = ("v3_671b", "v3_671b_32k", "v3_671b_128k")
CLUSTER = "h800:2048"
#: What the constants' table shows of the held-out runs: who, cluster and heading.
SHOWN = {0: "FP8, 1,024 H100", 1: "BF16, 1,024 H100", 7: "MXFP8, 256 GB200"}


def plan(calibration: Calibration) -> TrainingPlan:
    """Plan the published training."""
    cluster = parse_cluster(CLUSTER, packaged_chips())
    return plan_training([load_recipe(name) for name in PHASES], cluster, PUBLISHED, calibration, PRICE)


def held_out_speed(run: PublishedRun, calibration: Calibration) -> float:
    """Return the predicted tokens a second and device of a published run."""
    cluster = parse_cluster(run.cluster, packaged_chips())
    return plan_step(load_recipe(run.recipe), cluster, run.layout, calibration, run.sequences).tokens_per_device_s


def published_rows() -> Iterator[str]:
    """Yield the table of the published training."""
    training = plan(Calibration())
    step = training.phases[0].step
    hours = [phase.device_hours for phase in training.phases]
    total = training.device_hours + POST_TRAINING_HOURS
    yield "| figure | published | planned | |"
    yield "|---|---|---|---|"
    for name, published, planned, digits in (
        ("step of 62.9M tokens, s", STEP_S, step.seconds, 2),
        ("tokens a second and GPU", 1542, step.tokens_per_device_s, 0),
        ("MFU, causal, %", 100 * MFU, 100 * step.mfu(), 1),
        ("MFU, not causal, %", 100 * MFU_NOT_CAUSAL, 100 * step.mfu(causal=False), 1),
        ("pre-training, thousand GPU hours", PRETRAINING_HOURS / 1e3, hours[0] / 1e3, 0),
        ("context extension, thousand GPU hours", EXTENSION_HOURS / 1e3, sum(hours[1:]) / 1e3, 0),
        ("post-training, thousand GPU hours (given)", POST_TRAINING_HOURS / 1e3, POST_TRAINING_HOURS / 1e3, 0),
        ("all of it, million dollars at 2 an hour", 5.576, total * PRICE / 1e6, 3),
        (
            "decode bound at 50 GB/s, ms (7K = 7,000)",
            14.76,
            1e3 * expert_parallel_bound(50e9, hidden_size=7000, layers=61),
            2,
        ),
        ("decode bound at 900 GB/s, ms", 0.82, 1e3 * expert_parallel_bound(900e9, hidden_size=7000, layers=61), 2),
    ):
        yield f"| {name} | {published:,.{digits}f} | {planned:,.{digits}f} | {planned / published - 1:+.0%} |"


def part_rows() -> Iterator[str]:
    """Yield the parts of the step of an end and of a middle rank."""
    step = plan(Calibration()).phases[0].step
    ranks = [step.timeline.parts(rank) for rank in (0, 7)]
    yield "| part, s | published | rank 0 | | rank 7 | |"
    yield "|---|---|---|---|---|---|"
    sums = {"1F": ("F",), "bubble": ("idle",), "1B": ("B", "I"), "1W": ("W",), "1F1B": ("F&B",)}
    for name, published in STEP_PARTS.items():
        values = [sum(parts[p] for p in sums[name]) if name in sums else step.optimizer_s for parts in ranks]
        yield (
            f"| {name} | {published:.2f} | " + " | ".join(f"{v:.2f} | {v / published - 1:+.0%}" for v in values) + " |"
        )
    yield f"| exposed and imbalance, in the above | | {step.exposed_and_imbalance_s:.2f} | | | |"


def held_out_rows() -> Iterator[str]:
    """Yield the held-out runs."""
    yield "| who | devices | layout | published tokens/s a device | planned | |"
    yield "|---|---|---|---|---|---|"
    for run in HELD_OUT:
        speed = held_out_speed(run, Calibration())
        name, number = run.cluster.split(":")
        yield (
            f"| {run.who} | {number} {name} | {run.layout} | {run.tokens_per_device_s:,.0f} | {speed:,.0f} | "
            f"{speed / run.tokens_per_device_s - 1:+.0%} |"
        )
    yield ""
    for run in HELD_OUT:
        if run.reason:
            yield f"- {run.who} on {run.cluster}: {run.reason}."


def constant_rows() -> Iterator[str]:
    """Yield the constants, and the main figures with each deleted in turn."""
    yield "| constant | value | fitted to |"
    yield "|---|---|---|"
    for name, value, fitted_to in Calibration.constants():
        yield f"| `{name}` | {value:g} | {fitted_to} |"
    yield ""
    headings = ["step, s", "pre-training, K hours", *(f"{heading}" for heading in SHOWN.values())]
    yield "| without | " + " | ".join(headings) + " |"
    yield "|---|" + "---|" * len(headings)
    published = [STEP_S, PRETRAINING_HOURS / 1e3, *(HELD_OUT[n].tokens_per_device_s for n in SHOWN)]
    yield "| (published) | " + " | ".join(_short(value) for value in published) + " |"
    for without in (None, *(name for name, _, _ in Calibration.constants())):
        calibration = Calibration() if without is None else Calibration().without(without)
        cluster = parse_cluster(CLUSTER, packaged_chips())
        phase = plan_phase(load_recipe(PHASES[0]), cluster, PUBLISHED, calibration)
        speeds = (held_out_speed(HELD_OUT[n], calibration) for n in SHOWN)
        values = [phase.step.seconds, phase.device_hours / 1e3, *speeds]
        yield f"| {f'`{without}`' if without else 'none'} | " + " | ".join(_short(value) for value in values) + " |"


def here_rows() -> Iterator[str]:
    """Yield the newest measurement of bench/plan.py beside its predictions."""
    newest = sorted(RESULTS.glob("plan-*.json"))[-1]
    result = json.loads(newest.read_text(encoding="utf-8"))
    yield f"Measured and planned on {result['date']}, {result['device']}, {result['cores']} threads:"
    yield ""
    yield "| run | step, s | | weights, MB | gradients, MB | optimizer, MB | activations and casts, MB | |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in result["figures"]["measured, predicted"].items():
        if name == "machine":
            continue
        (seconds, planned), memory = row["seconds"], list(row["memory_mb"].values())
        kept, kept_planned = memory[-1]
        sizes = " | ".join(f"{measured:,.0f}, {predicted:,.0f}" for measured, predicted in memory)
        yield (
            f"| {name} | {seconds:.2f}, {planned:.2f} | {planned / seconds - 1:+.0%} | {sizes} | "
            f"{kept_planned / kept - 1:+.0%} |"
        )


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "published": published_rows,
    "parts": part_rows,
    "held out": held_out_rows,
    "constants": constant_rows,
    "here": here_rows,
}


def rendered(page: str) -> str:
    """Return the page with every table made anew between its marks."""
    for name, rows in TABLES.items():
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{re.escape(opening)}\n.*?{re.escape(closing)}", re.DOTALL)
        assert pattern.search(page), f"{PAGE}: has no {opening} ... {closing}"
        table = "\n".join([opening, *rows(), closing])
        page = pattern.sub(lambda _, table=table: table, page)  # type: ignore[misc]
    return page


def main() -> int:
    """Write the page, or say whether it is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = rendered(before)
    if arguments.check:
        if before != after:
            print(f"{PAGE} is stale: python tools/plan_tables.py", file=sys.stderr)
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
