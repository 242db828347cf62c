"""Unpacking of compressed .jsonl, Parquet and Hugging Face data sets into plain .jsonl.

Documents are read in shuffled order by several processes, which none of these formats allows. So each is unpacked
once, into a .jsonl file that is removed once the data is prepared.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from abyssal.data.optional import import_optional
from abyssal.errors import DataError
from abyssal.files.atomic import atomic_file
from abyssal.files.faults import os_faults

#: What an entry of the corpus that names a Hugging Face data set begins with.
HUGGING_FACE = "hf:"
#: Files with these suffixes are unpacked.
PACKED_SUFFIXES = (".jsonl.gz", ".jsonl.zst", ".parquet")
READ_BYTES = 1 << 18
BATCH_ROWS = 1024


def unpack(name: str, identity: str, text_field: str, folder: Path) -> Path:
    """Return a .jsonl file with the documents of one packed file or data set, in their order.

    Args:
        name: the path of a packed file, or the `hf:` entry of a data set.
        identity: what changes when its content does; a file unpacked under the same one is used again.
        text_field: the column of Parquet or of a data set that holds the text.
        folder: where the .jsonl goes; made if absent.

    Raises:
        DataError: it is damaged, cannot be read, has no such column, a package is missing, or the disk is full.
    """
    digest = hashlib.sha256(f"{name}\0{identity}\0{text_field}".encode(errors="surrogateescape")).hexdigest()
    path = folder / f"{digest[:24]}.jsonl"
    if path.exists():  # a file gets that name only when it is complete
        return path
    with os_faults(DataError, folder, "make this folder"):
        folder.mkdir(parents=True, exist_ok=True)
    with os_faults(DataError, path, "write it"), atomic_file(path) as staging, staging.open("wb") as file:
        for chunk in _jsonl_chunks(name, text_field):
            file.write(chunk)
    return path


def data_set_identity(entry: str) -> str:
    """Return what changes when a data set on disk does; one that is known by its name counts as unchanged."""
    folder = Path(entry.removeprefix(HUGGING_FACE).partition(":")[0])
    try:
        files = sorted((file.relative_to(folder).as_posix(), file.stat()) for file in folder.rglob("*.*"))
    except OSError as error:
        _unreadable(folder, error)
    return " ".join(f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in files)


def _jsonl_chunks(name: str, text_field: str) -> Iterator[bytes]:
    """Yield the bytes of the .jsonl file in chunks of any length."""
    if name.startswith(HUGGING_FACE):
        return _data_set(name, text_field)
    path = Path(name)
    if name.endswith(".parquet"):
        return _parquet(path, text_field)
    if name.endswith(".gz"):
        return _decompressed(path, lambda: zlib.decompressobj(wbits=31), zlib.error)
    decompressor, fault = _zstandard(path)
    return _decompressed(path, decompressor, fault)


def _zstandard(path: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """Return what makes a decompressor, and what it raises: Python's own from 3.14 on, else the package's."""
    try:
        own: Any = importlib.import_module("compression.zstd")
    except ImportError:
        package = import_optional("zstandard", "zstd", str(path))
        return lambda: package.ZstdDecompressor().decompressobj(), package.ZstdError
    return own.ZstdDecompressor, own.ZstdError


def _decompressed(path: Path, decompressor: Callable[[], Any], fault: type[Exception]) -> Iterator[bytes]:
    """Yield the content of a compressed file of one or several frames."""
    frame: Any = None
    try:
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                while chunk:
                    frame = frame or decompressor()
                    yield frame.decompress(chunk)
                    if not frame.eof:
                        break
                    chunk, frame = frame.unused_data, None
    except OSError as error:
        _unreadable(path, error)
    except fault as error:
        _damaged(path, error)
    if frame is not None:  # decompressors do not report a missing end themselves
        _damaged(path, "it ends too early")


def _parquet(path: Path, text_field: str) -> Iterator[bytes]:
    """Yield a line of JSON for every row."""
    parquet = import_optional("pyarrow.parquet", "parquet", str(path))
    fault = import_optional("pyarrow", "parquet", str(path)).ArrowException
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(str(path), text_field, file.schema_arrow.names)
            for batch in file.iter_batches(BATCH_ROWS, columns=[text_field]):
                yield _lines(batch.column(0).to_pylist(), text_field)
    except (fault, UnicodeDecodeError) as error:
        _damaged(path, error)
    except OSError as error:  # of damaged pages as well
        _unreadable(path, error) if error.strerror else _damaged(path, error)


def _data_set(entry: str, text_field: str) -> Iterator[bytes]:
    """Yield a line of JSON for every row of a data set on disk, or one that the library finds by its name."""
    datasets = import_optional("datasets", "datasets", entry)
    name, _, split = entry.removeprefix(HUGGING_FACE).partition(":")
    try:
        if Path(name).is_dir() and any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(name)
            if hasattr(rows, "keys"):
                rows = rows[split or "train"]
        else:
            rows = datasets.load_dataset(name, split=split or "train")
        columns = list(rows.column_names)
    except Exception as error:  # the library lets through whatever its own libraries raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{entry}: cannot be read ({reason}); must be hf:NAME or hf:FOLDER, or either:SPLIT") from None
    _check_column(entry, text_field, columns)
    try:
        for start in range(0, len(rows), BATCH_ROWS):
            yield _lines(rows[start : start + BATCH_ROWS][text_field], text_field)
    except Exception as error:
        _damaged(entry, error)


def _check_column(where: str, text_field: str, columns: list[str]) -> None:
    if text_field not in columns:
        raise DataError(
            f"{where}: must have text in the column {text_field!r} (data.text_field), but has only {', '.join(columns)}"
        )


def _lines(values: list[Any], text_field: str) -> bytes:
    return "".join(json.dumps({text_field: value}, default=str) + "\n" for value in values).encode()


def _unreadable(path: Path, error: OSError) -> NoReturn:
    raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _damaged(where: Path | str, reason: object) -> NoReturn:
    short = str(reason).strip().partition("\n")[0]
    raise DataError(f"{where}: damaged ({short}); fetch or make it again, or leave it out") from None
