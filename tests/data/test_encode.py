from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from abyssal.config.run import DataConfig
from abyssal.data.corpus import find_documents, find_files
from abyssal.data.encode import DocumentReader, ShardEncoder, ShardPlan, text_digest, write_shards
from abyssal.errors import DataError
from abyssal.text.special_tokens import EOS
from abyssal.text.tokenizer import Tokenizer

CONFIG = DataConfig(on_undecodable="skip")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    for name, content in {
        "a.txt": b"plain words",
        "b.txt": b"",
        "c.txt": b"\xff",
        "d.txt": b"known words",
        "e.txt": f"Größe {EOS}".encode(),
    }.items():
        (folder / name).write_bytes(content)
    return folder


def plan_of(folder: Path, split: str, name: str = "s-00000") -> ShardPlan:
    config = DataConfig(corpus=(str(folder),))
    return ShardPlan(split, name, tuple(find_documents(config, find_files(config), folder)))


@pytest.fixture
def encoder(tmp_path: Path) -> ShardEncoder:
    tokenizer = Tokenizer.train(["plain words and known words"], 270)
    return ShardEncoder(tmp_path, tokenizer, DocumentReader(CONFIG, frozenset({text_digest("known words")})))


def test_documents_stand_between_bos_and_eos_and_their_text_makes_neither(folder, encoder, tmp_path: Path) -> None:
    written = encoder.write(plan_of(folder, "train"))
    tokens, starts, num_bytes = (np.load(tmp_path / file.name) for file in written.shard.files)
    documents = [tokens[start:stop].tolist() for start, stop in pairwise(starts)]
    assert [(document[0], document[-1]) for document in documents] == [(0, 1)] * 2
    assert [encoder.tokenizer.decode(document[1:-1]) for document in documents] == ["plain words", f"Größe {EOS}"]
    assert num_bytes.tolist() == [11, 8 + len(EOS.encode())]
    assert (written.shard.documents, written.shard.tokens, written.shard.bytes) == (2, len(tokens), num_bytes.sum())


def test_documents_left_out_are_counted(folder, encoder) -> None:
    assert encoder.write(plan_of(folder, "train")).dropped == {"empty": 1, "undecodable": 1, "duplicate": 1}
    assert encoder.write(plan_of(folder, "validation")).dropped == {"empty": 1, "undecodable": 1}


def test_undecodable_document_is_a_fault_unless_it_may_be_skipped(folder, encoder) -> None:
    reader = DocumentReader(DataConfig(on_undecodable="fail"))
    with pytest.raises(DataError, match=r'c\.txt: not UTF-8 .*data\.on_undecodable="skip"'):
        reader.read(plan_of(folder, "train").documents[2], "train")


def test_processes_write_the_same_bytes_as_one(folder, encoder, tmp_path: Path) -> None:
    plans = [plan_of(folder, "train", f"s-{n:05d}") for n in range(3)]
    alone = list(write_shards(encoder, plans, workers=1))
    content = {path.name: path.read_bytes() for path in tmp_path.glob("*.npy")}
    together = list(write_shards(encoder, plans, workers=2))
    assert together == alone
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.npy")} == content


def test_fault_in_a_process_comes_out_as_its_sentence(folder, encoder, tmp_path: Path) -> None:
    strict = ShardEncoder(tmp_path, encoder.tokenizer, DocumentReader(DataConfig(on_undecodable="fail")))
    with pytest.raises(DataError, match=r"c\.txt: not UTF-8"):
        list(write_shards(strict, [plan_of(folder, "train", f"s-{n:05d}") for n in range(2)], workers=2))
