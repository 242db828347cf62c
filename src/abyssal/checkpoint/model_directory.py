"""A model directory: a Hugging Face `deepseek_v3` checkpoint, written whole or not at all and read tensor by tensor.

Files: config.json, model.safetensors (or several and model.safetensors.index.json), generation_config.json,
tokenizer.json, tokenizer_config.json, README.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from abyssal.checkpoint.atomic import atomic_directory, free_space_check, os_faults, remove_stale
from abyssal.checkpoint.fit import Fit, compare, is_finite
from abyssal.checkpoint.layout import (
    BIAS,
    HEAD,
    SCALE_SUFFIX,
    fold,
    join_experts,
    memory_tensors,
    mtp_copies,
    split_experts,
    split_names,
    stored_tensors,
)
from abyssal.checkpoint.safetensors_files import FP8, INDEX, SINGLE, Header, TensorFiles, read_headers, save
from abyssal.config import ModelConfig
from abyssal.config.quantization import BlockFP8
from abyssal.errors import CheckpointError, ConfigError, ModelDirectoryError
from abyssal.ops.block_fp8 import dequantise_blocks, quantise_blocks

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
#: The field of config.json that marks a directory as ours. Not in the safetensors header, whose writer puts a second
#: entry in random order, so that equal models would differ in their checksums.
PRODUCER = {"producer": "abyssal"}
#: Everything that a directory of ours may hold; another file in it is the user's, and keeps it from being replaced.
OWN_FILES = frozenset({CONFIG, GENERATION, CARD, SINGLE, INDEX, "chat_template.jinja", *TOKENIZER_FILES})

Tokenizer = Path | Callable[[Path], None]


def write_model_directory(
    path: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    tokenizer_files: Tokenizer,
    card: str,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model directory whole or not at all; one of ours that stands at `path` is replaced.

    Args:
        path: the directory to appear.
        config: the shape of the model.
        tensors: (in-memory name, tensor) of the whole model, in any order, each once; about a file's worth is held.
        dtype: what the weights are written in; `e_score_correction_bias` stays fp32. With float8_e4m3fn, which weights
            are FP8 is as released (`is_quantised`), with scales beside them, and the others are bf16.
        tokenizer_files: a folder with tokenizer.json and tokenizer_config.json, or what writes both into a folder.
        card: the text of README.md.
        generation: fields of generation_config.json beside the begin and end tokens.
        max_shard_bytes: the most bytes of tensors in one file; a single larger tensor gets a file of its own.

    Raises:
        ModelDirectoryError: the tensors are not those of `config` or not finite, a tokenizer file is missing, `path`
            holds something else, or the disk refused. What stood at `path` is untouched.
    """
    _check_replaceable(path)
    needed_bytes = sum(spec.numel * stored.itemsize for spec, stored in stored_tensors(config, dtype))
    with os_faults(ModelDirectoryError, path, "write the model directory"):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, path.name)
        try:
            free_space_check(path, needed_bytes)
        except CheckpointError as error:
            raise ModelDirectoryError(str(error)) from None
        with atomic_directory(path, replace=True) as staging:
            _write_tokenizer(staging, tokenizer_files)
            _write_json(staging / CONFIG, {**_config_fields(config, dtype), **PRODUCER})
            tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
            tokens = {key: value for key, value in tokens.items() if value is not None}
            _write_json(staging / GENERATION, {**tokens, **(generation or {})})
            (staging / CARD).write_text(card, encoding="utf-8")
            _write_shards(staging, _released(path, config, tensors, dtype), max_shard_bytes)


def read_model_directory(path: Path, *, needs_tokenizer: bool = True) -> tuple[ModelConfig, ModelReader]:
    """Read config.json and the headers of the weight files; tensors are read when the reader is asked for them.

    Raises:
        ModelDirectoryError: no such directory, a config.json that is missing or of an architecture that we do not
            implement, no tokenizer.json, or weights that are missing or damaged.
    """
    if not path.is_dir():
        raise ModelDirectoryError(f"{path}: no such model directory")
    try:
        config = ModelConfig.from_json(path / CONFIG)
    except ConfigError as error:  # not the user's own configuration, so no fault of usage
        raise ModelDirectoryError(str(error)) from None
    if needs_tokenizer and not (path / TOKENIZER_FILES[0]).is_file():
        raise ModelDirectoryError(f"{path / TOKENIZER_FILES[0]}: no such file; a model directory needs its tokenizer")
    return config, ModelReader(path, config)


