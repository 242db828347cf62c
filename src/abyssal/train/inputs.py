"""The data of one run: prepared when it begins, opened and checked when it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from abyssal.config import RunConfig
from abyssal.data.batch import BatchLoader, windows_by_source
from abyssal.data.manifest import MANIFEST_NAME, DatasetManifest
from abyssal.data.mixture import MixedOrder
from abyssal.data.order import WindowOrder
from abyssal.data.prepare import prepare
from abyssal.data.shards import Shards
from abyssal.errors import ConfigError
from abyssal.machine.describe import available_cores
from abyssal.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Inputs:
    """Training batches, validation documents (there may be none), and where the tokenizer stands."""

    folder: Path
    loader: BatchLoader
    validation: Shards


def prepare_inputs(config: RunConfig, folder: Path, console: Console) -> None:
    """Prepare the run's data in `folder`, or use what was prepared there from the same documents.

    Raises:
        DataError: see `abyssal.data.prepare`; or the corpus is shorter than one sequence.
    """
    manifest = prepare(
        config.data,
        config.tokenizer,
        config.model.vocab_size,
        folder,
        seed=config.seed,
        workers=config.train.threads or available_cores(),
        progress=console.is_terminal,
    )
    train, validation, dropped = manifest.splits["train"], manifest.splits["validation"], manifest.dropped
    console.print(
        f"data: {train.documents:,} documents of {train.bytes:,} bytes, {train.tokens:,} tokens to train on; "
        f"{validation.documents:,} for validation; left out: {dropped.sentence()}",
        highlight=False,
    )


def check_inputs(config: RunConfig, folder: Path, console: Console) -> None:
    """Compare every checksum of the data that the run began with, whatever has become of its documents.

    Raises:
        DataError: a shard is missing or damaged.
    """
    if not (folder / MANIFEST_NAME).is_file():
        prepare_inputs(config, folder, console)
        return
    for split in DatasetManifest.read(folder).splits:
        Shards.open(folder, split).verify()


def open_inputs(config: RunConfig, folder: Path) -> Inputs:
    """Open what was prepared.

    Raises:
        ConfigError: the tokenizer is not the model's.
        DataError: a file is missing, or the corpus is shorter than one sequence.
    """
    tokenizer = Tokenizer.load(folder)
    for name, ours, theirs in (
        ("bos_token_id", config.model.bos_token_id, tokenizer.bos_id),
        ("eos_token_id", config.model.eos_token_id, tokenizer.eos_id),
    ):
        if ours != theirs:
            raise ConfigError(f"model.{name}={ours}: must be the tokenizer's, {theirs}")
    length = config.train.sequence_length
    shards = Shards.open(folder, "train")
    loader = BatchLoader(shards, order_of(config, shards), length, mask_documents=config.data.mask_documents)
    return Inputs(folder, loader, Shards.open(folder, "validation"))


def order_of(config: RunConfig, shards: Shards) -> WindowOrder:
    """Return the order of training: the windows of one stream, or the recipe's mixture of several."""
    windows = windows_by_source(shards, config.train.sequence_length)
    if not shards.sources:
        return WindowOrder(config.seed, windows[""])
    return MixedOrder(config.seed, windows, config.data.mixture)
