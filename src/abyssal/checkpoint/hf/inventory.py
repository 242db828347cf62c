"""What the weight files of a model directory hold, told by their headers alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from abyssal.checkpoint.hf.expert_stacks import DOWN, GATE_UP
from abyssal.checkpoint.hf.files import CONFIG, GENERATION, PICKLES, TOKENIZER_FILES
from abyssal.checkpoint.hf.fp8_scales import SCALE_SUFFIX
from abyssal.checkpoint.hf.headers import TensorInfo
from abyssal.checkpoint.hf.names import HEAD, fold_names
from abyssal.checkpoint.hf.read import ModelReader

#: How experts lie in the files: each by its name, as released, or in one tensor a layer; `none` without any.
Experts = Literal["one by one", "stacked", "none"]
Head = Literal["own", "tied to the embedding", "missing"]


@dataclass(frozen=True)
class WeightInventory:
    """The figures of some weight files, and how they differ from what the config asks for."""

    num_files: int
    num_tensors: int
    #: Values of FP8 scales are not parameters.
    num_parameters: int
    #: By safetensors' name of the type, the largest first.
    bytes_by_dtype: dict[str, int]
    experts: Experts
    mtp_modules: int
    head: Head
    #: Types of the scales beside FP8 weights.
    scales: tuple[str, ...]
    #: Names folded into ranges; of `misshaped` and `mistyped` with what is there instead.
    missing: list[str]
    surplus: list[str]
    misshaped: dict[str, str]
    mistyped: dict[str, str]
    missing_files: list[str]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes_by_dtype.values())


def has_weights(folder: Path) -> bool:
    """Whether there are weight files of any kind, also those that are not read."""
    return any(True for pattern in ("*.safetensors*", *PICKLES) for _ in folder.glob(pattern))


def weight_inventory(reader: ModelReader) -> WeightInventory:
    """Count what the headers say, and compare it with the config; MTP modules may be left out."""
    headers, config = reader.headers, reader.config
    sizes: Counter[str] = Counter()
    for header in headers.values():
        sizes[header.dtype] += _bytes(header)
    mismatch = reader.compare(allow_missing_mtp=True)
    mtp_layers = range(config.num_hidden_layers, config.num_layers)
    head: Head = "own" if HEAD in headers else "tied to the embedding" if config.tie_word_embeddings else "missing"
    wanted_files = (CONFIG, GENERATION, *TOKENIZER_FILES)
    return WeightInventory(
        num_files=len({header.file for header in headers.values()}),
        num_tensors=len(headers),
        num_parameters=sum(prod(header.shape) for name, header in headers.items() if not name.endswith(SCALE_SUFFIX)),
        bytes_by_dtype=dict(sizes.most_common()),
        experts=_experts(headers.keys()),
        mtp_modules=sum(f"model.layers.{layer}.enorm.weight" in headers for layer in mtp_layers),
        head=head,
        scales=tuple(sorted({header.dtype for name, header in headers.items() if name.endswith(SCALE_SUFFIX)})),
        missing=fold_names(mismatch.missing),
        surplus=fold_names(sorted(mismatch.surplus)),
        misshaped=dict(mismatch.misshaped),
        mistyped=dict(mismatch.mistyped),
        missing_files=[name for name in wanted_files if not (reader.path / name).is_file()],
    )


def _experts(names: Iterable[str]) -> Experts:
    """Return how the routed experts lie in the files."""
    for name in names:
        if name.endswith((GATE_UP, DOWN)):
            return "stacked"
        if ".mlp.experts." in name:
            return "one by one"
    return "none"


def _bytes(info: TensorInfo) -> int:
    """Return the bytes of a tensor; safetensors writes the bits of a value into the name of its type."""
    bits = re.search(r"\d+", info.dtype)
    return prod(info.shape) * (int(bits[0]) if bits else 8) // 8
