import gzip
import json
import sys
import types
from pathlib import Path

import pytest

from abyssal.config.run import DataConfig, TokenizerConfig
from abyssal.data.corpus import find_documents, find_files, read_document
from abyssal.data.prepare import UNPACKED, prepare
from abyssal.data.unpack import unpack
from abyssal.errors import DataError

TEXTS = ["first", "Größe\nof two lines", "\u2028 is no line end", "", "last\r\n"]
JSONL = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)).encode()


def zstandard_file(path: Path, *frames: bytes) -> Path:
    zstandard = pytest.importorskip("zstandard", reason="the extra zstd is not installed")
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames))
    return path


def gzip_file(path: Path, *frames: bytes) -> Path:
    path.write_bytes(b"".join(map(gzip.compress, frames)))
    return path


def parquet_file(path: Path, column: str = "text", texts=TEXTS) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), path, row_group_size=2)
    return path


def data_set(path: Path, texts=TEXTS) -> str:
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    datasets.disable_progress_bars()
    table = datasets.table.InMemoryTable.from_pydict({"text": texts})
    datasets.Dataset(table, fingerprint="given").save_to_disk(str(path))  # computing one pickles half the library
    return f"hf:{path}"


MAKE = {
    "d.jsonl.gz": lambda path: gzip_file(path, JSONL),
    "d.jsonl.zst": lambda path: zstandard_file(path, JSONL),
    "d.parquet": parquet_file,
}


def documents(entry: object, unpacked: Path, **fields) -> dict[str, str]:
    config = DataConfig(corpus=(str(entry),), **fields)
    found = find_documents(config, find_files(config), unpacked)
    return {ref.key: read_document(ref, config.text_field) for ref in found}


@pytest.mark.parametrize("name", MAKE)
def test_packed_documents_are_those_that_went_in(tmp_path: Path, name: str) -> None:
    path = MAKE[name](tmp_path / name)
    expected = {f"{name}:{n}": text for n, text in enumerate(TEXTS, start=1)}
    assert documents(path, tmp_path / "unpacked") == expected
    suffix = name.removeprefix("d")
    assert documents(tmp_path, tmp_path / "again", suffixes=(suffix,)) == expected


def test_data_set_on_disk_is_a_corpus(tmp_path: Path) -> None:
    entry = data_set(tmp_path / "set")
    key = entry.removeprefix("hf:")
    assert documents(entry, tmp_path / "unpacked") == {f"{key}:{n}": text for n, text in enumerate(TEXTS, start=1)}


def test_data_set_is_found_by_name_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list):
        column_names = ("text",)

        def __getitem__(self, rows):
            return {"text": list(self)[rows]}

    def load_dataset(name: str, split: str) -> Rows:
        return Rows(f"{name} {split} {n}" for n in range(1500))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    assert list(documents("hf:some/name", tmp_path / "u").items())[1499] == ("some/name:1500", "some/name train 1499")
    assert documents("hf:some/name:test", tmp_path / "u")["some/name:test:1"] == "some/name test 0"
    with pytest.raises(DataError, match=r"hf:some/name: must have text in the column 'body' .* only text"):
        documents("hf:some/name", tmp_path / "u", text_field="body")


@pytest.mark.parametrize(
    ("module", "extra", "name"),
    [("zstandard", "zstd", "d.jsonl.zst"), ("pyarrow", "parquet", "d.parquet"), ("datasets", "datasets", "hf:name")],
)
def test_missing_package_is_a_sentence_with_the_extra(tmp_path: Path, module, extra, name, monkeypatch) -> None:
    for missing in (module, f"{module}.parquet", "compression.zstd"):
        monkeypatch.setitem(sys.modules, missing, None)
    entry = name if name.startswith("hf:") else tmp_path / name
    if entry != name:
        entry.write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name}: needs the package {module}, .* pip install 'abyssal\[{extra}\]'"):
        documents(entry, tmp_path / "unpacked")


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst"])
def test_frames_one_after_another_are_one_file(tmp_path: Path, name: str) -> None:
    make = gzip_file if name.endswith("gz") else zstandard_file
    path = make(tmp_path / name, JSONL[:21], JSONL[21:40], JSONL[40:])
    assert list(documents(path, tmp_path / "unpacked").values()) == TEXTS


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_damaged_file_is_named_and_leaves_nothing(tmp_path: Path, name: str, damage: str) -> None:
    path = MAKE[name](tmp_path / name)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:-5],
            "flipped": whole[:4] + bytes(byte ^ 0xFF for byte in whole[4:middle]) + whole[middle:],
            "other": b"something else altogether",
        }[damage]
    )
    with pytest.raises(DataError, match=rf"{name}: damaged \(.+\); fetch or make it again"):
        documents(path, tmp_path / "unpacked")
    assert list((tmp_path / "unpacked").iterdir()) == []


def test_row_that_is_no_text_is_named_with_the_file_it_came_from(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "d.parquet", texts=["a", None])
    with pytest.raises(DataError, match=r"d\.parquet:2: must have text in the field 'text' .* NoneType"):
        documents(path, tmp_path / "unpacked")
    with pytest.raises(DataError, match=r"d\.parquet: must have text in the column 'body' .* only text, id"):
        documents(path, tmp_path / "unpacked", text_field="body")


@pytest.mark.parametrize("entry", ["hf:folder", "hf:folder:test"])
def test_what_is_no_data_set_is_named(tmp_path: Path, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise FileNotFoundError(f"no {name} with {split}\nat all")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"{entry}: cannot be read \(no folder with (train|test)\); must be hf:NAME"):
        documents(entry, tmp_path / "unpacked")


def test_a_file_is_unpacked_once_and_again_when_it_changed(tmp_path: Path) -> None:
    path = gzip_file(tmp_path / "d.jsonl.gz", JSONL)
    first = unpack(str(path), "1", "text", tmp_path / "unpacked")
    written = first.stat().st_mtime_ns
    assert unpack(str(path), "1", "text", tmp_path / "unpacked") == first
    assert first.stat().st_mtime_ns == written
    assert unpack(str(path), "2", "text", tmp_path / "unpacked") != first


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_disk_that_is_full_while_unpacking_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    path, real = gzip_file(tmp_path / "d.jsonl.gz", JSONL), Path.open

    def open_on_full_disk(path: Path, *args, **kwargs):
        return real(Path("/dev/full") if ".jsonl.writing-" in path.name else path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(DataError, match=r"\.jsonl: cannot write it \(No space left on device; free some space"):
        documents(path, tmp_path / "unpacked")


def test_packed_and_plain_documents_give_the_same_shards(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {n}: {'words ' * (n % 9)}"}) + "\n" for n in range(80)).encode()
    for name in ("plain", "packed"):
        (tmp_path / name).mkdir()
    (tmp_path / "plain" / "d.jsonl").write_bytes(lines)
    gzip_file(tmp_path / "packed" / "d.jsonl.gz", lines)
    counts = []
    for name in ("plain", "packed"):
        config = DataConfig(corpus=(str(tmp_path / name),), suffixes=(".jsonl", ".jsonl.gz"), split_modulus=5)
        manifest = prepare(config, TokenizerConfig(), 300, tmp_path / f"{name}-data", seed=1)
        counts.append(sum(split.bytes for split in manifest.splits.values()))
        assert prepare(config, TokenizerConfig(), 300, tmp_path / f"{name}-data", seed=1) == manifest
        assert not (tmp_path / f"{name}-data" / UNPACKED).exists()
    assert counts[0] == counts[1] > 1000
