from pathlib import Path

import pytest

from abyssal.config.run import DataConfig, TokenizerConfig
from abyssal.data.corpus import split_of
from abyssal.data.duplicates import NearDuplicateIndex, bands_for
from abyssal.data.manifest import DatasetManifest, DroppedCounts
from abyssal.data.prepare import prepare
from abyssal.data.quality import broken_rule
from abyssal.data.shards import Shards
from abyssal.errors import DataError
from abyssal.text.tokenizer import Tokenizer

WORDS = ["".join(chr(97 + n * k % 26) for k in (1, 3, 7, 9)) + str(n) for n in range(400)]
PAGES = {f"{n}.txt": " ".join(WORDS[(n * 53 + k * (n + 3)) % 400] for k in range(120)) for n in range(60)}


def made(tmp_path: Path, texts: dict[str, str], **fields) -> tuple[DatasetManifest, dict[str, list[str]]]:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    config = DataConfig(corpus=(str(folder),), split_modulus=5, **fields)
    manifest = prepare(config, TokenizerConfig(), 300, out, seed=1)
    tokenizer = Tokenizer.load(out)
    opened = {split: Shards.open(out, split) for split in manifest.splits}
    return manifest, {
        split: [tokenizer.decode(shards.document(n)) for n in range(shards.documents)]
        for split, shards in opened.items()
    }


def of_split(split: str) -> dict[str, str]:
    return {key: text for key, text in PAGES.items() if split_of(key, 5) == split}


def names_in(split: str, count: int) -> list[str]:
    return [name for name in (f"copy{n}.txt" for n in range(1000)) if split_of(name, 5) == split][:count]


def test_copies_stay_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    copies = dict(zip(names_in("train", 9), of_split("train").values(), strict=False))
    manifest, texts = made(tmp_path, PAGES | copies)
    assert manifest.dropped == DroppedCounts()
    assert sorted(texts["train"]) == sorted([*of_split("train").values(), *copies.values()])


def test_exact_copies_leave_one_document_each(tmp_path: Path) -> None:
    copies = dict(zip(names_in("train", 9), of_split("train").values(), strict=False))
    manifest, texts = made(tmp_path, PAGES | copies, duplicates="exact")
    assert manifest.dropped == DroppedCounts(duplicate=9)
    assert sorted(texts["train"]) == sorted(of_split("train").values())


def test_near_copies_go_and_what_is_tested_stays(tmp_path: Path) -> None:
    pytest.importorskip("rensa", reason="the extra duplicates is not installed")
    tested = [*of_split("heldout").values(), *of_split("validation").values()]
    near = {name: f"{text} changed" for name, text in zip(names_in("train", 7), tested, strict=False)}
    among = {
        f"c{name}": f"new {text}" for name, text in of_split("train").items() if split_of(f"c{name}", 5) == "train"
    }
    kept = dict(zip(names_in("heldout", 5), (f"{text} ends" for text in of_split("train").values()), strict=False))
    manifest, texts = made(tmp_path, PAGES | near | among | kept, duplicates="near")
    assert sorted(texts["heldout"] + texts["validation"]) == sorted(tested + list(kept.values()))
    # each pair of near documents leaves one, unless a held-out one is near both
    left = len(of_split("train")) - len(kept)
    assert len(texts["train"]) == left
    assert manifest.dropped.near_duplicate == len(near) + len(among) + len(kept)
    assert not set(texts["train"]) & {text.removesuffix(" ends") for text in kept.values()}


def test_likeness_is_the_threshold(tmp_path: Path) -> None:
    pytest.importorskip("rensa", reason="the extra duplicates is not installed")
    words = WORDS[:200]
    half = " ".join(words[:100] + WORDS[300:400])
    for threshold, expected in ((0.2, True), (0.6, False)):
        found = NearDuplicateIndex(threshold)
        found.add(found.signature(" ".join(words)))
        assert found.contains(found.signature(half)) == expected  # a third of the runs are common
    assert not found.contains(found.signature("short"))
    assert not found.contains(found.signature(""))


def test_bands_are_the_fewest_that_find_what_is_alike() -> None:
    assert [bands_for(threshold) for threshold in (0.1, 0.5, 0.8, 0.95, 1.0)] == [128, 64, 32, 8, 4]


def test_near_without_the_library_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(DataError, match=r'data\.duplicates="near": needs the package rensa, .*abyssal\[duplicates\]'):
        made(tmp_path, PAGES, duplicates="near")


def test_corpus_that_is_all_duplicates_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"none of its 60 documents is left for training; left out: \d+ duplicate; give"
    ):
        made(tmp_path, dict.fromkeys(PAGES, "the same in all of them"))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("text", "rules", "fault"),
    [
        ("abcd", {"min_characters": 5}, "short"),
        ("abcde", {"min_characters": 5}, None),
        ("ab\nabcdef\n", {"max_line_characters": 5}, "long_line"),
        ("ab\nabcde\n", {"max_line_characters": 5}, None),
        ("a\n\n\n\nb\na\na\n", {"max_repeated_lines": 0.4}, "repetitive"),
        ("a\n\n\n\nb\na\na\n", {"max_repeated_lines": 0.5}, None),
        ("a\na\na\n", {}, None),
    ],
)
def test_rules_of_quality(text: str, rules: dict[str, float], fault: str | None) -> None:
    assert broken_rule(text, DataConfig(**rules)) == fault


def test_rules_of_quality_are_for_training_documents(tmp_path: Path) -> None:
    short = {name: f"s{n}" for n, name in enumerate(names_in("train", 4) + names_in("heldout", 3))}
    manifest, texts = made(tmp_path, PAGES | short, min_characters=5)
    assert manifest.dropped == DroppedCounts(short=4)
    assert manifest.dropped.sentence() == "4 short"
    assert {"s4", "s5", "s6"} <= set(texts["heldout"])
