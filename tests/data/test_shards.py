from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abyssal.data.shards import Shards, token_dtype
from abyssal.errors import DataError

FIRST = [[0, 11, 12, 1], [0, 13, 1]]
SECOND = [[0, 21, 22, 23, 24, 1], [0, 1], [0, 25, 1]]


def test_files_are_named_and_laid_out_as_documented(make_shards, tmp_path: Path) -> None:
    make_shards(FIRST, SECOND)
    load = {path.name: np.load(path, allow_pickle=False) for path in tmp_path.glob("*.npy")}
    assert sorted(load) == [f"train-{n:05d}.{kind}.npy" for n in range(2) for kind in ("bytes", "documents", "tokens")]
    assert load["train-00000.tokens.npy"].tolist() == [*chain(*FIRST)]
    assert load["train-00001.documents.npy"].tolist() == [0, 6, 8, 11]
    assert load["train-00001.bytes.npy"].tolist() == [60, 20, 30]
    assert [load[f"train-00000.{kind}.npy"].dtype for kind in ("tokens", "documents", "bytes")] == ["u2", "i8", "i8"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.lists(st.integers(2, 9), max_size=4), max_size=5))
def test_stream_and_documents_do_not_show_the_shards(make_shards, tmp_path: Path, lengths: list[list[int]]) -> None:
    ids = iter(range(1000))
    documents = [[[next(ids) for _ in range(length)] for length in shard] for shard in lengths]
    make_shards(*documents)
    shards = Shards.open(tmp_path, "train")
    flat = [document for shard in documents for document in shard]
    stream = [*chain(*flat)]
    assert shards.documents == len(flat)
    assert shards.bytes == 10 * len(stream)
    assert len(shards.tokens) == len(stream)
    assert [shards.document(n).tolist() for n in range(len(flat))] == flat
    assert [shards.document_bytes(n) for n in range(len(flat))] == [10 * len(document) for document in flat]
    for start in range(len(stream) + 1):
        for stop in range(start, len(stream) + 1, 3):
            assert shards.tokens[start:stop].tolist() == stream[start:stop]


def test_tokens_are_int64_copies(make_shards, tmp_path: Path) -> None:
    make_shards(FIRST, SECOND)
    shards = Shards.open(tmp_path, "train")
    for tokens in (shards.tokens[2:9], shards.tokens[3:3], shards.document(1)):
        assert tokens.dtype == np.int64
        tokens += 1
    assert shards.tokens[:].tolist() == [*chain(*FIRST, *SECOND)]


def test_large_vocabularies_keep_their_ids(make_shards, tmp_path: Path) -> None:
    assert [token_dtype(size) for size in (2**16, 2**16 + 1)] == ["uint16", "uint32"]
    make_shards([[0, 65536, 128814, 1]], [], dtype="uint32")
    assert Shards.open(tmp_path, "train").document(0).tolist() == [0, 65536, 128814, 1]


def test_reading_past_the_end_is_an_error_not_a_shorter_answer(make_shards, tmp_path: Path) -> None:
    make_shards(FIRST)
    shards = Shards.open(tmp_path, "train")
    for span in (slice(0, 8), slice(-1, 2), slice(3, 2), slice(0, 4, 2)):
        with pytest.raises(IndexError):
            shards.tokens[span]
    for document in (-1, 2):
        with pytest.raises(IndexError):
            shards.document(document)


def test_split_without_documents_is_empty(make_shards, tmp_path: Path) -> None:
    make_shards(FIRST)
    shards = Shards.open(tmp_path, "validation")
    assert (shards.documents, shards.bytes, len(shards.tokens)) == (0, 0, 0)
    shards.verify()


def test_more_shards_than_stay_open_are_read_all_the_same(make_shards, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("abyssal.data.shards.OPEN_SHARDS", 2)
    documents = [[[0, n, 1]] for n in range(7)]
    make_shards(*documents)
    shards = Shards.open(tmp_path, "train")
    starts = accumulate((3 for _ in range(7)), initial=0)
    assert [shards.tokens[a:b].tolist() for a, b in pairwise(starts)] == [[0, n, 1] for n in range(7)]


@pytest.mark.parametrize("kind", ["tokens", "documents", "bytes"])
def test_missing_or_shortened_file_is_found_on_opening(make_shards, tmp_path: Path, kind: str) -> None:
    make_shards(FIRST, SECOND)
    path = tmp_path / f"train-00001.{kind}.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"train-00001\.{kind}\.npy: damaged, has {len(content) - 1} bytes instead of"):
        Shards.open(tmp_path, "train")
    path.unlink()
    with pytest.raises(DataError, match=rf"train-00001\.{kind}\.npy: missing; delete .* and prepare the data again"):
        Shards.open(tmp_path, "train")


@pytest.mark.parametrize("place", [0, 40, 128, -1])
def test_changed_byte_is_found_by_the_checksum(make_shards, tmp_path: Path, place: int) -> None:
    make_shards(FIRST, SECOND)
    Shards.open(tmp_path, "train").verify()
    path = tmp_path / "train-00001.tokens.npy"
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00001\.tokens\.npy: damaged, its checksum"):
        Shards.open(tmp_path, "train").verify()


def test_header_of_another_array_is_found_on_reading(make_shards, tmp_path: Path) -> None:
    make_shards(FIRST)
    path = tmp_path / "train-00000.tokens.npy"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"<u2", b"<i2"))
    with pytest.raises(DataError, match=r"tokens\.npy: damaged, holds int16 \[7\] instead of uint16 \[7\]"):
        Shards.open(tmp_path, "train").tokens[0:3]
    path.write_bytes(b"x" * len(content))
    with pytest.raises(DataError, match=r"tokens\.npy: damaged \("):
        Shards.open(tmp_path, "train").tokens[0:3]
