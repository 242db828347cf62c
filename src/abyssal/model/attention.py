"""Multi-head Latent Attention. Paper: §2.1.1.

Legend: T packed tokens, S cached tokens of one sequence, D hidden, H heads, N nope dims, R rope dims, V value dim,
C latent dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.context import Context
from abyssal.model.layers import Linear, RMSNorm
from abyssal.ops.attention import Attention
from abyssal.ops.latent_attention import LatentAttention, latent_attention
from abyssal.ops.rms_norm import Normalise, rms_norm
from abyssal.ops.rotary import rotate

#: eps of the norms on the latents, fixed in the released modelling code whatever `rms_norm_eps` says.
LATENT_NORM_EPS = 1e-6


class AttentionCore(Protocol):
    """From queries and the latent to the heads' outputs: the seam between training and decoding."""

    def __call__(
        self, q_c: Tensor, q_r: Tensor, c_kv: Tensor, k_r: Tensor, kv_b_proj: nn.Module, ctx: Context
    ) -> Tensor:
        """Map q_c [T, H, N], q_r [T, H, R], c_kv [T, C] (normed) and k_r [T, R] to [T, H, V]."""
        ...


class NaiveCore:
    """Expands every latent to the heads' keys and values: least work where all tokens are new, so for training."""

    def __init__(self, config: ModelConfig, kernel: Attention) -> None:
        """Take the shapes from `config` and the version of causal attention to run."""
        self.config, self.kernel = config, kernel

    def __call__(
        self, q_c: Tensor, q_r: Tensor, c_kv: Tensor, k_r: Tensor, kv_b_proj: nn.Module, ctx: Context
    ) -> Tensor:
        """See `AttentionCore`."""
        cfg = self.config
        heads = cfg.num_attention_heads
        kv = kv_b_proj(c_kv).unflatten(-1, (heads, -1))  # [T, H, N+V]
        k_c, v = kv.split((cfg.qk_nope_head_dim, cfg.v_head_dim), -1)  # eq. 2, 5
        k = torch.cat((k_c, k_r[:, None].expand(-1, heads, -1)), -1)  # [T, H, N+R]  eq. 4
        q = torch.cat((q_c, q_r), -1)  # [T, H, N+R]  eq. 9
        return self.kernel(q, k, v, ctx.lengths, ctx.lengths, cfg.softmax_scale)  # eq. 10


class AbsorbedCore:
    """Attends over the latents themselves, W_UK absorbed into the query and W_UV into the output: for decoding.

    Equal in value to `NaiveCore`; reads C + R values a cached token instead of H (N + R + V), and kv_b_proj's weight
    once.
    """

    def __init__(self, config: ModelConfig, layer: int, kernel: LatentAttention = latent_attention) -> None:
        """Serve `layer`, whose latents go to the context's cache (without one, the tokens at hand are all there is)."""
        self.config, self.layer, self.kernel = config, layer, kernel

    def __call__(
        self, q_c: Tensor, q_r: Tensor, c_kv: Tensor, k_r: Tensor, kv_b_proj: nn.Module, ctx: Context
    ) -> Tensor:
        """See `AttentionCore`."""
        cfg = self.config
        weight: Tensor = kv_b_proj.weight.to(q_c.dtype)  # type: ignore[assignment]
        w_uk, w_uv = weight.unflatten(0, (cfg.num_attention_heads, -1)).split((cfg.qk_nope_head_dim, cfg.v_head_dim), 1)
        q_latent = torch.bmm(q_c.transpose(0, 1), w_uk)  # [H, T, C]  eq. 2 moved to the query's side
        if ctx.cache is None:
            cached: Sequence[Tensor] = torch.cat((c_kv, k_r), -1).split(ctx.lengths)
        else:
            cached = ctx.cache.append(self.layer, c_kv, k_r)  # [S, C+R] of each sequence
        o_latent = self.kernel(q_latent.transpose(0, 1), q_r, cached, ctx.lengths, cfg.softmax_scale)  # eq. 10
        o = torch.bmm(o_latent.transpose(0, 1), w_uv.transpose(1, 2))  # [H, T, V]  eq. 5 moved behind the sum
        return o.transpose(0, 1)  # [T, H, V]


class MultiHeadLatentAttention(nn.Module):
    """Attention whose keys and values come from one small latent a token, which is all that is cached."""

    def __init__(self, config: ModelConfig, core: AttentionCore, normalise: Normalise = rms_norm) -> None:
        """Build the projections; `core` is replaced from outside to decode over a cache."""
        super().__init__()
        self.config, self.core = config, core
        d, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(d, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(d, config.q_lora_rank)  # W^DQ
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, normalise)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)  # head by head, W^UQ above W^QR
        self.kv_a_proj_with_mqa = Linear(d, config.kv_lora_rank + config.qk_rope_head_dim)  # W^DKV above W^KR
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS, normalise)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)
        )  # head by head, W^UK above W^UV
        self.o_proj = Linear(heads * config.v_head_dim, d)  # W^O

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        """Map [T, D] to [T, D]; `ctx.rotary` holds the angles of its positions."""
        cfg = self.config
        assert ctx.rotary is not None, "the transformer puts the rotary tables into the context"
        cos, sin = ctx.rotary
        if cfg.q_lora_rank is None:
            q = self.q_proj(h)
        else:
            c_q = self.q_a_proj(h)  # [T, q_lora_rank]  eq. 6
            q = self.q_b_proj(self.q_a_layernorm(c_q))  # eq. 7, 8
        q = q.unflatten(-1, (cfg.num_attention_heads, -1))  # [T, H, N+R]
        q_c, q_r = q.split((cfg.qk_nope_head_dim, cfg.qk_rope_head_dim), -1)
        c_kv, k_r = self.kv_a_proj_with_mqa(h).split((cfg.kv_lora_rank, cfg.qk_rope_head_dim), -1)  # eq. 1
        q_r, k_r = rotate(q_r, cos, sin), rotate(k_r, cos, sin)  # eq. 8, 3
        o = self.core(q_c, q_r, self.kv_a_layernorm(c_kv), k_r, self.kv_b_proj, ctx)  # [T, H, V]
        return self.o_proj(o.flatten(-2))  # type: ignore[no-any-return]  # [T, D]  eq. 11
