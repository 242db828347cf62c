"""The model shapes that the benchmarks share with the measurements of other engines."""

from __future__ import annotations

from abyssal.config import ModelConfig


def shape_s(mtp: int = 0) -> ModelConfig:
    """109M parameters: hidden 512, 8 layers, 32 experts top-8 in 4 groups of which 2."""
    return ModelConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        moe_intermediate_size=192,
        num_hidden_layers=8,
        num_nextn_predict_layers=mtp,
        num_attention_heads=8,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=8,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        max_position_embeddings=4096,
    )


def shape_m() -> ModelConfig:
    """1.66B parameters, 253M of them read a token: hidden 1024, 16 layers, 64 experts top-6 in 8 groups of which 4."""
    return ModelConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=3072,
        moe_intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=16,
        q_lora_rank=384,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        max_position_embeddings=4096,
    )


def shape_m24() -> ModelConfig:
    """M with 24 experts top-6 in 4 groups of which 2."""
    return shape_m().model_copy(update={"n_routed_experts": 24, "n_group": 4, "topk_group": 2})


SHAPES = {"S": shape_s, "M": shape_m, "M24": shape_m24}
