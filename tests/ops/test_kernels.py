"""The choice of versions: the definitions by default, every choice printable and with its reasons."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from abyssal.ops.attention import attention, blocked_attention, sdpa_attention
from abyssal.ops.cross_entropy import linear_cross_entropy
from abyssal.ops.experts import expert_ffn
from abyssal.ops.kernels import VERSIONS, Kernels, choose_kernels, why_not
from abyssal.ops.latent_attention import latent_attention
from abyssal.ops.rms_norm import rms_norm

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def test_the_defaults_are_the_definitions_and_stand_last_among_the_versions() -> None:
    assert Kernels() == Kernels(attention, latent_attention, expert_ffn, linear_cross_entropy, rms_norm)
    assert {operation: versions[-1] for operation, versions in VERSIONS.items()} == {
        field.name: getattr(Kernels(), field.name) for field in fields(Kernels)
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_nothing_speaks_against_a_chosen_version_and_something_against_those_before_it(
    device: torch.device, dtype: torch.dtype
) -> None:
    for operation, chosen in zip(VERSIONS, vars(choose_kernels(device, dtype)).values(), strict=True):
        place = VERSIONS[operation].index(chosen)
        assert why_not(chosen, device, dtype) is None
        assert all(why_not(version, device, dtype) for version in VERSIONS[operation][:place])


def test_blocked_attention_is_for_bfloat16_on_a_cpu() -> None:
    assert choose_kernels(CPU, torch.bfloat16).attention is blocked_attention
    assert choose_kernels(CPU, torch.float32).attention is sdpa_attention
    assert choose_kernels(CUDA, torch.bfloat16).attention is sdpa_attention


def test_every_operation_is_described_by_the_name_of_its_version() -> None:
    assert choose_kernels(CPU, torch.float32).describe() == {
        "attention": "sdpa_attention",
        "latent_attention": "batched_latent_attention",
        "experts": "segmented_expert_ffn",
        "cross_entropy": "chunked_linear_cross_entropy",
        "rms_norm": "lean_rms_norm",
    }


def test_the_choice_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Kernels().attention = attention  # type: ignore[misc]
