"""A conversion from its beginning, or from where it was interrupted, to a whole directory.

Everything is written in a hidden folder beside the target: `.NAME.converting/model` becomes the target by a rename when
every file is on the disk, and `.NAME.converting/finished.json` says meanwhile which files are.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from abyssal.checkpoint.convert.manifest import MANIFEST, ConversionManifest, FileRecord
from abyssal.checkpoint.convert.plan import Conversion, OutputFile, plan_digest, plan_files
from abyssal.checkpoint.convert.side_files import converted_config, copy_side_files, files_to_copy
from abyssal.checkpoint.convert.source import SourceModel, read_source
from abyssal.checkpoint.convert.workers import write_output_files
from abyssal.checkpoint.hf.file_plan import write_index, write_json
from abyssal.checkpoint.hf.files import CONFIG
from abyssal.checkpoint.hf.fp8_scales import SCALE_SUFFIX
from abyssal.checkpoint.hf.headers import TensorInfo
from abyssal.config.frozen import Frozen
from abyssal.config.quantization import BlockFP8
from abyssal.errors import ModelDirectoryError
from abyssal.files.atomic import write_text
from abyssal.files.checksums import sha256
from abyssal.files.faults import check_free_space, os_faults
from abyssal.files.flush import flush, flush_tree
from abyssal.files.locks import locked

#: What the index, config.json and manifest may need on the disk, beside weights and copies.
MARGIN_BYTES = 2**25


@dataclass(frozen=True)
class ConversionProgress:
    """How far a conversion is; `kept_bytes` are those that an earlier call had finished."""

    written_bytes: int
    total_bytes: int
    kept_bytes: int
    files: int
    total_files: int


@dataclass(frozen=True)
class ConversionResult:
    """What was written, and the names of what was left out of the input."""

    files: int
    total_bytes: int
    kept_bytes: int
    left_out: tuple[str, ...]


class FinishedFiles(Frozen):
    """Which files of a conversion are whole; `identity` changes with what is to be written."""

    identity: str
    files: dict[str, FileRecord]


OnProgress = Callable[[ConversionProgress], None]


def convert_directory(
    source: Path,
    target: Path,
    conversion: Conversion,
    *,
    workers: int = 1,
    scales_from: Path | None = None,
    on_progress: OnProgress = lambda progress: None,
) -> ConversionResult:
    """Write the model of `source` to `target` in another number format; `target` appears whole or not at all.

    FP8 to bf16 or fp32 is fp8 * scale in fp32, rounded once; to FP8, scale = amax / 448 of each block of 128 x 128.
    Holds a few blocks of rows in each process. The bytes written do not depend on `workers` or on interruptions.

    Args:
        source: a model directory.
        target: a folder that does not exist or is empty.
        conversion: the format, and what goes with it.
        workers: processes that write files; one writes in this process.
        scales_from: an FP8 directory of the same model, whose scales are used again.
        on_progress: called with the progress now and then.

    Raises:
        ModelDirectoryError: the input is damaged or not one that is read, `target` stands in the way, or the disk
            refused. Files that were finished stay for the next call with the same arguments.
    """
    source, target = source.resolve(), target.resolve()
    _check_target(source, target)
    model = read_source(source)
    model = model if conversion.mtp else model.without_mtp()
    reference = read_source(scales_from.resolve()) if scales_from is not None else None
    kept_scales, scheme = _scales_to_keep(model, reference), (reference or model).scheme
    conversion = _scale_format(model, conversion, scheme)
    files = plan_files(model.weights, model.tensors, kept_scales, conversion)
    copied, left = files_to_copy(source)
    identity = _identity(model, reference, conversion, files, copied)
    with _workspace(target) as folder:
        finished = _resume(folder, identity)
        kept = sum(finished.files[file.name].bytes for file in files if file.name in finished.files)
        total = sum(file.nbytes for file in files)
        needed = total - kept + sum(path.stat().st_size for path in copied) + MARGIN_BYTES
        check_free_space(target, needed, ModelDirectoryError)
        with closing(_write(folder, files, finished, workers, on_progress)) as written:
            for file, record in written:
                finished = FinishedFiles(identity=identity, files=finished.files | {file.name: record})
                write_text(folder / "finished.json", finished.model_dump_json(indent=1))
        copy_side_files(copied, folder / "model")
        write_json(folder / "model" / CONFIG, converted_config(model.fields, model.config, conversion, scheme))
        write_index(folder / "model", files)
        _write_manifest(folder / "model", conversion, finished)
        flush_tree(folder / "model")
        (folder / "model").rename(target)
        flush(target.parent)
        shutil.rmtree(folder)
    return ConversionResult(len(files), total, kept, tuple(left))


def unfinished_folder(target: Path) -> Path:
    """Return where the parts of a conversion to `target` stand until it is whole."""
    target = target.resolve()
    return target.with_name(f".{target.name}.converting")


def _check_target(source: Path, target: Path) -> None:
    if source == target:
        raise ModelDirectoryError(f"{target}: is the input; choose another folder for the output")
    if (left := unfinished_folder(target)).is_dir() and not (left / "model").exists():
        shutil.rmtree(left)  # killed after the rename
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        finished = "; it has a manifest, which --verify compares it with" if (target / MANIFEST).is_file() else ""
        raise ModelDirectoryError(
            f"{target}: exists and is not an empty folder{finished}; remove it or choose another one"
        )


def _scales_to_keep(model: SourceModel, reference: SourceModel | None) -> dict[str, TensorInfo]:
    """Return the scales of the reference, each for a weight of the same shape.

    Raises:
        ModelDirectoryError: the reference has no scales, or is another model.
    """
    if reference is None:
        return {}
    found = {name: tensor for name, tensor in reference.tensors.items() if name.endswith(SCALE_SUFFIX)}
    if not found:
        raise ModelDirectoryError(f"{reference.path}: has no FP8 weights, so there are no scales to use again")
    for name in found:
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight in model.tensors and model.tensors[weight].shape != reference.tensors[weight].shape:
            raise ModelDirectoryError(f"{reference.path}: {weight} has another shape than in {model.path}")
    return found


def _scale_format(model: SourceModel, conversion: Conversion, scheme: BlockFP8 | None) -> Conversion:
    """Return the conversion with power-of-two scales where those that are kept are such.

    Raises:
        ModelDirectoryError: they are asked for, but scales are kept that are not.
    """
    if conversion.to != "fp8" or scheme is None or scheme.power_of_two == conversion.power_of_two:
        return conversion
    if conversion.power_of_two:
        raise ModelDirectoryError(
            f"{model.path}: is FP8 already and keeps its scales, which are not ue8m0; convert it to bf16 first"
        )
    return replace(conversion, power_of_two=True)


def _identity(
    model: SourceModel,
    reference: SourceModel | None,
    conversion: Conversion,
    files: list[OutputFile],
    copied: list[Path],
) -> str:
    """Return what changes when another output is to be written, or an input file was changed since."""
    tensors = [*model.tensors.values(), *(reference.tensors.values() if reference else ())]
    inputs = sorted({tensor.file for tensor in tensors} | {model.path / CONFIG, *copied})
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
    return hashlib.sha256(f"{conversion}{plan_digest(files)}{stats}".encode()).hexdigest()


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """Yield the hidden folder of a conversion, with `model` in it, held for this process alone.

    It stays where the body fails, unless nothing in it is finished.
    """
    folder = unfinished_folder(target)
    with os_faults(ModelDirectoryError, target, "write the model directory"):
        (folder / "model").mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder):
                try:
                    yield folder
                except BaseException as error:
                    if not (folder / "finished.json").exists():
                        shutil.rmtree(folder, ignore_errors=True)
                    elif isinstance(error, ModelDirectoryError):
                        kept = f"finished files stay in {folder} for the next call; remove it to give up"
                        raise ModelDirectoryError(f"{error} ({kept})") from error
                    raise
        except BlockingIOError:
            raise ModelDirectoryError(f"{target}: another process is converting to it; wait for its end") from None


def _resume(folder: Path, identity: str) -> FinishedFiles:
    """Return which files are finished, and remove what a killed process left half-written.

    Raises:
        ModelDirectoryError: the folder holds another conversion.
    """
    try:
        finished = FinishedFiles.model_validate_json((folder / "finished.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        finished = FinishedFiles(identity=identity, files={})
    if finished.identity != identity:
        raise ModelDirectoryError(
            f"{folder}: holds an unfinished conversion with other options, or of files that were changed since; "
            "finish that one, or remove this folder to begin again"
        )
    whole = {
        name: record
        for name, record in finished.files.items()
        if (file := folder / "model" / name).is_file() and file.stat().st_size == record.bytes
    }
    for file in (folder / "model").iterdir():
        if file.name not in whole:
            file.unlink()
    return FinishedFiles(identity=identity, files=whole)


def _write(
    folder: Path, files: list[OutputFile], finished: FinishedFiles, workers: int, on_progress: OnProgress
) -> Generator[tuple[OutputFile, FileRecord]]:
    """Write the files that are not finished, and yield each when it is."""
    todo = [file for file in files if file.name not in finished.files]
    kept = sum(record.bytes for record in finished.files.values())
    total, num_finished = sum(file.nbytes for file in files), len(finished.files)

    def report(written: int) -> None:
        on_progress(ConversionProgress(kept + written, total, kept, num_finished, len(files)))

    report(0)
    with closing(write_output_files(folder / "model", todo, workers, report)) as written:
        for file, record in written:
            num_finished += 1
            yield file, record
    report(total - kept)


def _write_manifest(folder: Path, conversion: Conversion, finished: FinishedFiles) -> None:
    """Write the lengths and checksums of every file, weights from when they were written."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    records = {
        path.name: finished.files.get(path.name) or FileRecord(bytes=path.stat().st_size, sha256=sha256(path))
        for path in paths
    }
    write_json(folder / MANIFEST, ConversionManifest(format=conversion.to, files=records).model_dump())
