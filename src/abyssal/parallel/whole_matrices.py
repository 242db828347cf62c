"""Whole matrices of parameters that are spread over ranks: each is put together, and worked on, on one of them.

Legend: L stacked matrices, A rows of a parameter, B columns, N rows of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from abyssal.parallel.deal import Spread, deal, overlap


@dataclass(frozen=True)
class Piece:
    """Rows of one matrix that lie on one rank, the holder, and are worked on on another or the same, the owner."""

    matrix: int  # its number in the deal
    owner: int
    holder: int
    parameter: int
    index: int  # of the matrix in the holder's part of the stack
    held: range  # these rows, counted in the holder's part
    rows: range  # and in the matrix
    columns: int
    asked: bool  # whether the owner takes them from this holder, and not from another copy's

    def of(self, parts: Sequence[Tensor]) -> Tensor:
        """Return this piece of the holder's parts of all parameters: [N, B], in their memory."""
        part = parts[self.parameter]
        return part.view(-1, *part.shape[-2:])[self.index, self.held.start : self.held.stop]

    def of_whole(self, matrix: Tensor) -> Tensor:
        """Return this piece of the whole matrix: [N, B], in its memory."""
        return matrix[self.rows.start : self.rows.stop]


class WholeMatrices:
    """Lets each whole matrix be worked on once, by one rank of those that share it.

    A call is two all-to-alls, each of all parameters together: rows go to the owners, and the same rows of what they
    made come back. Copies along dp_replicate share the work, so that they cannot drift apart: an owner takes rows from
    its own copy and returns them to all. What stays on its rank is not sent.
    """

    def __init__(
        self, parameters: Sequence[tuple[Tensor, int]], group: dist.ProcessGroup, cost: Callable[[int, int], int]
    ) -> None:
        """Deal the matrices out, without communication; every rank of `group` calls it with the same parameters.

        Args:
            parameters: DTensors over these ranks, [A, B] or [L, A, B], and of how many matrices, one above the other,
                each of theirs consists.
            group: the ranks that call together.
            cost: of the work on a matrix, by its rows and columns.
        """
        self.group, self.rank = group, dist.get_rank(group)
        ranks = dist.get_process_group_ranks(group)
        spreads = [Spread.of(parameter, matrices, ranks) for parameter, matrices in parameters]
        pieces = _pieces_of(self.rank, spreads, cost)
        here = self.rank
        self.staying = [p for p in pieces if p.owner == here and p.holder == here]
        self.held = [p for p in pieces if p.holder == here and p.owner != here]
        self.owned = [p for p in pieces if p.owner == here and p.holder != here]

    def __call__(self, parts: Sequence[Tensor], work: Callable[[Sequence[Tensor]], list[Tensor]]) -> list[Tensor]:
        """Return this rank's parts of what `work` makes of all whole matrices; the ranks of the group call together.

        Args:
            parts: this rank's part of every parameter, as given to the constructor; all of one dtype, in which they are
                sent. Not changed.
            work: takes stacks [L, A, B], those that this rank owns, and returns others of the same shapes and dtype.
        """
        asked = {piece: piece.of(parts) for piece in self.held if piece.asked}
        rows = self._exchange(asked, [piece for piece in self.owned if piece.asked], parts[0])
        rows |= {piece: piece.of(parts) for piece in self.staying}
        matrices: dict[int, list[Tensor]] = {}
        for piece in sorted(rows, key=lambda piece: (piece.matrix, piece.rows.start)):
            matrices.setdefault(piece.matrix, []).append(rows[piece])
        made = work([(torch.cat(found) if len(found) > 1 else found[0])[None] for found in matrices.values()])
        whole = {number: stack[0] for number, stack in zip(matrices, made, strict=True)}

        results = [torch.empty_like(part) for part in parts]
        returned = {piece: piece.of_whole(whole[piece.matrix]) for piece in self.owned}
        back = self._exchange(returned, self.held, parts[0])
        back |= {piece: piece.of_whole(whole[piece.matrix]) for piece in self.staying}
        for piece, update in back.items():
            piece.of(results).copy_(update)
        return results

    def _exchange(
        self, leaving: Mapping[Piece, Tensor], arriving: Sequence[Piece], like: Tensor
    ) -> dict[Piece, Tensor]:
        """Send pieces [N, B] to the other rank that each has, and return those that come, in the dtype of `like`."""
        to, from_ = ([0] * self.group.size() for _ in range(2))
        for piece in leaving:
            to[self._other(piece)] += len(piece.rows) * piece.columns
        for piece in arriving:
            from_[self._other(piece)] += len(piece.rows) * piece.columns
        # by rank, and by matrix for each of them: in that order both ends lay them
        sent = [leaving[piece].reshape(-1) for piece in sorted(leaving, key=self._other)]
        buffer = like.new_empty(sum(from_))
        dist.all_to_all_single(buffer, torch.cat(sent) if sent else like.new_empty(0), from_, to, group=self.group)
        expected = sorted(arriving, key=self._other)
        found = buffer.split([len(piece.rows) * piece.columns for piece in expected])
        return {piece: flat.view(-1, piece.columns) for piece, flat in zip(expected, found, strict=True)}

    def _other(self, piece: Piece) -> int:
        return piece.owner if piece.holder == self.rank else piece.holder


def _pieces_of(rank: int, spreads: Sequence[Spread], cost: Callable[[int, int], int]) -> list[Piece]:
    """Deal out, and return the pieces that a rank holds or owns, in the order of matrices."""
    found = []
    for number, matrix in enumerate(deal(spreads, cost)):
        spread = spreads[matrix.parameter]
        holders = matrix.ranks if matrix.owner == rank else [rank] if rank in matrix.ranks else []
        for holder in holders:
            part = spread.parts[holder]
            if not (rows := overlap(matrix.rows, part.rows)):
                continue
            piece = Piece(
                number,
                matrix.owner,
                holder,
                matrix.parameter,
                index=matrix.index - part.stack.start,
                held=range(rows.start - part.rows.start, rows.stop - part.rows.start),
                rows=range(rows.start - matrix.rows.start, rows.stop - matrix.rows.start),
                columns=spread.shape[2],
                asked=part.copy == spread.parts[matrix.owner].copy,
            )
            found.append(piece)
    return found
