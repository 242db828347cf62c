"""What a model keeps in memory while it serves."""

from __future__ import annotations

from abyssal.config import ModelConfig


def cache_bytes_per_token(config: ModelConfig, value_bytes: int = 2) -> int:
    """Return the bytes of the latent cache that one token takes in all main layers.

    A layer keeps `kv_lora_rank` latent values and `qk_rope_head_dim` of the rotary key, for all heads together.
    `value_bytes` is the size of one value: 2 in bfloat16. Paper: §2.1.1.
    """
    return (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers * value_bytes
