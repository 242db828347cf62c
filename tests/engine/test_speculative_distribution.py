"""Speculation at temperature 1 gives the model's own distribution, against its exact joint one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.engine import SamplingParameters, Speculation, generate_speculatively
from abyssal.model import Context, Transformer

Build = Callable[..., Transformer]


class TokenCache:
    """Stands in for the latent cache: the tokens themselves."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.fed: list[int] = []

    @property
    def lengths(self) -> tuple[int]:
        return (len(self.fed),)

    def truncate(self, sequence: int, length: int) -> None:
        assert sequence == 0
        del self.fed[length:]

    def reserve(self, capacity_tokens: int) -> None:
        """Has room for any number of them."""


class GuessingDrafter:
    """Drafts the most probable token of the main model itself, so that many a draft is accepted."""

    def __init__(self, *_: Any) -> None:
        self.ids: list[int] = []

    def reusable(self, prompt_ids: list[int]) -> int:
        return 0

    def rewind(self, length: int, capacity_tokens: int) -> None:
        assert length == 0 == len(self.ids)

    def extend(self, tokens: list[int], hidden: torch.Tensor) -> None:
        self.ids += tokens

    def draft(self, count: int) -> list[int]:
        return [GUESSES[tuple(self.ids)]] * count


GUESSES: dict[tuple[int, ...], int] = {}
WORDS = 64


@pytest.fixture
def logits_of_pairs(tiny_config: ModelConfig, build: Build) -> tuple[Transformer, dict[tuple[int, ...], torch.Tensor]]:
    """A model of 64 words, and its logits after a prompt, after each first token, and after each two."""
    config = tiny_config.model_copy(update={"vocab_size": WORDS, "num_hidden_layers": 2})
    model = build(config, dtype=torch.float32, cached=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.5)  # far from uniform
        texts = [(7, 1, a, b) for a in range(WORDS) for b in range(WORDS)]
        logits = model.logits(model(torch.tensor(texts).flatten(), Context.packed([4] * len(texts))))
    table = {
        text[:n]: row
        for text, rows in zip(texts, logits.unflatten(0, (-1, 4)), strict=True)
        for n, row in enumerate(rows, start=1)
    }
    return model, table


def chi_square_p(counts: Counter[tuple[int, int]], expected: torch.Tensor) -> float:
    """The probability of counts as far from `expected` [W, W] as these; rare pairs are taken together."""
    observed = torch.zeros_like(expected)
    for pair, n in counts.items():
        observed[pair] = n
    rare = expected < 5
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    found = torch.cat((observed[~rare], observed[rare].sum()[None]))
    assert len(wanted) > 200
    assert float(wanted[-1]) < 0.7 * float(expected.sum())
    statistic = ((found - wanted) ** 2 / wanted).sum()
    half_degrees = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_degrees, statistic / 2))


def exact_pairs(table: dict[tuple[int, ...], torch.Tensor], samples: int) -> torch.Tensor:
    """Expected counts [W, W] of the second and third token after the prompt (7, 1)."""
    first = table[7, 1].double().softmax(-1)  # [W]
    second = torch.stack([table[7, 1, a].double().softmax(-1) for a in range(WORDS)])  # [W, W]
    third = torch.stack(
        [torch.stack([table[7, 1, a, b].double().softmax(-1) for b in range(WORDS)]) for a in range(WORDS)]
    )
    return samples * torch.einsum("a,ab,abc->bc", first, second, third)


def test_the_joint_distribution_of_tokens_is_unchanged_at_temperature_1(
    logits_of_pairs: tuple[Transformer, dict[tuple[int, ...], torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 texts of three tokens: the second is verified against a draft, the third comes behind it or of a new pass.

    The logits of each pass come from a table, exact as the table is: what is looked at is verification.
    """
    model, table = logits_of_pairs
    module = import_module("abyssal.engine.speculate")
    samples, shared = 20_000, torch.Generator().manual_seed(11)

    def run_pass(_: Transformer, tokens: torch.Tensor, cache: TokenCache) -> torch.Tensor:
        starts = [tuple(cache.fed + tokens[: n + 1].tolist()) for n in range(len(tokens))]
        cache.fed += tokens.tolist()
        return torch.stack([table[start] for start in starts])

    monkeypatch.setattr(module, "run_pass", run_pass)
    monkeypatch.setattr(module, "_logits", lambda _, hidden: hidden)
    monkeypatch.setattr(import_module("abyssal.engine.kept_cache"), "ContiguousLatentCache", TokenCache)
    monkeypatch.setattr(module, "MTPDrafter", GuessingDrafter)
    monkeypatch.setattr(SamplingParameters, "generator", lambda *_: shared)
    for ids, logits in table.items():
        monkeypatch.setitem(GUESSES, ids, int(logits.argmax()))
    parameters = SamplingParameters(3, temperature=1.0, top_p=1.0)
    speculation, counts = Speculation(2), Counter[tuple[int, int]]()
    for _ in range(samples):
        _, second, third = generate_speculatively(model, [7, 1], parameters, (), speculation)
        counts[second.id, third.id] += 1
    accepted, drafted = speculation.accepted[0], speculation.drafted[0]
    assert drafted == samples
    assert 0.2 * drafted < accepted < 0.9 * drafted, "both ways must be taken often"
    expected = exact_pairs(table, samples)
    assert chi_square_p(counts, expected) > 1e-8  # of so many draws, one fails where another processor draws otherwise
    wrong = exact_pairs({ids: logits / 1.1 for ids, logits in table.items()}, samples)
    assert chi_square_p(counts, wrong) < 1e-8, "the test must see a temperature of 1.1"  # it is 1e-40 to 1e-52
