"""Which version of each operation a model runs: chosen once, for a device, dtype and purpose, and handed to it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from abyssal.ops import attention, cross_entropy, experts, latent_attention, packed, rms_norm
from abyssal.ops.version import Purpose, Version

#: The versions of each operation, the fastest first; the definition comes last and serves everywhere.
OPERATIONS: dict[str, tuple[Version, ...]] = {
    "attention": attention.VERSIONS,
    "latent_attention": latent_attention.VERSIONS,
    "linear": packed.VERSIONS,
    "experts": experts.VERSIONS,
    "cross_entropy": cross_entropy.VERSIONS,
    "log_probabilities": cross_entropy.LOG_PROBABILITIES,
    "rms_norm": rms_norm.VERSIONS,
}


@dataclass(frozen=True)
class Kernels:
    """One version of every operation; the defaults are the definitions."""

    attention: Version = OPERATIONS["attention"][-1]
    latent_attention: Version = OPERATIONS["latent_attention"][-1]
    linear: Version = OPERATIONS["linear"][-1]
    experts: Version = OPERATIONS["experts"][-1]
    cross_entropy: Version = OPERATIONS["cross_entropy"][-1]
    log_probabilities: Version = OPERATIONS["log_probabilities"][-1]
    rms_norm: Version = OPERATIONS["rms_norm"][-1]

    def describe(self) -> dict[str, str]:
        """Return the name of the version of each operation."""
        return {field.name: getattr(self, field.name).name for field in fields(self)}


def choose_kernels(device: torch.device, dtype: torch.dtype, purpose: Purpose) -> Kernels:
    """Return the first version of each operation that nothing speaks against."""
    return Kernels(
        **{
            operation: next(v for v in versions if v.why_not_for(purpose, device, dtype) is None)
            for operation, versions in OPERATIONS.items()
        }
    )


def passed_over(device: torch.device, dtype: torch.dtype, purpose: Purpose) -> dict[str, dict[str, str]]:
    """Return for each operation the versions before the chosen one, by name, with what speaks against each."""
    found: dict[str, dict[str, str]] = {operation: {} for operation in OPERATIONS}
    for operation, versions in OPERATIONS.items():
        for version in versions:
            if (reason := version.why_not_for(purpose, device, dtype)) is None:
                break
            found[operation][version.name] = reason
    return found
