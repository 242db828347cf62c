"""The asynchronous all-to-all, where a row leaves for another rank; what it sends is counted.

Legend: R ranks of the group, S rows sent, N rows received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from abyssal.parallel.dispatch.volume import CommunicationVolume


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that share a layer's experts, or those of them that rows cross nodes or stay in a node between."""

    process_group: dist.ProcessGroup
    rank: int  # of this process in the group
    nodes: tuple[int, ...]  # the node of each rank

    @classmethod
    def of(cls, process_group: dist.ProcessGroup, node_size: int) -> Self:
        """Return a process group that this rank is in, with its nodes, which hold neighbours in rank."""
        nodes = tuple(rank // node_size for rank in dist.get_process_group_ranks(process_group))
        return cls(process_group, dist.get_rank(process_group), nodes)

    @property
    def size(self) -> int:
        """R."""
        return len(self.nodes)

    def leaving(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Return how much of what is sent to each rank leaves this rank, and how much leaves its node."""
        node = self.nodes[self.rank]
        internode = sum(size for size, other in zip(sizes, self.nodes, strict=True) if other != node)
        return sum(sizes) - sizes[self.rank], internode


@dataclass(frozen=True)
class AsyncAllToAll:
    """An all-to-all in flight; holds both buffers until it has ended."""

    received: Tensor
    sent: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """Return what has been received: [N, ...]."""
        if self.work is not None:
            self.work.wait()
        return self.received


def start_all_to_all(
    group: ExpertGroup, sent: Tensor, splits: Tensor, volume: CommunicationVolume, *, rows: bool = False
) -> AsyncAllToAll:
    """Start to send `sent` [S, ...], sorted by receiving rank; what is received is sorted by sending rank.

    Args:
        splits: [2, R] on the CPU, how many go to each rank and how many come from each.
        volume: is added to.
        rows: whether these are tokens' rows, which are counted as such.
    """
    input_sizes, output_sizes = splits.tolist()
    sent = sent.contiguous()
    leaving, internode = group.leaving(input_sizes)
    size = sent[:1].numel() * sent.element_size() if len(sent) else 0
    volume.bytes += leaving * size
    volume.internode_bytes += internode * size
    if rows:
        volume.rows += leaving
        volume.internode_rows += internode
    if group.size == 1:
        return AsyncAllToAll(sent, sent, None)
    received = sent.new_empty(sum(output_sizes), *sent.shape[1:])
    work = dist.all_to_all_single(received, sent, output_sizes, input_sizes, group=group.process_group, async_op=True)
    return AsyncAllToAll(received, sent, work)


def exchange_counts(group: ExpertGroup, counts: Tensor, volume: CommunicationVolume) -> Tensor:
    """Send one row of `counts` [R, ...] to each rank and return the one from each: [R, ...]."""
    return start_all_to_all(group, counts, torch.ones(2, group.size, dtype=torch.int64), volume).wait()
