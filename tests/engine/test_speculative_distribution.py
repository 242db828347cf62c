"""Speculation at temperature 1 gives the model's own distribution, against its exact joint one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.engine import Engine, EngineOptions, Request, SamplingParameters
from abyssal.engine.paged_cache import PagedCacheView
from abyssal.engine.sequence import SequenceState
from abyssal.model import Context, Transformer

pytestmark = pytest.mark.slow

Build = Callable[..., Transformer]


class TableModel:
    """Stands in for the model: the logits after each beginning of a text come from a table, exact as the table is."""

    def __init__(self, model: Transformer, table: dict[tuple[int, ...], torch.Tensor]) -> None:
        self.config, self.compute_dtype, self.head_weight = model.config, model.compute_dtype, model.head_weight
        self._table = table

    def __call__(self, tokens: torch.Tensor, ctx: Context) -> torch.Tensor:
        cache = ctx.cache
        assert isinstance(cache, PagedCacheView)
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        ids = tokens[:, None].expand(-1, width).float()  # the latents of a token are its id
        for layer in range(self.config.num_hidden_layers):
            reads = cache.append(layer, *ids.split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1))
        texts = [tuple(map(int, read[:, 0].tolist())) for read in reads]
        ends = zip(texts, ctx.lengths, strict=True)
        return torch.stack([self._table[t[:n]] for t, new in ends for n in range(len(t) - new + 1, len(t) + 1)])

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


class GuessingDrafter:
    """Drafts the most probable token of the main model itself, so that many a draft is accepted."""

    def draft(self, wanted: Mapping[SequenceState, int]) -> None:
        for sequence, count in wanted.items():
            sequence.drafts = [GUESSES[tuple(sequence.tokens)]] * count


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

    The logits of each pass come from a table: what is looked at is verification.
    """
    model, table = logits_of_pairs
    samples, shared = 20_000, torch.Generator().manual_seed(11)
    monkeypatch.setattr(SamplingParameters, "generator", lambda *_: shared)
    for ids, logits in table.items():
        monkeypatch.setitem(GUESSES, ids, int(logits.argmax()))
    options = EngineOptions(256, 64, 4, share_prefixes=False, num_drafts=2, adapt_drafts=False)
    engine = Engine(model, options)
    engine._model = TableModel(model, table)  # type: ignore[assignment]
    engine._drafter = GuessingDrafter()  # type: ignore[assignment]
    for _ in range(samples // 100):
        engine.add(Request([7, 1], SamplingParameters(3, temperature=1.0, top_p=1.0), 100))
    texts: dict[tuple[int, int], list[int]] = defaultdict(list)
    while engine.has_work:
        for output in engine.step():
            assert output.token is not None
            texts[output.request_id, output.index].append(output.token.id)
    counts = Counter((second, third) for _, second, third in texts.values())
    speculation = engine.draft_statistics
    accepted, drafted = speculation.accepted[0], speculation.drafted[0]
    assert drafted == samples
    assert 0.2 * drafted < accepted < 0.9 * drafted, "both ways must be taken often"
    expected = exact_pairs(table, samples)
    assert chi_square_p(counts, expected) > 1e-8  # of so many draws, one fails where another processor draws otherwise
    wrong = exact_pairs({ids: logits / 1.1 for ids, logits in table.items()}, samples)
    assert chi_square_p(counts, wrong) < 1e-8, "the test must see a temperature of 1.1"  # it is 1e-40 to 1e-52
