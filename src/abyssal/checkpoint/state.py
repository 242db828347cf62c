"""The training state: a torch.distributed.checkpoint (DCP) folder that appears whole or not at all.

`root/step-00000123/` holds DCP's own files (`*.distcp`, `.metadata`), `progress.json` (where the run stands) and
`checksums.json` (the sha256 of every other file).

What is trusted: nothing that could run code. A state holds tensors only; DCP reads each with torch's weights-only
unpickler, its `.metadata` (a pickle) is read here by an unpickler that knows DCP's own record classes and nothing else,
and every file that the metadata names must be one of the folder's. The checksums find damage; they do not say who wrote
the files, since whoever changes a file can change its checksum too.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from abyssal.checkpoint.atomic import (
    atomic_directory,
    explain,
    free_space_check,
    os_faults,
    remove_directory,
    remove_stale,
)
from abyssal.errors import CheckpointError

PROGRESS, CHECKSUMS, METADATA = "progress.json", "checksums.json", ".metadata"
#: torch.save's frame around each tensor in a DCP file, generously.
TENSOR_OVERHEAD_BYTES = 4096
#: The most names that an error sentence lists of one kind.
MAX_NAMES = 8


def save_state(
    root: Path,
    step: int,
    tensors: Mapping[str, Any],
    progress: Mapping[str, Any],
    keep: int,
    *,
    keep_multiples_of: int = 0,
) -> Path:
    """Write `root/step-<step>/` whole or not at all, then remove the states of earlier steps beyond the newest `keep`.

    Args:
        root: the folder of all states of one run; what killed runs left half-written there is removed first.
        step: the optimizer step after which the state was taken.
        tensors: nested dicts with tensors as leaves (`{"model": ..., "optimizer": ...}`); read, not changed.
        progress: what JSON can hold: step, sequences consumed, tokens.
        keep: how many states stay, this one included; later steps than this one are never removed.
        keep_multiples_of: states of these steps are never removed; 0: every state may be.

    Raises:
        CheckpointError: the state exists, or the disk refused; earlier states are untouched.
        TypeError: a leaf is no tensor.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: must be at least 1")
    flat = dict(leaves(tensors))
    text = json.dumps(dict(progress), indent=1) + "\n"
    target = root / f"step-{step:08d}"
    with os_faults(CheckpointError, target, "write the training state"):
        root.mkdir(parents=True, exist_ok=True)
        remove_stale(root)
        free_space_check(root, sum(tensor.nbytes + TENSOR_OVERHEAD_BYTES for tensor in flat.values()))
        with atomic_directory(target) as staging:
            with _dcp_faults(target, "write the training state"):
                save(dict(tensors), storage_writer=_Writer(staging, sync_files=False), no_dist=True)
            (staging / PROGRESS).write_text(text, encoding="utf-8")
            sums = {file.name: sha256(file) for file in sorted(staging.iterdir())}
            (staging / CHECKSUMS).write_text(_render(sums), encoding="utf-8")
    older = [path for path in states(root) if _step(path) < step]
    for path in older[: max(0, len(older) + 1 - keep)]:
        if keep_multiples_of and _step(path) % keep_multiples_of == 0:
            continue
        with os_faults(CheckpointError, path, "remove this older training state"):
            remove_directory(path)
    return target


def states(root: Path) -> list[Path]:
    """Return the states under `root`, in the order of their steps."""
    found = root.glob("step-*") if root.is_dir() else []
    return sorted((path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()), key=_step)


def latest_state(root: Path) -> Path | None:
    """Return the state of the highest step under `root`, none if there is no state."""
    return max(states(root), key=_step, default=None)


