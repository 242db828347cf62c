"""Where the time of experts across ranks goes: parts of one layer's dispatch and combine on gloo ranks of this machine.

    python bench/dispatch.py --ranks 4 --node-size 2

Direct and node-limited, rows in bf16 and in FP8, with the same tokens and choices, uniformly random. Each part begins
together on all ranks and its slowest rank counts; the median over the repeats is shown. The floor of a part that sends
is what it sends to other ranks over the bandwidth of an all-to-all of equal messages of 4 MB, measured in the same run.
Nodes are only counted here: all ranks share one machine, so its links within a node and across are the same, and
node-limited dispatch, which saves on the slower ones, shows its price in time and its gain in what crosses.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from abyssal.config.parallel import ParallelConfig
from abyssal.ops.experts import segmented_expert_ffn
from abyssal.parallel.dispatch import CommunicationVolume, expert_parallel_dispatcher
from abyssal.parallel.dispatch.all_to_all import exchange_counts
from abyssal.parallel.dispatch.payload import Fp8Payload, PlainPayload
from abyssal.parallel.dispatch.transfer import FromExperts, ToExperts
from abyssal.parallel.layout import RankLayout
from record import record

MESSAGE = 4 << 20  # bytes, of the measured bandwidth


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer; tokens are those of a rank."""

    ranks: int
    node_size: int
    tokens: int
    hidden: int
    expert_width: int
    experts: int
    top_k: int


class Clock:
    """Times of parts that begin together, the slowest rank's."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        dist.barrier()
        begin = time.perf_counter()
        result = work()
        took = torch.tensor([time.perf_counter() - begin])
        dist.all_reduce(took, dist.ReduceOp.MAX)
        self.times.setdefault(name, []).append(took.item())
        return result

    def medians(self) -> dict[str, float]:
        """Return milliseconds, the first repeat left out."""
        return {name: round(1e3 * statistics.median(times[1:]), 2) for name, times in self.times.items()}


def bandwidth(ranks: int, repeats: int) -> float:
    """Return the bytes a second that a rank sends to others while all do."""
    sent = torch.zeros(ranks * MESSAGE, dtype=torch.uint8)
    received = torch.zeros_like(sent)
    clock = Clock()
    for _ in range(repeats):
        clock.part("send", lambda: dist.all_to_all_single(received, sent))
    return (ranks - 1) * MESSAGE / (clock.medians()["send"] / 1e3)


def draw(shape: Shape, rank: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Draw this rank's tokens, choices and experts."""
    generator = torch.Generator().manual_seed(rank)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    choices = torch.rand(shape.tokens, shape.experts, generator=generator).argsort(1)[:, : shape.top_k]
    inputs = {
        "hidden": randn(shape.tokens, shape.hidden).bfloat16().requires_grad_(),
        "weights": torch.rand(shape.tokens, shape.top_k, generator=generator).requires_grad_(),
        "experts": choices,
    }
    local = shape.experts // shape.ranks
    stacks = randn(local, 2 * shape.expert_width, shape.hidden), randn(local, shape.hidden, shape.expert_width)
    return inputs, [(stack / shape.hidden**0.5).bfloat16().requires_grad_() for stack in stacks]


