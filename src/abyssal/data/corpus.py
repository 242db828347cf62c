"""Documents: where they lie, how one is read, and which of them are never trained on."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from abyssal.config.run import DataConfig
from abyssal.errors import DataError

#: The corpus that every machine has: the source of Python's own standard library.
STDLIB = "stdlib:"

SplitName = Literal["train", "validation", "heldout"]


class UndecodableError(DataError):
    """A document is not UTF-8 text."""


@dataclass(frozen=True, slots=True)
class DocumentRef:
    """Where one document lies.

    `key` is the path relative to its corpus, with `/` between folders, and `:line` behind it for a line of a .jsonl
    file. It alone fixes the document's split and, with the seed, its place in the order.
    """

    key: str
    path: Path
    size: int  # bytes on disk
    offset: int = 0  # of a .jsonl line, in bytes
    line: int = 0  # of a .jsonl file, from 1; 0: the document is the whole file


def find_documents(config: DataConfig) -> list[DocumentRef]:
    """List the documents of every corpus: corpora as given, files by relative path, lines as they stand.

    Links to folders are not followed.

    Raises:
        DataError: no corpus is named, one does not exist or cannot be read, or one has no documents.
    """
    if not config.corpus:
        raise DataError(f"data.corpus=[]: must name folders, text files or .jsonl files, or {STDLIB!r}")
    found: list[DocumentRef] = []
    for entry in config.corpus:
        before = len(found)
        for key, path in sorted(_files(entry, config)):
            found += _lines(key, path) if path.suffix == ".jsonl" else [DocumentRef(key, path, _size(path))]
        if len(found) == before:
            raise DataError(
                f"data.corpus={entry!r}: no documents there; read are files named {', '.join(config.suffixes)} "
                f"(data.suffixes) outside of folders named {', '.join(config.exclude) or '-'} (data.exclude)"
            )
    return found


def read_document(ref: DocumentRef, text_field: str = "text") -> str:
    """Return the text of a document, line ends and all.

    Args:
        ref: the document.
        text_field: the field of a .jsonl line that holds it.

    Raises:
        UndecodableError: it is not UTF-8.
        DataError: it cannot be read, or the .jsonl line is not an object with the text in that field.
    """
    try:
        with ref.path.open("rb") as file:
            file.seek(ref.offset)
            content = file.read(ref.size) if ref.line else file.read()
    except OSError as error:
        _unreadable(error, ref.path)
    where = f"{ref.path}:{ref.line}" if ref.line else str(ref.path)
    try:
        text = content.decode()
        if ref.line:
            text = _field(text.removeprefix("\ufeff"), text_field, where)  # some editors put that mark first
            text.encode()  # JSON can spell half of a surrogate pair, which is no text
    except UnicodeError as error:
        raise UndecodableError(
            f"{where}: not UTF-8 text ({error}); convert it, or leave such documents out with "
            'data.on_undecodable="skip"'
        ) from None
    return text


def split_of(key: str, modulus: int) -> SplitName:
    """Return the split of the document `key`: sha256(key) mod `modulus` 0 is held out, 1 is for validation."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    match int.from_bytes(digest, "big") % modulus:
        case 0:
            return "heldout"
        case 1:
            return "validation"
        case _:
            return "train"


def _files(entry: str, config: DataConfig) -> Iterator[tuple[str, Path]]:
    """Yield the key and path of every file of one corpus, in no order."""
    root = Path(sysconfig.get_path("stdlib") if entry == STDLIB else entry)
    if root.is_file():
        yield root.name, root
        return
    if not root.is_dir():
        raise DataError(f"data.corpus={entry!r}: no such file or folder; must be either, or {STDLIB!r}")
    # without onerror, a folder that may not be read would be left out without a word
    for folder, subfolders, names in os.walk(root, onerror=_unreadable):
        subfolders[:] = [name for name in subfolders if name not in config.exclude]
        for name in names:
            if name.endswith(config.suffixes):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


def _lines(key: str, path: Path) -> Iterator[DocumentRef]:
    """Yield a reference to every line of a .jsonl file that is not blank."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield DocumentRef(f"{key}:{number}", path, len(line), offset, number)
                offset += len(line)
    except OSError as error:
        _unreadable(error, path)


def _field(line: str, field: str, where: str) -> str:
    """Return the text in one .jsonl line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be a JSON object on one line")
    text = record.get(field)
    if not isinstance(text, str):
        has = f"{type(text).__name__} in it" if field in record else f"only {', '.join(record) or 'nothing'}"
        raise DataError(f"{where}: must have text in the field {field!r} (data.text_field), but has {has}")
    return text


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        _unreadable(error, path)


def _unreadable(error: OSError, path: Path | None = None) -> NoReturn:
    raise DataError(f"{path or error.filename}: cannot be read ({error.strerror})") from None
