"""Matrices whose rows lie on several ranks: each is gathered, and worked on, on the rank that owns it.

Legend: L stacked matrices, A rows of a parameter, B columns, N rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from abyssal.parallel.matrix_owners import ShardedMatrices, assign_matrices, overlap


@dataclass(frozen=True)
class RowBlock:
    """Rows of one matrix that lie on one rank, the holder, and are worked on by another or the same, the owner."""

    matrix: int  # its number among all
    owner: int
    holder: int
    parameter: int
    index: int  # of the matrix in the holder's shard of the stack
    shard_rows: range  # these rows, counted in the holder's shard
    matrix_rows: range  # and in the matrix
    columns: int
    is_source: bool  # whether the owner takes them from this holder, and not from another copy's

    @property
    def numel(self) -> int:
        """How many values these are."""
        return len(self.matrix_rows) * self.columns

    def of(self, shards: Sequence[Tensor]) -> Tensor:
        """Return this block of the holder's shards of all parameters: [N, B], in their memory."""
        shard = shards[self.parameter]
        return shard.view(-1, *shard.shape[-2:])[self.index, self.shard_rows.start : self.shard_rows.stop]

    def of_whole(self, matrix: Tensor) -> Tensor:
        """Return this block of the whole matrix: [N, B], in its memory."""
        return matrix[self.matrix_rows.start : self.matrix_rows.stop]


class MatrixExchange:
    """Lets each whole matrix be worked on once, by the rank that owns it.

    A call is two all-to-alls, each of all parameters together: rows go to the owners, and the same rows of the results
    come back. Copies along dp_replicate share the work, so that they cannot drift apart: an owner takes rows from its
    own copy and returns them to all. What stays on its rank is not sent.
    """

    def __init__(
        self, parameters: Sequence[tuple[Tensor, int]], group: dist.ProcessGroup, cost: Callable[[int, int], int]
    ) -> None:
        """Assign the matrices, without communication; every rank of `group` calls it with the same parameters.

        Args:
            parameters: DTensors over these ranks, [A, B] or [L, A, B], and of how many matrices, one above the other,
                each of theirs consists.
            group: the ranks that call together.
            cost: of the work on a matrix, by its rows and columns.
        """
        self.group, self.rank = group, dist.get_rank(group)
        ranks = dist.get_process_group_ranks(group)
        blocks = _blocks_of(self.rank, [ShardedMatrices.of(p, matrices, ranks) for p, matrices in parameters], cost)
        here = self.rank
        self.staying = [block for block in blocks if block.owner == here and block.holder == here]
        self.held = [block for block in blocks if block.holder == here and block.owner != here]
        self.owned = [block for block in blocks if block.owner == here and block.holder != here]

    def __call__(self, shards: Sequence[Tensor], work: Callable[[Sequence[Tensor]], list[Tensor]]) -> list[Tensor]:
        """Return this rank's shards of what `work` makes of all whole matrices; the ranks of the group call together.

        Args:
            shards: this rank's shard of every parameter, in the constructor's order; all of one dtype, in which they
                are sent. Not changed.
            work: takes stacks [L, A, B], those that this rank owns, and returns others of the same shapes and dtype.
        """
        sent = {block: block.of(shards) for block in self.held if block.is_source}
        rows = self._all_to_all(sent, [block for block in self.owned if block.is_source], shards[0])
        rows |= {block: block.of(shards) for block in self.staying}
        matrices: dict[int, list[Tensor]] = {}
        for block in sorted(rows, key=lambda block: (block.matrix, block.matrix_rows.start)):
            matrices.setdefault(block.matrix, []).append(rows[block])
        stacks = work([(torch.cat(parts) if len(parts) > 1 else parts[0])[None] for parts in matrices.values()])
        results = {number: stack[0] for number, stack in zip(matrices, stacks, strict=True)}

        updates = [torch.empty_like(shard) for shard in shards]
        returned = {block: block.of_whole(results[block.matrix]) for block in self.owned}
        received = self._all_to_all(returned, self.held, shards[0])
        received |= {block: block.of_whole(results[block.matrix]) for block in self.staying}
        for block, update in received.items():
            block.of(updates).copy_(update)
        return updates

    def _all_to_all(
        self, sent: Mapping[RowBlock, Tensor], arriving: Sequence[RowBlock], like: Tensor
    ) -> dict[RowBlock, Tensor]:
        """Send blocks [N, B] to the other rank that each has, and return those that come, in the dtype of `like`."""
        to, from_ = ([0] * self.group.size() for _ in range(2))
        for block in sent:
            to[self._other(block)] += block.numel
        for block in arriving:
            from_[self._other(block)] += block.numel
        # by rank, and by matrix for each of them: in that order both ends lay them
        rows = [sent[block].reshape(-1) for block in sorted(sent, key=self._other)]
        buffer = like.new_empty(sum(from_))
        dist.all_to_all_single(buffer, torch.cat(rows) if rows else like.new_empty(0), from_, to, group=self.group)
        blocks = sorted(arriving, key=self._other)
        parts = buffer.split([block.numel for block in blocks])
        return {block: part.view(-1, block.columns) for block, part in zip(blocks, parts, strict=True)}

    def _other(self, block: RowBlock) -> int:
        return block.owner if block.holder == self.rank else block.holder


def _blocks_of(rank: int, parameters: Sequence[ShardedMatrices], cost: Callable[[int, int], int]) -> list[RowBlock]:
    """Assign the matrices, and return the blocks that a rank holds or owns, in the order of matrices."""
    blocks = []
    for number, matrix in enumerate(assign_matrices(parameters, cost)):
        parameter = parameters[matrix.parameter]
        holders = matrix.ranks if matrix.owner == rank else [rank] if rank in matrix.ranks else []
        for holder in holders:
            shard = parameter.shards[holder]
            stack, shard_rows, _ = shard.ranges
            if not (rows := overlap(matrix.rows, shard_rows)):
                continue
            block = RowBlock(
                number,
                matrix.owner,
                holder,
                matrix.parameter,
                index=matrix.index - stack.start,
                shard_rows=range(rows.start - shard_rows.start, rows.stop - shard_rows.start),
                matrix_rows=range(rows.start - matrix.rows.start, rows.stop - matrix.rows.start),
                columns=parameter.shape[2],
                is_source=shard.copy == parameter.shards[matrix.owner].copy,
            )
            blocks.append(block)
    return blocks
