"""What a forward pass is told beside its tokens."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from abyssal.model import Context


def test_packed_positions_restart_with_every_sequence() -> None:
    ctx = Context.packed([3, 1, 2])
    assert ctx.lengths == (3, 1, 2)
    assert ctx.positions.tolist() == [0, 1, 2, 0, 0, 1]


def test_shortened_drops_the_last_tokens_of_every_sequence() -> None:
    ctx = Context.packed((4, 3)).with_rotary(torch.arange(7.0)[:, None], -torch.arange(7.0)[:, None])
    shorter, kept = ctx.shortened(2)
    assert shorter.lengths == (2, 1)
    assert kept.tolist() == [0, 1, 4]
    assert shorter.positions.tolist() == [0, 1, 0]
    assert shorter.rotary is not None
    assert shorter.rotary[0].flatten().tolist() == [0.0, 1.0, 4.0]
    assert shorter.rotary[1].flatten().tolist() == [0.0, -1.0, -4.0]


def test_a_sequence_that_is_too_short_stays_with_no_tokens() -> None:
    shorter, kept = Context.packed((1, 4, 2)).shortened(2)
    assert shorter.lengths == (0, 2, 0)
    assert kept.tolist() == [1, 2]
    assert shorter.positions.tolist() == [0, 1]


def test_shortened_keeps_positions_that_do_not_start_at_zero() -> None:
    shorter, _ = Context((3, 2), torch.tensor([7, 8, 9, 4, 5])).shortened(1)
    assert shorter.positions.tolist() == [7, 8, 4]


def test_what_the_balance_loss_calls_a_sequence_is_shortened_by_what_attention_loses_in_it() -> None:
    """One window of two documents and one of three, the last of which is shorter than what is dropped."""
    ctx = Context((4, 3, 2, 5, 1), torch.arange(15), balance_lengths=(7, 8))
    shorter, kept = ctx.shortened(2)
    assert shorter.lengths == (2, 1, 0, 3, 0)
    assert shorter.balance_lengths == (3, 3)
    assert kept.tolist() == [0, 1, 4, 9, 10, 11]
    assert Context.packed((4, 3)).shortened(2)[0].balance_lengths is None


def test_the_context_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Context.packed((2,)).balance_weight = 1.0  # type: ignore[misc]
