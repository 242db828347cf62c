"""How much a dispatcher sends: the counters, and what they come to in the mean where routing is balanced.

What is expected is read off rows on the meta device, encoded as they are sent, every expert being as likely as any
other.

Legend: T tokens, D hidden, K experts a token, E experts, R ranks of an expert group, N nodes of it, L ranks of a node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, Self, get_args

import torch

from abyssal.config import ModelConfig
from abyssal.config.parallel import ParallelConfig
from abyssal.parallel.dispatch.payload import Fp8Payload, PlainPayload
from abyssal.parallel.layout import RankLayout
from abyssal.plan.communication import expected_destinations

TransferName = Literal["dispatch", "combine", "dispatch_backward", "combine_backward"]
TRANSFERS: tuple[TransferName, ...] = get_args(TransferName)

COUNT, LISTED = 8, 4  # bytes of a count, and of an expert's number that goes with a row to a relay


@dataclass
class CommunicationVolume:
    """What one rank sends to other ranks; of it, internode, what goes to other nodes.

    Rows are those of tokens; bytes are all that is sent, weights, counts and lists of experts included. A dispatcher's
    only grow, so that a caller takes the difference of two readings.
    """

    rows: float = 0
    internode_rows: float = 0
    bytes: float = 0
    internode_bytes: float = 0

    def __add__(self, other: Self) -> Self:
        """Add field by field."""
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Self:
        """Scale all."""
        return type(self)(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass(frozen=True)
class _ExpectedAllToAll:
    """How many rows and pairs of a token leave a rank in one all-to-all, and which part of them leaves its node."""

    rows: float
    pairs: float
    internode: float
    listed: bool = False  # whether the experts of a row are sent with it

    def volume(self, row: int, value: int) -> CommunicationVolume:
        """Return what a token's rows of so many bytes come to, with a value of so many for each pair."""
        return _volume(self.rows, self.rows * row + self.pairs * value, self.internode)


def expected_volume(
    config: ParallelConfig, layout: RankLayout, model: ModelConfig, compute_dtype: torch.dtype, rank: int = 0
) -> tuple[dict[TransferName, CommunicationVolume], dict[TransferName, CommunicationVolume]]:
    """Return what `rank` sends for one token of one layer, and beside it for each micro-batch, by transfer."""
    nothing = {name: CommunicationVolume() for name in TRANSFERS}
    if layout.ep_size == 1:
        return nothing, nothing
    row = torch.empty(1, model.hidden_size, dtype=compute_dtype, device="meta")  # [1, D]
    payload = Fp8Payload(model.hidden_size, compute_dtype) if config.dispatch_dtype == "fp8" else PlainPayload()
    to_experts, from_experts = payload.encode(row).nbytes, row.nbytes
    weight = torch.promote_types(compute_dtype, torch.float32).itemsize
    all_to_alls = list(_all_to_alls(config, layout, model, rank))

    def sent(row: int, value: int) -> CommunicationVolume:
        return sum((one.volume(row, value) for one in all_to_alls), CommunicationVolume())

    lists = (_volume(0.0, one.pairs * LISTED, one.internode) for one in all_to_alls if one.listed)
    token: dict[TransferName, CommunicationVolume] = {
        "dispatch": sent(to_experts, weight) + sum(lists, CommunicationVolume()),
        "combine": sent(from_experts, 0),
        "dispatch_backward": sent(from_experts, weight),
        "combine_backward": sent(to_experts, 0),
    }
    on_rank = model.n_routed_experts // layout.ep_size
    counts = on_rank * layout.node_size + 1 if len(all_to_alls) > 1 else on_rank  # that each rank is sent
    others = layout.ep_size - 1
    exchanged = _volume(0.0, others * counts * COUNT, _ranks_on_other_nodes(layout, rank) / others)
    return token, nothing | {"dispatch": exchanged}


def _all_to_alls(
    config: ParallelConfig, layout: RankLayout, model: ModelConfig, rank: int
) -> Iterable[_ExpectedAllToAll]:
    top_k, ranks, size = model.num_experts_per_tok, layout.ep_size, layout.node_size
    if config.dispatch == "direct" or ranks <= size:
        others = ranks - 1
        rows = top_k * others / ranks
        yield _ExpectedAllToAll(rows, rows, _ranks_on_other_nodes(layout, rank) / others)
        return
    nodes = ranks // size
    other_nodes = 1 - 1 / nodes
    yield _ExpectedAllToAll(expected_destinations(model, nodes) * other_nodes, top_k * other_nodes, 1.0, listed=True)
    intranode = top_k * (1 - 1 / size)
    yield _ExpectedAllToAll(intranode, intranode, 0.0)


def _ranks_on_other_nodes(layout: RankLayout, rank: int) -> int:
    """Return how many ranks of the expert group of `rank` stand on other nodes."""
    first = rank // layout.ep_size * layout.ep_size
    node = rank // layout.node_size
    return sum(other // layout.node_size != node for other in range(first, first + layout.ep_size))


def _volume(rows: float, size: float, internode: float) -> CommunicationVolume:
    return CommunicationVolume(rows, rows * internode, size, size * internode)
