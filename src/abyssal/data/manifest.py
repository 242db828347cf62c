"""`manifest.json`: what a data folder holds and was made from; written last, so an unfinished folder has none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import NonNegativeInt, ValidationError

from abyssal.config.frozen import Frozen
from abyssal.data.corpus import SplitName
from abyssal.errors import DataError
from abyssal.files.atomic import write_text
from abyssal.files.faults import os_faults

MANIFEST_NAME = "manifest.json"


class ShardFile(Frozen):
    """One file, with its size and checksum."""

    name: str
    size: NonNegativeInt  # bytes
    sha256: str


class TokenShard(Frozen):
    """One shard of a split: consecutive documents in three files."""

    documents: NonNegativeInt
    tokens: NonNegativeInt  # BOS and EOS included
    bytes: NonNegativeInt  # UTF-8 bytes of the documents' text
    token_file: ShardFile
    document_file: ShardFile
    byte_file: ShardFile

    @property
    def files(self) -> tuple[ShardFile, ...]:
        """The three files."""
        return self.token_file, self.document_file, self.byte_file


class ShardRecord(Frozen):
    """A finished shard of an unfinished folder: `{split}-{n:05d}.json`, removed once the manifest is written."""

    documents: str  # the digest of its `ShardPlan`
    shard: TokenShard
    dropped: dict[str, NonNegativeInt]  # by the field names of `DroppedCounts`


class Split(Frozen):
    """The shards of one split in order, and their sums."""

    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    shards: tuple[TokenShard, ...]

    @classmethod
    def of(cls, shards: Iterable[TokenShard]) -> Self:
        """Add up `shards`."""
        shards = tuple(shards)
        return cls(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            shards=shards,
        )


class SourceSummary(Frozen):
    """One source of the training split: its next `shards` shards, and their sums."""

    name: str
    shards: NonNegativeInt
    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt


class DroppedCounts(Frozen):
    """How many documents were dropped, by reason."""

    empty: NonNegativeInt = 0
    undecodable: NonNegativeInt = 0
    duplicate: NonNegativeInt = 0  # training documents equal to one of validation or held-out, or to an earlier one
    near_duplicate: NonNegativeInt = 0  # training documents nearly so
    short: NonNegativeInt = 0
    long_line: NonNegativeInt = 0
    repetitive: NonNegativeInt = 0

    def sentence(self) -> str:
        """Return the counts in words."""
        return ", ".join(f"{number:,} {why.replace('_', ' ')}" for why, number in self if number) or "nothing"


class DatasetManifest(Frozen):
    """The contents of `manifest.json`."""

    version: Literal[1] = 1
    tokenizer: str  # its fingerprint
    dtype: Literal["uint16", "uint32"]  # of the tokens
    dropped: DroppedCounts
    splits: dict[SplitName, Split]
    sources: tuple[SourceSummary, ...] = ()  # in the order of their shards; none: the training split is one
    inputs: dict[str, Any]  # everything that the bytes of the shards depend on

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a data folder.

        Raises:
            DataError: there is none, or it is damaged.
        """
        path = folder / MANIFEST_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; the data was not prepared, or not to the end") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except ValidationError as error:
            fault = error.errors()[0]
            field = ".".join(map(str, fault["loc"]))
            raise DataError(f"{path}: damaged ({field or 'JSON'}: {fault['msg']}); {repair_hint(folder)}") from None

    def write(self, folder: Path) -> None:
        """Write the manifest, after which the folder counts as finished.

        Raises:
            DataError: the disk is full, or the file cannot be written.
        """
        path = folder / MANIFEST_NAME
        with os_faults(DataError, path, "write it"):
            write_text(path, self.model_dump_json(indent=1))


def repair_hint(folder: Path) -> str:
    """Return what to do about a damaged data folder."""
    return f"delete {folder} and prepare the data again"
