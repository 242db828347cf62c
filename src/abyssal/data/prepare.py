"""Prepares the corpus of a recipe: find documents, split, tokenize, and write a data folder."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from abyssal.config.run import DataConfig, TokenizerConfig
from abyssal.data import manifest as manifests
from abyssal.data.corpus import CorpusFile, DocumentRef, SplitName, find_documents, find_files, split_of
from abyssal.data.duplicates import DuplicateFilter
from abyssal.data.encode import DocumentReader, ShardEncoder, ShardPlan, WrittenShard, text_digest, write_shards
from abyssal.data.manifest import DatasetManifest, DroppedCounts, SourceSummary, Split
from abyssal.data.shards import Shards, token_dtype
from abyssal.errors import DataError
from abyssal.files.atomic import remove_stale, write_text
from abyssal.files.faults import os_faults
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config

#: A shard holds 1/64 of the corpus, so that many processes share the work evenly, within these bounds.
SHARDS_PER_CORPUS = 64
SHARD_BYTES = (1 << 20, 1 << 28)
#: Holds the inputs of an unfinished preparation; written once its tokenizer is.
UNFINISHED = "unfinished.json"
SHARD_RECORD = re.compile(r"(train|validation|heldout)-\d+\.json")
#: Fields of the recipe's data section that change no byte of a shard.
NOT_IN_SHARDS: Any = {"folder": True, "mask_documents": True, "weights": True, "sources": {"__all__": {"weight"}}}
#: The folder, inside the data folder, for unpacked files; removed once the data is prepared.
UNPACKED = "unpacked"

Documents = dict[SplitName, list[DocumentRef]]


def prepare(
    config: DataConfig,
    tokenizer: TokenizerConfig,
    vocab_size: int,
    out: Path,
    *,
    seed: int,
    workers: int = 1,
    progress: bool = False,
) -> DatasetManifest:
    """Make the data folder `out`: `tokenizer.json`, the shards of every split, and last the manifest.

    The bytes of the shards are a function of the corpus, the recipe and `seed`, not of `workers`. A folder that was
    prepared from the same inputs is checked and used as it is.

    Args:
        config: the corpus and its splits.
        tokenizer: which tokenizer, or how to train one on the training documents.
        vocab_size: of the model; no token id reaches it.
        out: the folder; made if absent.
        seed: of the order of the documents.
        workers: processes that tokenize.
        progress: whether to draw bars on standard error.

    Raises:
        DataError: the corpus is missing, empty or damaged, the tokenizer does not fit, the disk is full, or `out`
            was prepared from other inputs.
    """
    files = find_files(config)
    loaded = None if tokenizer.path is None else _load_tokenizer(Path(tokenizer.path), vocab_size)
    inputs = {
        "data": config.model_dump(mode="json", exclude=NOT_IN_SHARDS),
        "tokenizer": tokenizer.model_dump(mode="json") | {"fingerprint": loaded and loaded.fingerprint},
        "vocab_size": vocab_size,
        "seed": seed,
        "corpus": _corpus_digest(files),
    }
    with _progress_bars(progress) as bars:
        if (out / manifests.MANIFEST_NAME).exists():
            return _reuse_prepared(out, inputs, bars)
        loaded = _resumed_tokenizer(out, inputs) or loaded
        references = list(find_documents(config, files, out / UNPACKED))
        documents = _split_in_order(references, config.split_modulus, seed)
        reader = _protect_test_documents(documents, DocumentReader(config), bars)
        dropped = _drop_duplicates(documents, reader, bars)
        loaded = loaded or _train_tokenizer(documents["train"], reader, tokenizer.train_bytes, vocab_size, bars)
        _write_tokenizer(out, loaded, inputs)
        written = _write_shards(ShardEncoder(out, loaded, reader, seed), documents, workers, bars)
    manifest = DatasetManifest(
        tokenizer=loaded.fingerprint,
        dtype=token_dtype(loaded.vocab_size),
        dropped=DroppedCounts(**sum((result.dropped for result in written), dropped)),
        splits={name: Split.of(result.shard for result in written if result.plan.split == name) for name in documents},
        sources=_summarise_sources(config, written),
        inputs=inputs,
    )
    _check_training_split(manifest, config, len(references))
    manifest.write(out)
    _remove_temporary_files(out)
    return manifest


def _check_training_split(manifest: DatasetManifest, config: DataConfig, num_documents: int) -> None:
    """Raise DataError where no document, or none of a source, is left for training."""
    if manifest.splits["train"].documents == 0:
        entries = [entry for _, entry in config.entries]
        raise DataError(
            f"data.corpus={entries}: none of its {num_documents} documents is left for "
            f"training; left out: {manifest.dropped.sentence()}; give more, or raise data.split_modulus"
        )
    for source in manifest.sources:
        if source.documents == 0:
            raise DataError(
                f"data.sources.{source.name}: none of its documents is left for training, so that its weight cannot be "
                "kept; give it more, or leave it out"
            )


def _resumed_tokenizer(out: Path, inputs: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of an interrupted preparation with the same inputs, whose shards then stay.

    The files of one with other inputs are removed, except those that it unpacked.
    """
    try:
        if json.loads((out / UNFINISHED).read_bytes()) == json.loads(json.dumps(inputs)):
            return Tokenizer.load(out)
    except (OSError, ValueError, DataError):  # there is none, or it had not come so far
        pass
    _clear_folder(out)
    return None