def load_state(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Load a state into `tensors`, in place, and return its progress.

    Every checksum, name, shape and dtype is compared before the first value is copied.

    Raises:
        CheckpointError: no such state, a damaged file, or names, shapes or dtypes that do not fit `tensors`.
    """
    check_state(path)
    with os_faults(CheckpointError, path, "read the training state"):
        metadata = _read_metadata(path)
        _compare(path, metadata, dict(leaves(tensors)))
        with _dcp_faults(path, "read the training state"):
            load(dict(tensors), storage_reader=_Reader(path, metadata), no_dist=True)
        progress: dict[str, Any] = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
    return progress


def read_progress(path: Path) -> dict[str, Any]:
    """Return the progress of a state without its tensors, its own checksum compared.

    Raises:
        CheckpointError: no such state, or a damaged file.
    """
    with os_faults(CheckpointError, path, "read the training state"):
        _check_file(path, PROGRESS, _read_checksums(path))
        progress: dict[str, Any] = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
    return progress


def check_state(path: Path) -> None:
    """Compare every file of a state with its checksum.

    Raises:
        CheckpointError: no such state, or names the file that is damaged, missing or not of this state.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such training state")
    with os_faults(CheckpointError, path, "read the training state"):
        sums = _read_checksums(path)
        for name in sums:
            _check_file(path, name, sums)
        for name in (PROGRESS, METADATA):
            if name not in sums:
                raise CheckpointError(f"{path / CHECKSUMS}: does not list {name}; {_way_out(path)}")


def leaves(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (dotted name, tensor) of nested dicts, as DCP names them.

    Raises:
        TypeError: a leaf is no tensor; other values belong into the progress.
    """
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{name}.")
        elif isinstance(value, torch.Tensor):
            yield name, value
        else:
            raise TypeError(f"{name}: a training state holds tensors only, not {type(value).__name__}")


def adamw_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return an AdamW's state as {parameter name: {"step", "exp_avg", "exp_avg_sq"}}, the live tensors themselves.

    What a fresh optimizer creates at its first step is created here, as zeros, so that a state can be loaded into it.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    wide = torch.get_default_dtype() == torch.float64
    for parameter in parameters.values():
        state, group = optimizer.state[parameter], groups[id(parameter)]
        if not state:  # as torch's own AdamW does: the fused kernel wants an fp32 count beside the parameter
            fused = bool(group["fused"])
            device = parameter.device if fused or group["capturable"] else None
            state["step"] = torch.zeros((), dtype=torch.float64 if wide and not fused else torch.float32, device=device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {name: dict(optimizer.state[parameter]) for name, parameter in parameters.items()}


def sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


# Checksums


def _render(sums: Mapping[str, str]) -> str:
    """Return the only text of `checksums.json` that stands for `sums`; `self` covers the list itself."""
    own = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    return json.dumps({"algorithm": "sha256", "files": dict(sorted(sums.items())), "self": own}, indent=1) + "\n"


def _read_checksums(path: Path) -> dict[str, str]:
    file = path / CHECKSUMS
    try:
        text = file.read_text(encoding="utf-8")
        sums = json.loads(text)["files"]
        if _render(sums) == text and all(Path(name).name == name for name in sums):
            return dict(sums)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, so this is no whole training state; {_way_out(path)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{file}: damaged; {_way_out(path)}")


def _check_file(path: Path, name: str, sums: Mapping[str, str]) -> None:
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{file}: missing from the training state; {_way_out(path)}")
    if sha256(file) != sums.get(name):
        raise CheckpointError(f"{file}: damaged (its sha256 is not the one written with it); {_way_out(path)}")


def _way_out(path: Path) -> str:
    if any((len(other.name), other.name) < (len(path.name), path.name) for other in states(path.parent)):
        return f"remove {path.name} to resume from the state before it"
    return f"remove {path.name}, and the run begins anew, since no earlier state is there"


# DCP


class _Writer(FileSystemWriter):
    """DCP's writer, which leaves out what differs between equal states: the path and a random name."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Reader(FileSystemReader):
    """DCP's reader over metadata that was read and checked already."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _RecordsOnly(pickle.Unpickler):
    """An unpickler that knows the records DCP's metadata is made of, and no other class or function."""

    KNOWN = frozenset(
        {
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata",
                    "MetadataIndex",
                    "TensorStorageMetadata",
                    "ChunkStorageMetadata",
                    "BytesStorageMetadata",
                    "TensorProperties",
                    "StorageMeta",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no training state needs")
        return super().find_class(module, name)


def _read_metadata(path: Path) -> Metadata:
    """Read `.metadata`, and see that it speaks of tensors in files of this folder only."""
    file = path / METADATA
    try:
        with file.open("rb") as stream:
            metadata = _RecordsOnly(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        written = {info.relative_path for info in metadata.storage_data.values()}
    except OSError:
        raise
    except Exception as error:  # a hostile or damaged pickle may raise anything
        raise CheckpointError(f"{file}: not the metadata of a training state: {error}; {_way_out(path)}") from None
    if strangers := sorted(written - _read_checksums(path).keys()):
        raise CheckpointError(f"{file}: names {strangers[0]!r}, which is no file of this training state")
    return metadata


def _compare(path: Path, metadata: Metadata, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a state whose names, shapes or dtypes are not those of `tensors`."""
    records = metadata.state_dict_metadata
    unfit = []
    for name in tensors.keys() & records.keys():
        record, tensor = records[name], tensors[name]
        if not isinstance(record, TensorStorageMetadata):
            unfit.append(f"{name} (no tensor)")
        elif (record.size, record.properties.dtype) != (tensor.size(), tensor.dtype):
            stored = f"{list(record.size)} {record.properties.dtype}"
            unfit.append(f"{name} ({stored} instead of {list(tensor.size())} {tensor.dtype})".replace("torch.", ""))
    faults = {
        "missing": tensors.keys() - records.keys(),
        "surplus": records.keys() - tensors.keys(),
        "of another shape or type": unfit,
    }
    sentences = [f"{kind}: {_list(sorted(names))}" for kind, names in faults.items() if names]
    if sentences:
        raise CheckpointError(
            f"{path}: this training state is of another model or optimizer; {'; '.join(sentences)}; "
            "resume with the recipe that it was written with"
        )


def _list(names: list[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _dcp_faults(path: Path, doing: str) -> Iterator[None]:
    """Turn DCP's CheckpointException into a CheckpointError; let Ctrl-C, which DCP wraps too, out as it came."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if not isinstance(cause, Exception):
                raise cause from None
        reason = "; ".join(_reason(cause) for cause in causes)
        raise CheckpointError(f"{path}: cannot {doing} ({reason})") from error


def _reason(error: BaseException) -> str:
    """Return the fault of the disk behind `error` if there is one, its own first line otherwise."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return explain(cause)
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
