"""What speaks against loading a model directory's weights, all of it in one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from abyssal.checkpoint.hf.expert_stacks import split_shapes
from abyssal.checkpoint.hf.fp8_scales import SCALE_SUFFIX, scales_of
from abyssal.checkpoint.hf.headers import FP8, READABLE, SCALES, TensorInfo, printable
from abyssal.checkpoint.hf.names import HEAD, TensorSpec, fold_names, layer_of
from abyssal.config import ModelConfig
from abyssal.errors import ModelDirectoryError
from abyssal.ops.block_fp8 import FP8_MAX, scale_rows


@dataclass(slots=True)
class WeightMismatch:
    """What the files hold of a model, and what is wrong with it."""

    #: In-memory names.
    held: list[str] = field(default_factory=list)
    #: Released names of all that those stand for, the scales of FP8 weights among them, without what has another fault.
    stored: list[str] = field(default_factory=list)
    #: Released names by what is wrong with them; of `misshaped` and `mistyped` with what is there instead.
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    misshaped: dict[str, str] = field(default_factory=dict)
    mistyped: dict[str, str] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.missing or self.surplus or self.misshaped or self.mistyped or self.not_finite)

    def report(self) -> str:
        """Return every fault in words, with layers and experts folded into ranges; empty when nothing is wrong."""
        faults = {
            "missing": fold_names(self.missing),
            "surplus": fold_names(printable(name) for name in sorted(self.surplus)),
            "of another shape": _fold_with_reason(self.misshaped),
            "of a type that is not read": _fold_with_reason(self.mistyped),
            "with values that are not finite": fold_names(self.not_finite),
        }
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)

    def refuse(self, path: Path) -> None:
        """Raise what is wrong with the files of the directory `path`, if anything is.

        Raises:
            ModelDirectoryError: names every fault.
        """
        if self:
            raise ModelDirectoryError(f"{path}: the weights do not fit the model; {self.report()}")

    def read_values(
        self, get: Callable[[str], torch.Tensor], rows: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        """Read the values of everything held and note what is not finite; `get` gives a tensor as it is in its file.

        With `rows`, (from, to) by released name, nothing else of the weights is read, and of their scales what goes
        with it.
        """
        self.not_finite = []
        for name in self.stored:
            weight, is_scale = name.removesuffix(SCALE_SUFFIX), name.endswith(SCALE_SUFFIX)
            if rows is not None and weight not in rows:
                continue
            tensor = get(name)
            if rows is not None:
                tensor = tensor[scale_rows(*rows[weight]) if is_scale else slice(*rows[weight])]
            if is_scale:  # one so large that the largest weight would overflow is none
                tensor = tensor.to(torch.float32) * FP8_MAX
            if not is_finite(tensor):
                self.not_finite.append(name)


def compare_weights(
    headers: Mapping[str, TensorInfo],
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    allow_missing_mtp: bool,
) -> WeightMismatch:
    """Compare the files' headers with a model of these in-memory names and shapes.

    With `allow_missing_mtp`, MTP layers of which the files hold nothing may be missing.
    """
    mismatch = WeightMismatch()
    surplus = {name for name in headers if not _is_redundant(name, config)}
    in_files = {layer_of(name) for name in surplus}
    for name, shape in shapes.items():
        layer = layer_of(name)
        if allow_missing_mtp and layer not in in_files and _is_mtp(layer, config):
            continue
        mismatch.held.append(name)
        for part in split_shapes(name, tuple(shape)):
            surplus.discard(part.name)
            info = headers.get(part.name)
            _compare_one(mismatch, part, info, READABLE if len(part.shape) == 2 else READABLE[:-1])
            if info is not None and info.dtype == FP8 and len(part.shape) == 2:
                scales = scales_of(part)
                surplus.discard(scales.name)
                _compare_one(mismatch, scales, headers.get(scales.name), SCALES)
    mismatch.surplus = list(surplus)
    return mismatch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a weight of any readable type holds no NaN and no infinity."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype == torch.float8_e4m3fn:  # NaN is 0x7f or 0xff, there is no infinity
        codes = tensor.contiguous().view(torch.uint8)
        return int(codes.max()) < 0xFF and int(codes.view(torch.int8).max()) < 0x7F
    low, high = tensor.aminmax()  # NaN passes through, and this is many times faster than isfinite
    return bool(low.isfinite() & high.isfinite())


def _compare_one(mismatch: WeightMismatch, wanted: TensorSpec, info: TensorInfo | None, types: tuple[str, ...]) -> None:
    """Note what is wrong with one tensor of the files."""
    if info is None:
        mismatch.missing.append(wanted.name)
    elif info.shape != wanted.shape:
        mismatch.misshaped[wanted.name] = f"{list(info.shape)} instead of {list(wanted.shape)}"
    elif info.dtype not in types:
        mismatch.mistyped[wanted.name] = f"{info.dtype}; possible: {', '.join(types)}"
    else:
        mismatch.stored.append(wanted.name)


def _is_mtp(layer: int | None, config: ModelConfig) -> bool:
    return layer is not None and layer >= config.num_hidden_layers


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Whether a tensor of the files is one that a model computes or has elsewhere: copies, RoPE's frequencies."""
    name = name.removesuffix(SCALE_SUFFIX)
    if name == HEAD:
        return config.tie_word_embeddings
    copy = _is_mtp(layer_of(name), config) and name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
    return copy or name.endswith(".rotary_emb.inv_freq")


def _fold_with_reason(faults: Mapping[str, str]) -> list[str]:
    """Return `name (reason)` with names folded that have the same reason."""
    return [
        f"{name} ({reason})"
        for reason in dict.fromkeys(faults.values())
        for name in fold_names(name for name, own in faults.items() if own == reason)
    ]