class ModelReader:
    """The tensors of a model directory, each read when it is asked for; files are mapped into memory."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """Read the headers of the files in `path`.

        Raises:
            ModelDirectoryError: see `read_headers`.
        """
        self.path = path
        self.config = config
        #: What the files hold, by released name, scales of FP8 weights among them.
        self.headers: Mapping[str, Header] = read_headers(path)
        self._files = TensorFiles(self.headers)

    def __contains__(self, name: str) -> bool:
        """Whether the files hold the whole of the in-memory tensor `name`."""
        return all(part in self.headers for part in split_names(name, self.config.n_routed_experts))

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (in-memory name, tensor) of every tensor of `config` that the files hold, in the model's order."""
        return ((spec.name, self.tensor(spec.name)) for spec in memory_tensors(self.config) if spec.name in self)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one in-memory tensor in the dtype of its file, FP8 weights as bf16.

        It may share the file's memory: do not write to it.
        """
        return join_experts(name, self.config.n_routed_experts, lambda part: self.part(part, torch.bfloat16))

    def part(self, name: str, dequantised: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        """Return one released tensor on `device`, none for the CPU; FP8 weights become `dequantised`.

        Any other weight keeps the dtype of its file; on the CPU it shares the file's memory: do not write to it.
        """
        tensor = self._files.get(name).to(device)
        if self.headers[name].dtype != FP8:
            return tensor
        return dequantise_blocks(tensor, self._files.get(name + SCALE_SUFFIX).to(device), dequantised)

    def fit(
        self,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        allow_missing_mtp: bool = False,
        values: bool = False,
    ) -> Fit:
        """Return what is wrong with the files for a model of these in-memory names and shapes, without one `config`'s.

        With `allow_missing_mtp`, MTP layers of which the files hold nothing may be missing. With `values`, everything
        that would be loaded is read, to find what is not finite; otherwise headers only.
        """
        if shapes is None:
            shapes = {spec.name: spec.shape for spec in memory_tensors(self.config)}
        fit = compare(self.headers, self.config, shapes, allow_missing_mtp=allow_missing_mtp)
        if values:
            fit.read_values(self._files.get)
        return fit

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        allow_missing_mtp: bool = False,
        values: bool = False,
    ) -> list[str]:
        """Refuse files that do not fit; for the arguments see `fit`.

        Where the headers do not fit, the values are read in any case, so that one report names every fault; that takes
        about as long as loading would have.

        Returns:
            The in-memory names that the files hold.

        Raises:
            ModelDirectoryError: names every tensor that is missing, surplus, of another shape or type, or not finite.
        """
        fit = self.fit(shapes, allow_missing_mtp=allow_missing_mtp, values=values)
        if not fit.whole:
            if not values:
                fit.read_values(self._files.get)
            raise ModelDirectoryError(f"{self.path}: the weights do not fit the model; {fit.report()}")
        return fit.held


def load_into(
    model: nn.Module, reader: ModelReader, dtype: torch.dtype | None = None, *, allow_missing_mtp: bool = False
) -> list[str]:
    """Copy a model directory's tensors into `model`, after all names, shapes, types and values have been looked at.

    With a `dtype` the parameters become that (`e_score_correction_bias` fp32), without one they keep theirs. A tensor
    of the model that is on the meta device or changes its dtype is replaced by a new one, others are filled in place,
    experts one by one; FP8 weights are dequantised to what they become, on its device.

    Returns:
        The in-memory names that were loaded; without the MTP layers that `allow_missing_mtp` let pass.

    Raises:
        ModelDirectoryError: names every tensor that is missing, surplus, of another shape or type, or not finite;
            `model` is as it was.
    """
    targets = dict(model.state_dict(keep_vars=True))
    if reader.config.tie_word_embeddings:
        targets.pop(HEAD, None)
    shapes = {name: tuple(target.shape) for name, target in targets.items()}
    held = reader.check(shapes, allow_missing_mtp=allow_missing_mtp, values=True)
    with torch.no_grad():
        for name in held:
            target = targets[name]
            wanted = target.dtype if dtype is None else torch.float32 if name.endswith(BIAS) else dtype
            if target.is_meta or target.dtype != wanted:
                target = torch.empty_like(target, dtype=wanted, device="cpu" if target.is_meta else target.device)
            for part, view in split_experts(name, target):
                view.copy_(reader.part(part, wanted, target.device))
            if target is not targets[name]:
                _replace(model, name, targets[name], target)
    return held


def _replace(model: nn.Module, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    """Put `new` in the place of the parameter or buffer `old` of `model`."""
    owner, _, leaf = name.rpartition(".")
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(model.get_submodule(owner), leaf, new)


# Writing


def _check_replaceable(path: Path) -> None:
    """Refuse to replace what is neither an empty folder nor a model directory of ours with nothing else in it."""
    try:
        found = sorted(file.name for file in path.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise ModelDirectoryError(f"{path}: cannot write a model directory there ({error.strerror})") from None
    others = [name for name in found if name not in OWN_FILES and not _is_shard(name)]
    if others or (found and not _written_by_us(path)):
        what = f"holds {others[0]}" if others else "was not written by Abyssal"
        raise ModelDirectoryError(f"{path}: exists and {what}, so it is not replaced; remove it or choose another path")


def _written_by_us(path: Path) -> bool:
    try:
        fields = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.items() >= PRODUCER.items()


def _is_shard(name: str) -> bool:
    return name.startswith("model-") and name.endswith(".safetensors")


def _write_tokenizer(staging: Path, tokenizer: Tokenizer) -> None:
    if not isinstance(tokenizer, Path):
        tokenizer(staging)
    for name in TOKENIZER_FILES:
        if isinstance(tokenizer, Path):
            if not (tokenizer / name).is_file():
                raise ModelDirectoryError(f"{tokenizer / name}: no such file; a model directory needs it")
            shutil.copyfile(tokenizer / name, staging / name)
        elif not (staging / name).is_file():
            raise ModelDirectoryError(f"{name}: the tokenizer did not write this file; a model directory needs it")


def _config_fields(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of config.json; the FP8 release, too, names bf16 as its dtype."""
    if dtype == torch.float8_e4m3fn:
        return {**config.to_hf("bfloat16"), "quantization_config": BlockFP8().to_hf()}
    return config.to_hf(str(dtype).removeprefix("torch."))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _released(
    path: Path, config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (released name, tensor to write) for a whole model; refuse one that is not whole.

    Raises:
        ModelDirectoryError: a tensor is unknown, given twice or of another shape, or, at the end, missing or not
            finite.
    """
    missing = {spec.name: spec.shape for spec in memory_tensors(config)}
    stored = {spec.name: stored for spec, stored in stored_tensors(config, dtype)}
    not_finite = []
    for name, tensor in tensors:
        if name not in missing:
            raise ModelDirectoryError(f"{path}: {name}: not a tensor of this model, or given twice")
        if tuple(tensor.shape) != (shape := missing.pop(name)):
            raise ModelDirectoryError(f"{path}: {name} is {list(tensor.shape)} instead of {list(shape)}")
        for released, part in split_experts(name, tensor.detach()):
            for stored_name, value in _encode(released, part, stored[released]):
                if not is_finite(value):
                    not_finite.append(stored_name)
                yield stored_name, value
                # a file's tensors may not share memory
                copies = mtp_copies(name, config)
                yield from ((copy, value.clone()) for copy in copies)
    if missing:
        raise ModelDirectoryError(f"{path}: the model to write lacks {', '.join(fold(missing))}")
    if not_finite:
        raise ModelDirectoryError(f"{path}: the model to write is not finite in {', '.join(fold(not_finite))}")


def _encode(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a released weight in `dtype` on the CPU and, if that is FP8, its scales."""
    if dtype == torch.float8_e4m3fn:
        fp8, scale = quantise_blocks(tensor)
        yield name, fp8.cpu()
        yield name + SCALE_SUFFIX, scale.cpu()
    else:
        yield name, tensor.to("cpu", dtype).contiguous()


def _write_shards(staging: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> None:
    """Write the tensors into as few files as `max_bytes` allows, with an index if there are several."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    held = total = 0

    def write() -> None:
        save(pending, staging / f"{len(shards)}.part")
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and held + tensor.nbytes > max_bytes:
            write()
            held = 0
        pending[name] = tensor
        held, total = held + tensor.nbytes, total + tensor.nbytes
    write()
    if len(shards) == 1:
        (staging / "0.part").rename(staging / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (staging / f"{number}.part").rename(staging / file)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
