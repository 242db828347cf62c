"""Tiny models, as configurations and random tensors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from abyssal.checkpoint.hf import write_model_directory
from abyssal.checkpoint.hf.names import memory_tensors
from abyssal.config import ModelConfig

TINY = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 29,
    "moe_intermediate_size": 7,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 5,
    "q_lora_rank": 13,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """Build a tiny configuration, all dims different, with some fields changed."""
    return lambda **changes: ModelConfig(**{**TINY, **changes})


@pytest.fixture
def random_tensors() -> Callable[..., dict[str, torch.Tensor]]:
    """Build random tensors for a configuration under their in-memory names."""

    def build(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {spec.name: torch.randn(spec.shape, generator=generator) * 0.1 for spec in memory_tensors(config)}

    return build


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """Return a folder with the smallest tokenizer that transformers would look for."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE"}}))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def build_module() -> Callable[..., nn.Module]:
    """Build a module whose state dict has some names and shapes, filled with sevens."""

    def build(tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
        root = nn.Module()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            owner = root
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            if leaf == "e_score_correction_bias":
                owner.register_buffer(leaf, torch.full(tensor.shape, 7.0, device=device))
            else:
                owner.register_parameter(leaf, nn.Parameter(torch.full(tensor.shape, 7.0, dtype=dtype, device=device)))
        return root

    return build


@pytest.fixture
def rewrite() -> Callable[..., None]:
    """Rewrite the tensors of a directory with one file after a change of the mapping; our mark is lost."""

    def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


@pytest.fixture
def write(tmp_path, tokenizer_folder):
    """Write a model directory under tmp_path / "model"."""

    def write(config, tensors, **options) -> Path:
        options = {"dtype": torch.float32, "tokenizer_files": tokenizer_folder, "card": "# Card\n", **options}
        write_model_directory(tmp_path / "model", config, tensors, **options)
        return tmp_path / "model"

    return write


@pytest.fixture
def written(write, tiny, random_tensors) -> Path:
    return write(tiny(), random_tensors(tiny()))
