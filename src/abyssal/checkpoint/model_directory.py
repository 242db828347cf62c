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
from abyssal.checkpoint.layout import (
    BIAS,
    HEAD,
    TensorSpec,
    fold,
    join_experts,
    layer_of,
    memory_tensors,
    mtp_copies,
    released_tensors,
    split_experts,
    split_names,
    split_shapes,
)
from abyssal.checkpoint.safetensors_files import INDEX, SINGLE, TensorFiles, read_headers, save
from abyssal.config import ModelConfig
from abyssal.errors import CheckpointError, ModelDirectoryError

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
        dtype: what the weights are written in; `e_score_correction_bias` stays fp32.
        tokenizer_files: a folder with tokenizer.json and tokenizer_config.json, or what writes both into a folder.
        card: the text of README.md.
        generation: fields of generation_config.json beside the begin and end tokens.
        max_shard_bytes: the most bytes of tensors in one file; a single larger tensor gets a file of its own.

    Raises:
        ModelDirectoryError: the tensors are not those of `config`, a tokenizer file is missing, `path` holds something
            else, or the disk refused. What stood at `path` is untouched.
    """
    _check_replaceable(path)
    name = str(dtype).removeprefix("torch.")
    specs = list(released_tensors(config))
    with os_faults(ModelDirectoryError, path, "write the model directory"):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, path.name)
        try:
            free_space_check(path, sum(spec.numel for spec in specs) * dtype.itemsize)
        except CheckpointError as error:
            raise ModelDirectoryError(str(error)) from None
        with atomic_directory(path, replace=True) as staging:
            _write_tokenizer(staging, tokenizer_files)
            _write_json(staging / CONFIG, {**config.to_hf(name), **PRODUCER})
            tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
            tokens = {key: value for key, value in tokens.items() if value is not None}
            _write_json(staging / GENERATION, {**tokens, **(generation or {})})
            (staging / CARD).write_text(card, encoding="utf-8")
            _write_shards(staging, _released(path, config, tensors, dtype), max_shard_bytes)


def read_model_directory(path: Path, *, needs_tokenizer: bool = True) -> tuple[ModelConfig, ModelReader]:
    """Read config.json and the headers of the weight files; tensors are read when the reader is asked for them.

    Raises:
        ConfigError: config.json is missing or is not of an architecture that we implement.
        ModelDirectoryError: no such directory, no tokenizer.json, or weights that are missing, damaged or of a kind
            that is not read.
    """
    if not path.is_dir():
        raise ModelDirectoryError(f"{path}: no such model directory")
    config = ModelConfig.from_json(path / CONFIG)
    if needs_tokenizer and not (path / TOKENIZER_FILES[0]).is_file():
        raise ModelDirectoryError(f"{path / TOKENIZER_FILES[0]}: no such file; a model directory needs its tokenizer")
    return config, ModelReader(path, config)


class ModelReader:
    """The tensors of a model directory under their in-memory names, each read when it is asked for."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """Read the headers of the files in `path`.

        Raises:
            ModelDirectoryError: see `read_headers`.
        """
        self.path = path
        self.config = config
        self._headers = read_headers(path)
        self._files = TensorFiles(self._headers)

    def __contains__(self, name: str) -> bool:
        """Whether the files hold the whole of the in-memory tensor `name`."""
        return all(part in self._headers for part in split_names(name, self.config.n_routed_experts))

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (in-memory name, tensor) of every tensor of `config` that the files hold, in the model's order."""
        return ((spec.name, self.tensor(spec.name)) for spec in memory_tensors(self.config) if spec.name in self)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one in-memory tensor in the dtype of its file; it may share the file's memory: do not write to it."""
        return join_experts(name, self.config.n_routed_experts, self._files.get)

    def check(
        self, shapes: Mapping[str, tuple[int, ...]] | None = None, *, allow_missing_mtp: bool = False
    ) -> list[str]:
        """Compare the files with a model of these in-memory names and shapes, without one with `config`.

        With `allow_missing_mtp`, MTP layers of which the files hold nothing may be missing.

        Returns:
            The in-memory names that the files hold.

        Raises:
            ModelDirectoryError: names every tensor that is missing, surplus or of another shape.
        """
        if shapes is None:
            shapes = {spec.name: spec.shape for spec in memory_tensors(self.config)}
        wanted = [TensorSpec(name, tuple(shape)) for name, shape in shapes.items()]
        surplus = {name for name in self._headers if not self._needless(name)}
        in_files = {layer_of(name) for name in surplus}
        held, missing, misshaped = [], [], {}
        for spec in wanted:
            layer = layer_of(spec.name)
            if allow_missing_mtp and layer not in in_files and self._is_mtp(layer):
                continue
            held.append(spec.name)
            for part in split_shapes(spec.name, spec.shape):
                header = self._headers.get(part.name)
                surplus.discard(part.name)
                if header is None:
                    missing.append(part.name)
                elif header.shape != part.shape:
                    misshaped[part.name] = f"{list(header.shape)} instead of {list(part.shape)}"
        faults = {
            "missing": fold(missing),
            "surplus": fold(sorted(surplus)),
            "of another shape": _fold_shapes(misshaped),
        }
        if sentences := [f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names]:
            raise ModelDirectoryError(f"{self.path}: the weights do not fit the model; {'; '.join(sentences)}")
        return held

    def _is_mtp(self, layer: int | None) -> bool:
        return layer is not None and layer >= self.config.num_hidden_layers

    def _needless(self, name: str) -> bool:
        """Whether a tensor of the files is one that a model computes or has elsewhere: copies, RoPE's frequencies."""
        if name == HEAD:
            return self.config.tie_word_embeddings
        copy = self._is_mtp(layer_of(name)) and name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
        return copy or name.endswith(".rotary_emb.inv_freq")


