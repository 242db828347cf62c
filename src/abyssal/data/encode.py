"""Encodes documents into shards with several processes; the bytes written do not depend on how many."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from abyssal.config.run import DataConfig
from abyssal.data.augment import TrainingEncoder
from abyssal.data.corpus import DocumentRef, SplitName, UndecodableError, read_document
from abyssal.data.manifest import ShardRecord, TokenShard
from abyssal.data.quality import broken_rule
from abyssal.data.shards import is_intact, token_dtype, write_shard
from abyssal.errors import DataError
from abyssal.files.atomic import write_text
from abyssal.files.faults import os_faults
from abyssal.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Which documents become one shard."""

    split: SplitName
    name: str
    documents: tuple[DocumentRef, ...]  # of one source, in the training split

    @property
    def size(self) -> int:
        """The bytes of these documents on disk."""
        return sum(ref.size for ref in self.documents)

    def digest(self) -> str:
        """Return a digest of which documents become this shard."""
        lines = (f"{self.split}\0{ref.source}\0{ref.key}\0{ref.size}\n" for ref in self.documents)
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A shard that was written, and how many of its documents were dropped."""

    plan: ShardPlan
    shard: TokenShard
    dropped: Counter[str]  # by the field names of `DroppedCounts`


@dataclass(frozen=True, slots=True)
class DocumentReader:
    """Reads documents under the recipe's rules; says why one is dropped."""

    config: DataConfig
    protected: frozenset[bytes] = frozenset()  # digests of the validation and held-out documents

    def read(self, ref: DocumentRef, split: SplitName) -> tuple[str, str | None]:
        """Return the text and None, or an empty text and why the document is dropped.

        Raises:
            DataError: it cannot be read, or is not UTF-8 and the recipe does not say to skip such documents.
        """
        try:
            text = read_document(ref, self.config.text_field)
        except UndecodableError:
            if self.config.on_undecodable == "fail":
                raise
            return "", "undecodable"
        if not text:
            return "", "empty"
        if split == "train":
            reason = "duplicate" if text_digest(text) in self.protected else broken_rule(text, self.config)
            return ("", reason) if reason else (text, None)
        return text, None


def text_digest(text: str) -> bytes:
    """Return the SHA-256 of a document's text."""
    return hashlib.sha256(text.encode()).digest()


@dataclass(frozen=True)
class ShardEncoder:
    """Encodes the documents of a plan into a shard, in any process."""

    folder: Path
    tokenizer: Tokenizer
    reader: DocumentReader
    seed: int = 0  # of what is random in training documents

    def write(self, plan: ShardPlan) -> WrittenShard:
        """Write one shard unless it is finished: each document as BOS, text, EOS, augmented if it is for training.

        Raises:
            DataError: a document cannot be read, or the shard not be written.
        """
        path = self.folder / f"{plan.name}.json"
        try:
            record = ShardRecord.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):  # not there: it is written last, whole or not at all
            record = None
        if record is None or record.documents != plan.digest() or not is_intact(self.folder, record.shard):
            shard, dropped = self._encode(plan)
            record = ShardRecord(documents=plan.digest(), shard=shard, dropped=dropped)
            with os_faults(DataError, path, "write it"):
                write_text(path, record.model_dump_json())
        return WrittenShard(plan, record.shard, Counter(record.dropped))

    def _encode(self, plan: ShardPlan) -> tuple[TokenShard, Counter[str]]:
        """Write the files of one shard; return it, and how many documents were dropped."""
        dtype = token_dtype(self.tokenizer.vocab_size)
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        encoder = TrainingEncoder(self.tokenizer, self.reader.config, self.seed)
        documents, num_bytes, dropped = [], [], Counter[str]()
        for ref in plan.documents:
            text, reason = self.reader.read(ref, plan.split)
            if reason:
                dropped[reason] += 1
                continue
            training = plan.split == "train"
            ids = encoder.encode(text, ref.key) if training else self.tokenizer.encode_document(text)
            documents.append(np.array([bos, *ids, eos], dtype))
            num_bytes.append(len(text.encode()))
        return write_shard(self.folder / plan.name, documents, num_bytes, dtype), dropped


def write_shards(encoder: ShardEncoder, plans: Sequence[ShardPlan], workers: int) -> Iterator[WrittenShard]:
    """Write the shards with `workers` processes, and yield each in the order of `plans` once it is written.

    Raises:
        DataError: a document cannot be read, a shard not be written, or a process was killed.
    """
    if workers == 1 or len(plans) <= 1:
        yield from map(encoder.write, plans)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(plans)),
        mp_context=multiprocessing.get_context("spawn"),  # a fork would copy the tokenizer's threads in any state
        initializer=_start_worker,
        initargs=(encoder,),
    )
    try:
        yield from pool.map(_write, plans)
    except BrokenProcessPool:
        raise DataError(
            f"workers={workers}: one of the processes was killed, perhaps for want of memory; try fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


#: Set once in each worker process and never in this one: the pool hands a task its arguments anew each time, and the
#: tokenizer is too large for that.
_worker: list[ShardEncoder] = []


def _start_worker(encoder: ShardEncoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process: the processes fill the machine
    _worker.append(encoder)


def _write(plan: ShardPlan) -> WrittenShard:
    return _worker[0].write(plan)
