"""Causal attention over packed sequences, with keys and values expanded.

Legend: T packed queries, S packed keys, t and s those of one sequence, H heads, K query/key dims, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

LONGEST = 1024  # tokens a sequence up to which `blocked_attention` keeps the probabilities

Attention = Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int], float], Tensor]


def attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int], scale: float
) -> Tensor:
    """The definition: every query attends to its own position and those before it in its sequence.

    Args:
        q: [T, H, K], sequences one after another.
        k: [S, H, K], likewise.
        v: [S, H, V].
        q_lengths: queries of each sequence, those of its last positions; their sum is T.
        k_lengths: positions of each sequence, no fewer than its queries; their sum is S.
        scale: multiplies q.k before the softmax.

    Returns:
        [T, H, V] in v's dtype; scores and softmax in at least fp32.

    Paper: §2.1.1 eq. 10.
    """
    outputs = []
    wide = torch.promote_types(q.dtype, torch.float32)
    for q_i, k_i, v_i in _sequences(q, k, v, q_lengths, k_lengths):
        scores = torch.einsum("thd,shd->hts", q_i.to(wide), k_i.to(wide)) * scale  # [H, t, s]
        future = ~_visible(len(q_i), len(k_i), q.device)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hts,shv->thv", weights, v_i.to(wide)).to(v.dtype))  # [t, H, V]
    return torch.cat(outputs)  # [T, H, V]


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int], scale: float
) -> Tensor:
    """`attention` by torch's fused kernel: one call where all sequences are equally long, otherwise one a sequence.

    v is padded to K dims, since the fused CPU kernel takes only equal head dims.
    """
    value_dim = v.shape[-1]
    if value_dim < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - value_dim))  # [S, H, K]
    equal = len(set(zip(q_lengths, k_lengths, strict=True))) == 1
    count = len(q_lengths) if equal else 1
    parts = [(q, k, v)] if equal else _sequences(q, k, v, q_lengths, k_lengths)
    outputs = []
    for part in parts:
        q_b, k_b, v_b = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in part)  # [n, H, t or s, K]
        t, s = q_b.shape[2], k_b.shape[2]
        mask = None if t in (1, s) else _visible(t, s, q.device)  # what is causal at the start needs none
        o = F.scaled_dot_product_attention(q_b, k_b, v_b, mask, is_causal=t == s, scale=scale)
        outputs.append(o[..., :value_dim].transpose(1, 2).flatten(0, 1))  # [n * t, H, V]
    return outputs[0] if equal else torch.cat(outputs)  # [T, H, V]


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield each sequence's queries, keys and values."""
    sizes = list(k_lengths)
    return zip(q.split(list(q_lengths)), k.split(sizes), v.split(sizes), strict=True)


def _visible(t: int, s: int, device: torch.device) -> Tensor:
    """Mark what the queries of the last t of s positions may see, themselves and what is before them: [t, s]."""
    return torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)


class _BlockedAttention(torch.autograd.Function):
    """Attention of equally long sequences in blocks of query rows, with the probabilities kept for the backward.

    A block of rows multiplies only the keys up to its own end. Products are matrix products in q's dtype; the softmax
    and the sums over blocks are in at least fp32.
    """

    ROWS = 128  # a block's scores, over MATRICES matrices, stay in the cache
    MATRICES = 32

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:  # [n, S, K], [n, S, K], [n, S, V]
        length, rows = q.shape[1], _BlockedAttention.ROWS
        out = torch.empty_like(v)
        future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
        kept = []
        for i in range(0, q.shape[0], _BlockedAttention.MATRICES):
            part = slice(i, i + _BlockedAttention.MATRICES)
            for a in range(0, length, rows):
                b = min(a + rows, length)
                scores = torch.bmm(q[part, a:b], k[part, :b].transpose(1, 2))  # [m, rows, b]
                scores[:, :, a:].masked_fill_(future[: b - a, : b - a], float("-inf"))
                p = scores.mul_(scale).softmax(-1)
                out[part, a:b] = torch.bmm(p, v[part, :b])
                kept.append(p)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *kept = ctx.saved_tensors
        length, rows = q.shape[1], _BlockedAttention.ROWS
        grad, wide = grad.contiguous(), torch.promote_types(q.dtype, torch.float32)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        probabilities = iter(kept)
        for i in range(0, q.shape[0], _BlockedAttention.MATRICES):
            part = slice(i, i + _BlockedAttention.MATRICES)
            k_sum = torch.zeros_like(k[part], dtype=wide)
            v_sum = torch.zeros_like(v[part], dtype=wide)
            delta = (grad[part] * out[part]).sum(-1, keepdim=True, dtype=wide).to(q.dtype)  # [m, S, 1]
            for a in range(0, length, rows):
                b = min(a + rows, length)
                p = next(probabilities)  # [m, rows, b]
                v_sum[:, :b] += torch.bmm(p.transpose(1, 2), grad[part, a:b])
                d_p = torch.bmm(grad[part, a:b], v[part, :b].transpose(1, 2))
                d_scores = d_p.sub_(delta[:, a:b]).mul_(p).mul_(ctx.scale)
                d_q[part, a:b] = torch.bmm(d_scores, k[part, :b])
                k_sum[:, :b] += torch.bmm(d_scores.transpose(1, 2), q[part, a:b])
            d_k[part], d_v[part] = k_sum, v_sum
        return d_q, d_k, d_v, None


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int], scale: float
) -> Tensor:
    """`attention` by plain matrix products, for the short, equally long sequences that a CPU trains on.

    Scores are rounded to q's dtype before the softmax. Sequences beyond `LONGEST` tokens, whose probabilities would
    not be worth keeping, unequal ones and those with fewer queries than keys go to `sdpa_attention`. First derivatives
    only.
    """
    if len({*q_lengths, *k_lengths}) > 1 or q_lengths[0] > LONGEST:
        return sdpa_attention(q, k, v, q_lengths, k_lengths, scale)
    heads, value_dim = v.shape[1], v.shape[2]
    q_m, k_m, v_m = (
        x.unflatten(0, (len(q_lengths), -1)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)
    )  # [n*H, t, .]
    o: Tensor = _BlockedAttention.apply(q_m, k_m, v_m, scale)  # type: ignore[no-untyped-call]
    return o.view(len(q_lengths), heads, -1, value_dim).transpose(1, 2).flatten(0, 1)  # [T, H, V]
