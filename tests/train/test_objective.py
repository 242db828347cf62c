"""The objective against eq. 24, 25 and 17, written out position by position in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.model import Context, Transformer, initialise, next_tokens
from abyssal.ops.kernels import choose_kernels
from abyssal.train.executor import StepSums, forward
from abyssal.train.objective import Losses, MicroBatch, NextTokenObjective, Objective

FAST = choose_kernels(torch.device("cpu"), torch.float32, "train")


def double_model(config: ModelConfig) -> Transformer:
    return initialise(Transformer(config, FAST, torch.float64), seed=5).double()


def losses_of(model: Transformer, windows: torch.Tensor, objective: Objective, lengths: Any = ()) -> Losses:
    return forward(model, objective, MicroBatch(windows, lengths))[0]


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_objective_equals_the_equations_summed_over_positions(tiny_config: ModelConfig, depth: int) -> None:
    config = tiny_config.model_copy(update={"num_nextn_predict_layers": depth})
    model = double_model(config)
    windows = torch.randint(config.vocab_size, (3, 8))
    length = 7
    objective = NextTokenObjective(tokens=3 * length, sequences=3, mtp=0.3, balance=0.0)
    found = losses_of(model, windows, objective)

    main = torch.zeros((), dtype=torch.float64)
    losses = [torch.zeros((), dtype=torch.float64) for _ in range(depth)]
    for t in windows:  # t[0] .. t[T], the report's t_1 .. t_{T+1}
        ctx = Context.packed([length])
        h = model(t[:-1], ctx)
        log_p = model.logits(h).log_softmax(-1)
        main -= sum(log_p[i, t[i + 1]] for i in range(length))
        for k, (h_k, kept) in enumerate(model.predict_further(h, next_tokens(t[:-1], depth), ctx), start=1):
            assert kept.tolist() == list(range(length - k))
            log_p = model.logits(h_k).log_softmax(-1)
            losses[k - 1] -= sum(log_p[i, t[i + k + 1]] for i in range(length - k))
    expected = main / (3 * length) + sum(0.3 / depth * loss / (3 * length) for loss in losses)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sums["main"], main.detach(), rtol=1e-12, atol=1e-12)
    assert list(found.sums) == ["main", *(f"mtp_{k}" for k in range(1, depth + 1))]


def test_micro_batches_add_up_to_the_whole_batch_in_loss_gradients_and_load(tiny_config: ModelConfig) -> None:
    windows = torch.randint(tiny_config.vocab_size, (5, 12))
    objective = NextTokenObjective(tokens=5 * 11, sequences=5, mtp=0.3, balance=0.7)
    whole, parts = double_model(tiny_config), double_model(tiny_config)
    one, statistics = forward(whole, objective, MicroBatch(windows))
    one.total.backward()
    sums, total = StepSums(), torch.zeros((), dtype=torch.float64)
    for micro_batch in windows.split(2):
        losses, reported = forward(parts, objective, MicroBatch(micro_batch))
        losses.total.backward()
        sums.add(losses, reported)
        total += losses.total.detach()
    torch.testing.assert_close(total, one.total.detach(), rtol=1e-12, atol=0)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)
    assert statistics is not None
    totals = sums.read(torch.tensor(3.5))
    assert totals.gradient_norm == 3.5
    assert totals.losses == pytest.approx({name: loss.item() for name, loss in one.sums.items()}, rel=1e-12)
    for layer, load in statistics.expert_load.items():
        assert torch.equal(totals.loads[layer], load)


def test_balance_loss_reaches_the_gate_and_no_loss_value(tiny_config: ModelConfig) -> None:
    windows = torch.randint(tiny_config.vocab_size, (2, 9))
    values, gradients = [], []
    for balance in (0.0, 0.5):
        model = double_model(tiny_config)
        loss = losses_of(model, windows, NextTokenObjective(tokens=16, sequences=2, mtp=0.1, balance=balance))
        loss.total.backward()
        values.append(loss.total.item())
        gradients.append(model.model.layers[2].mlp.gate.weight.grad)
    assert values[0] == values[1]
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)


def test_masked_documents_are_as_if_each_stood_alone(tiny_config: ModelConfig) -> None:
    model = double_model(tiny_config)
    windows = torch.randint(tiny_config.vocab_size, (2, 10))
    lengths = ((4, 5), (9,))
    objective = NextTokenObjective(tokens=18, sequences=3, mtp=0.3, balance=0.01)
    found = losses_of(model, windows, objective, lengths)
    alone = [windows[0, :5], windows[0, 4:], windows[1]]
    parts = [losses_of(model, window[None], objective) for window in alone]
    torch.testing.assert_close(found.total, sum(part.total for part in parts), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sums["mtp_1"], sum(part.sums["mtp_1"] for part in parts), rtol=1e-12, atol=1e-12)
    assert abs(found.total - losses_of(model, windows, objective).total) > 1e-6
    found.total.backward()
    masked = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sum(part.total for part in parts).backward()
    for name, p in model.named_parameters():  # the balance loss among them
        torch.testing.assert_close(masked[name], p.grad, rtol=1e-9, atol=1e-12)


def test_token_weights_count_each_target_so_much_at_every_depth(tiny_config: ModelConfig) -> None:
    model = double_model(tiny_config.model_copy(update={"num_nextn_predict_layers": 2}))
    windows = torch.randint(tiny_config.vocab_size, (3, 9))
    counts = torch.rand(3, 8, dtype=torch.float64) * (torch.rand(3, 8) > 0.4)
    objective = NextTokenObjective(tokens=24, sequences=3, mtp=0.3, balance=0.0)
    found = forward(model, objective, MicroBatch(windows, token_weights=counts))[0]
    main, mtp = 0.0, [0.0, 0.0]
    for window, count in zip(windows, counts, strict=True):
        ctx = Context.packed([8])
        h = model(window[:-1], ctx)
        main = main - (model.logits(h).log_softmax(-1)[range(8), window[1:]] * count).sum()
        for k, (h_k, kept) in enumerate(model.predict_further(h, next_tokens(window[:-1], 2), ctx), start=1):
            log_p = model.logits(h_k).log_softmax(-1)
            mtp[k - 1] = mtp[k - 1] - sum(log_p[i, window[i + k + 1]] * count[i + k] for i in range(len(kept)))
    torch.testing.assert_close(found.total, (main + 0.15 * sum(mtp)) / 24, rtol=1e-12, atol=1e-12)


def test_a_target_that_does_not_count_teaches_nothing(tiny_config: ModelConfig) -> None:
    windows = torch.randint(tiny_config.vocab_size, (1, 9))
    other = windows.clone()
    other[0, 8] = (other[0, 8] + 1) % tiny_config.vocab_size  # a target alone: no input sees it
    counts = torch.ones(1, 8)
    counts[0, 7] = 0.0
    objective = NextTokenObjective(tokens=7, sequences=1, mtp=0.3, balance=0.0)
    totals = [
        forward(double_model(tiny_config), objective, MicroBatch(w, (), counts))[0].total for w in (windows, other)
    ]
    assert totals[0] == totals[1]
