from pathlib import Path

import pytest

from abyssal.config.run import DataConfig, TokenizerConfig
from abyssal.data.augment import TrainingEncoder
from abyssal.data.prepare import prepare
from abyssal.data.shards import Shards
from abyssal.text.fim import FillInTheMiddle
from abyssal.text.tokenizer import Tokenizer

LINES = "if (a);\n  f(b, [c]);\r\n});\n\n# Größe: 1 €\n€\n"
TOKENIZER = Tokenizer.train([LINES * 20], 330)
TEXTS = {f"{n}.txt": LINES[n % 7 :] + str(n) for n in range(400)}


def text_of(fim: float = 0.0, split: float = 0.0, seed: int = 5) -> TrainingEncoder:
    return TrainingEncoder(TOKENIZER, DataConfig(fim_rate=fim, split_merged_rate=split), seed)


def encoded(training: TrainingEncoder) -> dict[str, list[int]]:
    return {key: training.encode(text, key) for key, text in TEXTS.items()}


def test_without_rates_documents_stay_as_they_are() -> None:
    assert encoded(text_of()) == {key: TOKENIZER.encode_document(text) for key, text in TEXTS.items()}


def test_share_of_documents_is_rearranged_and_none_lost() -> None:
    fim = FillInTheMiddle(TOKENIZER)
    found = encoded(text_of(fim=0.25, split=0.5))
    assert {key: fim.decode(ids) for key, ids in found.items()} == TEXTS
    assert 70 < sum(fim.begin_id in ids for ids in found.values()) < 130


def test_cuts_reach_every_part_of_a_document() -> None:
    fim, training = FillInTheMiddle(TOKENIZER), text_of(fim=1.0)
    middles = set()
    for n in range(200):
        ids = training.encode("abc", str(n))
        middles.add(TOKENIZER.decode(ids[ids.index(fim.end_id) + 1 :]))
    assert middles == {"", "a", "b", "c", "ab", "bc", "abc"}


def test_share_of_merged_tokens_is_taken_apart_into_punctuation_and_line_ends() -> None:
    plain, training = encoded(text_of()), text_of(split=0.3)
    found = encoded(training)
    assert {key: TOKENIZER.decode(ids) for key, ids in found.items()} == TEXTS
    parts = training.merged_tokens
    merged = {TOKENIZER.decode([token]) for token in parts}
    assert {");\n", "€\n"} <= merged
    assert not any(text.isspace() or "\ufffd" in text or text.strip()[0].isalnum() for text in merged)
    before, after = (
        sum(token in training.merged_tokens for ids in all_.values() for token in ids) for all_ in (plain, found)
    )
    assert 0.6 < after / before < 0.8
    assert all(
        TOKENIZER.decode(pair[-1:]).strip("\r\n") == "" and len(pair) >= 2 for pair in training.merged_tokens.values()
    )


def test_randomness_is_of_seed_and_document_alone() -> None:
    training = text_of(fim=0.5, split=0.5)
    whole = encoded(training)
    assert {key: training.encode(TEXTS[key], key) for key in reversed(TEXTS)} == dict(reversed(whole.items()))
    assert encoded(text_of(fim=0.5, split=0.5)) == whole
    assert encoded(text_of(fim=0.5, split=0.5, seed=6)) != whole
    assert len({tuple(training.encode(LINES, str(n))) for n in range(30)}) > 10


@pytest.mark.parametrize("workers", [1, 2])
def test_only_training_documents_are_rearranged(tmp_path: Path, monkeypatch, workers: int) -> None:
    monkeypatch.setattr("abyssal.data.prepare.SHARD_BYTES", (4000, 4000))
    (tmp_path / "in").mkdir()
    for key, text in TEXTS.items():
        (tmp_path / "in" / key).write_bytes(text.encode())
    config = DataConfig(corpus=(str(tmp_path / "in"),), split_modulus=5, fim_rate=0.5, split_merged_rate=0.5)
    prepare(config, TokenizerConfig(), 330, tmp_path / "out", seed=5, workers=workers)
    tokenizer = Tokenizer.load(tmp_path / "out")
    fim, training = FillInTheMiddle(tokenizer), TrainingEncoder(tokenizer, config, 5)
    texts = {}
    for split in ("train", "validation", "heldout"):
        shards = Shards.open(tmp_path / "out", split)
        texts[split] = [list(shards.document(n)) for n in range(shards.documents)]
    assert any(fim.begin_id in ids for ids in texts["train"])
    expected = {tuple(training.encode(text, key)) for key, text in TEXTS.items()}
    assert {tuple(ids[1:-1]) for ids in texts["train"]} <= expected
    for ids in texts["validation"] + texts["heldout"]:
        assert ids[1:-1] == tokenizer.encode_document(tokenizer.decode(ids))
