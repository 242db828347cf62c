"""Matrix products with weights that were laid out once, for inference, as the CPU's matrix library wants to read them.

With a weight as it is stored the library rearranges it in every product; for a few rows that takes as long as the
product itself. A packed weight is opaque: it is only good for these products.

Legend: M rows, D hidden, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from abyssal.ops.linear import linear
from abyssal.ops.version import Version, decode_only, why_not_bfloat16_products

EXACT = 16  # more rows are rounded up, since each new number of rows costs the library a kernel, which it keeps
CHUNK = 256  # rows whose fp32 activations stay in the cache


def why_not_packed(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why weights cannot be packed for this device and dtype, or None where they can."""
    if device.type != "cpu":
        return "made for a CPU"
    if dtype not in (torch.float32, torch.bfloat16):
        return "the matrix library packs float32 and bfloat16 only"
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return "this build of torch comes without the matrix library (oneDNN)"
    return why_not_bfloat16_products() if dtype == torch.bfloat16 else None


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in `dtype`, packed, a copy; where `why_not_packed` says nothing against it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous())  # type: ignore[no-any-return]


def pack_each(stack: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return each of the weights [E, out, in] packed."""
    return [pack(weight, dtype) for weight in stack]


def num_rows_read(num_rows: int) -> int:
    """Return over how many rows the product for `num_rows` is taken: as many, then four numbers for each doubling.

    The library compiles a kernel for each number of rows that it has not met with a weight's shape, and keeps it: 1 to
    2 ms and 0.5 to 0.8 MB each in fp32. So loads that change at every step would cost time and memory for hours; this
    way they soon meet all there is, and read at most a quarter more rows than they need.
    """
    if num_rows <= EXACT:
        return num_rows
    step = 1 << ((num_rows - 1).bit_length() - 3)
    return -(-num_rows // step) * step


def packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    """Return x W^T for x [M, in] in the weight's dtype: [M, out]; accumulated in fp32."""
    num_rows = x.shape[0]
    further = num_rows_read(num_rows) - num_rows
    if further:
        x = F.pad(x, (0, 0, 0, further))
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
    return out[:num_rows] if further else out


def packed_expert_ffn(
    rows: Tensor, weights: Tensor, counts: Tensor, gate_up: Sequence[Tensor], down: Sequence[Tensor]
) -> Tensor:
    """`expert_ffn` with packed weights, one [2F, D] and one [D, F] an expert; values only, no gradients."""
    windows = list(_windows(counts))
    exact = all(end - a == n for _, a, n, end in windows)

    def products(x: Tensor, packed: Sequence[Tensor]) -> Tensor:
        pieces = x.split([n for _, _, n, _ in windows]) if exact else [x[a:end] for _, a, _, end in windows]
        parts = [packed_linear(piece, packed[expert]) for piece, (expert, _, _, _) in zip(pieces, windows, strict=True)]
        return torch.cat(parts if exact else [part[:n] for part, (_, _, n, _) in zip(parts, windows, strict=True)])

    pre = products(rows, gate_up)  # [M, 2F]
    hidden = [_activate(p, w) for p, w in zip(pre.split(CHUNK), weights.split(CHUNK), strict=True)]
    return products(hidden[0] if len(hidden) == 1 else torch.cat(hidden), down)  # [M, D]


def _windows(counts: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yield (expert, its first row, how many, end of the rows to multiply) of each expert that has rows, in order."""
    sizes = counts.tolist()
    a, total = 0, sum(sizes)
    for expert, n in enumerate(sizes):
        if n:
            yield expert, a, n, min(a + num_rows_read(n), total)
            a += n


def _activate(pre: Tensor, weights: Tensor) -> Tensor:
    """SwiGLU times the routing weight, in the weights' dtype: [m, 2F] -> [m, F] in pre's."""
    gate, up = pre.to(weights.dtype).chunk(2, -1)
    return F.silu(gate).mul_(up).mul_(weights[:, None]).to(pre.dtype)


VERSIONS = (
    decode_only(packed_linear, why_not_packed, prepare=pack),
    Version(linear),
)
