"""Balance of the demo's experts over all held-out tokens, with the balancing bias and without.

    python bench/maxvio.py --minutes 2 --out runs/maxvio

Two runs of the demo's recipe, equally many tokens of the same data: as it is, and with the speed of the bias at 0. Then
every held-out token goes through each model once, in windows as in `abyssal demo`'s score, and the tokens that each
expert was given are counted over the whole set. A layer's MaxVio is its largest load over its mean load, minus 1; what
is compared is the mean over all layers with experts, that of the MTP module included. The first model is also measured
with its bias set to zero: what the bias does to a router that has grown up with it.

The bias must keep MaxVio below 0.5, and without it MaxVio must be above: else the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from abyssal.config import RunConfig, load_recipe
from abyssal.data.batch import evaluation_sequences
from abyssal.data.shards import Shards
from abyssal.engine import load_model
from abyssal.model import Context, RouterStatistics, Transformer, next_tokens
from abyssal.train import loop
from abyssal.train.balancing import add_loads, max_violation
from abyssal.train.run_folder import RunFolder
from record import record

LIMIT = 0.5
NO_BIAS = ["schedule.bias_update_speed.start=0.0", "schedule.bias_update_speed.segments=[]"]
WINDOWS = 16  # a pass


@torch.inference_mode()
def held_out_loads(model: Transformer, shards: Shards, length: int) -> dict[int, torch.Tensor]:
    """Return how many held-out tokens each expert is given: layer -> [E]; the MTP layers come after the main ones."""
    windows = [sequence.tokens[:-1] for sequence in evaluation_sequences(shards, length)]
    loads: dict[int, torch.Tensor] = {}
    for first in range(0, len(windows), WINDOWS):
        part = windows[first : first + WINDOWS]
        statistics = RouterStatistics()
        packed = Context.packed([len(window) for window in part])
        ctx = Context(packed.lengths, packed.positions, statistics=statistics)
        tokens = torch.cat(part)
        further = next_tokens(tokens, len(model.mtp_modules))
        for _ in model.predict_further(model(tokens, ctx), further, ctx):
            pass
        add_loads(loads, statistics.expert_load)
    return loads


@dataclass(frozen=True)
class Balance:
    """MaxVio by layer, and their mean."""

    mean: float
    layers: dict[int, float]


def measure(folder: RunFolder, run: RunConfig, *, without_bias: bool = False) -> Balance:
    """Measure the model of a finished run; with its bias, or with the bias set to zero."""
    model = load_model(folder.model).model
    if without_bias:
        for buffer in model.buffers():
            buffer.zero_()
    shards = Shards.open(folder.data(run), "heldout")
    loads = held_out_loads(model, shards, run.train.sequence_length)
    return Balance(
        mean=round(max_violation(loads), 3),
        layers={layer: round(max_violation({layer: load}), 3) for layer, load in sorted(loads.items())},
    )


def train(path: Path, overrides: list[str], console: Console) -> tuple[RunFolder, RunConfig]:
    """Train the demo's recipe with some fields changed, unless the run is there already."""
    folder = RunFolder(path)
    if not (folder.model / "config.json").is_file():
        loop.start(load_recipe("demo", overrides), path, console)
    return folder, folder.resolved_config()


def main() -> None:
    """Train both, measure three times, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="training time of the first run")
    parser.add_argument("--out", type=Path, default=Path("runs/maxvio"), help="folder of both runs; finished ones stay")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="SECTION.FIELD=VALUE")
    arguments = parser.parse_args()
    console = Console()
    timed = [f"train.time_budget_s={60 * arguments.minutes}", *arguments.overrides]
    folder, run = train(arguments.out / "with", timed, console)
    shared = [f"train.tokens={run.train.tokens}", f"train.compute_dtype={run.train.compute_dtype}"]
    data = f"data.folder={str(folder.data(run).resolve())!r}"
    bare, bare_run = train(arguments.out / "without", [*arguments.overrides, *shared, data, *NO_BIAS], console)
    found = {
        "with the bias": measure(folder, run),
        "with the bias, set to zero afterwards": measure(folder, run, without_bias=True),
        "without the bias from the start": measure(bare, bare_run),
    }
    for name, figure in found.items():
        print(f"{name}: MaxVio {figure.mean:.3f}; by layer {figure.layers}")
    figures = {"tokens": run.train.tokens, **{name: asdict(figure) for name, figure in found.items()}}
    print(f"written to {record('maxvio', ' '.join(['python', 'bench/maxvio.py', *sys.argv[1:]]), figures)}")
    balanced, _, bare_figure = found.values()
    sys.exit(0 if balanced.mean < LIMIT <= bare_figure.mean else 1)


if __name__ == "__main__":
    main()
