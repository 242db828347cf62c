"""Which version of each operation a model runs: chosen once, handed to the model, printable."""

from __future__ import annotations

from dataclasses import dataclass, fields

from abyssal.ops.attention import Attention, attention, sdpa_attention
from abyssal.ops.cross_entropy import CrossEntropy, chunked_linear_cross_entropy, linear_cross_entropy
from abyssal.ops.experts import Experts, expert_ffn, segmented_expert_ffn


@dataclass(frozen=True)
class Kernels:
    """One version of every operation that has several; the defaults are the definitions."""

    attention: Attention = attention
    experts: Experts = expert_ffn
    cross_entropy: CrossEntropy = linear_cross_entropy

    def describe(self) -> dict[str, str]:
        """Return the chosen function's name for each operation."""
        return {field.name: getattr(self, field.name).__name__ for field in fields(self)}


#: The fast versions; all of them serve every device and dtype that torch computes in.
FAST = Kernels(sdpa_attention, segmented_expert_ffn, chunked_linear_cross_entropy)
