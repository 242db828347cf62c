"""The objective against eq. 24, 25 and 17, written out position by position in float64."""

from __future__ import annotations

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.model import Context, Transformer, initialise, next_tokens
from abyssal.ops.kernels import choose_kernels
from abyssal.train.objective import ObjectiveWeights, micro_batch_loss

FAST = choose_kernels(torch.device("cpu"), torch.float32, "train")


def double_model(config: ModelConfig) -> Transformer:
    return initialise(Transformer(config, FAST, torch.float64), seed=5).double()


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_objective_equals_the_equations_summed_over_positions(tiny_config: ModelConfig, depth: int) -> None:
    config = tiny_config.model_copy(update={"num_nextn_predict_layers": depth})
    model = double_model(config)
    windows = torch.randint(config.vocab_size, (3, 8))
    length = 7
    weights = ObjectiveWeights(tokens=3 * length, sequences=3, mtp=0.3, balance=0.0)
    found = micro_batch_loss(model, windows, weights)

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
    torch.testing.assert_close(found.main, main.detach(), rtol=1e-12, atol=1e-12)
    assert len(found.mtp) == depth


def test_micro_batches_add_up_to_the_whole_batch_in_loss_gradients_and_load(tiny_config: ModelConfig) -> None:
    windows = torch.randint(tiny_config.vocab_size, (5, 12))
    weights = ObjectiveWeights(tokens=5 * 11, sequences=5, mtp=0.3, balance=0.7)
    whole, parts = double_model(tiny_config), double_model(tiny_config)
    one = micro_batch_loss(whole, windows, weights)
    one.total.backward()
    several = [micro_batch_loss(parts, micro_batch, weights) for micro_batch in windows.split(2)]
    for part in several:
        part.total.backward()
    torch.testing.assert_close(sum(part.total for part in several), one.total, rtol=1e-12, atol=0)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)
    for layer, load in one.statistics.expert_load.items():
        assert torch.equal(sum(part.statistics.expert_load[layer] for part in several), load)


def test_balance_loss_reaches_the_gate_and_no_loss_value(tiny_config: ModelConfig) -> None:
    windows = torch.randint(tiny_config.vocab_size, (2, 9))
    values, gradients = [], []
    for balance in (0.0, 0.5):
        model = double_model(tiny_config)
        loss = micro_batch_loss(model, windows, ObjectiveWeights(tokens=16, sequences=2, mtp=0.1, balance=balance))
        loss.total.backward()
        values.append(loss.total.item())
        gradients.append(model.model.layers[2].mlp.gate.weight.grad)
    assert values[0] == values[1]
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)


def test_masked_documents_are_as_if_each_stood_alone(tiny_config: ModelConfig) -> None:
    model = double_model(tiny_config)
    windows = torch.randint(tiny_config.vocab_size, (2, 10))
    lengths = ((4, 5), (9,))
    weights = ObjectiveWeights(tokens=18, sequences=3, mtp=0.3, balance=0.01)
    found = micro_batch_loss(model, windows, weights, lengths)
    alone = [windows[0, :5], windows[0, 4:], windows[1]]
    parts = [micro_batch_loss(model, window[None], weights) for window in alone]
    torch.testing.assert_close(found.total, sum(part.total for part in parts), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.mtp[0], sum(part.mtp[0] for part in parts), rtol=1e-12, atol=1e-12)
    assert abs(found.total - micro_batch_loss(model, windows, weights).total) > 1e-6
    found.total.backward()
    masked = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sum(part.total for part in parts).backward()
    for name, p in model.named_parameters():  # the balance loss among them
        torch.testing.assert_close(masked[name], p.grad, rtol=1e-9, atol=1e-12)
