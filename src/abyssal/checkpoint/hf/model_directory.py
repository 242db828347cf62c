"""A model directory: a Hugging Face `deepseek_v3` checkpoint, written whole or not at all and read tensor by tensor.

Files: config.json, model.safetensors (or several and model.safetensors.index.json), generation_config.json,
tokenizer.json, tokenizer_config.json, README.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from abyssal.checkpoint.hf.file_plan import write_json
from abyssal.checkpoint.hf.headers import FP8, INDEX, SINGLE, Header, TensorFiles, read_headers
from abyssal.checkpoint.hf.joint_export import JointExport, model_directory_faults
from abyssal.checkpoint.hf.mismatch import Fit, compare
from abyssal.checkpoint.hf.names import (
    BIAS,
    HEAD,
    SCALE_SUFFIX,
    join_experts,
    memory_tensors,
    split_names,
    split_shard,
)
from abyssal.checkpoint.hf.write_weights import plan_weights
from abyssal.config import ModelConfig
from abyssal.config.quantization import BlockFP8
from abyssal.errors import ConfigError, ModelDirectoryError
from abyssal.files.atomic import atomic_directory, remove_stale
from abyssal.files.faults import check_free_space
from abyssal.ops.block_fp8 import BLOCK, dequantise_blocks, scale_rows
from abyssal.ranks.placements import local_shard
from abyssal.ranks.ranks import Ranks

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
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    tokenizer_files: Tokenizer,
    card: str,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    group: ProcessGroup | None = None,
) -> None:
    """Write a model directory whole or not at all; one of ours that stands at `path` is replaced.

    With a `group`, all its ranks call this together and see one file system. Each writes what it holds, the files are
    the same to the byte however the model is spread, and either all return or all raise.

    Args:
        path: the directory to appear.
        config: the shape of the model.
        tensors: the whole model by in-memory name, in any order: plain tensors, equal on all ranks that hold them, or
            DTensors. Of a pipeline, a rank gives those of its stage.
        dtype: what the weights are written in; `e_score_correction_bias` stays fp32. With float8_e4m3fn, which weights
            are FP8 is as released (`is_quantised`), with scales beside them, and the others are bf16.
        tokenizer_files: a folder with tokenizer.json and tokenizer_config.json, or what writes both into a folder; the
            first rank's, like `card` and `generation`.
        card: the text of README.md.
        generation: fields of generation_config.json beside the begin and end tokens.
        max_shard_bytes: the most bytes of tensors in one file; a single larger tensor gets a file of its own.
        group: the ranks that hold the model, over a backend for the CPU; none for this process alone.

    Raises:
        ModelDirectoryError: the tensors are not those of `config` or not finite, a tokenizer file is missing, `path`
            holds something else, or the disk refused. What stood at `path` is untouched.
    """
    ranks = Ranks(group)
    if ranks.world_size > 1 and dtype == torch.float8_e4m3fn:
        raise ModelDirectoryError(
            f"{path}: blocks of FP8 weights lie across ranks, so one process writes them; write bfloat16 here, which "
            "`abyssal convert` makes FP8"
        )
    files = plan_weights(config, dtype, max_shard_bytes)

    @contextmanager
    def staging() -> Iterator[Path]:
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, path.name)
        check_free_space(path, sum(file.nbytes for file in files), ModelDirectoryError)
        with atomic_directory(path, replace=True) as folder:
            _write_tokenizer(folder, tokenizer_files)
            write_json(folder / CONFIG, {**_config_fields(config, dtype), **PRODUCER})
            tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
            tokens = {key: value for key, value in tokens.items() if value is not None}
            write_json(folder / GENERATION, {**tokens, **(generation or {})})
            (folder / CARD).write_text(card, encoding="utf-8")
            yield folder

    JointExport(path, config, files, tensors).run(ranks, staging)


def read_model_directory(path: Path, *, needs_tokenizer: bool = True) -> tuple[ModelConfig, ModelReader]:
    """Read config.json and the headers of the weight files; tensors are read when the reader is asked for them.

    Raises:
        ModelDirectoryError: no such directory, a config.json that is missing or of an architecture that we do not
            implement, no tokenizer.json, or weights that are missing or damaged.
    """
    if path.is_file():
        raise ModelDirectoryError(f"{path}: is a file; give the model directory, perhaps {path.parent}")
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

    def stored(self, name: str) -> torch.Tensor:
        """Return one released tensor as it is in its file, whose memory it shares: do not write to it."""
        return self._files.get(name)

    def part(
        self,
        name: str,
        dequantised: torch.dtype,
        device: torch.device | None = None,
        rows: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Return one released tensor, or its rows from..to, on `device`, none for the CPU.

        FP8 weights become `dequantised`. Any other weight keeps the dtype of its file; on the CPU it shares the file's
        memory: do not write to it.
        """
        start, stop = rows or (0, self.headers[name].shape[0])
        if self.headers[name].dtype != FP8:
            return self.stored(name)[start:stop].to(device)
        first = start // BLOCK * BLOCK  # whole rows of blocks
        fp8 = self.stored(name)[first:stop].to(device)
        scale = self.stored(name + SCALE_SUFFIX)[scale_rows(first, stop)].to(device)
        return dequantise_blocks(fp8, scale, dequantised)[start - first :]

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
            fit.read_values(self.stored)
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
        if not fit.whole and not values:
            fit.read_values(self.stored)
        self.refuse(fit)
        return fit.held

    def refuse(self, fit: Fit) -> None:
        """Raise what is wrong with the files, if anything is.

        Raises:
            ModelDirectoryError: names everything that `fit` names.
        """
        if not fit.whole:
            raise ModelDirectoryError(f"{self.path}: the weights do not fit the model; {fit.report()}")


