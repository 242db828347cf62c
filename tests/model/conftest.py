"""Drawn model shapes with all dims different, models filled with random weights, and the reference network."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.model import Transformer


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The loops of reference.py, which is no test and not on the import path."""
    spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def draw_config() -> Callable[..., ModelConfig]:
    return _draw_config


@pytest.fixture(scope="session")
def build() -> Callable[..., Transformer]:
    return _build


@pytest.fixture(scope="session")
def draw_tokens() -> Callable[..., Tensor]:
    return _draw_tokens


def _draw_config(seed: int, **fixed: Any) -> ModelConfig:
    """Draw a shape from `seed`; `fixed` fields replace what was drawn.

    No two widths are equal. YaRN is drawn with mscale and mscale_all_dim both positive, or with the defaults
    (1 and 0): elsewhere the engines themselves disagree.
    """
    rng = random.Random(seed)
    hidden, dense, moe, q_lora, kv_lora, nope, value = rng.sample(range(7, 21), 7)
    groups, in_group = rng.choice([(1, 5), (2, 3), (2, 4), (3, 2), (4, 2), (4, 3), (1, 8)])
    kept = rng.randint(1, groups)
    mscale, mscale_all_dim = rng.choice([(1.0, 1.0), (1.0, 1.0), (0.7, 1.3), (1.0, 0.0)])
    yarn = {
        "factor": rng.uniform(1.5, 40.0),
        "original_max_position_embeddings": rng.choice([24, 100, 4096]),
        "beta_fast": rng.uniform(2.0, 32.0),
        "beta_slow": rng.uniform(0.2, 1.5),
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }
    fields: dict[str, Any] = {
        "vocab_size": rng.randint(23, 37),
        "hidden_size": hidden,
        "intermediate_size": dense,
        "moe_intermediate_size": moe,
        "num_hidden_layers": 3,
        "num_attention_heads": rng.choice([2, 3, 5]),
        "q_lora_rank": rng.choice([None, q_lora]),
        "kv_lora_rank": kv_lora,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rng.choice([4, 6]),
        "v_head_dim": value,
        "n_routed_experts": groups * in_group,
        "n_shared_experts": rng.randint(1, 3),
        "num_experts_per_tok": rng.randint(2, min(4, kept * in_group)),
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": rng.random() < 0.7,
        "routed_scaling_factor": rng.uniform(0.5, 3.0),
        "first_k_dense_replace": rng.randint(0, 2),
        "max_position_embeddings": 4096,
        "rope_theta": rng.choice([50.0, 10000.0]),
        "rope_scaling": rng.choice([None, yarn]),
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.3,
    }
    return ModelConfig.parse({**fields, **fixed}, source=f"seed {seed}")


def _build(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64, **arguments: Any) -> Transformer:
    """Build a model whose weights, norms and balancing biases are all random and of order 1 in effect."""
    model = Transformer(config, compute_dtype=dtype, **arguments).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            drawn = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.2 * drawn)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * drawn)
            else:
                tensor.copy_(drawn * (1.0 if "embed_tokens" in name else tensor.shape[-1] ** -0.5))
    return model


def _draw_tokens(config: ModelConfig, count: int, seed: int) -> Tensor:
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
