"""Rotary frequencies, plain and with YaRN.

Legend: T packed tokens, R rotary dims.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abyssal.config import ModelConfig, RopeScaling


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Return the angle a position adds to each rotary pair: [R/2], float64.

    Under YaRN, pairs that turn more than `beta_fast` times over the original context keep their frequency, pairs that
    turn less than `beta_slow` times are slowed by `factor`, and those between are blended linearly. Paper: §4.3.
    """
    dims = config.qk_rope_head_dim
    exponents = torch.arange(0, dims, 2, dtype=torch.float64) / dims
    frequencies = config.rope_theta**-exponents  # [R/2]
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies
    low = max(math.floor(_pair_turning(yarn.beta_fast, config, yarn)), 0)
    high = min(math.ceil(_pair_turning(yarn.beta_slow, config, yarn)), dims - 1)
    span = max(high - low, 0.001)  # equal bounds: a step instead of a division by zero
    slowed = ((torch.arange(dims // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    return frequencies / yarn.factor * slowed + frequencies * (1 - slowed)


def _pair_turning(times: float, config: ModelConfig, yarn: RopeScaling) -> float:
    """Return the (fractional) index of the pair that turns `times` times over the original context."""
    length = yarn.original_max_position_embeddings
    return config.qk_rope_head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))


def rotary_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of each position's angles: [T, R/2] each.

    Differs: angles are taken in float64 and rounded once (transformers: fp32 throughout), so that they stay exact at
    positions far out.
    """
    frequencies = rotary_frequencies(config).to(positions.device)
    angles = positions.to(torch.float64)[:, None] * frequencies  # [T, R/2]
    amplitude = 1.0 if config.rope_scaling is None else config.rope_scaling.rotary_factor
    return (angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype)
