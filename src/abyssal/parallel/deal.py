"""Which rank works on which whole matrix: a function of shapes, placements and costs, without a process group.

Legend: L stacked matrices, A rows, B columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from abyssal.ranks.placements import is_distributed, shard_by_rank


@dataclass(frozen=True)
class Part:
    """What one rank holds of a parameter [L, A, B]: all columns of some rows of some of its matrices."""

    stack: range
    rows: range
    copy: int = 0  # which of the parameter's copies it belongs to


@dataclass(frozen=True)
class Spread:
    """A parameter [L, A, B], or [A, B] with L = 1, and the part of it that each rank holds."""

    shape: tuple[int, int, int]
    matrices: int  # that each of the L consists of, one above the other
    parts: tuple[Part, ...]  # of every rank, in their order

    @classmethod
    def of(cls, parameter: Tensor, matrices: int, ranks: Sequence[int]) -> Self:
        """Read it from a DTensor over a mesh of exactly these global `ranks`, without communication.

        Raises:
            ValueError: it is none, or columns are sharded, or other ranks hold it.
        """
        shards = shard_by_rank(parameter) if is_distributed(parameter) else {}
        if sorted(shards) != sorted(ranks):
            raise ValueError("a matrix must be a DTensor over all ranks of its pipeline stage")
        leading = parameter.dim() - 2
        if leading not in (0, 1):
            raise ValueError(f"shape {tuple(parameter.shape)}: a matrix, or one dim of stacked ones, is expected")
        stack, height, columns = (1,) * (1 - leading) + tuple(parameter.shape)
        parts = []
        for rank in ranks:
            stacked, rows, cut = [range(1), *shards[rank].ranges][-3:]
            if len(cut) < columns:
                raise ValueError(f"{parameter.shape}: columns are sharded; rows and stacked matrices may be")
            parts.append(Part(stacked, rows, shards[rank].copy))
        return cls((stack, height, columns), matrices, tuple(parts))

    def sharing(self) -> Iterator[tuple[range, list[int]]]:
        """Return, for each range of the stack, the ranks that hold its matrices; several ranks share each of them."""
        found = defaultdict[range, list[int]](list)
        for rank, part in enumerate(self.parts):
            found[part.stack].append(rank)
        yield from ((stack, ranks) for stack, ranks in found.items() if stack)


@dataclass(frozen=True)
class Matrix:
    """A whole matrix, and the rank that works on it."""

    parameter: int
    index: int  # in the stack
    rows: range  # of the parameter's
    ranks: tuple[int, ...]  # that share its parameter's part of the stack
    cost: int
    owner: int = -1


def deal(parameters: Sequence[Spread], cost: Callable[[int, int], int]) -> list[Matrix]:
    """Give every whole matrix to one of the ranks that share it, so that all ranks have about as much to do.

    The dearest go first, each to the rank with least to do; of several to the one that holds most of it. Matrices that
    few ranks share, as experts, are dealt before those that can even out what is left.

    Args:
        parameters: as spread over the same ranks.
        cost: of a matrix, by its rows and columns.

    Returns:
        The matrices in the order of parameters, stack and rows; the same on every rank that asks.
    """
    matrices = []
    for number, parameter in enumerate(parameters):
        height, columns = parameter.shape[1] // parameter.matrices, parameter.shape[2]
        for stack, ranks in parameter.sharing():
            for index in stack:
                for first in range(0, height * parameter.matrices, height):
                    rows = range(first, first + height)
                    matrices.append(Matrix(number, index, rows, tuple(ranks), cost(height, columns)))
    matrices.sort(key=lambda matrix: (len(matrix.ranks), -matrix.cost, _place(matrix)))
    loads, dealt = [0] * len(parameters[0].parts), []
    for matrix in matrices:
        parts = parameters[matrix.parameter].parts
        held = {rank: len(overlap(matrix.rows, parts[rank].rows)) for rank in matrix.ranks}
        _, _, owner = min((loads[rank], -rows, rank) for rank, rows in held.items())
        loads[owner] += matrix.cost
        dealt.append(replace(matrix, owner=owner))
    return sorted(dealt, key=_place)


def _place(matrix: Matrix) -> tuple[int, int, int]:
    return matrix.parameter, matrix.index, matrix.rows.start


def overlap(a: range, b: range) -> range:
    """Return what two ranges have in common."""
    return range(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))