def _write_tokenizer(out: Path, tokenizer: Tokenizer, inputs: dict[str, Any]) -> None:
    """Write the tokenizer, and then the inputs that mark its preparation as resumable."""
    with os_faults(DataError, path := out / "tokenizer.json", "write it"):
        write_text(path, tokenizer.to_json())
    write_tokenizer_config(out, tokenizer)
    with os_faults(DataError, path := out / UNFINISHED, "write it"):
        write_text(path, json.dumps(inputs))


def _remove_temporary_files(out: Path) -> None:
    """Remove the files that only an interrupted preparation needs."""
    shutil.rmtree(out / UNPACKED, ignore_errors=True)
    for path in out.iterdir():
        if path.name == UNFINISHED or SHARD_RECORD.fullmatch(path.name):
            path.unlink()


def _summarise_sources(config: DataConfig, written: list[WrittenShard]) -> tuple[SourceSummary, ...]:
    """Return the sums of the training shards by source, where sources have names."""
    summaries = []
    for name in config.mixture:
        split = Split.of(r.shard for r in written if r.plan.split == "train" and r.plan.documents[0].source == name)
        sums = {"documents": split.documents, "tokens": split.tokens, "bytes": split.bytes}
        summaries.append(SourceSummary(name=name, shards=len(split.shards), **sums))
    return tuple(summaries)


def _load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Load a tokenizer, and check that the model has all its ids."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size}: must be at least {tokenizer.vocab_size}, "
            f"for the ids of tokenizer.path={str(path)!r}"
        )
    return tokenizer


