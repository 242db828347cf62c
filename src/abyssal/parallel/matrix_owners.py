"""Which rank owns which whole matrix: a function of shapes, placements and costs, without a process group.

Legend: L stacked matrices, A rows, B columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from abyssal.ranks.placements import TensorShard, is_distributed, shard_by_rank


@dataclass(frozen=True)
class ShardedMatrices:
    """A parameter [L, A, B], or [A, B] with L = 1, and what each rank holds of it: all columns of some rows."""

    shape: tuple[int, int, int]
    matrices: int  # that each of the L consists of, one above the other
    shards: tuple[TensorShard, ...]  # of every rank, in their order; three dims each

    @classmethod
    def of(cls, parameter: Tensor, matrices: int, ranks: Sequence[int]) -> Self:
        """Read it from a DTensor over a mesh of exactly these global `ranks`, without communication.

        Raises:
            ValueError: it is none, or columns are sharded, or other ranks hold it.
        """
        by_rank = shard_by_rank(parameter) if is_distributed(parameter) else {}
        if sorted(by_rank) != sorted(ranks):
            raise ValueError("a matrix must be a DTensor over all ranks of its pipeline stage")
        if parameter.dim() not in (2, 3):
            raise ValueError(f"shape {tuple(parameter.shape)}: a matrix, or one dim of stacked ones, is expected")
        stack, height, columns = (1, *parameter.shape)[-3:]
        shards = [replace(shard, ranges=(range(1), *shard.ranges)[-3:]) for shard in map(by_rank.__getitem__, ranks)]
        if any(len(shard.ranges[2]) < columns for shard in shards):
            raise ValueError(f"{parameter.shape}: columns are sharded; rows and stacked matrices may be")
        return cls((stack, height, columns), matrices, tuple(shards))

    def holders(self) -> Iterator[tuple[range, list[int]]]:
        """Return, for each range of the stack, the ranks that hold rows of its matrices."""
        by_stack = defaultdict[range, list[int]](list)
        for rank, shard in enumerate(self.shards):
            by_stack[shard.ranges[0]].append(rank)
        yield from ((stack, ranks) for stack, ranks in by_stack.items() if stack)


@dataclass(frozen=True)
class Matrix:
    """A whole matrix, and the rank that works on it."""

    parameter: int
    index: int  # in the stack
    rows: range  # of the parameter's
    ranks: tuple[int, ...]  # that hold rows of it
    cost: int
    owner: int = -1


def assign_matrices(parameters: Sequence[ShardedMatrices], cost: Callable[[int, int], int]) -> list[Matrix]:
    """Give every whole matrix to one of the ranks that hold rows of it, so that all ranks have about as much to do.

    The dearest go first, each to the rank with least to do; of several to the one that holds most of it. Matrices that
    few ranks hold, as experts, are assigned before those that can even out what is left.

    Args:
        parameters: over the same ranks.
        cost: of a matrix, by its rows and columns.

    Returns:
        The matrices in the order of parameters, stack and rows; the same on every rank that asks.
    """
    matrices = []
    for number, parameter in enumerate(parameters):
        height, columns = parameter.shape[1] // parameter.matrices, parameter.shape[2]
        for stack, ranks in parameter.holders():
            for index in stack:
                for first in range(0, height * parameter.matrices, height):
                    rows = range(first, first + height)
                    matrices.append(Matrix(number, index, rows, tuple(ranks), cost(height, columns)))
    matrices.sort(key=lambda matrix: (len(matrix.ranks), -matrix.cost, _order(matrix)))
    loads, assigned = [0] * len(parameters[0].shards), []
    for matrix in matrices:
        shards = parameters[matrix.parameter].shards
        rows_of = {rank: len(overlap(matrix.rows, shards[rank].ranges[1])) for rank in matrix.ranks}
        _, _, owner = min((loads[rank], -rows, rank) for rank, rows in rows_of.items())
        loads[owner] += matrix.cost
        assigned.append(replace(matrix, owner=owner))
    return sorted(assigned, key=_order)


def _order(matrix: Matrix) -> tuple[int, int, int]:
    return matrix.parameter, matrix.index, matrix.rows.start


def overlap(a: range, b: range) -> range:
    """Return what two ranges have in common."""
    return range(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))
