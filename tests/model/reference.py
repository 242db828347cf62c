"""The network from the paper's equations: float64, one token and one head at a time, no call into the package.

Only field names of the config and parameter names are shared with the code under test. Autograd differentiates these
loops, so values and gradients both come from the definition. Sequences are lists of vectors, one a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Sequence = list[Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * weight


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def swiglu_network(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = gate @ x
    return down @ (g * sigmoid(g) * (up @ x))


# Rotary embedding and YaRN (§4.3)


def magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1


def frequencies(config: Any) -> list[float]:
    dims, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    plain = [1 / theta ** (2 * j / dims) for j in range(dims // 2)]
    if yarn is None:
        return plain

    def turning(times: float) -> float:
        length = yarn.original_max_position_embeddings
        return dims * math.log(length / (2 * math.pi * times)) / (2 * math.log(theta))

    low = max(math.floor(turning(yarn.beta_fast)), 0)
    high = min(math.ceil(turning(yarn.beta_slow)), dims - 1)
    result = []
    for j, f in enumerate(plain):
        ramp = 0.0 if j <= low else 1.0 if j >= high else (j - low) / (high - low)
        result.append(ramp * f / yarn.factor + (1 - ramp) * f)
    return result


def rotate(x: Tensor, position: int, config: Any) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... of one vector."""
    yarn = config.rope_scaling
    amplitude = 1.0
    if yarn is not None:
        amplitude = magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim)
    values: Sequence = []
    for j, f in enumerate(frequencies(config)):
        cos, sin = amplitude * math.cos(position * f), amplitude * math.sin(position * f)
        values += [x[2 * j] * cos - x[2 * j + 1] * sin, x[2 * j + 1] * cos + x[2 * j] * sin]
    return torch.stack(values)


# Multi-head latent attention (§2.1.1)