def _corpus_digest(files: list[CorpusFile]) -> str:
    """Return a digest that changes when a file is added, removed, renamed or edited."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.key}\0{file.identity}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _reuse_prepared(out: Path, inputs: dict[str, Any], bars: Progress) -> DatasetManifest:
    """Return the manifest of a folder prepared from the same inputs, once its checksums are verified."""
    manifest = DatasetManifest.read(out)
    before, now = _flatten(manifest.inputs), _flatten(inputs)
    for field in sorted(before.keys() | now.keys()):
        if before.get(field) != now.get(field):
            difference = (
                "from other documents: files were added, removed or edited since"
                if field == "corpus"
                else f"with {field}={before.get(field)!r}, not {now.get(field)!r}"
            )
            raise DataError(f"{out}: was prepared {difference}; choose another folder or delete this one")
    if Tokenizer.load(out).fingerprint != manifest.tokenizer:
        raise DataError(f"{out / 'tokenizer.json'}: not the tokenizer of these shards; {manifests.repair_hint(out)}")
    _remove_temporary_files(out)
    sizes = {split: sum(f.size for shard in s.shards for f in shard.files) for split, s in manifest.splits.items()}
    task = bars.add_task("Checking", total=sum(sizes.values()))
    for split, size in sizes.items():
        Shards.open(out, split).verify()
        bars.advance(task, size)
    return manifest


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _clear_folder(out: Path) -> None:
    """Make the folder, or remove what an interrupted preparation left in it."""
    pattern = re.compile(rf"(train|validation|heldout)-\d+\.(\w+\.npy|json)|{UNFINISHED}")
    with os_faults(DataError, out, "prepare the data here"):
        out.mkdir(parents=True, exist_ok=True)
        remove_stale(out)
        for path in out.iterdir():
            if pattern.fullmatch(path.name):
                path.unlink()


def _split_in_order(references: list[DocumentRef], modulus: int, seed: int) -> Documents:
    """Return the documents of each split in the order of sha256(seed, key)."""

    def order_key(ref: DocumentRef) -> bytes:
        return hashlib.sha256(f"{seed}:{ref.key}".encode(errors="surrogateescape")).digest()

    documents: Documents = {"train": [], "validation": [], "heldout": []}
    for ref in sorted(references, key=order_key):
        documents[split_of(ref.key, modulus)].append(ref)
    return documents


def _protect_test_documents(documents: Documents, reader: DocumentReader, bars: Progress) -> DocumentReader:
    """Return a reader that drops training documents equal to one of validation or held-out."""
    protected: set[bytes] = set()
    test_documents = documents["validation"] + documents["heldout"]
    task = bars.add_task("Held-out documents", total=sum(ref.size for ref in test_documents))
    for ref in test_documents:
        protected.add(text_digest(reader.read(ref, "heldout")[0]))
        bars.advance(task, ref.size)
    return DocumentReader(reader.config, frozenset(protected))


def _drop_duplicates(documents: Documents, reader: DocumentReader, bars: Progress) -> Counter[str]:
    """Remove duplicates from the training documents, by the recipe's rule; return how many of each kind."""
    config, counts = reader.config, Counter[str]()
    if config.duplicates == "keep":
        return counts
    duplicates = DuplicateFilter(config, text_digest)
    task = bars.add_task("Duplicates", total=sum(ref.size for references in documents.values() for ref in references))
    for ref in documents["validation"] + documents["heldout"]:
        duplicates.add_test_document(reader.read(ref, "heldout")[0])
        bars.advance(task, ref.size)
    kept = []
    for ref in documents["train"]:
        text, fault = reader.read(ref, "train")
        reason = None if fault else duplicates.drop_reason(text)  # other faults are counted when shards are written
        counts.update([reason] if reason else [])
        kept += [] if reason else [ref]
        bars.advance(task, ref.size)
    documents["train"] = kept
    return counts


def _train_tokenizer(
    documents: list[DocumentRef], reader: DocumentReader, train_bytes: int, vocab_size: int, bars: Progress
) -> Tokenizer:
    """Train a tokenizer on the first `train_bytes` of the training documents, which stand in random order."""
    task = bars.add_task("Tokenizer", total=min(train_bytes, sum(ref.size for ref in documents)))

    def texts() -> Iterator[str]:
        left = train_bytes
        for ref in documents:
            content = reader.read(ref, "train")[0].encode()[:left]
            yield content.decode(errors="ignore")  # the last one may end inside a character
            bars.advance(task, len(content))
            left -= len(content)
            if left == 0:
                return

    return Tokenizer.train(texts(), vocab_size)


def _write_shards(encoder: ShardEncoder, documents: Documents, workers: int, bars: Progress) -> list[WrittenShard]:
    """Write the shards of all splits."""
    total = sum(ref.size for references in documents.values() for ref in references)
    min_bytes, max_bytes = SHARD_BYTES
    shard_bytes = min(max(total // SHARDS_PER_CORPUS, min_bytes), max_bytes)
    names = list(encoder.reader.config.mixture) or [""]
    plans = [
        plan
        for split, references in documents.items()
        for plan in _shard_plans(split, references, shard_bytes, names if split == "train" else None)
    ]
    task = bars.add_task("Shards", total=total)
    written = []
    for result in write_shards(encoder, plans, workers):
        bars.advance(task, result.plan.size)
        written.append(result)
    return written


def _shard_plans(
    split: SplitName, references: list[DocumentRef], shard_bytes: int, sources: list[str] | None
) -> Iterator[ShardPlan]:
    """Cut a split into shards, one source after another; each ends with the document that fills it up."""
    number = 0
    names: Sequence[str | None] = sources or [None]
    for source in names:
        size, documents = 0, list[DocumentRef]()
        for ref in references:
            if source is not None and ref.source != source:
                continue
            documents.append(ref)
            size += ref.size
            if size >= shard_bytes:
                yield ShardPlan(split, f"{split}-{number:05d}", tuple(documents))
                number, size, documents = number + 1, 0, []
        if documents:
            yield ShardPlan(split, f"{split}-{number:05d}", tuple(documents))
            number += 1


def _progress_bars(shown: bool) -> Progress:
    """Return progress bars with bytes, rate and time left."""
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        disable=not shown,
    )
