"""Products with packed weights against the same products with the weights as they are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from abyssal.ops import packed as module
from abyssal.ops.experts import expert_ffn
from abyssal.ops.packed import num_rows_read, pack, packed_expert_ffn, packed_linear, why_not_packed

CPU = torch.device("cpu")
DTYPES = [
    pytest.param(dtype, id=str(dtype), marks=pytest.mark.skipif(bool(reason), reason=f"weights not packed: {reason}"))
    for dtype in (torch.float32, torch.bfloat16)
    for reason in [why_not_packed(CPU, dtype)]
]


def test_packing_is_for_the_precisions_of_the_cpus_matrix_library() -> None:
    assert why_not_packed(torch.device("cuda"), torch.bfloat16) == "made for a CPU"
    assert why_not_packed(CPU, torch.float64) == "the matrix library packs float32 and bfloat16 only"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 65])
def test_a_packed_product_is_the_product(rows: int, dtype: torch.dtype) -> None:
    """Rounded once, from a sum in fp32, as the plain one is."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 24), (13, 24)))
    out = packed_linear(x, pack(weight, dtype))
    assert out.dtype == dtype
    expected = F.linear(x.double(), weight.double())
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=1e-5 * expected.abs().max().item())


def test_few_numbers_of_rows_are_ever_read_and_a_quarter_more_than_needed_at_most() -> None:
    sizes = range(1, 4097)
    read = [num_rows_read(n) for n in sizes]
    assert read[:20] == [*range(1, 17), 20, 20, 20, 20]
    assert all(n <= size <= max(16, 1.25 * n) for n, size in zip(sizes, read, strict=True))
    assert len(set(read)) == 16 + 4 * 8  # 16 and four for each of the eight doublings from there to 4,096


def test_all_products_are_of_these_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    met: set[int] = set()

    class Library:
        """The matrix library's product, and what it is asked for."""

        @staticmethod
        def default(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
            met.add(len(x))
            return F.linear(x, weight)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Library, raising=False)
    gate_up, down = [torch.randn(14, 5)] * 3, [torch.randn(5, 7)] * 3
    for n in range(1, 300):
        packed_linear(torch.randn(n, 5), gate_up[0])
        packed_expert_ffn(torch.randn(n + 90, 5), torch.rand(n + 90), torch.tensor((n, 61, 29)), gate_up, down)
    assert met == {num_rows_read(n) for n in range(1, 300)}


def test_rows_and_weights_may_lie_anyhow() -> None:
    x, weight = torch.randn(24, 5), torch.randn(24, 13)
    torch.testing.assert_close(packed_linear(x.T, pack(weight.T, torch.float32)), x.T @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "counts", [(0, 1, 0, 0), (1, 1, 0, 1), (4, 2, 1, 3), (0, 9, 0, 2), (5, 0, 3, 6), (13, 0, 0, 1)], ids=str
)
@pytest.mark.parametrize("exact", [4, 8, 16])
def test_packed_experts_equal_the_definition(
    exact: int, counts: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXACT", exact)
    monkeypatch.setattr(module, "CHUNK", 3)
    generator = torch.Generator().manual_seed(sum(counts))
    hidden, width, total = 10, 6, sum(counts)
    shapes = ((total, hidden), (len(counts), 2 * width, hidden), (len(counts), hidden, width))
    rows, gate_up, down = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    weights = torch.rand(total, generator=generator)
    out = packed_expert_ffn(
        rows, weights, torch.tensor(counts), [pack(w, dtype) for w in gate_up], [pack(w, dtype) for w in down]
    )
    assert out.dtype == dtype
    wide = (x.double() for x in (rows, weights))
    expected = expert_ffn(*wide, torch.tensor(counts), gate_up.double(), down.double())
    plain = expert_ffn(rows, weights, torch.tensor(counts), gate_up, down)
    error, plain_error = ((ffn.double() - expected).norm() for ffn in (out, plain))
    assert error <= 2 * plain_error + 1e-7 * expected.norm()
