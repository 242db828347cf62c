"""Tokens as tensors: batches to train on, documents to be scored. Shapes: B sequences, S targets a sequence."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

from abyssal.data.order import Ranges, WindowOrder
from abyssal.data.shards import Shards
from abyssal.errors import DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of S+1 tokens: the first S are inputs, the last S targets."""

    tokens: Tensor  # [B, S+1] int64; of a share of the batch, its rows only
    first_sequence: int  # which sequence of the run row 0 is
    ranges: Ranges = ()  # the sequence indices of the whole batch in the data order
    lengths: tuple[tuple[int, ...], ...] = ()  # of each row, inputs of one document after another; (): not masked


def windows_by_source(shards: Shards, sequence_length: int) -> dict[str, int]:
    """Return how many windows of `sequence_length`+1 tokens, each one token into the next, each source has.

    A split without named sources is one of the name "".

    Raises:
        DataError: one has none.
    """
    windows = {}
    for name, tokens in _tokens_by_source(shards).items():
        windows[name] = (len(tokens) - 1) // sequence_length
        if windows[name] < 1:
            raise DataError(
                f"{shards.folder}: {f'data.sources.{name} ' if name else ''}has {len(tokens)} training tokens, but "
                f"train.sequence_length={sequence_length} needs at least {sequence_length + 1}; give more text, or "
                "make sequences shorter"
            )
    return windows


def count_windows(shards: Shards, sequence_length: int) -> int:
    """Return how many windows the split has; see `windows_by_source`."""
    return sum(windows_by_source(shards, sequence_length).values())


def _tokens_by_source(shards: Shards) -> dict[str, range]:
    """Return the tokens of each source."""
    return shards.sources or {"": range(len(shards.tokens))}


class BatchLoader:
    """Cuts the stream of training documents into windows and hands them out in the run's order.

    Documents are packed: a window starts and ends anywhere, and attention crosses their borders, unless the batches
    say where documents begin. Paper: §4.1.
    """

    def __init__(
        self, shards: Shards, order: WindowOrder, sequence_length: int, *, mask_documents: bool = False
    ) -> None:
        """Take the training split and an order of its windows; `mask_documents`: whether batches have lengths.

        Raises:
            DataError: the split is shorter than one window, or `order` was made for another number of them.
        """
        windows = count_windows(shards, sequence_length)
        if order.windows != windows:
            raise DataError(f"{shards.folder}: has {windows} windows, but the order was made for {order.windows}")
        self._shards = shards
        self._order = order
        self._sequence_length = sequence_length
        self._mask_documents = mask_documents
        self._first_window = list(accumulate(windows_by_source(shards, sequence_length).values(), initial=0))
        self._first_token = [tokens.start for tokens in _tokens_by_source(shards).values()]

    def batch(self, first_sequence: int, size: int, share: tuple[int, int] = (0, 1)) -> Batch:
        """Return the `size` sequences of the run from `first_sequence` on, skipped ones not counted.

        Args:
            first_sequence: of the whole batch.
            size: of the whole batch.
            share: (i, n): only the rows of the i-th of n equal shares, one after another; n must divide `size`.
        """
        index, parts = share
        if size % parts:
            raise ValueError(f"size={size}: must be a multiple of the {parts} shares")
        own = size // parts
        starts = [self._start(first_sequence + index * own + row) for row in range(own)]
        rows = [self._shards.tokens[start : start + self._sequence_length + 1] for start in starts]
        return Batch(
            tokens=torch.stack([torch.from_numpy(row) for row in rows]),
            first_sequence=first_sequence + index * own,
            ranges=self._order.ranges(first_sequence, size),
            lengths=tuple(map(self._lengths, starts)) if self._mask_documents else (),
        )

    def skipping(self, ranges: Ranges) -> Self:
        """Return a loader of the same sequences without those of `ranges`, whatever this one skips."""
        loader = copy(self)
        loader._order = self._order.skipping(ranges)
        return loader

    def _start(self, n: int) -> int:
        """Return the first token of the n-th sequence of the run."""
        window = self._order.window(self._order.effective(n))
        source = bisect_right(self._first_window, window) - 1
        return self._first_token[source] + (window - self._first_window[source]) * self._sequence_length

    def _lengths(self, start: int) -> tuple[int, ...]:
        """Return how many inputs of the window are of its first document, of its second, and so on."""
        stop = start + self._sequence_length
        borders = [start, *self._shards.document_starts(start + 1, stop), stop]
        return tuple(after - before for before, after in pairwise(borders))


@dataclass(frozen=True, eq=False)
class EvaluationSequence:
    """A slice of one document to be scored: token i+1 is predicted from tokens 0 to i of this slice."""

    tokens: Tensor  # [n+1] int64, 1 <= n <= S
    document: int
    num_bytes: int  # of the document's text, with its first slice; 0 with the others


def evaluation_sequences(
    shards: Shards, sequence_length: int, max_bytes: int | None = None
) -> Iterator[EvaluationSequence]:
    """Yield slices in which every token of a document after BOS, EOS included, is a target exactly once.

    A document longer than S goes on in further slices, whose first token is the last of the slice before. The bits
    per byte of a split are the nats of all targets / ln 2 / the bytes of all slices.

    Args:
        shards: the split.
        sequence_length: S, the targets of a slice at most.
        max_bytes: whole documents are taken, in order, as long as they come to no more than this; but at least one.
    """
    total = 0
    for document in range(shards.documents):
        num_bytes = shards.document_bytes(document)
        total += num_bytes
        if max_bytes is not None and document > 0 and total > max_bytes:
            return
        tokens = torch.from_numpy(shards.document(document))
        for start in range(0, len(tokens) - 1, sequence_length):
            yield EvaluationSequence(
                tokens[start : start + sequence_length + 1], document, num_bytes if start == 0 else 0
            )
