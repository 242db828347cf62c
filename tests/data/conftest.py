from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from abyssal.data.manifest import DatasetManifest, DroppedCounts, Split
from abyssal.data.shards import write_shard

MakeShards = Callable[..., DatasetManifest]


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Write a data folder at `tmp_path` whose training shards hold the given documents, each 10 bytes a token."""

    def make(*shards: list[list[int]], dtype: str = "uint16") -> DatasetManifest:
        written = [
            write_shard(
                tmp_path / f"train-{n:05d}",
                [np.array(document, dtype) for document in documents],
                [10 * len(document) for document in documents],
                dtype,
            )
            for n, documents in enumerate(shards)
        ]
        manifest = DatasetManifest(
            tokenizer="t",
            dtype=dtype,
            dropped=DroppedCounts(),
            splits={"train": Split.of(written), "validation": Split.of([]), "heldout": Split.of([])},
            inputs={},
        )
        manifest.write(tmp_path)
        return manifest

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 90 small text files, some in subfolders, with documents in every split."""
    folder = tmp_path / "corpus"
    for n in range(90):
        path = folder / f"part{n % 4}" / f"{n}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Document {n}: {'words and more words, ' * (n % 7 + 1)}Größe {n * n}.\n", encoding="utf-8")
    return folder
