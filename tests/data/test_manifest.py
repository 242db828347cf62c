import json
from pathlib import Path

import pytest

from abyssal.data.manifest import MANIFEST_NAME, DatasetManifest
from abyssal.errors import DataError


def test_manifest_reads_what_it_wrote(make_shards, tmp_path: Path) -> None:
    manifest = make_shards([[0, 5, 1], [0, 1]], [[0, 7, 8, 1]])
    assert DatasetManifest.read(tmp_path) == manifest
    train = manifest.splits["train"]
    assert (train.documents, train.tokens, train.bytes) == (3, 9, 90)


def test_missing_manifest_means_unfinished(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: no such file; the data was not prepared, or not to the end"):
        DatasetManifest.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}"])
def test_damaged_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json: damaged .*; delete .* and prepare the data again"):
        DatasetManifest.read(tmp_path)


def test_manifest_of_another_version_is_refused(make_shards, tmp_path: Path) -> None:
    make_shards([[0, 1]])
    path = tmp_path / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(DataError, match=r"damaged \(version: Input should be 1\)"):
        DatasetManifest.read(tmp_path)
