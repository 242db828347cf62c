"""`manifest.json`: length and checksum of every file of a converted directory, and the comparison with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from abyssal.checkpoint.hf.read import read_model_directory
from abyssal.config.frozen import Frozen
from abyssal.errors import ModelDirectoryError
from abyssal.files.checksums import sha256
from abyssal.files.faults import os_faults

MANIFEST = "manifest.json"


class FileRecord(Frozen):
    """A file that is whole."""

    bytes: int
    sha256: str


class ConversionManifest(Frozen):
    """What a conversion wrote: the format of its weights, and its files by name."""

    format: str
    files: dict[str, FileRecord]


def read_manifest(folder: Path) -> ConversionManifest:
    """Read the manifest of a directory.

    Raises:
        ModelDirectoryError: there is none, or it is damaged.
    """
    try:
        return ConversionManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ModelDirectoryError(f"{folder / MANIFEST}: no such file, so there is nothing to compare with") from None
    except (OSError, ValidationError):
        raise ModelDirectoryError(f"{folder / MANIFEST}: damaged; convert again") from None


def verify_directory(
    folder: Path, on_read: Callable[[int, int], None] = lambda read, total: None
) -> ConversionManifest:
    """Read a converted directory whole and compare it with its manifest, and its tensors with its config.

    `on_read` is called with the bytes that were read, and how many there are.

    Raises:
        ModelDirectoryError: names every file that is missing, surplus or different, or every tensor that does not fit.
    """
    manifest = read_manifest(folder)
    faults = []
    read_bytes, total = 0, sum(record.bytes for record in manifest.files.values())

    def count(read: int) -> None:
        nonlocal read_bytes
        read_bytes += read
        on_read(read_bytes, total)

    with os_faults(ModelDirectoryError, folder, "compare it with its manifest"):
        present = {file.name for file in folder.iterdir()} - {MANIFEST}
        for name, record in manifest.files.items():
            if name not in present:
                faults.append(f"{name} is missing")
            elif (size := (folder / name).stat().st_size) != record.bytes:
                faults.append(f"{name} has {size:,} bytes instead of {record.bytes:,}")
            elif sha256(folder / name, count) != record.sha256:
                faults.append(f"{name} has another checksum")
    faults += [f"{name} is not in the manifest" for name in sorted(present - manifest.files.keys())]
    if faults:
        raise ModelDirectoryError(f"{folder}: is not as it was written: {', '.join(faults)}; convert again")
    read_model_directory(folder, needs_tokenizer=False)[1].check()
    return manifest
