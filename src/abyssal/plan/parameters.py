"""How many parameters a model has, in closed form. Paper: §4.2; the release's figures of 671B, 37B and 685B."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from abyssal.config import ModelConfig


@dataclass(frozen=True)
class ParametersByPart:
    """The number of parameters of each part of the network.

    `gate_bias` (`e_score_correction_bias`) is no parameter to the optimizer, but the published totals count it.
    """

    embedding: int = 0
    attention: int = 0  # the projections
    dense_ffn: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    gate: int = 0
    gate_bias: int = 0
    norms: int = 0  # those of the latents too
    mtp_projection: int = 0  # eh_proj
    head: int = 0

    def __add__(self, other: Self) -> Self:
        """Add part by part."""
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> Self:
        """Repeat: `layer * num_layers`."""
        return type(self)(*(getattr(self, f.name) * times for f in fields(self)))

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def matrices(self) -> int:
        """Those that a token is multiplied with: all but the embedding (a look-up), the norms and the gate's bias."""
        return self.total - self.embedding - self.norms - self.gate_bias


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the main model and of the MTP modules, all of them and those that one token uses.

    A token uses the shared experts and `num_experts_per_tok` routed ones; of the rest it uses everything.
    """

    main: ParametersByPart
    mtp: ParametersByPart  # what the MTP modules add: embedding and head are those of the main model
    activated_main: ParametersByPart
    activated_mtp: ParametersByPart
    copies: int  # embedding and head that the files repeat in each MTP module

    @property
    def total(self) -> int:
        """The main model, as published: 671B."""
        return self.main.total

    @property
    def activated(self) -> int:
        """What one token uses of the main model, with embedding and head: 37B."""
        return self.activated_main.total

    @property
    def activated_without_embedding(self) -> int:
        """What one token uses of the main model, with the head only."""
        return self.activated_main.total - self.main.embedding

    @property
    def activated_without_both(self) -> int:
        """What one token uses of the main model's layers and last norm, without embedding and head."""
        return self.activated_main.total - self.main.embedding - self.main.head

    @property
    def activated_mtp_with_both(self) -> int:
        """What one token uses of the MTP modules, counting embedding and head once a module."""
        return self.activated_mtp.total + self.copies

    @property
    def model(self) -> int:
        """The main model and the MTP modules, each tensor once: what training holds."""
        return self.main.total + self.mtp.total

    @property
    def trainable(self) -> int:
        """What the optimizer updates: everything but the gate's bias."""
        return self.model - self.main.gate_bias - self.mtp.gate_bias

    @property
    def release(self) -> int:
        """What the files of a model directory hold, the copies in the MTP modules included: 685B."""
        return self.model + self.copies


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of `config`, exactly.

    With tied embeddings the head is the embedding and counts as 0; the files repeat both all the same.
    """
    dense_layers = config.first_k_dense_replace
    moe_layers = config.num_hidden_layers - dense_layers
    vocabulary = config.vocab_size * config.hidden_size
    ends = ParametersByPart(
        embedding=vocabulary, norms=config.hidden_size, head=0 if config.tie_word_embeddings else vocabulary
    )
    dense = _attention(config) + ParametersByPart(dense_ffn=3 * config.hidden_size * config.intermediate_size)
    main = ends + dense * dense_layers
    mtp_ends = ParametersByPart(
        norms=3 * config.hidden_size,  # enorm, hnorm, shared_head.norm
        mtp_projection=2 * config.hidden_size**2,
    )
    moe, activated_moe = (
        _attention(config) + _moe(config, experts) for experts in (config.n_routed_experts, config.num_experts_per_tok)
    )
    modules = config.num_nextn_predict_layers
    return ParameterCount(
        main=main + moe * moe_layers,
        mtp=(mtp_ends + moe) * modules,
        activated_main=main + activated_moe * moe_layers,
        activated_mtp=(mtp_ends + activated_moe) * modules,
        copies=2 * vocabulary * modules,
    )


def _attention(config: ModelConfig) -> ParametersByPart:
    """Count one layer's attention, with the layer's two norms."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    rank = config.q_lora_rank
    projections = hidden * queries if rank is None else hidden * rank + rank * queries
    projections += hidden * (latent + config.qk_rope_head_dim)  # kv_a_proj_with_mqa
    projections += latent * heads * (config.qk_nope_head_dim + config.v_head_dim)  # kv_b_proj
    projections += heads * config.v_head_dim * hidden  # o_proj
    return ParametersByPart(attention=projections, norms=2 * hidden + latent + (rank or 0))


def _moe(config: ModelConfig, experts: int) -> ParametersByPart:
    """Count one layer's router, shared experts and `experts` of its routed ones."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return ParametersByPart(
        routed_experts=expert * experts,
        shared_experts=expert * config.n_shared_experts,
        gate=config.n_routed_experts * config.hidden_size,
        gate_bias=config.n_routed_experts,
    )
