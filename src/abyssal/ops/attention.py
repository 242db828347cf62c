"""Causal attention over packed sequences, with keys and values expanded.

Legend: T packed queries, S packed keys, t and s those of one sequence, H heads, K query/key dims, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from abyssal.ops.version import Version, on_cpu, train_only, why_not_bfloat16_products

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
    """Attention in blocks of query rows, whose scores stay in the cache and are made again for the backward.

    A block of rows multiplies only the keys up to its own end. What scores and their gradients are made of, two
    products of six, is in at least fp32, with the softmax and the sums over blocks; the other products are in `narrow`.
    """

    ROWS, FEWEST = 128, 16  # of a block
    SCORES = 1 << 19  # of a block over all heads, but for the fewest rows

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lengths: Sequence[int],
        k_lengths: Sequence[int],
        scale: float,
        narrow: torch.dtype,
    ) -> Tensor:
        out = v.new_empty(*q.shape[:2], v.shape[2])
        parts = zip(_sequences(q, k, v, q_lengths, k_lengths), out.split(list(q_lengths)), strict=True)
        for (q_i, k_i, v_i), out_i in parts:
            values = _by_head(v_i, narrow)
            for rows, seen, p in _BlockedAttention.probabilities(q_i, k_i, scale):
                out_i[rows] = torch.bmm(p.to(narrow), values[:, :seen]).transpose(0, 1)
        ctx.save_for_backward(q, k, v)
        ctx.lengths, ctx.scale, ctx.narrow = (list(q_lengths), list(k_lengths)), scale, narrow
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        (q_lengths, k_lengths), narrow = ctx.lengths, ctx.narrow
        wide = torch.promote_types(q.dtype, torch.float32)
        gradients = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        parts = zip(
            _sequences(q, k, v, q_lengths, k_lengths),
            _sequences(*gradients, q_lengths, k_lengths),
            grad.split(q_lengths),
            strict=True,
        )
        for (q_i, k_i, v_i), (d_q_i, d_k_i, d_v_i), grad_i in parts:
            queries, keys, grads = (_by_head(x, narrow) for x in (q_i, k_i, grad_i))
            wide_grads, wide_values = _by_head(grad_i, wide), _by_head(v_i, wide)
            k_sum, v_sum = torch.zeros_like(keys, dtype=wide), torch.zeros_like(wide_values)
            for rows, seen, p in _BlockedAttention.probabilities(q_i, k_i, ctx.scale):
                d_p = torch.bmm(wide_grads[:, rows], wide_values[:, :seen].transpose(1, 2))
                d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, wide).to(narrow)  # [H, rows, seen]
                v_sum[:, :seen] += torch.bmm(p.to(narrow).transpose(1, 2), grads[:, rows])
                k_sum[:, :seen] += torch.bmm(d_scores.transpose(1, 2), queries[:, rows])
                d_q_i[rows] = torch.bmm(d_scores, keys[:, :seen]).mul_(ctx.scale).transpose(0, 1)
            d_k_i.copy_(k_sum.mul_(ctx.scale).transpose(0, 1))
            d_v_i.copy_(v_sum.transpose(0, 1))
        return *gradients, None, None, None, None

    @staticmethod
    def probabilities(q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[slice, int, Tensor]]:
        """Yield blocks of queries of [t, H, K]: which rows, how many of [s, H, K] they see, softmax [H, rows, seen]."""
        wide = torch.promote_types(q.dtype, torch.float32)
        queries, keys = _by_head(q, wide) * scale, _by_head(k, wide)
        (heads, t, _), s = queries.shape, keys.shape[1]
        size = min(_BlockedAttention.ROWS, max(_BlockedAttention.FEWEST, _BlockedAttention.SCORES // (heads * s)))
        future = ~_visible(size, size, q.device)
        for a in range(0, t, size):
            b = min(a + size, t)
            seen = s - t + b
            scores = torch.bmm(queries[:, a:b], keys[:, :seen].transpose(1, 2))
            scores[:, :, a - b :].masked_fill_(future[: b - a, : b - a], float("-inf"))
            yield slice(a, b), seen, scores.softmax(-1)


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [t, H, d] as [H, t, d] in `dtype`."""
    return x.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format)


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int], scale: float
) -> Tensor:
    """`attention` of bf16 in blocks of fp32 that stay in a CPU's cache; keeps q, k and v. First derivatives only."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return _BlockedAttention.apply(q, k, v, q_lengths, k_lengths, scale, wide)  # type: ignore[no-any-return, no-untyped-call]


def mixed_blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int], scale: float
) -> Tensor:
    """`blocked_attention` with four products of six in bf16, where the CPU multiplies it faster than fp32.

    What is lost: values come to 1.4 times, gradients to 1.8 times the definition's error.
    """
    return _BlockedAttention.apply(q, k, v, q_lengths, k_lengths, scale, q.dtype)  # type: ignore[no-any-return, no-untyped-call]


def _why_not_blocked(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return "made for bfloat16; in other dtypes torch's fused attention is as fast"
    return on_cpu(device, dtype)


def _why_not_mixed(device: torch.device, dtype: torch.dtype) -> str | None:
    return _why_not_blocked(device, dtype) or why_not_bfloat16_products()


def _why_not_sdpa(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "on a CPU its gradients in bfloat16 have 2.8 times the definition's error"
    return None


VERSIONS = (
    train_only(mixed_blocked_attention, _why_not_mixed),
    train_only(blocked_attention, _why_not_blocked),
    Version(sdpa_attention, why_not=_why_not_sdpa, error_bound=4.0),  # it keeps a rounded logarithm of each sum
    Version(attention),
)