def load_into(
    model: nn.Module, reader: ModelReader, dtype: torch.dtype | None = None, *, allow_missing_mtp: bool = False
) -> list[str]:
    """Copy a model directory's tensors into `model`, after all names and shapes have been compared.

    With a `dtype` the parameters become that (`e_score_correction_bias` fp32), without one they keep theirs. A tensor
    of the model that is on the meta device or changes its dtype is replaced by a new one, others are filled in place.

    Returns:
        The in-memory names that were loaded; without the MTP layers that `allow_missing_mtp` let pass.

    Raises:
        ModelDirectoryError: names every tensor that is missing, surplus or of another shape; `model` is as it was.
    """
    targets = dict(model.state_dict(keep_vars=True))
    if reader.config.tie_word_embeddings:
        targets.pop(HEAD, None)
    held = reader.check({name: tuple(t.shape) for name, t in targets.items()}, allow_missing_mtp=allow_missing_mtp)
    with torch.no_grad():
        for name in held:
            target, tensor = targets[name], reader.tensor(name)
            wanted = target.dtype if dtype is None else torch.float32 if name.endswith(BIAS) else dtype
            if target.is_meta or target.dtype != wanted:
                device = tensor.device if target.is_meta else target.device
                _replace(model, name, target, tensor.to(device, wanted, copy=True))
            else:
                target.copy_(tensor)
    return held


def _replace(model: nn.Module, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    """Put `new` in the place of the parameter or buffer `old` of `model`."""
    owner, _, leaf = name.rpartition(".")
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(model.get_submodule(owner), leaf, new)


def _fold_shapes(faults: Mapping[str, str]) -> list[str]:
    """Return `name (fault)` with names folded that have the same fault."""
    return [f"{name} ({fault})" for fault in dict.fromkeys(faults.values()) for name in fold(_having(faults, fault))]


def _having(faults: Mapping[str, str], fault: str) -> list[str]:
    return [name for name, own in faults.items() if own == fault]


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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _released(
    path: Path, config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (released name, tensor to write) for a whole model; refuse one that is not whole.

    Raises:
        ModelDirectoryError: a tensor is unknown, given twice or of another shape, or, at the end, missing.
    """
    missing = {spec.name: spec.shape for spec in memory_tensors(config)}
    for name, tensor in tensors:
        if name not in missing:
            raise ModelDirectoryError(f"{path}: {name}: not a tensor of this model, or given twice")
        if tuple(tensor.shape) != (shape := missing.pop(name)):
            raise ModelDirectoryError(f"{path}: {name} is {list(tensor.shape)} instead of {list(shape)}")
        tensor = tensor.detach().to("cpu", torch.float32 if name.endswith(BIAS) else dtype)
        for released, part in split_experts(name, tensor):
            yield released, part.contiguous()
        for copy in mtp_copies(name, config):
            yield copy, tensor.clone(memory_format=torch.contiguous_format)  # a file's tensors may not share memory
    if missing:
        raise ModelDirectoryError(f"{path}: the model to write lacks {', '.join(fold(missing))}")


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
