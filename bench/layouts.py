"""Every layout of a small demo against one process: gradients of the first step, and the losses of 20.

    python bench/layouts.py [--ranks 2 4 8]

Each case is a command line of `abyssal train` over gloo on this machine, in float64 and in fp32, with MTP on, and all
cases of a number of ranks share their processes. The same code as in tests/parallel/test_training.py, which holds a
part of these cases, makes and compares them. A case passes if no parameter's gradient is further from that of one
process than the limit, over its norm, and no loss or gradient norm further than the other, over its value where that is
above 1; in float64 every expert's load of every step must be equal too. Exits with 1 if a case does not pass.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # before the processes start, which get it too

from ranks.training import LIMITS, Run, train_runs


def zero_stages(name: str, **fields: Any) -> dict[str, dict[str, Any]]:
    """Return a layout in each ZeRO stage."""
    return {f"{name}, ZeRO-{stage}": {"zero_stage": stage, **fields} for stage in (1, 2, 3)}


#: For each number of ranks: fields of `parallel`.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {**zero_stages("dp 2"), "ep 2": {"ep_size": 2}, "2 replicas": {"dp_replicate_size": 2}},
    4: {
        **zero_stages("dp 4"),
        "ep 4": {"ep_size": 4},
        "ep 4, nodes of 2": {"ep_size": 4, "dispatch": "node_limited", "node_size": 2},
        "ep 2 * dp 2": {"ep_size": 2},
        "2 replicas of ep 2": {"ep_size": 2, "dp_replicate_size": 2},
        "2 replicas of dp 2, ZeRO-3": {"dp_replicate_size": 2, "zero_stage": 3},
    },
    8: {
        "ep 8": {"ep_size": 8},
        "ep 8, nodes of 2": {"ep_size": 8, "dispatch": "node_limited", "node_size": 2},
        "ep 8, nodes of 4": {"ep_size": 8, "dispatch": "node_limited", "node_size": 4},
        **zero_stages("ep 2 * dp 4", ep_size=2),
        "ep 4 * dp 2, nodes of 2": {"ep_size": 4, "dispatch": "node_limited", "node_size": 2},
        "2 replicas of ep 2 * dp 2": {"ep_size": 2, "dp_replicate_size": 2},
    },
}


def compare(run: Run, alone: Run, dtype: str) -> dict[str, Any]:
    """Return the worst differences of a run from that of one process, and whether they are within the limits."""
    gradient, loss = run.gradient_error(alone), run.loss_error(alone)
    gradient_limit, loss_limit = LIMITS[dtype]
    loads = dtype != "float64" or run.of("expert_load") == alone.of("expert_load")
    return {
        "gradient": gradient.size,
        "gradient limit": gradient_limit,
        "parameter": gradient.where,
        "loss": loss.size,
        "loss limit": loss_limit,
        "which loss": loss.where,
        "loads": "equal" if loads else "different",
        "passes": gradient.size <= gradient_limit and loss.size <= loss_limit and loads,
    }


def show(name: str, found: dict[str, Any]) -> None:
    """Print the row of a case."""
    print(
        f"{name:46s} {found['gradient']:9.1e} of {found['gradient limit']:.0e}  {found['loss']:9.1e} of "
        f"{found['loss limit']:.0e}  {'pass' if found['passes'] else 'FAIL'}  {found['parameter']}; "
        f"{found['which loss']}" + ("" if found["loads"] == "equal" else "; expert loads differ"),
        flush=True,
    )


def main() -> int:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    chosen = parser.parse_args().ranks
    begin, figures = time.perf_counter(), dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = train_runs(1, folder, {dtype: {"train.compute_dtype": dtype} for dtype in LIMITS})
        print(f"{'':46s} {'gradient':>9s}           {'losses':>9s}                 where both are worst")
        for ranks in chosen:
            cases = {
                f"{ranks} ranks: {layout}, {dtype}": {
                    "train.compute_dtype": dtype,
                    **{f"parallel.{field}": value for field, value in fields.items()},
                }
                for layout, fields in LAYOUTS[ranks].items()
                for dtype in LIMITS
            }
            for case, run in train_runs(ranks, folder, cases).items():
                dtype = cases[case]["train.compute_dtype"]
                figures[case] = compare(run, alone[dtype], dtype)
                show(case, figures[case])
    failed = [case for case, found in figures.items() if not found["passes"]]
    path = record("layouts", " ".join(["python", "bench/layouts.py", *sys.argv[1:]]), figures)
    print(
        f"{len(figures) - len(failed)} of {len(figures)} cases pass, in {time.perf_counter() - begin:.0f} s; "
        f"written to {path}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
