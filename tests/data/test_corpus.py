import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from abyssal.config.run import DataConfig
from abyssal.data import corpus
from abyssal.data.corpus import STDLIB, DocumentRef, UndecodableError, find_files, read_document, split_of
from abyssal.errors import DataError


def write(path: Path, content: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def config(*corpus: Path | str, **fields) -> DataConfig:
    return DataConfig(corpus=tuple(str(entry) for entry in corpus), **fields)


def find_documents(config: DataConfig) -> list[DocumentRef]:
    return list(corpus.find_documents(config, find_files(config), Path("never made")))


def keys(found: list[DocumentRef]) -> list[str]:
    return [ref.key for ref in found]


def test_folder_is_walked_in_the_order_of_relative_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a.md", "a/b/c.rst", "B.txt", "a/skip.json"):
        write(tmp_path / name, name)
    found = find_documents(config(tmp_path))
    assert keys(found) == ["B.txt", "a.md", "a/b/c.rst", "a/z.py", "b.txt"]
    assert [read_document(ref) for ref in found] == keys(found)
    assert [ref.size for ref in found] == [5, 4, 9, 6, 5]


def test_excluded_folders_are_left_out_at_any_depth_but_not_the_corpus_itself(tmp_path: Path) -> None:
    root = tmp_path / "test"
    for name in ("a.py", "test/b.py", "x/test/c.py", "x/testing/d.py", "x/test.py"):
        write(root / name)
    assert keys(find_documents(config(root, exclude=("test",)))) == ["a.py", "x/test.py", "x/testing/d.py"]


def test_a_file_is_a_corpus_whatever_its_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "book.tex", "text")
    assert find_documents(config(path)) == [DocumentRef("book.tex", path, 4)]


def test_corpora_stand_in_the_order_given(tmp_path: Path) -> None:
    write(tmp_path / "b/1.txt")
    write(tmp_path / "a/2.txt")
    assert keys(find_documents(config(tmp_path / "b", tmp_path / "a"))) == ["1.txt", "2.txt"]


def test_jsonl_lines_are_documents(tmp_path: Path) -> None:
    texts = ["first", "Größe\nof two lines", "\u2028 is no line end", "last"]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    path = write(tmp_path / "d.jsonl", lines[0] + "\n\n" + lines[1] + "\r\n" + lines[2] + "\n  \n" + lines[3])
    found = find_documents(config(path))
    assert keys(found) == ["d.jsonl:1", "d.jsonl:3", "d.jsonl:4", "d.jsonl:6"]
    assert [read_document(ref) for ref in reversed(found)] == texts[::-1]


def test_jsonl_in_a_folder_is_read_where_the_suffixes_name_it(tmp_path: Path) -> None:
    write(tmp_path / "in/d.jsonl", '\ufeff{"body": "one"}\n{"body": "two"}\n')
    write(tmp_path / "in/e.txt")
    assert keys(find_documents(config(tmp_path))) == ["in/e.txt"]
    found = find_documents(config(tmp_path, suffixes=(".jsonl",)))
    assert keys(found) == ["in/d.jsonl:1", "in/d.jsonl:2"]
    assert [read_document(ref, "body") for ref in found] == ["one", "two"]


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    text = "\ufeffa\r\nb\rc\n\0\u2028"
    assert read_document(DocumentRef("a", write(tmp_path / "a.txt", text), 1)) == text


@pytest.mark.parametrize("entries", [(), ("",), ("absent",)])
def test_a_corpus_that_does_not_exist_is_named(tmp_path: Path, entries: tuple[str, ...]) -> None:
    paths = [str(tmp_path / entry / "nothing") for entry in entries]
    with pytest.raises(DataError, match=r"^data\.corpus=\[\]: must name" if not entries else "no such file or folder"):
        find_documents(config(*paths))


def test_a_corpus_without_documents_is_named_with_what_is_read(tmp_path: Path) -> None:
    write(tmp_path / "full/a.py")
    write(tmp_path / "empty/test/a.py")
    write(tmp_path / "empty/a.c")
    with pytest.raises(
        DataError, match=r"empty': no documents there; read are files named \.py .* folders named test "
    ):
        find_documents(config(tmp_path / "full", tmp_path / "empty", suffixes=(".py",), exclude=("test",)))
    with pytest.raises(DataError, match="no documents there"):
        find_documents(config(write(tmp_path / "blank.jsonl", "\n \n")))


def test_a_folder_that_may_not_be_read_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt")
    write(tmp_path / "locked/b.txt")
    real = os.scandir

    def scandir(path: str):  # root, as whom tests may run, could read any folder
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"locked: cannot be read \(Permission denied\)"):
        find_documents(config(tmp_path))


def test_a_broken_link_is_no_silence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        find_documents(config(tmp_path))


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read"):
        read_document(DocumentRef("gone.txt", tmp_path / "gone.txt", 3))


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "latin.txt", "Größe".encode("latin-1"))
    with pytest.raises(UndecodableError, match=r"latin\.txt: not UTF-8 text .*position 2"):
        read_document(DocumentRef("latin.txt", path, 5))


@pytest.mark.parametrize("line", [b'{"text": "\xff"}', b'{"text": "a \\ud800 b"}'])
def test_a_jsonl_line_that_is_no_text_is_named(tmp_path: Path, line: bytes) -> None:
    (_, ref) = find_documents(config(write(tmp_path / "d.jsonl", b'{"text": "fine"}\n' + line)))
    with pytest.raises(UndecodableError, match=r"d\.jsonl:2: not UTF-8 text"):
        read_document(ref)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("[1, 2]", "must be a JSON object on one line"),
        ('{"text": "a"', "must be a JSON object on one line"),
        ("9" * 5000, "must be a JSON object on one line"),
        ("[" * 100000, "must be a JSON object on one line"),
        ('{"body": "a", "id": 3}', r"must have text in the field 'text' \(data.text_field\), but has only body, id"),
        ("{}", "but has only nothing"),
        ('{"text": null}', "but has NoneType in it"),
    ],
)
def test_a_faulty_jsonl_line_is_named_with_its_number(tmp_path: Path, line: str, sentence: str) -> None:
    (_, ref) = find_documents(config(write(tmp_path / "d.jsonl", '{"text": "fine"}\n\n' + line + "\n")))
    with pytest.raises(DataError, match=rf"d\.jsonl:3: .*{sentence}"):
        read_document(ref)


def test_splits_are_sha256_of_the_key_mod_the_modulus() -> None:
    assert split_of("types.py", 3) == split_of("types.py", 3)
    for key in ("types.py", "json/decoder.py", "d.jsonl:17", "größe.txt"):
        rest = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 5
        assert split_of(key, 5) == {0: "heldout", 1: "validation"}.get(rest, "train")


def test_standard_library_is_a_corpus() -> None:
    found = find_documents(
        config(STDLIB, suffixes=(".py",), exclude=("site-packages", "test", "tests", "idle_test", "__pycache__"))
    )
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(keys(found))
    assert not any("/test/" in f"/{key}" or "site-packages" in key for key in keys(found))
    held_out = [ref for ref in found if split_of(ref.key, 20) == "heldout"]
    if sum(ref.size for ref in found) != 12_118_641:
        pytest.skip("another standard library than the one whose figures are known")
    assert len(found) == 734
    assert (len(held_out), sum(ref.size for ref in held_out)) == (39, 655_776)
