"""Products with packed weights against the same products with the weights as they are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from abyssal.ops import packed as module
from abyssal.ops.experts import expert_ffn
from abyssal.ops.packed import pack, packed_expert_ffn, packed_linear, why_not_packed

CPU = torch.device("cpu")
DTYPES = [
    pytest.param(
        dtype, tolerance, id=str(dtype), marks=pytest.mark.skipif(bool(reason), reason=f"weights not packed: {reason}")
    )
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2))
    for reason in [why_not_packed(CPU, dtype)]
]


def test_packing_is_for_the_precisions_of_the_cpus_matrix_library() -> None:
    assert why_not_packed(torch.device("cuda"), torch.bfloat16) == "made for a CPU"
    assert why_not_packed(CPU, torch.float64) == "the matrix library packs float32 and bfloat16 only"


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_a_packed_product_is_the_product(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    """Rounded once, from a sum in fp32, as the plain one is."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 24), (13, 24)))
    out = packed_linear(x, pack(weight))
    assert out.dtype == dtype
    expected = F.linear(x.double(), weight.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_rows_and_weights_may_lie_anyhow() -> None:
    x, weight = torch.randn(24, 5), torch.randn(24, 13)
    torch.testing.assert_close(packed_linear(x.T, pack(weight.T)), x.T @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    "counts", [(0, 1, 0, 0), (1, 1, 0, 1), (4, 2, 1, 3), (0, 9, 0, 2), (5, 0, 3, 6), (13, 0, 0, 1)], ids=str
)
@pytest.mark.parametrize("window", [2, 4, 16])
def test_packed_experts_equal_the_definition(
    window: int, counts: tuple[int, ...], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROUND", window)
    monkeypatch.setattr(module, "CHUNK", 3)
    generator = torch.Generator().manual_seed(sum(counts))
    hidden, width, total = 10, 6, sum(counts)
    shapes = ((total, hidden), (len(counts), 2 * width, hidden), (len(counts), hidden, width))
    rows, gate_up, down = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    weights = torch.rand(total, generator=generator)
    out = packed_expert_ffn(rows, weights, torch.tensor(counts), [pack(w) for w in gate_up], [pack(w) for w in down])
    assert out.dtype == dtype
    wide = (x.double() for x in (rows, weights))
    expected = expert_ffn(*wide, torch.tensor(counts), gate_up.double(), down.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