def load_into(
    model: nn.Module,
    reader: ModelReader,
    dtype: torch.dtype | None = None,
    *,
    allow_missing_mtp: bool = False,
    group: ProcessGroup | None = None,
) -> list[str]:
    """Copy a model directory's tensors into `model`, after all names, shapes, types and values have been looked at.

    With a `dtype` the parameters become that (`e_score_correction_bias` fp32), without one they keep theirs. A tensor
    of the model that is on the meta device or changes its dtype is replaced by a new one, others are filled in place,
    experts one by one; FP8 weights are dequantised to what they become, on its device. DTensors are filled in place,
    each rank with what it holds; that is all that a rank reads. With a `group`, all its ranks call this together, and
    either all return or all raise.

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
    fit = reader.fit(shapes, allow_missing_mtp=allow_missing_mtp)
    ranks = Ranks(group)

    def look() -> list[str]:
        fit.read_values(reader.stored, _own_rows(targets))
        return fit.not_finite

    @torch.no_grad()
    def fill() -> None:
        for name in fit.held:
            old = targets[name]
            wanted = old.dtype if dtype is None else torch.float32 if name.endswith(BIAS) else dtype
            new = old
            if old.is_meta or old.dtype != wanted:
                new = torch.empty_like(old, dtype=wanted, device="cpu" if old.is_meta else old.device)
            for part, first, view in split_shard(name, new.shape, *local_shard(new)):
                view.copy_(reader.part(part, wanted, new.device, (first, first + len(view))))
            if new is not old:
                _replace(model, name, old, new)

    with model_directory_faults():
        found: set[str] = ranks.agree(look, lambda names: set(chain.from_iterable(names)))
        fit.not_finite = [name for name in fit.parts if name in found]
        reader.refuse(fit)
        ranks.together(fill)
    return fit.held


def _own_rows(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Return which rows of each released tensor this rank holds, from..to."""
    return {
        part: (first, first + len(rows))
        for name, tensor in tensors.items()
        for part, first, rows in split_shard(name, tensor.shape, *local_shard(tensor))
    }


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
