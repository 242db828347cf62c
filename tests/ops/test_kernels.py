"""The choice of versions: the definitions by default, every choice printable."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from abyssal.ops.attention import attention
from abyssal.ops.cross_entropy import linear_cross_entropy
from abyssal.ops.experts import expert_ffn
from abyssal.ops.kernels import FAST, Kernels


def test_the_defaults_are_the_definitions() -> None:
    assert Kernels() == Kernels(attention, expert_ffn, linear_cross_entropy)


def test_every_operation_is_described_by_the_name_of_its_version() -> None:
    assert FAST.describe() == {
        "attention": "sdpa_attention",
        "experts": "segmented_expert_ffn",
        "cross_entropy": "chunked_linear_cross_entropy",
    }


def test_every_fast_version_differs_from_its_definition() -> None:
    assert all(getattr(FAST, f.name) is not getattr(Kernels(), f.name) for f in fields(Kernels))


def test_the_choice_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        FAST.attention = attention  # type: ignore[misc]
