"""Which version of each operation a model runs: chosen once, handed to the model, printable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from abyssal.ops.attention import Attention, attention, blocked_attention, sdpa_attention
from abyssal.ops.cross_entropy import CrossEntropy, chunked_linear_cross_entropy, linear_cross_entropy
from abyssal.ops.experts import Experts, expert_ffn, segmented_expert_ffn
from abyssal.ops.latent_attention import LatentAttention, batched_latent_attention, latent_attention
from abyssal.ops.rms_norm import Normalise, lean_rms_norm, rms_norm


@dataclass(frozen=True)
class Kernels:
    """One version of every operation that has several; the defaults are the definitions."""

    attention: Attention = attention
    latent_attention: LatentAttention = latent_attention
    experts: Experts = expert_ffn
    cross_entropy: CrossEntropy = linear_cross_entropy
    rms_norm: Normalise = rms_norm

    def describe(self) -> dict[str, str]:
        """Return the chosen function's name for each operation."""
        return {field.name: getattr(self, field.name).__name__ for field in fields(self)}


Version = Callable[..., torch.Tensor]

#: The versions of each operation, the fastest first; the definition comes last and serves everywhere.
VERSIONS: dict[str, tuple[Version, ...]] = {
    "attention": (blocked_attention, sdpa_attention, attention),
    "latent_attention": (batched_latent_attention, latent_attention),
    "experts": (segmented_expert_ffn, expert_ffn),
    "cross_entropy": (chunked_linear_cross_entropy, linear_cross_entropy),
    "rms_norm": (lean_rms_norm, rms_norm),
}


def why_not(version: Version, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why `version` is not the one for this device and dtype, or None where it can be."""
    if version is blocked_attention and (device.type != "cpu" or dtype != torch.bfloat16):
        return "made for bfloat16 on a CPU; elsewhere torch's fused attention is faster"
    return None


def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the first version of each operation that nothing speaks against."""
    chosen = {
        operation: next(version for version in versions if why_not(version, device, dtype) is None)
        for operation, versions in VERSIONS.items()
    }
    return Kernels(**chosen)
