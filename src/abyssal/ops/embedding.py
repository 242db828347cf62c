"""Token embedding: a row of a table for each token.

Legend: T packed tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def embed(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows of `table` that tokens name, in `dtype`.

    Args:
        tokens: [T] ids.
        table: [V, D].
        dtype: of the result.

    Returns:
        [T, D]. The gradient of a row is summed over its tokens in at least fp32, whatever the table's dtype.
    """
    return _Embed.apply(tokens, table, dtype)  # type: ignore[no-any-return, no-untyped-call]


class _Embed(torch.autograd.Function):
    """Torch's own backward, which sums in the dtype of the gradient, with that made wide."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = len(table)
        return F.embedding(tokens, table).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return None, torch.ops.aten.embedding_dense_backward(grad, *ctx.saved_tensors, ctx.rows, -1, False), None
