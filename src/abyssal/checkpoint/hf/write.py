"""A model directory written whole or not at all, by one process or by all ranks that hold the model."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from abyssal.checkpoint.hf.file_plan import PlannedFile, write_json
from abyssal.checkpoint.hf.files import CARD, CONFIG, GENERATION, INDEX, SINGLE, TOKENIZER_FILES
from abyssal.checkpoint.hf.names import fold_names, memory_tensors
from abyssal.checkpoint.hf.released import released_tensors
from abyssal.checkpoint.hf.weight_files import StoredWeight, create_files, plan_weights, write_weights
from abyssal.checkpoint.joint_write import JointWrite
from abyssal.config import ModelConfig
from abyssal.config.quantization import BlockFP8
from abyssal.errors import ModelDirectoryError
from abyssal.files.atomic import atomic_directory, remove_stale
from abyssal.files.faults import check_free_space
from abyssal.ranks.placements import local_shard
from abyssal.ranks.ranks import Ranks

#: The field of config.json that marks a directory as ours. Not in the safetensors header, whose writer puts a second
#: entry in random order, so that equal models would differ in their checksums.
PRODUCER = {"producer": "abyssal"}
#: Everything that a directory of ours may hold; another file in it is the user's, and keeps it from being replaced.
OWN_FILES = frozenset({CONFIG, GENERATION, CARD, SINGLE, INDEX, "chat_template.jinja", *TOKENIZER_FILES})

Tokenizer = Path | Callable[[Path], None]
#: Where a shard begins in its tensor, along each dim, and its shape.
Box = tuple[tuple[int, ...], tuple[int, ...]]


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
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    tokens = {key: value for key, value in tokens.items() if value is not None}
    texts = _Texts({**_config_fields(config, dtype), **PRODUCER}, {**tokens, **(generation or {})}, card)
    files = plan_weights(config, dtype, max_shard_bytes)
    _ModelDirectoryWrite(ranks, path, config, files, tensors, texts, tokenizer_files).run()


@dataclass(frozen=True)
class _Texts:
    """What stands beside weights and tokenizer."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    card: str


class _ModelDirectoryWrite(JointWrite[dict[str, Box], set[str], list[str]]):
    """The steps of a joint write of one model directory; a rank writes what it holds of the tensors given to it."""

    fault = ModelDirectoryError
    doing = "write the model directory"

    def __init__(
        self,
        ranks: Ranks,
        target: Path,
        config: ModelConfig,
        files: Sequence[PlannedFile[StoredWeight]],
        tensors: Mapping[str, Tensor],
        texts: _Texts,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__(ranks, target)
        self.config, self.files, self.tensors, self.texts, self.tokenizer = config, files, tensors, texts, tokenizer

    def offer(self) -> dict[str, Box]:
        return _held_boxes(self.target, self.config, self.tensors)

    def plan(self, offers: Sequence[Mapping[str, Box]]) -> list[set[str]]:
        return _assign_writers(self.target, self.config, offers)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        path = self.target
        _refuse_to_replace(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, path.name)
        check_free_space(path, sum(file.nbytes for file in self.files), ModelDirectoryError)
        with atomic_directory(path, replace=True) as folder:
            _write_tokenizer(folder, self.tokenizer)
            write_json(folder / CONFIG, self.texts.config)
            write_json(folder / GENERATION, self.texts.generation)
            (folder / CARD).write_text(self.texts.card, encoding="utf-8")
            create_files(folder, self.files)
            yield folder

    def write(self, folder: Path, plan: set[str]) -> list[str]:
        own = {name: tensor for name, tensor in self.tensors.items() if name in plan}
        return write_weights(folder, self.files, self.config, own)

    def finish(self, folder: Path, written: Sequence[list[str]]) -> str | None:
        not_finite = {name for names in written for name in names}
        ordered = [spec.name for spec in released_tensors(self.config) if spec.name in not_finite]
        refusal = f"{self.target}: the model to write is not finite in {', '.join(fold_names(ordered))}"
        return refusal if ordered else None


def _held_boxes(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Box]:
    """Return what this rank holds of each tensor, by in-memory name.

    Raises:
        ModelDirectoryError: a tensor is not the model's, or of another shape.
    """
    shapes = {spec.name: spec.shape for spec in memory_tensors(config)}
    boxes = {}
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ModelDirectoryError(f"{path}: {name}: not a tensor of this model")
        if tuple(tensor.shape) != shapes[name]:
            raise ModelDirectoryError(f"{path}: {name} is {list(tensor.shape)} instead of {list(shapes[name])}")
        shard, begin = local_shard(tensor)
        boxes[name] = begin, tuple(shard.shape)
    return boxes


def _assign_writers(path: Path, config: ModelConfig, offers: Sequence[Mapping[str, Box]]) -> list[set[str]]:
    """Return of which tensors each rank writes what it holds, from what the ranks hold.

    What several hold is written by the one that has the fewest values to write so far.

    Raises:
        ModelDirectoryError: a tensor, or a part of one, is on no rank.
    """
    holders: defaultdict[tuple[str, Box], list[int]] = defaultdict(list)
    for rank, offer in enumerate(offers):
        for name, box in offer.items():
            holders[name, box].append(rank)
    missing = {spec.name: spec.numel for spec in memory_tensors(config)}
    written, assigned = [0] * len(offers), [set[str]() for _ in offers]
    for (name, (_, shape)), ranks in holders.items():
        rank = min(ranks, key=written.__getitem__)
        assigned[rank].add(name)
        written[rank] += prod(shape)
        missing[name] -= prod(shape)
    if lacking := [name for name, count in missing.items() if count]:
        raise ModelDirectoryError(f"{path}: the model to write lacks {', '.join(fold_names(lacking))}")
    return assigned


def _refuse_to_replace(path: Path) -> None:
    """Refuse to replace what is neither an empty folder nor a model directory of ours with nothing else in it."""
    try:
        names = sorted(file.name for file in path.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise ModelDirectoryError(f"{path}: cannot write a model directory there ({error.strerror})") from None
    others = [name for name in names if name not in OWN_FILES and not _is_shard(name)]
    if others or (names and not _written_by_us(path)):
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
