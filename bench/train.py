"""A training step of Abyssal against one of transformers: same shape, same batch, same optimizer, one run.

    python bench/train.py --shape S --sequences 8 --length 512

Both hold fp32 master weights and step AdamW. transformers runs under bf16 autocast and in fp32, with each of its
experts implementations; the fastest of all is the baseline. Rounds are interleaved, the best step of each counts,
and MFU is stated against the bf16 matmul peak measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable

import torch

from abyssal.config import ModelConfig, RunConfig, Schedule, load_recipe
from abyssal.machine.describe import available_cores
from abyssal.machine.probe import measure
from abyssal.model import Transformer, initialise
from abyssal.ops.kernels import choose_kernels
from abyssal.plan import training_flops
from abyssal.train.optimizer import build_optimizer
from abyssal.train.setup import settle
from abyssal.train.step import train_step
from record import record
from shapes import SHAPES

Step = Callable[[], None]
WARM_UP_STEPS = 3


def abyssal_step(config: ModelConfig, windows: torch.Tensor) -> Step:
    """One step of `train_step`, everything on: clipping, balancing bias, balance loss."""
    base = load_recipe("demo")
    constant = Schedule(start=len(windows))
    run = RunConfig.parse(
        base.model_dump()
        | {
            "model": config.model_dump(),
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
    model = initialise(Transformer(config, choose_kernels(torch.device("cpu"), torch.bfloat16), torch.bfloat16), 0)
    optimizer = build_optimizer(model, run.optimizer)
    return lambda: void(train_step(model, optimizer, windows, run, 0))


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


def measure_in_turns(makers: dict[str, Callable[[], Step]], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Time one step of each candidate in turn, `rounds` times, each after some first steps that are not counted.

    The first steps allocate, and let the matrix library build the code for the sizes they meet. Candidates stay in memory, so that no round
    pays for building; one that is twice as slow as the fastest of its kind is dropped after two rounds.
    """
    times: dict[str, list[float]] = {}
    steps: dict[str, Step] = {}
    for name, make in makers.items():
        try:
            step = make()
            for _ in range(WARM_UP_STEPS):
                step()
        except RuntimeError as error:
            print(f"{name}: failed: {str(error).splitlines()[0]}", flush=True)
            continue
        steps[name], times[name] = step, []
    for number in range(rounds):
        for name in list(steps):
            begin = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - begin)
            print(f"{name}: {times[name][-1]:.2f} s, {tokens / times[name][-1]:,.0f} tokens/s", flush=True)
        fastest = min(min(times[name]) for name in steps if name.startswith("transformers"))
        if number == 1:
            steps = {n: s for n, s in steps.items() if n.startswith("abyssal") or min(times[n]) < 2 * fastest}
            gc.collect()
    return times


def void(_: object) -> None:
    """Drop a result."""


def main() -> None:
    """Time all candidates in turn and print and record the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm", "batched_mm"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    settle(available_cores())  # for all candidates: they run in this one process

    config = SHAPES[arguments.shape]()
    windows = torch.randint(
        config.vocab_size, (arguments.sequences, arguments.length + 1), generator=torch.Generator().manual_seed(0)
    )
    tokens = arguments.sequences * arguments.length
    makers: dict[str, Callable[[], Step]] = {"abyssal bf16": lambda: abyssal_step(config, windows)}
    for experts in arguments.experts:
        for autocast in (True, False):
            name = f"transformers {experts} {'bf16 autocast' if autocast else 'fp32'}"
            makers[name] = lambda e=experts, a=autocast: transformers_step(config, windows, e, a)  # type: ignore[misc]

    peak = measure([torch.bfloat16]).gflops[torch.bfloat16] * 1e9
    times = measure_in_turns(makers, arguments.rounds, tokens)
    best = {name: min(seconds) for name, seconds in times.items()}
    flops = training_flops(config, arguments.length).total * tokens
    ours = best["abyssal bf16"]
    peer, theirs = min(((n, s) for n, s in best.items() if n.startswith("transformers")), key=lambda item: item[1])
    figures = {
        "shape": arguments.shape,
        "batch": [arguments.sequences, arguments.length],
        "bf16_peak_gflops": round(peak / 1e9),
        "tokens_per_s": {name: round(tokens / seconds, 1) for name, seconds in best.items()},
        "mfu": {name: round(flops / seconds / peak, 4) for name, seconds in best.items()},
        "baseline": peer,
        "ratio": round(theirs / ours, 2),
    }
    path = record(f"train-{arguments.shape}", " ".join(["python", "bench/train.py", *sys.argv[1:]]), figures)
    print(f"\nabyssal is {theirs / ours:.2f}x {peer}; MFU {flops / ours / peak:.1%}; written to {path}")


if __name__ == "__main__":
    main()
