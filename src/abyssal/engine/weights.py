"""New weights for a model that serves, from a stream of names and tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from abyssal.checkpoint.hf.expert_stacks import split_experts, split_shapes
from abyssal.checkpoint.hf.mismatch import is_finite
from abyssal.checkpoint.hf.names import HEAD, fold_names, memory_tensors
from abyssal.checkpoint.hf.released import mtp_copies
from abyssal.config import ModelConfig
from abyssal.engine.load import materialise
from abyssal.engine.prepare import prepare_for_inference
from abyssal.errors import UsageError
from abyssal.model import Transformer


def model_with_weights(served: Transformer, weights: Iterable[tuple[str, Tensor]]) -> Transformer:
    """Return a model like `served` with other weights, prepared for inference; `served` is not changed.

    Args:
        served: gives shape, dtype, device and versions of operations.
        weights: (name, tensor) as a model directory has them: experts one by one. The MTP layers' copies of embedding
            and head may be there.

    Raises:
        UsageError: a tensor is missing, of another name or shape, comes twice or is not finite.
    """
    tensors = _checked(served.config, weights)
    model = materialise(served.config, served.compute_dtype, served.head_weight.device, served.kernels)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            for released, view in split_experts(name, target):
                view.copy_(tensors[released])
    prepare_for_inference(model)
    return model


def _checked(config: ModelConfig, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors by name, after a look at every one."""
    specs = list(memory_tensors(config))
    shapes = {part.name: part.shape for spec in specs for part in split_shapes(spec.name, spec.shape)}
    copies = {copy for spec in specs for copy in mtp_copies(spec.name, config)}
    if config.tie_word_embeddings:
        copies.add(HEAD)
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights:
        if name in copies:
            continue
        if name not in shapes:
            raise UsageError(f"weights: {name}: not a tensor of this model")
        if name in tensors:
            raise UsageError(f"weights: {name}: comes twice")
        if tuple(tensor.shape) != shapes[name]:
            raise UsageError(f"weights: {name}: has the shape {list(tensor.shape)}, must have {list(shapes[name])}")
        if not is_finite(tensor):
            raise UsageError(f"weights: {name}: has values that are not finite")
        tensors[name] = tensor
    if missing := shapes.keys() - tensors.keys():
        raise UsageError(f"weights: missing: {', '.join(fold_names(name for name in shapes if name in missing))}")
    return tensors
