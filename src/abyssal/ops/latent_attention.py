"""Attention over the latent cache itself: all heads share one key of C + R dims and one value of C dims.

Legend: T packed new tokens, t those of one sequence, S cached tokens of one sequence, N sequences, H heads, C latent
dim, R rotary dims, W = C + R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence

from abyssal.ops.version import Version, on_cpu

SCORES = 1 << 19  # of a block of prompt tokens: they stay in the cache

LatentAttention = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[int], float], Tensor]


@dataclass(frozen=True)
class PaddedLatents(Sequence[Tensor]):
    """The cached latents of several sequences side by side in one tensor, where a cache has them so.

    `rows` [N, S, W] reaches to the longest sequence; what stands behind the `lengths` of a shorter one is finite.
    As a sequence it yields each one's own rows [S, W].
    """

    rows: Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        """The rows of one sequence, a view."""
        return self.rows[index, : self.lengths[index]]

    def __iter__(self) -> Iterator[Tensor]:
        """Each sequence's rows, in order."""
        return (self[index] for index in range(len(self)))


def latent_attention(
    q_latent: Tensor, q_rope: Tensor, cached: Sequence[Tensor], lengths: Sequence[int], scale: float
) -> Tensor:
    """The definition: the newest tokens of each sequence attend to what is cached of it, themselves included.

    Args:
        q_latent: [T, H, C], queries with W_UK absorbed, sequences one after another.
        q_rope: [T, H, R].
        cached: for each sequence [S, W], its latents with their rotary keys beside them, the new tokens' last.
        lengths: new tokens of each sequence; their sum is T.
        scale: multiplies the scores before the softmax.

    Returns:
        [T, H, C], the attended latents, in q_latent's dtype; scores and softmax in at least fp32.

    Paper: §2.1.1 eq. 10, with W_UK and W_UV absorbed into query and output as DeepSeek-V2 describes.
    """
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    queries = torch.cat((q_latent, q_rope), -1).to(wide)  # [T, H, W]
    outputs = []
    for q, rows in zip(queries.split(list(lengths)), cached, strict=True):
        scores = torch.einsum("thw,sw->ths", q, rows.to(wide)) * scale
        weights = scores.masked_fill(_future(len(q), rows)[:, None], float("-inf")).softmax(-1)
        outputs.append(torch.einsum("ths,sc->thc", weights, rows[:, : q_latent.shape[-1]].to(wide)))
    return torch.cat(outputs).to(q_latent.dtype)  # [T, H, C]


def batched_latent_attention(
    q_latent: Tensor, q_rope: Tensor, cached: Sequence[Tensor], lengths: Sequence[int], scale: float
) -> Tensor:
    """`latent_attention` in few, large products of matrices, with the heads as further rows of queries.

    Sequences that advance by one token each are taken together, a single one by torch's fused kernel; others one after
    another, in blocks of tokens whose scores stay in the cache. All in at least fp32.
    """
    queries = torch.cat((q_latent, q_rope), -1).to(torch.promote_types(q_latent.dtype, torch.float32))  # [T, H, W]
    if len(queries) == 1:
        keys = cached[0].to(queries.dtype)[None, None]  # [1, 1, S, W]; the value is the key, its rotary part left over
        o = F.scaled_dot_product_attention(queries[None], keys, keys, scale=scale)[0]
    elif len(queries) == len(cached):
        o = _one_token_each(queries, cached, scale)
    else:
        parts = zip(queries.split(list(lengths)), cached, strict=True)
        o = torch.cat([o for q, rows in parts for o in _blocks(q, rows, scale)])
    return o[..., : q_latent.shape[-1]].to(q_latent.dtype)  # [T, H, C]


def _one_token_each(queries: Tensor, cached: Sequence[Tensor], scale: float) -> Tensor:
    """Attend with one token's queries [N, H, W] of each of N sequences: [N, H, W]."""
    if not isinstance(cached, PaddedLatents):
        cached = PaddedLatents(pad_sequence(list(cached), batch_first=True), tuple(map(len, cached)))
    device = queries.device
    places, ends = torch.arange(cached.rows.shape[1], device=device), torch.tensor(cached.lengths, device=device)
    return _attend(queries, cached.rows, (places >= ends[:, None])[:, None], scale)


def _blocks(queries: Tensor, rows: Tensor, scale: float) -> Iterator[Tensor]:
    """Attend with queries [t, H, W] of the newest tokens to rows [S, W]; yield [block, H, W], tokens in order."""
    t, heads, width = queries.shape
    before = len(rows) - t
    step = max(1, SCORES // (heads * len(rows)))
    for a in range(0, t, step):
        block = queries[a : a + step]
        seen = rows[: before + a + len(block)]
        unseen = _future(len(block), seen).repeat_interleave(heads, 0)  # [block*H, S]
        yield _attend(block.reshape(1, -1, width), seen[None], unseen, scale).view_as(block)


def _attend(queries: Tensor, rows: Tensor, unseen: Tensor, scale: float) -> Tensor:
    """Attend with [N, Q, W] to [N, S, W], but not where `unseen` [N or 1, Q or 1, S]: [N, Q, W] in queries' dtype."""
    keys = rows.to(queries.dtype)
    scores = torch.bmm(queries, keys.transpose(1, 2)) * scale  # [N, Q, S]
    return torch.bmm(scores.masked_fill_(unseen, float("-inf")).softmax(-1), keys)


def _future(t: int, rows: Tensor) -> Tensor:
    """Mark what each of the newest t of S tokens must not see: [t, S]."""
    s = len(rows)
    return torch.ones(t, s, dtype=torch.bool, device=rows.device).triu(s - t + 1)


VERSIONS = (Version(batched_latent_attention, why_not=on_cpu), Version(latent_attention))
