"""What a dispatcher sends where every expert is as likely as any other: rows and bytes in the mean.

The counters of `ExpertParallelDispatcher.traffic` say what a run has really sent; this is what they come to, for each
of the four ways, where routing is balanced. Sizes are read off rows on the meta device, encoded as they are sent.

Legend: T tokens, D hidden, K experts a token, E experts, R ranks of an expert group, N nodes of it, L ranks of a node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

import torch

from abyssal.config import ModelConfig
from abyssal.config.parallel import ParallelConfig
from abyssal.parallel.dispatch.dispatcher import Leg
from abyssal.parallel.dispatch.message import Fp8, Plain
from abyssal.parallel.layout import RankLayout
from abyssal.plan.traffic import expected_places

COUNT, LISTED = 8, 4  # bytes of a count, and of an expert's number that goes with a row to a relay


@dataclass(frozen=True)
class Sent:
    """What one rank sends to others, as `exchange.Traffic` counts it, in the mean."""

    rows_to_ranks: float = 0.0
    rows_to_nodes: float = 0.0
    bytes_to_ranks: float = 0.0
    bytes_to_nodes: float = 0.0

    def __add__(self, other: Self) -> Self:
        """Add field by field."""
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Self:
        """Scale all."""
        return type(self)(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass(frozen=True)
class _Hop:
    """One all-to-all: how many rows and pairs of a token go to other ranks, and which share of them to other nodes."""

    rows: float
    pairs: float
    apart: float
    listed: bool = False  # whether the experts of a row are sent with it


def expected_dispatch(
    config: ParallelConfig, layout: RankLayout, model: ModelConfig, compute_dtype: torch.dtype, rank: int = 0
) -> tuple[dict[Leg, Sent], dict[Leg, Sent]]:
    """Return what `rank` sends for one token of one layer, and beside it for each micro-batch, by way."""
    legs: tuple[Leg, ...] = ("dispatch", "combine", "dispatch_backward", "combine_backward")
    if layout.ep_size == 1:
        return dict.fromkeys(legs, Sent()), dict.fromkeys(legs, Sent())
    row = torch.empty(1, model.hidden_size, dtype=compute_dtype, device="meta")  # [1, D]
    encoding = Fp8(model.hidden_size, compute_dtype) if config.dispatch_dtype == "fp8" else Plain()
    out, back = _bytes(encoding.encode(row)), _bytes(row)
    weight = torch.promote_types(compute_dtype, torch.float32).itemsize
    hops = list(_hops(config, layout, model, rank))
    listed = sum((_sent(0.0, hop.pairs * LISTED, hop.apart) for hop in hops if hop.listed), Sent())
    token: dict[Leg, Sent] = {
        "dispatch": _ways(hops, out, weight) + listed,
        "combine": _ways(hops, back, 0),
        "dispatch_backward": _ways(hops, back, weight),
        "combine_backward": _ways(hops, out, 0),
    }
    on_rank = model.n_routed_experts // layout.ep_size
    told = on_rank * layout.node_size + 1 if len(hops) > 1 else on_rank  # counts that each rank is sent
    others = layout.ep_size - 1
    counts = _sent(0.0, others * told * COUNT, _elsewhere(layout, rank) / others)
    return token, {**dict.fromkeys(legs, Sent()), "dispatch": counts}


def _hops(config: ParallelConfig, layout: RankLayout, model: ModelConfig, rank: int) -> Iterable[_Hop]:
    top_k, ranks, size = model.num_experts_per_tok, layout.ep_size, layout.node_size
    if config.dispatch == "direct" or ranks <= size:
        others = ranks - 1
        rows = top_k * others / ranks
        yield _Hop(rows, rows, _elsewhere(layout, rank) / others)
        return
    nodes = ranks // size
    other_nodes = 1 - 1 / nodes
    yield _Hop(expected_places(model, nodes) * other_nodes, top_k * other_nodes, 1.0, listed=True)
    within = top_k * (1 - 1 / size)
    yield _Hop(within, within, 0.0)


def _elsewhere(layout: RankLayout, rank: int) -> int:
    """Return how many ranks of the expert group of `rank` stand on other nodes."""
    first = rank // layout.ep_size * layout.ep_size
    here = rank // layout.node_size
    return sum(other // layout.node_size != here for other in range(first, first + layout.ep_size))


def _ways(hops: list[_Hop], row: int, value: int) -> Sent:
    """Return all hops of a token with rows of so many bytes and, for each pair, a value of so many."""
    return sum((_sent(hop.rows, hop.rows * row + hop.pairs * value, hop.apart) for hop in hops), Sent())


def _sent(rows: float, size: float, apart: float) -> Sent:
    return Sent(rows, rows * apart, size, size * apart)


def _bytes(rows: torch.Tensor) -> int:
    return rows.numel() * rows.element_size()
