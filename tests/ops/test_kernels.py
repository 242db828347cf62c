"""The choice of versions: the definitions by default, every choice printable and with its reasons."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from abyssal.ops import attention
from abyssal.ops.kernels import OPERATIONS, Kernels, choose_kernels, passed_over
from abyssal.ops.version import PURPOSES, Purpose, Version

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # to name a device takes none
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def test_the_defaults_are_the_definitions_which_stand_last_among_the_versions_and_serve_everywhere() -> None:
    assert list(OPERATIONS) == [field.name for field in fields(Kernels)]
    for operation, versions in OPERATIONS.items():
        assert getattr(Kernels(), operation) is versions[-1] == Version(versions[-1].function)


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_nothing_speaks_against_a_chosen_version_and_something_against_those_before_it(
    device: torch.device, dtype: torch.dtype, purpose: Purpose
) -> None:
    kernels, reasons = choose_kernels(device, dtype, purpose), passed_over(device, dtype, purpose)
    for operation, versions in OPERATIONS.items():
        chosen = getattr(kernels, operation)
        assert chosen.why_not_for(purpose, device, dtype) is None
        assert list(reasons[operation]) == [version.name for version in versions[: versions.index(chosen)]]
        assert all(reasons[operation].values())


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_the_definitions_and_torchs_own_fused_kernels_are_chosen(dtype: torch.dtype, purpose: Purpose) -> None:
    """What was laid out for a CPU has no measurement there."""
    chosen = choose_kernels(CUDA, dtype, purpose).describe()
    assert chosen == Kernels().describe() | {"attention": "sdpa_attention"}


def test_what_trains_has_gradients_and_what_decodes_asks_for_none() -> None:
    chosen = {purpose: choose_kernels(CPU, torch.float32, purpose).describe() for purpose in PURPOSES}
    assert chosen["train"] == {
        "attention": "sdpa_attention",
        "latent_attention": "batched_latent_attention",
        "linear": "linear",
        "experts": "segmented_expert_ffn",
        "cross_entropy": "chunked_linear_cross_entropy",
        "log_probabilities": "differentiable_log_probabilities",
        "rms_norm": "differentiable_rms_norm",
    }
    packed = {"linear": "packed_linear", "experts": "packed_expert_ffn"}  # where the matrix library is there
    assert chosen["decode"] | packed == chosen["train"] | {
        **packed,
        "cross_entropy": "linear_cross_entropy",
        "log_probabilities": "chunked_log_probabilities",
        "rms_norm": "lean_rms_norm",
    }


@pytest.mark.parametrize("instructions", [True, False])
def test_products_of_bfloat16_are_for_a_cpu_with_the_instructions(
    instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "why_not_bfloat16_products", lambda: None if instructions else "slow")
    chosen = choose_kernels(CPU, torch.bfloat16, "train").attention
    assert chosen.name == ("mixed_blocked_attention" if instructions else "blocked_attention")


def test_the_choice_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Kernels().attention = Kernels().rms_norm  # type: ignore[misc]
