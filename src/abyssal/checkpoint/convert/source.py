"""The input of a conversion, looked at before anything is written: what it holds, and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abyssal.checkpoint.hf.files import CONFIG
from abyssal.checkpoint.hf.fp8_scales import SCALE_SUFFIX
from abyssal.checkpoint.hf.headers import READABLE, TensorInfo
from abyssal.checkpoint.hf.mismatch import is_finite
from abyssal.checkpoint.hf.names import layer_of
from abyssal.checkpoint.hf.read import read_model_directory
from abyssal.checkpoint.hf.released import released_tensors
from abyssal.checkpoint.hf.row_reader import RowReader
from abyssal.config import ModelConfig
from abyssal.config.quantization import BlockFP8


@dataclass(frozen=True)
class SourceModel:
    """A model directory to convert.

    `config` has as many MTP modules as the files hold; `fields` are those of config.json as they stand there; `tensors`
    are weights and scales; `weights` the names of the weights in the order of the release, scales left out.
    """

    path: Path
    config: ModelConfig
    fields: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    weights: tuple[str, ...]

    @property
    def scheme(self) -> BlockFP8 | None:
        """How weights are quantised, none where config.json says nothing of it."""
        return BlockFP8.from_hf(dict(self.fields), str(self.path / CONFIG))

    def without_mtp(self) -> SourceModel:
        """Return the same without its MTP layers."""
        layers = self.config.num_hidden_layers
        main = tuple(name for name in self.weights if (layer := layer_of(name)) is None or layer < layers)
        return replace(self, config=self.config.model_copy(update={"num_nextn_predict_layers": 0}), weights=main)


def read_source(path: Path) -> SourceModel:
    """Read config.json and the headers of a model directory, and all scales; no weights.

    Raises:
        ModelDirectoryError: another architecture, or files that are missing, damaged or do not fit the config; names
            every tensor that is missing, surplus, of another shape or type, and every scale that is not finite.
    """
    config, model = read_model_directory(path, needs_tokenizer=False)
    fields = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    headers, mismatch = model.headers, model.compare(allow_missing_mtp=True)
    compared = {*mismatch.stored, *mismatch.misshaped, *mismatch.mistyped, *mismatch.surplus}
    for name in headers.keys() - compared:  # copies and the like, never FP8
        if headers[name].dtype not in READABLE[:-1]:
            mismatch.mistyped[name] = f"{headers[name].dtype}; possible: {', '.join(READABLE[:-1])}"
    with RowReader() as reader:
        scales = (name for name in mismatch.stored if name.endswith(SCALE_SUFFIX))
        mismatch.not_finite = [name for name in scales if not is_finite(reader.whole(headers[name]))]
    mismatch.refuse(path)
    modules = sum(name.endswith(".enorm.weight") for name in mismatch.held)
    config = config.model_copy(update={"num_nextn_predict_layers": modules})
    return SourceModel(path, config, fields, headers, tuple(_in_order(headers, config)))


def _in_order(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> Iterator[str]:
    """Yield the weights of the files, those of the model in its order and then what the files hold beside them."""
    known = [spec.name for spec in released_tensors(config) if spec.name in tensors]
    yield from known
    beside = tensors.keys() - set(known)
    yield from sorted(name for name in beside if not name.endswith(SCALE_SUFFIX))
