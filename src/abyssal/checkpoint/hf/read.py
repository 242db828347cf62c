"""A model directory read tensor by tensor, each when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from abyssal.checkpoint.hf.expert_stacks import split_names, stack_experts
from abyssal.checkpoint.hf.files import CONFIG, TOKENIZER_FILES
from abyssal.checkpoint.hf.fp8_scales import read_dequantised
from abyssal.checkpoint.hf.headers import FP8, TensorInfo, open_safetensors, read_headers
from abyssal.checkpoint.hf.mismatch import WeightMismatch, compare_weights
from abyssal.checkpoint.hf.names import memory_tensors
from abyssal.config import ModelConfig
from abyssal.errors import ConfigError, ModelDirectoryError
from abyssal.files.faults import os_faults


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
        self.headers: Mapping[str, TensorInfo] = read_headers(path)
        self._open: dict[Path, Any] = {}

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
        return stack_experts(name, self.config.n_routed_experts, lambda part: self.part(part, torch.bfloat16))

    def stored(self, name: str) -> torch.Tensor:
        """Return one released tensor as it is in its file, whose memory it shares: do not write to it."""
        file = self.headers[name].file
        with os_faults(ModelDirectoryError, file, "read the weights"):
            if file not in self._open:
                self._open[file] = open_safetensors(file)
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        return tensor

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
        return read_dequantised(self.stored, name, (start, stop), dequantised, device)

    def compare(
        self,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        allow_missing_mtp: bool = False,
        values: bool = False,
    ) -> WeightMismatch:
        """Return what is wrong with the files for a model of these in-memory names and shapes, without one `config`'s.

        With `allow_missing_mtp`, MTP layers of which the files hold nothing may be missing. With `values`, everything
        that would be loaded is read, to find what is not finite; otherwise headers only.
        """
        if shapes is None:
            shapes = {spec.name: spec.shape for spec in memory_tensors(self.config)}
        mismatch = compare_weights(self.headers, self.config, shapes, allow_missing_mtp=allow_missing_mtp)
        if values:
            mismatch.read_values(self.stored)
        return mismatch

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        allow_missing_mtp: bool = False,
        values: bool = False,
    ) -> list[str]:
        """Refuse files that do not fit; for the arguments see `compare`.

        Where the headers do not fit, the values are read in any case, so that one report names every fault; that takes
        about as long as loading would have.

        Returns:
            The in-memory names that the files hold.

        Raises:
            ModelDirectoryError: names every tensor that is missing, surplus, of another shape or type, or not finite.
        """
        mismatch = self.compare(shapes, allow_missing_mtp=allow_missing_mtp, values=values)
        if mismatch and not values:
            mismatch.read_values(self.stored)
        mismatch.refuse(self.path)
        return mismatch.held
