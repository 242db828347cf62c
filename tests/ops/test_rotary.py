"""Rotation of interleaved pairs against multiplication by complex numbers."""

from __future__ import annotations

import cmath

import pytest
import torch

from abyssal.ops.rotary import rotate


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (1, 2)], ids=str)
@pytest.mark.parametrize("seed", range(3), ids="seed{}".format)
def test_rotate_multiplies_pairs_by_complex_numbers(seed: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    coefficients = torch.randn(shape, dtype=torch.float64, generator=generator)
    angles = 6 * torch.rand(shape[0], shape[-1] // 2, dtype=torch.float64, generator=generator)
    out = rotate(x, angles.cos(), angles.sin())
    (gradient,) = torch.autograd.grad((out * coefficients).sum(), x)
    for t in range(shape[0]):
        rows = zip(*(y[t].detach().reshape(-1, shape[-1]) for y in (x, out, coefficients, gradient)), strict=True)
        for before, after, outward, inward in rows:
            for j in range(shape[-1] // 2):
                turn = cmath.exp(1j * angles[t, j].item())
                here = complex(before[2 * j], before[2 * j + 1]) * turn
                assert complex(after[2 * j], after[2 * j + 1]) == pytest.approx(here, abs=1e-12)
                # the gradient of a rotation turns back
                back = complex(outward[2 * j], outward[2 * j + 1]) * turn.conjugate()
                assert complex(inward[2 * j], inward[2 * j + 1]) == pytest.approx(back, abs=1e-12)


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=generator)
    frequencies = torch.tensor([1.0, 0.3, 0.07, 0.01], dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        positions = torch.tensor([query_position, key_position])[:, None] * frequencies
        rotated = rotate(torch.stack((q, k)), positions.cos(), positions.sin())
        return float(rotated[0] @ rotated[1])

    assert score(17, 12) == pytest.approx(score(1005, 1000), abs=1e-11)
    assert score(17, 12) != pytest.approx(score(17, 11), abs=1e-3)


def test_bfloat16_is_rotated_in_the_precision_of_the_angles() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    angles = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))
    out = rotate(x, angles.cos(), angles.sin())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), angles.cos(), angles.sin()).bfloat16())
