"""A training step of Abyssal against one of transformers: same shape, same batch, same optimizer, one run.

    python bench/train.py --shape S --sequences 8 --length 512

All hold fp32 master weights and step AdamW. transformers runs under bf16 autocast and in fp32, with each of its experts
implementations; the fastest of all is the baseline. Every candidate runs in a process of its own, in turns; its first
steps are not counted; its median step counts, and the least over the rounds is compared. MFU is stated against the bf16
matmul peak measured in the same run. (transformers' batched_mm gathers weights for each token: at shape S it asks for
26 GB, so it is not among the defaults.)
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch

from abyssal.config import ModelConfig, RunConfig, ValueSchedule, load_recipe
from abyssal.machine.describe import available_cores
from abyssal.machine.matmul_speed import measure_matmul
from abyssal.model import Transformer, initialise
from abyssal.ops.kernels import choose_kernels
from abyssal.plan import training_flops
from abyssal.train.optimizer import build_optimizer
from abyssal.train.resolve import set_threads
from abyssal.train.step import train_step
from record import record
from shapes import SHAPES

Step = Callable[[], object]
OURS = "abyssal bf16"
WARM_UP_STEPS, TIMED_STEPS = 3, 3


def abyssal_step(config: ModelConfig, windows: torch.Tensor) -> Step:
    """One step of `train_step`, everything on: clipping, balancing bias, balance loss."""
    base = load_recipe("demo")
    constant = ValueSchedule(start=len(windows))
    run = RunConfig.parse(
        base.model_dump()
        | {
            "model": config.model_dump(),
            "optimizer": base.optimizer.model_dump() | {"name": "adamw"},
            "train": base.train.model_dump()
            | {
                "sequence_length": windows.shape[1] - 1,
                "micro_batch_size": len(windows),
                "compute_dtype": "bfloat16",
            },
            "schedule": base.schedule.model_dump() | {"batch_size": constant.model_dump()},
        },
        source="bench",
    )
    model = initialise(
        Transformer(config, choose_kernels(torch.device("cpu"), torch.bfloat16, "train"), torch.bfloat16), 0
    )
    optimizer = build_optimizer(model, run.optimizer)
    return lambda: train_step(model, optimizer, windows, run, 0)


def transformers_step(config: ModelConfig, windows: torch.Tensor, experts: str, autocast: bool) -> Step:
    """One step of transformers' model: loss, clipping, AdamW."""
    import transformers

    fields = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "torch_dtype")}
    hf_config = transformers.DeepseekV3Config(**fields)
    hf_config._experts_implementation = experts
    model = transformers.DeepseekV3ForCausalLM._from_config(hf_config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = windows[:, :-1].contiguous()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def run_candidate(name: str, config: ModelConfig, windows: torch.Tensor) -> dict[str, float]:
    """Time one candidate in this process: seconds of its median step, and the most memory it held."""
    set_threads(available_cores())  # threads, and the allocator's setting, for every candidate
    if name == OURS:
        step = abyssal_step(config, windows)
    else:
        _, experts, precision = name.split(" ", 2)
        step = transformers_step(config, windows, experts, autocast=precision == "bf16 autocast")
    times = []
    for _ in range(WARM_UP_STEPS + TIMED_STEPS):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": statistics.median(times[WARM_UP_STEPS:]), "peak_gib": round(peak_gib, 2)}


def main() -> None:
    """Run all candidates in turn and print and record the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm"])
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")

    config = SHAPES[arguments.shape]()
    shape = (arguments.sequences, arguments.length + 1)
    windows = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    if arguments.candidate:
        print(json.dumps(run_candidate(arguments.candidate, config, windows)))
        return

    peers = [f"transformers {e} {precision}" for e in arguments.experts for precision in ("bf16 autocast", "fp32")]
    tokens = arguments.sequences * arguments.length
    peak = measure_matmul([torch.bfloat16]).gflops[torch.bfloat16] * 1e9
    best: dict[str, dict[str, float]] = {}
    for _ in range(arguments.rounds):
        for name in (OURS, *peers):
            worker = subprocess.run(
                [sys.executable, *sys.argv, "--candidate", name], capture_output=True, text=True, check=False
            )
            if worker.returncode:
                reason = worker.stderr.strip().splitlines()[-1:] or [f"exit code {worker.returncode}"]
                print(f"{name}: failed: {reason[0]}", flush=True)
                continue
            result = json.loads(worker.stdout)
            print(
                f"{name}: {result['seconds']:.2f} s, {tokens / result['seconds']:,.0f} tokens/s, "
                f"{result['peak_gib']} GiB",
                flush=True,
            )
            best[name] = min(best.get(name, result), result, key=lambda r: r["seconds"])
    flops = training_flops(config, arguments.length).total * tokens
    ours, (peer, theirs) = (
        best[OURS],
        min(((name, best[name]) for name in peers if name in best), key=lambda item: item[1]["seconds"]),
    )
    ratio = theirs["seconds"] / ours["seconds"]
    figures = {
        "shape": arguments.shape,
        "batch": [arguments.sequences, arguments.length],
        "bf16_peak_gflops": round(peak / 1e9),
        "tokens_per_s": {name: round(tokens / r["seconds"], 1) for name, r in best.items()},
        "mfu": {name: round(flops / r["seconds"] / peak, 4) for name, r in best.items()},
        "peak_gib": {name: r["peak_gib"] for name, r in best.items()},
        "baseline": peer,
        "ratio": round(ratio, 2),
    }
    path = record(f"train-{arguments.shape}", " ".join(["python", "bench/train.py", *sys.argv[1:]]), figures)
    print(f"\nabyssal is {ratio:.2f}x {peer}; MFU {flops / ours['seconds'] / peak:.1%}; written to {path}")


if __name__ == "__main__":
    main()
