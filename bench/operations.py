"""Every version of every operation that runs on this CPU against the definition: time and error, in one run.

    python bench/operations.py
    python bench/operations.py --dtype float32 --only attention

Sizes are those of shape S, and of the demo for attention. Training is timed forward and backward, decoding forward.
Versions take turns; the least time of each counts. An error is that of values and gradients against float64, relative
to their norm, the worst of them. A version that the choice passes over is shown with the reason.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from abyssal.ops.kernels import OPERATIONS
from abyssal.ops.latent_attention import PaddedLatents
from abyssal.ops.version import Purpose, Version
from record import record

CPU = torch.device("cpu")
Draw = Callable[..., Tensor]
#: Arguments, and which of them are differentiated; weights come last and are prepared.
Case = tuple[list[Any], tuple[int, ...]]


def attention(draw: Draw, sequences: int, heads: int, length: int, key_dims: int, value_dims: int) -> Case:
    """Return queries, keys and values of equally long sequences."""
    q, k, v = (draw(sequences * length, heads, dims) for dims in (key_dims, key_dims, value_dims))
    lengths = (length,) * sequences
    return [q, k, v, lengths, lengths, key_dims**-0.5], (0, 1, 2)


def latent_attention(draw: Draw, sequences: int, new: int, cached: int) -> Case:
    """Return the queries of sequences that advance by `new` tokens, and their cached rows."""
    rows = PaddedLatents(draw(sequences, cached, 160), (cached,) * sequences)
    return [draw(sequences * new, 8, 128), draw(sequences * new, 8, 32), rows, [new] * sequences, 96**-0.5], ()


def experts(draw: Draw, rows: int) -> Case:
    """Return rows that 32 experts share unevenly, with their weights."""
    shares = torch.linspace(0.5, 1.5, 32)
    counts = (shares / shares.sum() * rows).long()
    counts[0] += rows - counts.sum()
    return [draw(rows, 512), draw(rows).float().sigmoid(), counts, draw(32, 384, 512), draw(32, 512, 192)], (0, 1, 3, 4)


def log_probabilities(draw: Draw, tokens: int) -> Case:
    """Return hidden states, the head and targets."""
    return [draw(tokens, 512), draw(32000, 512) / 16, torch.arange(tokens)], (0, 1)


CASES: dict[str, dict[tuple[Purpose, str], Callable[[Draw], Case]]] = {
    "attention": {
        ("train", "S, 8 x 512"): lambda draw: attention(draw, 8, 8, 512, 96, 64),
        ("train", "demo, 16 x 256"): lambda draw: attention(draw, 16, 4, 256, 64, 64),
        ("train", "S, 1 x 2,048"): lambda draw: attention(draw, 1, 8, 2048, 96, 64),
    },
    "latent_attention": {
        ("decode", "1 token over 600"): lambda draw: latent_attention(draw, 1, 1, 600),
        ("decode", "32 tokens over 600"): lambda draw: latent_attention(draw, 32, 1, 600),
        ("decode", "4 x 3 tokens over 600"): lambda draw: latent_attention(draw, 4, 3, 600),
        ("decode", "prompt of 512"): lambda draw: latent_attention(draw, 1, 512, 512),
    },
    "linear": {
        ("decode", "1 row"): lambda draw: ([draw(1, 512), draw(768, 512)], (0, 1)),
        ("decode", "32 rows"): lambda draw: ([draw(32, 512), draw(768, 512)], (0, 1)),
    },
    "experts": {
        ("train", "32,768 rows"): lambda draw: experts(draw, 32768),
        ("decode", "256 rows"): lambda draw: experts(draw, 256),
    },
    "cross_entropy": {("train", "4,096 tokens"): lambda draw: log_probabilities(draw, 4096)},
    "log_probabilities": {
        ("train", "4,096 tokens"): lambda draw: log_probabilities(draw, 4096),
        ("decode", "4,096 tokens"): lambda draw: log_probabilities(draw, 4096),
    },
    "rms_norm": {
        ("train", "4,096 rows"): lambda draw: ([draw(4096, 512), 1 + draw(512)], (0, 1)),
        ("decode", "1 row"): lambda draw: ([draw(1, 512), 1 + draw(512)], (0, 1)),
        ("decode", "32 rows"): lambda draw: ([draw(32, 512), 1 + draw(512)], (0, 1)),
    },
}
PREPARED = {"linear": (1,), "experts": (3, 4)}


def to(argument: Any, dtype: torch.dtype) -> Any:
    """Return an argument of an operation in `dtype`."""
    if isinstance(argument, PaddedLatents):
        return PaddedLatents(argument.rows.to(dtype), argument.lengths)
    return argument.to(dtype) if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def prepare(
    version: Version, operation: str, purpose: Purpose, case: Case, dtype: torch.dtype
) -> Callable[[], list[Tensor]]:
    """Return what computes values, for training gradients too."""
    arguments, trains = [to(x, dtype) for x in case[0]], purpose == "train"
    leaves = [arguments[i].requires_grad_() for i in case[1]] if trains else []
    for i in PREPARED.get(operation, ()):
        arguments[i] = version.prepare(arguments[i], dtype)

    def compute() -> list[Tensor]:
        with torch.set_grad_enabled(trains):
            out = version(*arguments)
            return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))] if trains else [out]

    return compute


def measure(operation: str, purpose: Purpose, case: Case, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, Any]]:
    """Return for each version its time in ms and error, or why it is passed over."""
    exact = prepare(OPERATIONS[operation][-1], operation, purpose, case, torch.float64)()
    running, found = {}, {}
    for version in OPERATIONS[operation]:
        if reason := version.why_not_for(purpose, CPU, dtype):
            found[version.name] = {"not": reason}
            continue
        compute = running[version.name] = prepare(version, operation, purpose, case, dtype)
        errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(compute(), exact, strict=True)]
        found[version.name] = {"error": float(f"{max(errors):.2e}"), "ms": float("inf")}
    for _ in range(rounds):
        for name, compute in running.items():
            begin = time.perf_counter()
            compute()
            found[name]["ms"] = min(found[name]["ms"], round(1e3 * (time.perf_counter() - begin), 3))
    return found


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    figures: dict[str, Any] = {"dtype": arguments.dtype, "threads": torch.get_num_threads()}
    for operation in arguments.only:
        for (purpose, size), build in CASES[operation].items():
            generator = torch.Generator().manual_seed(0)
            case = build(lambda *shape, g=generator: torch.randn(shape, generator=g).to(dtype))  # type: ignore[misc]
            name = f"{purpose}: {operation}, {size}"
            print(name)
            figures[name] = found = measure(operation, purpose, case, dtype, arguments.rounds)
            for version, result in found.items():
                print(f"  {version}: " + ", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    print(record(f"operations-{arguments.dtype}", "python bench/operations.py " + arguments.dtype, figures))


if __name__ == "__main__":
    main()