def attention(hs: Sequence, w: Weights, prefix: str, config: Any) -> Sequence:
    """Eq. 1-11 for one sequence."""
    heads, nope, rope, value = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    scale = 1 / math.sqrt(nope + rope)
    if config.rope_scaling is not None:
        scale *= magnitude(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    latents, rotated, outputs = [], [], []
    for t, h in enumerate(hs):
        down = w[prefix + "kv_a_proj_with_mqa.weight"]
        c_kv, k_r = down[: config.kv_lora_rank] @ h, down[config.kv_lora_rank :] @ h  # eq. 1, 3
        latents.append(rms_norm(c_kv, w[prefix + "kv_a_layernorm.weight"], 1e-6))
        rotated.append(rotate(k_r, t, config))
        if config.q_lora_rank is None:
            query = w[prefix + "q_proj.weight"] @ h
        else:
            c_q = w[prefix + "q_a_proj.weight"] @ h  # eq. 6
            query = w[prefix + "q_b_proj.weight"] @ rms_norm(c_q, w[prefix + "q_a_layernorm.weight"], 1e-6)  # eq. 7
        concatenated = []
        for i in range(heads):
            q = query[i * (nope + rope) : (i + 1) * (nope + rope)]
            q_c, q_r = q[:nope], rotate(q[nope:], t, config)  # eq. 8
            up = w[prefix + "kv_b_proj.weight"][i * (nope + value) : (i + 1) * (nope + value)]
            scores = [((q_c * (up[:nope] @ latents[j])).sum() + (q_r * rotated[j]).sum()) * scale for j in range(t + 1)]
            shares = [torch.exp(s - scores[0].detach()) for s in scores]
            total = sum(shares[1:], shares[0])
            values = [share / total * (up[nope:] @ latents[j]) for j, share in enumerate(shares)]  # eq. 5
            concatenated.append(sum(values[1:], values[0]))  # eq. 10
        outputs.append(w[prefix + "o_proj.weight"] @ torch.cat(concatenated))  # eq. 11
    return outputs


# DeepSeekMoE (§2.1.2)


def affinities(u: Tensor, w: Weights, prefix: str) -> Tensor:
    return sigmoid(w[prefix + "gate.weight"] @ u)  # eq. 15


def choose(scores: list[float], bias: list[float], config: Any) -> list[int]:
    """Eq. 16 among the best groups."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(biased) // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    if config.n_group > 1:
        groups.sort(key=lambda group: -sum(sorted(biased[i] for i in group)[-2:]))
    candidates = [i for group in groups[: config.topk_group] for i in group]
    return sorted(candidates, key=lambda i: -biased[i])[: config.num_experts_per_tok]


def mixture(u: Tensor, w: Weights, prefix: str, config: Any) -> tuple[Tensor, list[int]]:
    """Eq. 12-16 for one token, without the residual; also the chosen experts."""
    s = affinities(u, w, prefix)
    chosen = choose(s.tolist(), w[prefix + "gate.e_score_correction_bias"].tolist(), config)
    total = sum((s[i] for i in chosen), torch.zeros((), dtype=torch.float64)) if config.norm_topk_prob else 1.0
    shared = [w[prefix + f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")]
    out = swiglu_network(u, shared[0], shared[1], shared[2])
    width = config.moe_intermediate_size
    for i in chosen:
        gate_up, down = w[prefix + "experts.gate_up_proj"][i], w[prefix + "experts.down_proj"][i]
        routed = swiglu_network(u, gate_up[:width], gate_up[width:], down)
        out = out + config.routed_scaling_factor * s[i] / total * routed  # eq. 12, 13
    return out, chosen


def balance_loss(us: Sequence, w: Weights, prefix: str, config: Any) -> Tensor:
    """Eq. 17-20 for one sequence, without alpha."""
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    counts = [0] * experts
    shares = torch.zeros(experts, dtype=torch.float64)
    for u in us:
        s = affinities(u, w, prefix)
        row = s.tolist()
        for i in sorted(range(experts), key=lambda i, row=row: -row[i])[:top_k]:
            counts[i] += 1
        shares = shares + s / s.sum()
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(experts):
        loss = loss + experts / (top_k * len(us)) * counts[i] * shares[i] / len(us)
    return loss


# Blocks, the whole, and MTP (§2.2)


def block(
    xs: Sequence, w: Weights, layer: int, config: Any, *, loads: dict[int, list[int]], losses: list[Tensor]
) -> Sequence:
    """One pre-norm block; adds the layer's load to `loads` and its balance loss to `losses`."""
    prefix = f"model.layers.{layer}."
    eps = config.rms_norm_eps
    normed = [rms_norm(x, w[prefix + "input_layernorm.weight"], eps) for x in xs]
    xs = [x + y for x, y in zip(xs, attention(normed, w, prefix + "self_attn.", config), strict=True)]
    us = [rms_norm(x, w[prefix + "post_attention_layernorm.weight"], eps) for x in xs]
    if layer < config.first_k_dense_replace:
        gate, up, down = (w[prefix + f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return [x + swiglu_network(u, gate, up, down) for x, u in zip(xs, us, strict=True)]
    losses.append(balance_loss(us, w, prefix + "mlp.", config))
    outputs = []
    for x, u in zip(xs, us, strict=True):
        out, chosen = mixture(u, w, prefix + "mlp.", config)
        load = loads.setdefault(layer, [0] * config.n_routed_experts)
        for i in chosen:
            load[i] += 1
        outputs.append(x + out)
    return outputs


class Result:
    """What one sequence gives: hidden states of the main model and of each MTP depth, loads, balance losses."""

    def __init__(self, tokens: list[int], w: Weights, config: Any, loads: dict[int, list[int]]) -> None:
        self.balance_losses: list[Tensor] = []
        self.depths: list[Sequence] = []
        embedding = w["model.embed_tokens.weight"]
        notes: dict[str, Any] = {"loads": loads, "losses": self.balance_losses}
        xs = [embedding[token] for token in tokens]
        for layer in range(config.num_hidden_layers):
            xs = block(xs, w, layer, config, **notes)
        self.hidden = [rms_norm(x, w["model.norm.weight"], config.rms_norm_eps) for x in xs]
        # tokens and positions from 1, as eq. 21-25 count them
        t = [None, *tokens]
        h: list[Any] = [None, *self.hidden]
        for k in range(1, config.num_nextn_predict_layers + 1):
            prefix = f"model.layers.{config.num_hidden_layers + k - 1}."
            joined = []
            for i in range(1, len(tokens) - k + 1):
                a = rms_norm(embedding[t[i + k]], w[prefix + "enorm.weight"], config.rms_norm_eps)
                b = rms_norm(h[i], w[prefix + "hnorm.weight"], config.rms_norm_eps)
                joined.append(w[prefix + "eh_proj.weight"] @ torch.cat((a, b)))  # eq. 21
            xs = block(joined, w, config.num_hidden_layers + k - 1, config, **notes)  # eq. 22
            final = w[prefix + "shared_head.norm.weight"]
            h = [None, *(rms_norm(x, final, config.rms_norm_eps) for x in xs)]
            self.depths.append(h[1:])


def log_probabilities(h: Tensor, w: Weights, config: Any) -> Tensor:
    """Log of OutHead(h), eq. 23."""
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = head @ h
    return logits - logits.detach().max() - torch.log(torch.exp(logits - logits.detach().max()).sum())


def mtp_loss(depths: list[Sequence], tokens: list[int], w: Weights, config: Any) -> Tensor:
    """Eq. 24 and 25 with lambda = 1 for one sequence t_1 .. t_{T+1}, of which the model saw t_1 .. t_T."""
    t = [None, *tokens]
    length = len(tokens) - 1
    total = torch.zeros((), dtype=torch.float64)
    for k, hidden in enumerate(depths, start=1):
        h = [None, *hidden]
        for i in range(2 + k, length + 2):  # P^k_i comes from position i - k - 1
            total = total - log_probabilities(h[i - k - 1], w, config)[t[i]] / length  # type: ignore[arg-type]
    return total / len(depths)
