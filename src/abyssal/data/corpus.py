"""The corpus: where its documents are, how one is read, and which split each belongs to."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from abyssal.config.run import DataConfig
from abyssal.data.unpack import HUGGING_FACE, PACKED_SUFFIXES, data_set_identity, unpack
from abyssal.errors import DataError

#: The corpus that every machine has: the source of Python's own standard library.
STDLIB = "stdlib:"

SplitName = Literal["train", "validation", "heldout"]


class UndecodableError(DataError):
    """A document is not UTF-8 text."""


@dataclass(frozen=True, slots=True)
class DocumentRef:
    """Where one document is stored.

    `key` is the path relative to its corpus, with `/` between folders, and `:line` behind it for a line of a .jsonl
    file or a row. It alone fixes the document's split and, with the seed, its place in the order.
    """

    key: str
    path: Path
    size: int  # bytes on disk
    offset: int = 0  # of a .jsonl line, in bytes
    line: int = 0  # of a .jsonl file, from 1; 0: the document is the whole file
    origin: str = ""  # the packed file or data set that `path` was unpacked from
    source: str = ""  # the name of its source


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file of a corpus, or one data set: what may be opened only when it is needed."""

    source: str  # "" where sources have no names
    entry: str  # of data.corpus, or of the source's paths
    key: str
    name: str  # its path, or the `hf:` entry
    identity: str  # changes when its content does

    @property
    def needs_unpacking(self) -> bool:
        """Whether it must be unpacked before its documents can be read."""
        return self.name.startswith(HUGGING_FACE) or self.name.endswith(PACKED_SUFFIXES)


def find_files(config: DataConfig) -> list[CorpusFile]:
    """List the files of every corpus: corpora as given, files by relative path. Links to folders are not followed.

    Raises:
        DataError: no corpus is named, or one does not exist or cannot be read.
    """
    if not config.entries:
        raise DataError(f"data.corpus=[]: must name folders, text files or .jsonl files, or {STDLIB!r}")
    files: list[CorpusFile] = []
    for source, entry in config.entries:
        if entry.startswith(HUGGING_FACE):
            key = entry.removeprefix(HUGGING_FACE)
            files.append(CorpusFile(source, entry, key, entry, data_set_identity(entry)))
        else:
            for key, path in sorted(_files(source, entry, config)):
                files.append(CorpusFile(source, entry, key, str(path), _identity(path)))
    return files


def find_documents(config: DataConfig, files: Sequence[CorpusFile], unpacked: Path) -> Iterator[DocumentRef]:
    """Yield the documents of these files, in the order of files, lines and rows.

    Args:
        config: of the recipe.
        files: as `find_files` lists them.
        unpacked: the folder to unpack files into.

    Raises:
        DataError: a file cannot be read or unpacked, or a corpus has no documents.
    """
    counts = Counter[tuple[str, str]]()
    for file in files:
        for ref in _documents(file, config, unpacked):
            counts[file.source, file.entry] += 1
            yield ref
    for source, entry in config.entries:
        if not counts[source, entry]:
            raise DataError(
                f"{_recipe_field(source)}={entry!r}: no documents there; read are files named "
                f"{', '.join(config.suffixes)} (data.suffixes) outside of folders named "
                f"{', '.join(config.exclude) or '-'} (data.exclude)"
            )


def _recipe_field(source: str) -> str:
    """Return the name of the recipe's field that has the entries of a source."""
    return f"data.sources.{source}.paths" if source else "data.corpus"


def _documents(file: CorpusFile, config: DataConfig, unpacked: Path) -> Iterator[DocumentRef]:
    """Yield the documents of one file."""
    if file.needs_unpacking:
        yield from _lines(file, unpack(file.name, file.identity, config.text_field, unpacked), file.name)
    elif file.name.endswith(".jsonl"):
        yield from _lines(file, Path(file.name))
    else:
        path = Path(file.name)
        yield DocumentRef(file.key, path, _stat(path).st_size, source=file.source)


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
    where = f"{ref.origin or ref.path}:{ref.line}" if ref.line else str(ref.path)
    try:
        text = content.decode()
        if ref.line:
            text = _text_of_line(text.removeprefix("\ufeff"), text_field, where)  # some editors write that mark first
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


def _files(source: str, entry: str, config: DataConfig) -> Iterator[tuple[str, Path]]:
    """Yield the key and path of every file of one corpus, in no order."""
    root = Path(sysconfig.get_path("stdlib") if entry == STDLIB else entry)
    if root.is_file():
        yield root.name, root
        return
    if not root.is_dir():
        raise DataError(f"{_recipe_field(source)}={entry!r}: no such file or folder; must be either, or {STDLIB!r}")
    # without onerror, a folder that may not be read would be left out silently
    for folder, subfolders, names in os.walk(root, onerror=_unreadable):
        subfolders[:] = [name for name in subfolders if name not in config.exclude]
        for name in names:
            if name.endswith(config.suffixes):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


def _lines(file: CorpusFile, path: Path, origin: str = "") -> Iterator[DocumentRef]:
    """Yield a reference to every line of a .jsonl file that is not blank."""
    offset = 0
    try:
        with path.open("rb") as content:
            for number, line in enumerate(content, start=1):
                if line.strip():
                    yield DocumentRef(f"{file.key}:{number}", path, len(line), offset, number, origin, file.source)
                offset += len(line)
    except OSError as error:
        _unreadable(error, path)


def _text_of_line(line: str, field: str, where: str) -> str:
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


def _identity(path: Path) -> str:
    status = _stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        _unreadable(error, path)


def _unreadable(error: OSError, path: Path | None = None) -> NoReturn:
    raise DataError(f"{path or error.filename}: cannot be read ({error.strerror})") from None
