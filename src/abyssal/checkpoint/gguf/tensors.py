"""The tensors of a GGUF file of the architecture `deepseek2`, and what each is made of.

Shapes: D hidden, H heads, N nope, V value dim, C latent, E experts, F expert width; the slowest dim first, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType
from gguf.quants import quantize
from torch.nn import functional

from abyssal.checkpoint.hf.expert_stacks import DOWN, GATE_UP
from abyssal.checkpoint.hf.names import BIAS, EMBEDDING, HEAD, TensorSpec, layer_of, memory_tensors
from abyssal.config import ModelConfig

#: What each of our tensors is called in GGUF, without `model.layers.N.` and `.weight`.
NAMES = {
    EMBEDDING.removesuffix(".weight"): MODEL_TENSOR.TOKEN_EMBD,
    "model.norm": MODEL_TENSOR.OUTPUT_NORM,
    HEAD.removesuffix(".weight"): MODEL_TENSOR.OUTPUT,
    "input_layernorm": MODEL_TENSOR.ATTN_NORM,
    "self_attn.q_proj": MODEL_TENSOR.ATTN_Q,
    "self_attn.q_a_proj": MODEL_TENSOR.ATTN_Q_A,
    "self_attn.q_a_layernorm": MODEL_TENSOR.ATTN_Q_A_NORM,
    "self_attn.q_b_proj": MODEL_TENSOR.ATTN_Q_B,
    "self_attn.kv_a_proj_with_mqa": MODEL_TENSOR.ATTN_KV_A_MQA,
    "self_attn.kv_a_layernorm": MODEL_TENSOR.ATTN_KV_A_NORM,
    "self_attn.o_proj": MODEL_TENSOR.ATTN_OUT,
    "post_attention_layernorm": MODEL_TENSOR.FFN_NORM,
    "mlp.gate_proj": MODEL_TENSOR.FFN_GATE,
    "mlp.up_proj": MODEL_TENSOR.FFN_UP,
    "mlp.down_proj": MODEL_TENSOR.FFN_DOWN,
    "mlp.gate": MODEL_TENSOR.FFN_GATE_INP,
    "mlp.shared_experts.gate_proj": MODEL_TENSOR.FFN_GATE_SHEXP,
    "mlp.shared_experts.up_proj": MODEL_TENSOR.FFN_UP_SHEXP,
    "mlp.shared_experts.down_proj": MODEL_TENSOR.FFN_DOWN_SHEXP,
}
KV_B = ".self_attn.kv_b_proj.weight"
ROUTER = ".mlp.gate.weight"
F32, BF16, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0
#: The largest value of each; of Q8_0, 127 times the largest scale in fp16.
MOST = {F32: torch.finfo(torch.float32).max, BF16: torch.finfo(torch.bfloat16).max, Q8_0: 127 * 65504.0}
#: Up to this, values become 0 in Q8_0: the scale of a block of nothing larger would be 0 in fp16 anyway.
Q8_0_LEAST = 1e-30


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file: `take` of each released tensor of `parts`, one after the other."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    parts: tuple[str, ...]
    take: Callable[[torch.Tensor], torch.Tensor] = _whole

    @property
    def nbytes(self) -> int:
        """The bytes it takes in the file, without padding."""
        values, size = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // values * size


def gguf_tensors(config: ModelConfig, kind: GGMLQuantizationType) -> Iterator[GgufTensor]:
    """Yield the tensors of the main model, matrices in `kind`.

    Norms, router and selection bias are fp32 in every file. A matrix whose rows `kind` cannot cut into blocks is bf16.
    """
    for spec in memory_tensors(config):
        layer = layer_of(spec.name)
        if layer is None or layer < config.num_hidden_layers:
            yield from _tensors(config, spec, kind)


def encode(values: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Return rows of values [R, n] as the file holds them; rounding is to nearest even, of Q8_0 half away from zero."""
    if kind == BF16:
        return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    wide = values.to(torch.float32).contiguous()
    if kind == Q8_0:
        # the package divides by a block's largest value, and the inverse of a denormal one is not finite
        return quantize(functional.hardshrink(wide, Q8_0_LEAST).numpy(), kind)
    return wide.numpy()


def _tensors(config: ModelConfig, spec: TensorSpec, kind: GGMLQuantizationType) -> Iterator[GgufTensor]:
    """Yield what one in-memory tensor becomes."""
    layer = layer_of(spec.name)
    prefix = "" if layer is None else f"model.layers.{layer}."
    experts = [f"{prefix}mlp.experts.{e}" for e in range(config.n_routed_experts)]

    def build(tensor: MODEL_TENSOR, shape: tuple[int, ...], *parts: str, suffix: str = "weight") -> GgufTensor:
        stored = F32 if len(shape) == 1 or spec.name.endswith(ROUTER) else kind
        if shape[-1] % GGML_QUANT_SIZES[stored][0]:
            stored = BF16
        return GgufTensor(f"{TENSOR_NAMES[tensor].format(bid=layer)}.{suffix}", shape, stored, parts)

    if spec.name.endswith(GATE_UP):
        shape = (spec.shape[0], spec.shape[1] // 2, spec.shape[2])  # [E, F, D]
        yield build(MODEL_TENSOR.FFN_GATE_EXP, shape, *(f"{expert}.gate_proj.weight" for expert in experts))
        yield build(MODEL_TENSOR.FFN_UP_EXP, shape, *(f"{expert}.up_proj.weight" for expert in experts))
    elif spec.name.endswith(DOWN):
        yield build(MODEL_TENSOR.FFN_DOWN_EXP, spec.shape, *(f"{expert}.down_proj.weight" for expert in experts))
    elif spec.name.endswith(KV_B):
        yield from _split_kv_b(config, spec.name, build)
    elif spec.name.endswith(BIAS):
        yield build(MODEL_TENSOR.FFN_EXP_PROBS_B, spec.shape, spec.name, suffix="bias")
    else:
        yield build(NAMES[spec.name.removeprefix(prefix).removesuffix(".weight")], spec.shape, spec.name)


def _split_kv_b(config: ModelConfig, name: str, build: Callable[..., GgufTensor]) -> Iterator[GgufTensor]:
    """Yield the two halves of kv_b_proj [H * (N + V), C], the keys' transposed, as absorbed attention multiplies them.

    Paper: §2.1.1 eq. 2 and 5.
    """
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim

    def keys(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(heads, nope + value, -1)[:, :nope].mT  # [H, C, N]

    def values(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(heads, nope + value, -1)[:, nope:]  # [H, V, C]

    k_b = build(MODEL_TENSOR.ATTN_K_B, (heads, config.kv_lora_rank, nope), name)
    v_b = build(MODEL_TENSOR.ATTN_V_B, (heads, value, config.kv_lora_rank), name)
    yield GgufTensor(k_b.name, k_b.shape, k_b.kind, k_b.parts, keys)
    yield GgufTensor(v_b.name, v_b.shape, v_b.kind, v_b.parts, values)