def measure(shape: Shape, dispatch: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Time the parts of the forward pass one by one, and both passes whole; count what crosses."""
    config = ParallelConfig.model_validate({"ep_size": shape.ranks, "dispatch": dispatch, "dispatch_dtype": dtype})
    layout = RankLayout(1, 1, 1, shape.ranks, shape.node_size)
    dispatcher = expert_parallel_dispatcher(config, layout, dist.group.WORLD, shape.experts)
    planner, clock = dispatcher.planner, Clock()
    inputs, stacks = draw(shape, dist.get_rank())
    hidden, weights = inputs["hidden"].detach(), inputs["weights"].detach().flatten()
    payload = Fp8Payload(shape.hidden, hidden.dtype) if dtype == "fp8" else PlainPayload()
    counts_sent = torch.zeros(shape.ranks, shape.experts // shape.ranks, dtype=torch.int64)
    sent = {name: CommunicationVolume() for name in ("to experts", "from experts")}

    def forward() -> Tensor:
        in_flight = dispatcher.start_dispatch(inputs["hidden"], inputs["weights"], inputs["experts"])
        received = dispatcher.finish_dispatch(in_flight)
        rows = segmented_expert_ffn(received.rows, received.row_weights, received.counts, *stacks)
        return dispatcher.finish_combine(dispatcher.start_combine(rows, received.origin))

    def run(transfer: ToExperts | FromExperts, *tensors: Tensor) -> tuple[Tensor, ...]:
        transfer.start(*tensors)
        return transfer.finish()

    for _ in range(repeats):
        plan = clock.part("plan", lambda: planner.plan(inputs["experts"], CommunicationVolume()))
        clock.part("of which counts", lambda: exchange_counts(planner.group, counts_sent, CommunicationVolume()))
        there = ToExperts(plan, payload, sent["to experts"])
        with torch.no_grad():
            received = clock.part("rows to experts", partial(run, there, hidden, weights))
            rows = clock.part("experts", partial(segmented_expert_ffn, *received, plan.counts, *stacks))
            clock.part("rows back", partial(run, FromExperts(plan, sent["from experts"]), rows))
        output = clock.part("forward pass, whole", forward)
        grad = torch.ones_like(output)
        clock.part("backward pass, whole", lambda output=output, grad=grad: output.backward(grad))
    crossed = {}
    for name, volume in sent.items():
        counted = torch.tensor(astuple(volume), dtype=torch.int64) // repeats
        most = counted.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        dist.all_reduce(counted)
        names = ("rows to ranks", "rows to nodes", "bytes to ranks", "bytes to nodes")
        crossed[name] = dict(zip(names, counted.tolist(), strict=True)) | {"most bytes of a rank": int(most[2])}
    return {"ms": clock.medians(), "sent by all ranks": crossed}


def rank_main(rank: int, shape: Shape, port: int, repeats: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=shape.ranks)
    speed = bandwidth(shape.ranks, repeats)
    cases = {
        f"{dispatch}, {dtype}": measure(shape, dispatch, "fp8" if dtype == "FP8" else "compute", repeats)
        for dispatch in ("direct", "node_limited")
        for dtype in ("bf16", "FP8")
    }
    if rank == 0:
        results.put((speed, cases))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 4), ("node-size", 2), ("tokens", 1024), ("hidden", 1024), ("expert-width", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=8)
    arguments = vars(parser.parse_args())
    repeats = arguments.pop("repeats")
    shape = Shape(**arguments)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank_main, (shape, port, repeats, results), nprocs=shape.ranks)
    speed, cases = results.get()
    print(f"{shape}\nall-to-all on this machine: {speed / 1e6:.0f} MB/s a rank, all at once")
    for name, case in cases.items():
        case["floor ms"] = {
            part: round(1e3 * case["sent by all ranks"][direction]["most bytes of a rank"] / speed, 2)
            for part, direction in (("rows to experts", "to experts"), ("rows back", "from experts"))
        }
        print(name)
        for part, took in case["ms"].items():
            floor = case["floor ms"].get(part)
            print(f"  {part:22s} {took:8.2f} ms" + (f", floor {floor:.2f}" if floor is not None else ""))
        for direction, counted in case["sent by all ranks"].items():
            print(f"  {direction}: " + ", ".join(f"{value:,} {what}" for what, value in counted.items()))
    direct, limited = (
        cases[f"{dispatch}, bf16"]["sent by all ranks"]["to experts"] for dispatch in ("direct", "node_limited")
    )
    ratio = limited["rows to nodes"] / direct["rows to nodes"]
    print(f"rows that cross nodes, node-limited over direct: {ratio:.3f}")
    figures = {
        "shape": vars(shape),
        "bytes a second, all-to-all": round(speed),
        "rows across nodes, ratio": round(ratio, 4),
        **cases,
    }
    print(f"written to {record('dispatch', ' '.join(['python', 'bench/dispatch.py', *sys.argv[1:]]), figures)}")


if __name__ == "__main__":
    main()
