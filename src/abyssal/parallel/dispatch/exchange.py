"""An all-to-all among the ranks of a group, in two halves, and the count of what it sent.

Legend: R ranks of the group, S rows sent, N rows received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What this rank has sent to others so far; it only grows, so that a caller takes the difference of two readings.

    Rows are those of tokens; bytes are all that is sent, weights, counts and lists of experts included. What goes to
    another node is counted among what goes to another rank too.
    """

    rows_to_ranks: int = 0
    rows_to_nodes: int = 0
    bytes_to_ranks: int = 0
    bytes_to_nodes: int = 0


@dataclass(frozen=True)
class Link:
    """A process group, and which of its ranks stand elsewhere."""

    group: dist.ProcessGroup
    rank: int
    nodes: tuple[int, ...]  # of each rank of the group

    @classmethod
    def over(cls, group: dist.ProcessGroup, node_size: int) -> Self:
        """Return the link over `group`, of which this rank is a member; nodes hold neighbours in rank."""
        nodes = tuple(rank // node_size for rank in dist.get_process_group_ranks(group))
        return cls(group, dist.get_rank(group), nodes)

    @property
    def size(self) -> int:
        """R."""
        return len(self.nodes)

    def elsewhere(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Return how much of what is sent to each rank goes to other ranks, and how much to other nodes."""
        ranks = sum(sizes) - sizes[self.rank]
        here = self.nodes[self.rank]
        return ranks, sum(size for size, node in zip(sizes, self.nodes, strict=True) if node != here)


@dataclass(frozen=True)
class Transfer:
    """Rows under way; both buffers are held until they have arrived."""

    arriving: Tensor
    leaving: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """Return what has arrived: [N, ...]."""
        if self.work is not None:
            self.work.wait()
        return self.arriving


def send(link: Link, leaving: Tensor, splits: Tensor, traffic: Traffic, *, rows: bool = False) -> Transfer:
    """Begin to send `leaving` [S, ...], sorted by receiving rank; what arrives is sorted by sending rank.

    Args:
        splits: [2, R] on the CPU, how many to each rank and how many from each.
        traffic: is added to.
        rows: whether these are tokens' rows, which are counted as such.
    """
    to, from_ = splits.tolist()
    leaving = leaving.contiguous()
    ranks, nodes = link.elsewhere(to)
    size = leaving[:1].numel() * leaving.element_size() if len(leaving) else 0
    traffic.bytes_to_ranks += ranks * size
    traffic.bytes_to_nodes += nodes * size
    if rows:
        traffic.rows_to_ranks += ranks
        traffic.rows_to_nodes += nodes
    if link.size == 1:
        return Transfer(leaving, leaving, None)
    arriving = leaving.new_empty(sum(from_), *leaving.shape[1:])
    work = dist.all_to_all_single(arriving, leaving, from_, to, group=link.group, async_op=True)
    return Transfer(arriving, leaving, work)


def send_evenly(link: Link, leaving: Tensor, traffic: Traffic) -> Tensor:
    """Send one row of `leaving` [R, ...] to each rank and return the one from each: [R, ...]."""
    return send(link, leaving, torch.ones(2, link.size, dtype=torch.int64), traffic).wait()
