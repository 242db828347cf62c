import errno
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from abyssal.config.run import DataConfig, TokenizerConfig
from abyssal.data.corpus import split_of
from abyssal.data.manifest import MANIFEST_NAME, DatasetManifest
from abyssal.data.prepare import prepare
from abyssal.data.shards import Shards
from abyssal.errors import DataError
from abyssal.text.special_tokens import USER
from abyssal.text.tokenizer import Tokenizer

VOCAB = 300
TRAINED = TokenizerConfig()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abyssal.data.prepare.SHARD_BYTES", (2000, 2000))


def config(corpus: Path, **fields) -> DataConfig:
    return DataConfig(corpus=(str(corpus),), split_modulus=5, **fields)


def texts(out: Path, split: str) -> list[str]:
    shards, tokenizer = Shards.open(out, split), Tokenizer.load(out)
    return [tokenizer.decode(shards.document(n)[1:-1], skip_special=False) for n in range(shards.documents)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_is_in_one_split_word_for_word(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    manifest = prepare(config(corpus), TRAINED, VOCAB, out, seed=3)
    assert manifest == DatasetManifest.read(out)
    found = {split: texts(out, split) for split in ("train", "validation", "heldout")}
    assert all(len(split) >= 5 for split in found.values())
    assert sorted(chain(*found.values())) == sorted(path.read_text() for path in corpus.rglob("*.txt"))
    for split, documents in found.items():
        assert manifest.splits[split].documents == len(documents)
        assert manifest.splits[split].bytes == sum(len(text.encode()) for text in documents)
        assert manifest.splits[split].tokens == len(Shards.open(out, split).tokens)
    assert len(manifest.splits["train"].shards) > 2


def test_documents_are_shuffled_by_the_seed(corpus: Path, tmp_path: Path) -> None:
    orders = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        prepare(config(corpus), TRAINED, VOCAB, tmp_path / name, seed=seed)
        orders.append(texts(tmp_path / name, "train"))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert orders[0] != sorted(orders[0])


def test_bytes_do_not_depend_on_the_number_of_processes(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare(config(corpus), TRAINED, VOCAB, tmp_path / str(workers), seed=3, workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_training_leaves_out_copies_of_documents_it_is_tested_on(corpus: Path, tmp_path: Path) -> None:
    before = prepare(config(corpus), TRAINED, VOCAB, tmp_path / "before", seed=3)
    tested = texts(tmp_path / "before", "validation") + texts(tmp_path / "before", "heldout")
    copies = {f"copy{n}.txt": tested[n % len(tested)] for n in range(40)}
    for name, text in copies.items():
        (corpus / name).write_text(text, encoding="utf-8")
    out = tmp_path / "after"
    after = prepare(config(corpus), TRAINED, VOCAB, out, seed=3)
    assert set(texts(out, "train")).isdisjoint(texts(out, "validation") + texts(out, "heldout"))
    assert after.splits["train"].documents == before.splits["train"].documents
    assert after.dropped.duplicate == sum(split_of(name, 5) == "train" for name in copies) > 0


def test_documents_without_text_are_dropped_and_counted(corpus: Path, tmp_path: Path) -> None:
    for n in range(7):
        (corpus / f"empty{n}.txt").touch()
        (corpus / f"latin{n}.txt").write_bytes(b"\xe4")
    with pytest.raises(DataError, match=r"latin\d\.txt: not UTF-8"):
        prepare(config(corpus), TRAINED, VOCAB, tmp_path / "data", seed=3)
    manifest = prepare(config(corpus, on_undecodable="skip"), TRAINED, VOCAB, tmp_path / "data", seed=3)
    assert (manifest.dropped.empty, manifest.dropped.undecodable, manifest.dropped.duplicate) == (7, 7, 0)
    assert sum(split.documents for split in manifest.splits.values()) == 90


@pytest.mark.parametrize("train_bytes", [333, 64_000_000])
def test_tokenizer_learns_from_the_first_bytes_of_the_training_documents(
    corpus: Path, tmp_path: Path, train_bytes: int
) -> None:
    out = tmp_path / "data"
    prepare(config(corpus), TokenizerConfig(train_bytes=train_bytes), VOCAB, out, seed=3)
    learnt, left = [], train_bytes
    for text in texts(out, "train"):
        portion = text.encode()[:left]
        learnt.append(portion.decode(errors="ignore"))
        left -= len(portion)
    assert Tokenizer.load(out).fingerprint == Tokenizer.train(learnt, VOCAB).fingerprint


def test_existing_tokenizer_is_taken_as_it_is(corpus: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["some other text", "and words, words"], 280)
    tokenizer.save(tmp_path / "tokenizer.json")
    given = TokenizerConfig(path=str(tmp_path / "tokenizer.json"))
    manifest = prepare(config(corpus), given, VOCAB, tmp_path / "data", seed=3)
    assert manifest.tokenizer == tokenizer.fingerprint == Tokenizer.load(tmp_path / "data").fingerprint
    with pytest.raises(DataError, match=r"^model\.vocab_size=279: must be at least 280, .*tokenizer\.path="):
        prepare(config(corpus), given, 279, tmp_path / "small", seed=3)


def test_special_tokens_written_in_documents_stay_text(corpus: Path, tmp_path: Path) -> None:
    (corpus / "chat.txt").write_text(f"{USER}hello", encoding="utf-8")
    prepare(config(corpus), TRAINED, VOCAB, tmp_path / "data", seed=3)
    for split in ("train", "validation", "heldout"):
        shards = Shards.open(tmp_path / "data", split)
        assert all(min(shards.document(n)[1:-1]) >= 8 for n in range(shards.documents))


def test_same_inputs_again_use_what_is_there(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    first = prepare(config(corpus), TRAINED, VOCAB, out, seed=3)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(config(corpus), TRAINED, VOCAB, out, seed=3, workers=2) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_other_inputs_are_refused_with_what_differs(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    prepare(config(corpus), TRAINED, VOCAB, out, seed=3)
    before = content(out)
    with pytest.raises(DataError, match=r"was prepared with seed=3, not 4; choose another folder or delete this one"):
        prepare(config(corpus), TRAINED, VOCAB, out, seed=4)
    with pytest.raises(DataError, match=r"data\.exclude=\[\], not \['x'\]"):
        prepare(config(corpus, exclude=("x",)), TRAINED, VOCAB, out, seed=3)
    with pytest.raises(DataError, match=r"tokenizer\.train_bytes=64000000, not 5"):
        prepare(config(corpus), TokenizerConfig(train_bytes=5), VOCAB, out, seed=3)
    with pytest.raises(DataError, match=r"vocab_size=300, not 301"):
        prepare(config(corpus), TRAINED, VOCAB + 1, out, seed=3)
    path = corpus / "part0" / "0.txt"
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="was prepared from other documents: files were added, removed or edited"):
        prepare(config(corpus), TRAINED, VOCAB, out, seed=3)
    assert content(out) == before


def test_damage_is_found_before_data_is_used_again(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    prepare(config(corpus), TRAINED, VOCAB, out, seed=3)
    path = out / "heldout-00000.tokens.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"heldout-00000\.tokens\.npy: damaged, its checksum"):
        prepare(config(corpus), TRAINED, VOCAB, out, seed=3)
    path.write_bytes(whole)
    Tokenizer.train(["other"], VOCAB).save(out / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer\.json: not the tokenizer of these shards"):
        prepare(config(corpus), TRAINED, VOCAB, out, seed=3)


@pytest.mark.parametrize("name", ["tokenizer.json", MANIFEST_NAME])
def test_full_disk_is_one_sentence_and_leaves_no_manifest(corpus: Path, tmp_path: Path, name: str, monkeypatch) -> None:
    out = tmp_path / "data"
    out.mkdir()

    def full(path: Path) -> None:
        if path.name.startswith(f".{name}."):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("abyssal.files.atomic.flush", full)
    with pytest.raises(DataError, match=rf"{name}: cannot write it \(No space left on device; free some space"):
        prepare(config(corpus), TRAINED, VOCAB, out, seed=3)
    assert not (out / MANIFEST_NAME).exists()
    assert not list(out.glob(".*"))


def test_disk_that_fills_up_in_a_shard_is_one_sentence(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        if len(list((tmp_path / "data").glob("train-*"))) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DataError, match=r"train-\d+\.\w+\.npy: cannot write it \(No space left on device; free some space"
    ):
        prepare(config(corpus), TRAINED, VOCAB, tmp_path / "data", seed=3)
    assert not (tmp_path / "data" / MANIFEST_NAME).exists()


def test_an_interrupted_preparation_is_begun_anew_and_nothing_else_is_touched(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus), TRAINED, VOCAB, tmp_path / "whole", seed=3)
    out = tmp_path / "data"
    out.mkdir()
    for name in ("train-00099.tokens.npy", ".validation-00000.bytes.npy.writing-0a1b2c3d", "notes.txt", "train-1.txt"):
        (out / name).write_text("left over")
    prepare(config(corpus), TRAINED, VOCAB, out, seed=3)
    kept = content(out)
    assert kept.pop("notes.txt") == kept.pop("train-1.txt") == b"left over"
    assert kept == content(tmp_path / "whole")


def test_nothing_left_for_training_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").touch()
    with pytest.raises(DataError, match=r"none of its 1 documents is left for training"):
        prepare(config(tmp_path / "corpus"), TRAINED, VOCAB, tmp_path / "data", seed=3)


def test_out_that_is_a_file_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(DataError, match=r"data: cannot prepare the data here"):
        prepare(config(corpus), TRAINED, VOCAB, tmp_path / "data", seed=3)


def test_bars_go_to_standard_error_when_asked_for(corpus: Path, tmp_path: Path, capsys) -> None:
    prepare(config(corpus), TRAINED, VOCAB, tmp_path / "quiet", seed=3)
    assert capsys.readouterr() == ("", "")
    prepare(config(corpus), TRAINED, VOCAB, tmp_path / "shown", seed=3, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Shards" in shown.err


def test_worker_processes_do_not_load_torch() -> None:
    code = "import sys, abyssal.data.encode, abyssal.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
