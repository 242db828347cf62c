"""Random model directories in bf16 or FP8, and an arithmetic of their own for both formats."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from abyssal.checkpoint.hf.released import released_tensors
from abyssal.config import ModelConfig

#: Two or three blocks along each side, the last one smaller; odd sizes among them.
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 140,
    "intermediate_size": 259,
    "moe_intermediate_size": 131,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 3,
    "q_lora_rank": 133,
    "kv_lora_rank": 127,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
#: The last parts of the names that the release holds in FP8, as its description lists them.
PROJECTIONS = {
    *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
}


def is_projection(name: str) -> bool:
    return name.split(".")[-2] in PROJECTIONS


def widen_fp8(codes: np.ndarray) -> np.ndarray:
    """Return e4m3 codes as float64: 4 exponent bits of bias 7, 3 mantissa bits."""
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8.0 + mantissa) * 2.0 ** (exponent.astype(np.float64) - 10))
    return np.where(codes & 0x80, -size, size)


def spread(scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return for each value of a weight the scale of its block."""
    rows, columns = np.arange(shape[0]) // 128, np.arange(shape[1]) // 128
    return scale[rows[:, None], columns[None, :]]


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16, ties to even, and return the bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_bits(tensor: Tensor) -> np.ndarray:
    assert tensor.dtype == torch.bfloat16
    return tensor.view(torch.uint16).numpy()


def sums_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sums(folder: Path) -> dict[str, str]:
    return {path.name: sums_of(path) for path in sorted(folder.iterdir())}


def draw(config: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return random released tensors; blocks of very different sizes, the bias in fp32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in released_tensors(config):
        sizes = torch.exp2(torch.randint(-9, 3, spec.shape[:1], generator=generator).float())
        values = torch.randn(spec.shape, generator=generator) * sizes.view(-1, *[1] * (len(spec.shape) - 1))
        tensors[spec.name] = values if spec.name.endswith("bias") else values.to(dtype)
    return tensors


def quantise_randomly(tensors: dict[str, Tensor], seed: int, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Replace the projections by random finite FP8 codes with random scales."""
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        result[name] = tensor
        if is_projection(name):
            codes = torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
            codes[(codes & 0x7F) == 0x7F] = 5
            grid = tuple(-(-size // 128) for size in tensor.shape)
            sizes = torch.exp2(torch.randint(-9, 4, grid, generator=generator).float())
            scale = torch.rand(grid, generator=generator) * sizes + 1e-6
            result[name] = codes.view(torch.float8_e4m3fn)
            result[f"{name}_scale_inv"] = scale.to(scale_dtype)
    return result


def save_directory(folder: Path, config: ModelConfig, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """Write a model directory as others do: two weight files with an index, and files that we never write."""
    folder.mkdir()
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    dtype = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config.to_hf(dtype) | fields))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "README.md").write_text("# Card\n")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    return folder
