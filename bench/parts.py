"""The parts of a training step on many ranks, told apart from outside: what is patched, and how the time is taken.

A part is what runs inside some function and in no other part. A collective belongs to the part that calls it, and is
taken in two: a barrier of its group, which is waiting for the ranks that are late, and then the transfer, which is
waited for at once. So nothing overlaps while parts are told apart.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from abyssal.model import Transformer
from abyssal.model.dispatcher import LocalDispatcher
from abyssal.parallel.apply import moe_layers
from abyssal.parallel.dispatch.direct import DirectPlanner
from abyssal.parallel.dispatch.dispatcher import ExpertParallelDispatcher
from abyssal.parallel.dispatch.node_limited import NodeLimitedPlanner
from abyssal.parallel.dispatch.transfer import FromExperts, ToExperts
from abyssal.ranks.ranks import Ranks
from abyssal.train import executor, step
from abyssal.train.optimizer import Optimizers

Label = str | Callable[[Any], str]
KINDS = ("own", "waiting", "transfer")
#: Transfers of the dispatcher and what they carry.
TRANSFERS = {
    "dispatch": "rows to experts",
    "combine": "rows back",
    "combine_backward": "gradients to experts",
    "dispatch_backward": "gradients back",
}
#: Collectives that are parts by themselves, whoever calls them.
COLLECTIVES = {
    "all_gather_single": "all-gather of weights",
    "all_gather_into_tensor": "all-gather of weights",
    "reduce_scatter_single": "reduce-scatter of gradients",
    "reduce_scatter_tensor": "reduce-scatter of gradients",
    "all_to_all_single": "",
    "all_reduce": "",
}
REST = "rest of the step"


@dataclass
class Parts:
    """Seconds of parts, by part and kind, and processor seconds by part; times that something was sent."""

    wall: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: dict.fromkeys(KINDS, 0.0)))
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    transfers: dict[int, str] = field(default_factory=dict)  # by the id of a dispatcher's communication volume
    _inside: list[tuple[str, list[float]]] = field(
        default_factory=list
    )  # parts begun, and what was in others meanwhile

    def clear(self) -> None:
        """Begin anew."""
        for found in (self.wall, self.cpu, self.calls):
            found.clear()  # type: ignore[attr-defined]

    def know(self, model: Transformer) -> None:
        """Learn which transfer is which of a model's dispatcher."""
        for moe in moe_layers(model):
            if isinstance(moe.dispatcher, ExpertParallelDispatcher):
                self.transfers |= {id(volume): TRANSFERS[name] for name, volume in moe.dispatcher.volumes.items()}

    @contextmanager
    def part(self, label: str, kind: str = "own") -> Iterator[None]:
        """Count what happens inside as that part, but for what is a part of its own."""
        elsewhere = [0.0, 0.0]
        self._inside.append((label, elsewhere))
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            self._inside.pop()
            self.wall[label][kind] += wall - elsewhere[0]
            self.cpu[label] += cpu - elsewhere[1]
            if self._inside:
                self._inside[-1][1][0] += wall
                self._inside[-1][1][1] += cpu

    def wrap(self, owner: Any, name: str, label: Label) -> None:
        """Make a function a part, from now on; `label` may depend on its first argument."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **named: Any) -> Any:
            with self.part(label(args[0]) if callable(label) else label):
                return original(*args, **named)

        setattr(owner, name, wrapped)

    def wrap_collective(self, name: str) -> None:
        """Take a collective of torch.distributed in two, from now on."""
        original, own_part = getattr(dist, name), COLLECTIVES[name]

        @functools.wraps(original)
        def wrapped(*args: Any, group: Any = None, async_op: bool = False, **named: Any) -> Any:
            label = own_part or (self._inside[-1][0] if self._inside else REST)
            self.calls[label] += 1
            with self.part(label, "waiting"):
                dist.barrier(group)
            with self.part(label, "transfer"):
                work = original(*args, group=group, async_op=True, **named)
                work.wait()
            return work if async_op else None

        setattr(dist, name, wrapped)


def tell_apart() -> Parts:
    """Patch this process, for good, so that steps of models that are built from now on fill the parts returned."""
    parts = Parts()
    parts.wrap(executor, "forward", "forward pass")
    parts.wrap(torch.Tensor, "backward", "backward pass")
    parts.wrap(step, "clip_gradients", "norm and clipping")
    parts.wrap(executor.StepSums, "read", "losses and loads")
    parts.wrap(Optimizers, "step", "AdamW")
    parts.wrap(Ranks, "most", "control: signals")
    for planner in (DirectPlanner, NodeLimitedPlanner):
        parts.wrap(planner, "plan", "plan of the dispatch")
    for transfer in (ToExperts, FromExperts):
        for method in ("start", "finish"):
            parts.wrap(transfer, method, lambda self: parts.transfers[id(self.volume)])
    for name in ("dispatch", "combine"):
        parts.wrap(LocalDispatcher, f"start_{name}", TRANSFERS[name])
    hooks = ("_pre_forward", "_post_forward", "_pre_backward", "_root_post_backward_final_callback")
    for owner, names in ((FSDPState, hooks), (FSDPParamGroup, ("post_backward",))):
        for name in names:
            parts.wrap(owner, name, "FSDP: hooks and copies")
    for name in COLLECTIVES:
        if hasattr(dist, name):
            parts.wrap_collective(name)
    return parts
