"""The tensors of a model directory, as released: experts one by one, FP8 scales, the copies of each MTP layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from abyssal.checkpoint.hf.expert_stacks import DOWN, GATE_UP, split_shapes
from abyssal.checkpoint.hf.fp8_scales import is_quantised, scales_of
from abyssal.checkpoint.hf.names import BIAS, EMBEDDING, HEAD, TensorSpec, layer_prefix, memory_tensors
from abyssal.config import ModelConfig


def released_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield every tensor of a model directory: experts one by one, each MTP layer with copies of embedding and head.

    The copy of the head is there also when `tie_word_embeddings` leaves out `lm_head.weight` itself.
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    for spec in memory_tensors(config):
        if spec.name.endswith(".enorm.weight"):
            yield TensorSpec(spec.name.replace(".enorm.", ".embed_tokens."), vocabulary)
        if spec.name.endswith(GATE_UP):
            gate_up = list(split_shapes(spec.name, spec.shape))
            down_name = spec.name.removesuffix(GATE_UP) + DOWN
            down = list(split_shapes(down_name, (spec.shape[0], spec.shape[2], spec.shape[1] // 2)))
            for expert in range(spec.shape[0]):  # expert by expert, as released
                yield from (*gate_up[2 * expert : 2 * expert + 2], down[expert])
        elif not spec.name.endswith(DOWN):
            yield spec
        if spec.name.endswith(".shared_head.norm.weight"):
            yield TensorSpec(spec.name.replace(".norm.", ".head."), vocabulary)


def stored_tensors(config: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[TensorSpec, torch.dtype]]:
    """Yield (name and shape, dtype) of every tensor in the files of a model directory that is written in `dtype`.

    With float8_e4m3fn, the weights of `is_quantised` are FP8, each with fp32 scales after it, and the others bf16.
    """
    fp8 = dtype == torch.float8_e4m3fn
    for spec in released_tensors(config):
        if fp8 and is_quantised(spec.name):
            yield spec, dtype
            yield scales_of(spec), torch.float32
        else:
            wide = torch.float32 if spec.name.endswith(BIAS) else torch.bfloat16 if fp8 else dtype
            yield spec, wide


def mtp_copies(name: str, config: ModelConfig) -> list[str]:
    """Return the released names inside the MTP layers that hold a copy of the in-memory tensor `name`."""
    layers = [layer_prefix(layer) for layer in range(config.num_hidden_layers, config.num_layers)]
    copies = []
    if name == EMBEDDING:
        copies += [f"{layer}embed_tokens.weight" for layer in layers]
    if name == (EMBEDDING if config.tie_word_embeddings else HEAD):
        copies += [f"{layer}shared_head.head.weight" for layer in layers]
    return copies
