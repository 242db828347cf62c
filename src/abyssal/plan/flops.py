"""How many floating-point operations a token takes, in closed form.

Matrix products only, two operations a multiply-add: the published figures count the same way. The backward pass
counts twice the forward pass (one product for the input's gradient, one for the weight's); recomputation, norms,
activations, softmax, rotation and the optimizer are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

from abyssal.config import ModelConfig
from abyssal.plan.parameters import ParametersByPart, count_parameters


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one forward pass, a token, by part of the network."""

    attention_projections: int = 0
    attention_scores: int = 0  # queries against keys, and weights against values
    dense_ffn: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    gate: int = 0
    mtp_projection: int = 0
    head: int = 0

    def __add__(self, other: Self) -> Self:
        """Add part by part."""
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of one token in training: the main model's forward pass, that of the MTP modules, and both backward."""

    main: TokenFlops
    mtp: TokenFlops

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.main.total + self.mtp.total

    @property
    def backward(self) -> int:
        """One backward pass: gradients of inputs and of weights."""
        return 2 * self.forward

    @property
    def total(self) -> int:
        """Forward and backward; times tokens a second this is what MFU compares with the peak."""
        return self.forward + self.backward


def training_flops(
    config: ModelConfig, sequence_length: int, *, causal: bool = True, mtp: bool = True
) -> TrainingFlops:
    """Count a token's training FLOPs, averaged over a packed sequence of `sequence_length`.

    With `causal` a token meets the keys up to itself, (sequence_length + 1) / 2 in the mean; without, it is charged
    for all of them, as figures of non-causal MFU do. `mtp` counts the MTP modules, each with its use of the head and
    at every position (the last few of a sequence, which have no target, are counted as well).
    """
    main = forward_flops(config, sequence_length, causal=causal)
    if not mtp:
        return TrainingFlops(main, TokenFlops())
    modules = config.num_nextn_predict_layers
    activated = count_parameters(config).activated_mtp
    scores = _scores(config, sequence_length, causal) * modules
    return TrainingFlops(main, _products(activated, scores, head=_head(config) * modules))


def forward_flops(config: ModelConfig, sequence_length: int, *, causal: bool = True) -> TokenFlops:
    """Count a token's FLOPs in the main model's forward pass, averaged over a sequence; `causal` as in training."""
    scores = _scores(config, sequence_length, causal) * config.num_hidden_layers
    return _products(count_parameters(config).activated_main, scores, head=_head(config))


def decode_flops(config: ModelConfig, context_length: int, *, absorbed: bool = True) -> TokenFlops:
    """Count the FLOPs of generating one token after a context of `context_length` (itself included).

    `absorbed`: queries meet the cached latent itself, and kv_b_proj is applied to one query and one output. Without,
    every step expands the latent of the whole context into keys and values first. Paper: §2.1.1; DeepSeek-V2.
    """
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    if absorbed:
        per_key = heads * (2 * latent + config.qk_rope_head_dim)
        expansion = 0
    else:
        per_key = heads * (config.qk_head_dim + config.v_head_dim)
        expansion = (context_length - 1) * latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
    layers = config.num_hidden_layers
    flops = _products(
        count_parameters(config).activated_main, 2 * per_key * context_length * layers, head=_head(config)
    )
    return flops + TokenFlops(attention_projections=2 * expansion * layers)


def muon_flops(config: ModelConfig, iterations: int = 5) -> int:
    """Count the FLOPs of one step's orthogonalisation of all hidden matrices by Newton-Schulz iteration.

    An iteration on a matrix of sides a <= b multiplies a a b, a a a and a a b. Embedding, head and gates are not
    orthogonalised.
    """
    return sum(times * iterations * 2 * (2 * a * a * b + a**3) for (a, b), times in _hidden_matrices(config))


def _hidden_matrices(config: ModelConfig) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield (sides, the smaller first) of each kind of hidden matrix, and how many the model has."""
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_layers
    queries = heads * config.qk_head_dim
    rank = config.q_lora_rank
    shapes = [(hidden, queries)] if rank is None else [(hidden, rank), (rank, queries)]
    shapes.append((hidden, config.kv_lora_rank + config.qk_rope_head_dim))
    shapes.append((config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)))
    shapes.append((heads * config.v_head_dim, hidden))
    counted = [(shape, layers) for shape in shapes]
    moe_layers = layers - config.first_k_dense_replace
    counted.append(((hidden, config.intermediate_size), 3 * config.first_k_dense_replace))
    counted.append(((hidden, config.moe_intermediate_size), 3 * config.n_routed_experts * moe_layers))
    counted.append(((hidden, config.n_shared_experts * config.moe_intermediate_size), 3 * moe_layers))
    counted.append(((hidden, 2 * hidden), config.num_nextn_predict_layers))
    for (a, b), times in counted:
        yield (min(a, b), max(a, b)), times


def _products(parts: ParametersByPart, scores: int, head: int) -> TokenFlops:
    """Turn the matrices that a token meets into FLOPs: one multiply-add a weight."""
    return TokenFlops(
        attention_projections=2 * parts.attention,
        attention_scores=scores,
        dense_ffn=2 * parts.dense_ffn,
        routed_experts=2 * parts.routed_experts,
        shared_experts=2 * parts.shared_experts,
        gate=2 * parts.gate,
        mtp_projection=2 * parts.mtp_projection,
        head=head,
    )


def _scores(config: ModelConfig, sequence_length: int, causal: bool) -> int:
    """Return one layer's FLOPs, a token, of scores and weighted values over expanded keys and values."""
    twice_keys = sequence_length + 1 if causal else 2 * sequence_length
    return config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * twice_keys


def _head(config: ModelConfig) -> int:
    """Return the FLOPs of one use of the output head, tied or not."""
    return 2 * config.hidden_size * config.vocab_size
