"""The demo's learning curve, from runs of `abyssal demo` that are finished: one JSON, and docs/demo-curve.svg.

    python bench/demo.py runs/demo [RUN ...]

The runs are repetitions that differ in their seed. Validation is over the first 100,000 bytes of the validation files
while a run goes on and over all of them at its end, so its last point stands apart from the curve; which files come
first depends on the seed. The held-out files are the same in all runs and were not looked at before the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from abyssal.data.shards import Shards
from abyssal.engine import load_model
from abyssal.train.evaluation import score_documents
from abyssal.train.run_folder import RunFolder
from record import record

PICTURE = Path(__file__).parents[1] / "docs" / "demo-curve.svg"
XZ = 1.586  # bits per byte of the held-out files, one after another by path


def validation(run: Path) -> list[tuple[int, float]]:
    """Return (step, bits per byte) of every validation of a run."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["validation_bits_per_byte"]) for line in lines if "validation_bits_per_byte" in line]


def held_out(run: Path) -> float:
    """Return the bits per byte of the run's model on all held-out files, as `abyssal demo` counts them."""
    folder = RunFolder(run)
    config = folder.resolved_config()
    shards, length = Shards.open(folder.data(config), "heldout"), config.train.sequence_length
    model = load_model(folder.model).model
    return score_documents(model, shards, length, config.train.micro_batch_size * length).bits_per_byte


def draw(curves: dict[str, list[tuple[int, float]]]) -> None:
    """Write the picture: validation over steps, and xz's figure as a line."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for label, points in curves.items():
        axes.plot(*zip(*points[:-1], strict=True), label=label)
    axes.axhline(XZ, color="gray", linestyle="--", linewidth=1, label="xz -9e, held-out files")
    axes.set(xlabel="step of 4,096 tokens", ylabel="validation, bits per byte", ylim=(1, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> int:
    """Score, record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    torch.set_num_threads(2)
    figures, curves = [], {}
    for run in runs:
        config = RunFolder(run).resolved_config()
        name = f"seed {config.seed}" + ("" if config.optimizer.name == "muon" else f", {config.optimizer.name}")
        curves[name] = validation(run)
        score = held_out(run)
        figures.append({"run": name, "threads": config.train.threads, "held_out": score, "validation": curves[name]})
        print(f"{name}: {curves[name][-1][0]} steps, held-out {score:.3f} bits per byte")
    print(f"mean of the held-out figures: {statistics.mean(f['held_out'] for f in figures):.3f}")
    draw(curves)
    print(f"written to {record('demo', 'python bench/demo.py RUN ...', figures)} and {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
