"""FP8 weights and their scales: which weights are FP8, what their scales are called, and both read as one weight."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from abyssal.checkpoint.hf.names import TensorSpec
from abyssal.ops.block_fp8 import BLOCK, dequantise_blocks, scale_rows, scale_shape

#: What a released FP8 weight's name is followed by in the name of its scales, which stand for W = fp8 * scale.
SCALE_SUFFIX = "_scale_inv"


def is_quantised(name: str) -> bool:
    """Whether the FP8 release holds the weight `name` in FP8: every projection of attention and feed-forward networks.

    Embeddings, norms, the gate and its bias, `eh_proj` and the heads are never FP8. Paper: §3.3.1.
    """
    return re.search(r"\.(self_attn|mlp)\.(.*\.)?\w*_proj(_with_mqa)?\.weight$", name) is not None


def scales_of(weight: TensorSpec) -> TensorSpec:
    """Return name and shape of the scales of a released weight [N, K]."""
    return TensorSpec(weight.name + SCALE_SUFFIX, scale_shape(weight.shape))


def read_dequantised(
    stored: Callable[[str], torch.Tensor],
    name: str,
    rows: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | None,
) -> torch.Tensor:
    """Return the rows from..to of an FP8 weight in `dtype` on `device`; `stored` gives a tensor as in its file."""
    start, stop = rows
    first = start // BLOCK * BLOCK  # whole rows of blocks
    fp8 = stored(name)[first:stop].to(device)
    scale = stored(name + SCALE_SUFFIX)[scale_rows(first, stop)].to(device)
    return dequantise_blocks(fp8, scale, dtype)[start - first :]
