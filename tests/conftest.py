"""Fixtures that several areas share."""

from __future__ import annotations

import pytest

from abyssal.config import ModelConfig


@pytest.fixture
def tiny_config() -> ModelConfig:
    """A model with every part of the architecture and no two dims alike: 1 dense, 2 MoE and 1 MTP layer."""
    return ModelConfig(
        vocab_size=97,
        hidden_size=20,
        intermediate_size=33,
        moe_intermediate_size=9,
        num_hidden_layers=3,
        num_nextn_predict_layers=1,
        num_attention_heads=3,
        q_lora_rank=11,
        kv_lora_rank=13,
        qk_nope_head_dim=7,
        qk_rope_head_dim=4,
        v_head_dim=5,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=2,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=1.7,
        first_k_dense_replace=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
