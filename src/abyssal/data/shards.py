"""Shards: token ids on disk with the borders of their documents, read through memory maps.

Of shard n of a split, with T tokens and N documents:
`{split}-{n:05d}.tokens.npy` [T] uint16 or uint32, every document as BOS, text, EOS;
`{split}-{n:05d}.documents.npy` [N+1] int64, where each document starts, and T;
`{split}-{n:05d}.bytes.npy` [N] int64, the UTF-8 bytes of each document's text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from abyssal.data.corpus import SplitName
from abyssal.data.manifest import DatasetManifest, ShardFile, Split, TokenShard, repair_hint
from abyssal.errors import DataError
from abyssal.files.atomic import atomic_file
from abyssal.files.checksums import HashingWriter, sha256
from abyssal.files.faults import os_faults

#: Shards whose memory maps stay open; each holds file descriptors, of which a process has about a thousand.
OPEN_SHARDS = 64


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest type on disk that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_shard(stem: Path, documents: Sequence[NDArray[Any]], num_bytes: Sequence[int], dtype: str) -> TokenShard:
    """Write one shard, each file whole or not at all.

    Args:
        stem: folder and `{split}-{n:05d}`.
        documents: the token ids of each document, BOS and EOS included.
        num_bytes: the UTF-8 bytes of each document's text.
        dtype: of the token ids on disk.

    Raises:
        DataError: the disk is full, or a file cannot be written.
    """
    tokens = np.concatenate([np.zeros(0, dtype), *documents], dtype=dtype)
    starts = np.fromiter(accumulate(map(len, documents), initial=0), np.int64)
    return TokenShard(
        documents=len(documents),
        tokens=len(tokens),
        bytes=sum(num_bytes),
        token_file=_write_array(stem, "tokens", tokens),
        document_file=_write_array(stem, "documents", starts),
        byte_file=_write_array(stem, "bytes", np.array(num_bytes, np.int64)),
    )


def is_intact(folder: Path, shard: TokenShard) -> bool:
    """Whether every file of a shard is there with the checksum that was written."""
    try:
        return all(sha256(folder / file.name) == file.sha256 for file in shard.files)
    except OSError:
        return False


class Shards:
    """One split of a data folder: `tokens[a:b]` of it as one stream, or document by document."""

    def __init__(self, folder: Path, split: Split, dtype: str) -> None:
        """Read `split` from `folder`; most callers want `open`."""
        self.folder = folder
        self.sources: dict[str, range] = {}  # the tokens of each source that has a name; none: they are one
        self.documents, self.bytes = split.documents, split.bytes
        self._shards = split.shards
        self._dtype = np.dtype(dtype)
        self._first_document = list(accumulate((shard.documents for shard in split.shards), initial=0))
        self._first_token = list(accumulate((shard.tokens for shard in split.shards), initial=0))
        self._map = lru_cache(maxsize=OPEN_SHARDS)(self._map_shard)
        self.tokens = TokenStream(self._first_token, lambda n: self._map(n).tokens)

    @classmethod
    def open(cls, folder: Path, split: SplitName) -> Self:
        """Open a split; every file must be there in its full size.

        Raises:
            DataError: the folder is unfinished, or a file is missing or has another size.
        """
        manifest = DatasetManifest.read(folder)
        shards = cls(folder, manifest.splits[split], manifest.dtype)
        if split == "train":
            start = 0
            for source in manifest.sources:
                shards.sources[source.name] = range(start, start := start + source.tokens)
        for file in shards._files():
            path = folder / file.name
            size = path.stat().st_size if path.is_file() else None
            if size != file.size:
                fault = "missing" if size is None else f"damaged, has {size} bytes instead of {file.size}"
                raise DataError(f"{path}: {fault}; {repair_hint(folder)}")
        return shards

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            DataError: a file is not what was written.
        """
        for file in self._files():
            path = self.folder / file.name
            if sha256(path) != file.sha256:
                raise DataError(
                    f"{path}: damaged, its checksum is not the one in the manifest; {repair_hint(self.folder)}"
                )

    def document(self, index: int) -> NDArray[np.int64]:
        """Return the token ids of a document, BOS and EOS included."""
        shard, place = self._locate(index)
        start, stop = shard.starts[place], shard.starts[place + 1]
        return shard.tokens[start:stop].astype(np.int64)

    def document_starts(self, start: int, stop: int) -> list[int]:
        """Return which of the tokens [start, stop) of the stream are the first of a document."""
        first_tokens = list[int]()
        for number, (first, end) in enumerate(pairwise(self._first_token)):
            if first < stop and start < end:
                starts = self._map(number).starts[:-1]
                low, high = np.searchsorted(starts, (start - first, stop - first))
                first_tokens += (starts[low:high] + first).tolist()
        return first_tokens

    def document_bytes(self, index: int) -> int:
        """Return the UTF-8 bytes of a document's text."""
        shard, place = self._locate(index)
        return int(shard.bytes[place])

    def _locate(self, document: int) -> tuple[ShardArrays, int]:
        """Return the shard that holds a document, and its place there."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        number = bisect_right(self._first_document, document) - 1
        return self._map(number), document - self._first_document[number]

    def _files(self) -> list[ShardFile]:
        return [file for shard in self._shards for file in shard.files]

    def _map_shard(self, number: int) -> ShardArrays:
        shard = self._shards[number]
        return ShardArrays(
            tokens=self._map_array(shard.token_file, self._dtype, shard.tokens),
            starts=self._map_array(shard.document_file, np.dtype(np.int64), shard.documents + 1),
            bytes=self._map_array(shard.byte_file, np.dtype(np.int64), shard.documents),
        )

    def _map_array(self, file: ShardFile, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
        """Map one file into memory, after checking its header."""
        path = self.folder / file.name
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: damaged ({error}); {repair_hint(self.folder)}") from None
        if array.dtype != dtype or array.shape != (length,):
            raise DataError(
                f"{path}: damaged, holds {array.dtype} {list(array.shape)} instead of {dtype} [{length}]; "
                f"{repair_hint(self.folder)}"
            )
        return array


class ShardArrays(NamedTuple):
    """The memory maps of one shard: T tokens, N documents."""

    tokens: NDArray[Any]  # [T]
    starts: NDArray[np.int64]  # [N+1]
    bytes: NDArray[np.int64]  # [N]


class TokenStream:
    """The tokens of a split as one array over all its shards."""

    def __init__(self, first_token: list[int], load: Callable[[int], NDArray[Any]]) -> None:
        """Take where each shard starts, and the end; `load(n)` returns the tokens of shard n."""
        self._first_token = first_token
        self._load = load

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self._first_token[-1]

    def __getitem__(self, span: slice) -> NDArray[np.int64]:
        """Return a copy of tokens [a:b], 0 <= a <= b <= len."""
        start, stop = span.start or 0, len(self) if span.stop is None else span.stop
        if not (0 <= start <= stop <= len(self) and span.step is None):
            raise IndexError(f"tokens[{span.start}:{span.stop}:{span.step}] of {len(self)}")
        slices = []
        number = bisect_right(self._first_token, start) - 1
        while start < stop:
            first, end = self._first_token[number], self._first_token[number + 1]
            slices.append(self._load(number)[start - first : min(stop, end) - first])
            start, number = min(stop, end), number + 1
        return np.concatenate(slices).astype(np.int64) if slices else np.zeros(0, np.int64)


def _write_array(stem: Path, kind: str, array: NDArray[Any]) -> ShardFile:
    """Write one array as .npy and return its entry in the manifest."""
    path = stem.with_name(f"{stem.name}.{kind}.npy")
    with os_faults(DataError, path, "write it"), atomic_file(path) as staging, staging.open("wb") as file:
        writer = HashingWriter(file)
        np.lib.format.write_array(writer, array, allow_pickle=False)
    return ShardFile(name=path.name, size=writer.nbytes, sha256=writer.sha256)
