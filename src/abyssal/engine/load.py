"""From a model directory to a model that is ready to generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from abyssal.checkpoint.hf import ModelReader, load_into, read_model_directory
from abyssal.checkpoint.hf.expert_stacks import split_experts
from abyssal.checkpoint.hf.mismatch import WeightMismatch
from abyssal.checkpoint.hf.row_reader import can_read_into, read_into
from abyssal.config import ModelConfig
from abyssal.engine.generation_config import GenerationDefaults, read_generation_defaults
from abyssal.engine.prepare import prepare_for_inference
from abyssal.errors import ModelDirectoryError, UsageError, nearest
from abyssal.model import Transformer
from abyssal.ops.kernels import Kernels, choose_kernels
from abyssal.text.fim import FillInTheMiddle, missing_tokens
from abyssal.text.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, ready for an engine, with its tokenizer and what its directory asks for."""

    model: Transformer
    tokenizer: Tokenizer
    config: ModelConfig
    defaults: GenerationDefaults

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        return self.defaults.eos_ids

    def encode_prompt(self, text: str, *, bos: bool = True) -> list[int]:
        """Return a prompt's ids, with one BOS first if `bos`, also where the text already spells it."""
        ids = self.tokenizer.encode(text)
        first = self.tokenizer.bos_id
        return ids if not bos or first is None or ids[:1] == [first] else [first, *ids]

    def encode_gap(self, prefix: str, suffix: str, *, bos: bool = True) -> list[int]:
        """Return the ids after which the model writes what belongs between two texts, with one BOS first if `bos`.

        As in training, a special token spelt in either text is nothing but characters.

        Raises:
            UsageError: the tokenizer lacks the tokens for it.
        """
        if missing := missing_tokens(self.tokenizer):
            raise UsageError(
                f"suffix: this model's tokenizer lacks {', '.join(missing)}, so it was not trained to fill a gap; "
                "generate without a suffix, or take a model that was trained with fill-in-the-middle"
            )
        ids, first = FillInTheMiddle(self.tokenizer).prompt(prefix, suffix), self.tokenizer.bos_id
        return ids if not bos or first is None else [first, *ids]


def load_model(path: str | Path, dtype: str = "auto", device: str = "cpu", threads: int | None = None) -> LoadedModel:
    """Read a model directory, tensor by tensor, so that memory holds the weights once.

    Args:
        path: the model directory.
        dtype: of weights and activations: float32, bfloat16, or auto for bfloat16 where the files hold 16 bits and
            float32 otherwise.
        device: cpu, cuda or cuda:<index>.
        threads: threads of torch on the CPU, for the whole process; none leaves torch's own choice.

    Raises:
        UsageError: an argument that cannot be.
        DataError, ModelDirectoryError: the directory, a file of it, or how they fit each other.
    """
    path, place = Path(path), _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype={dtype}: must be one of auto, {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads={threads}: must be at least 1")
        torch.set_num_threads(threads)
    config, reader = read_model_directory(path)
    config = _with_modules_in_files(config, reader)
    reader.check(allow_missing_mtp=True)  # before memory is taken for a model that the files do not have
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelDirectoryError(
            f"{path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's vocab_size="
            f"{config.vocab_size}; this is another model's tokenizer.json"
        )
    defaults = read_generation_defaults(path, config)
    compute_dtype = _stored_dtype(reader) if dtype == "auto" else DTYPES[dtype]
    model = materialise(config, compute_dtype, place, choose_kernels(place, compute_dtype, "decode"))
    _fill(model, reader)
    prepare_for_inference(model)
    return LoadedModel(model, tokenizer, config, defaults)


def _device(name: str) -> torch.device:
    """Return the device `name`, which is there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name}: must be cpu, cuda or cuda:<index>") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device={name}: must be cpu, cuda or cuda:<index>")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UsageError(f"device={name}: torch sees {count} CUDA devices here; use cpu{' or cuda' if count else ''}")
    return device


def _stored_dtype(reader: ModelReader) -> torch.dtype:
    """Return the dtype to compute in that suits the weights as they are stored."""
    return torch.bfloat16 if reader.tensor("model.embed_tokens.weight").itemsize == 2 else torch.float32


def _with_modules_in_files(config: ModelConfig, reader: ModelReader) -> ModelConfig:
    """Return the config with as many MTP modules as the files hold: many copies of V3 leave them out."""
    held = 0
    while f"model.layers.{config.num_hidden_layers + held}.enorm.weight" in reader:
        held += 1
    return config.model_copy(update={"num_nextn_predict_layers": held})


def _fill(model: Transformer, reader: ModelReader) -> None:
    """Read the weights: straight into their places where every type is the same, else by way of mapped files.

    Raises:
        ModelDirectoryError: values that are not finite, or files that cannot be read.
    """
    held = {name: tensor for name, tensor in model.state_dict().items() if name in reader}
    places = {part: view for name, tensor in held.items() for part, view in split_experts(name, tensor)}
    if not all(can_read_into(reader.headers[name], place) for name, place in places.items()):
        load_into(model, reader)
    elif not_finite := read_into(places, reader.headers, torch.get_num_threads()):
        WeightMismatch(not_finite=not_finite).refuse(reader.path)


def materialise(config: ModelConfig, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> Transformer:
    """Return a model with its parameters allocated in `dtype` on `device`, not filled; buffers stay fp32.

    Built on the meta device first, so that nothing is ever allocated in another precision.
    """
    with torch.device("meta"):
        model = Transformer(config, kernels, compute_dtype=dtype)
    for module in model.modules():
        # torch.empty, since to_empty's empty_like of a meta tensor imports sympy: a second
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    return model
