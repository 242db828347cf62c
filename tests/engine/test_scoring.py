"""The log-probabilities of a prompt's own tokens, whatever runs beside it, however it is cut, shared or preempted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.engine import Engine, EngineOptions, Output, Request, SamplingParameters
from abyssal.engine import scoring as module
from abyssal.errors import UsageError
from abyssal.model import Context, Transformer
from engine.oracle import generate

Build = Callable[..., Transformer]
GREEDY = SamplingParameters(6, temperature=0)


def whole_logprobs(plain: Transformer, ids: Sequence[int]) -> torch.Tensor:
    """What one pass over the whole text without a cache says of each next token: [T, V]."""
    with torch.no_grad():
        return plain.logits(plain(torch.tensor(ids), Context.packed([len(ids)]))).log_softmax(-1)


def run(engine: Engine) -> dict[int, list[Output]]:
    outputs: dict[int, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    return outputs


def assert_scores(output: Output, wanted: torch.Tensor, ids: Sequence[int], start: int, top: int) -> None:
    assert output.prompt_logprobs is not None
    assert [token.id for token in output.prompt_logprobs] == list(ids[start:])
    for place, token in enumerate(output.prompt_logprobs, start - 1):
        assert token.logprob == pytest.approx(float(wanted[place, ids[place + 1]]), abs=1e-9)
        values, likeliest = wanted[place].topk(top)
        assert [other for other, _ in token.top] == likeliest.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(values.tolist(), abs=1e-9)


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("pages", [14, 60])
def test_scores_are_those_of_one_pass_over_the_whole_text(
    variant: ModelConfig, build: Build, monkeypatch: pytest.MonkeyPatch, pages: int, drafts: int
) -> None:
    """In float64: requests that score and that generate, alike at their beginnings, in few pages and in many."""
    monkeypatch.setattr(module, "ROWS", 5)
    model, plain = build(variant), build(variant, cached=False)
    drafts = drafts if model.mtp_modules else 0
    width = (variant.kv_lora_rank + variant.qk_rope_head_dim) * variant.num_layers * 8
    options = EngineOptions(11, 4, 4, pages * 4 * width, num_drafts=drafts, adapt_drafts=False)
    engine, source = Engine(model, options), random.Random(5)
    beginning = [source.randrange(97) for _ in range(13)]
    asked: dict[int, tuple[list[int], Request]] = {}
    for number in range(12):
        ids = beginning[: source.choice([0, 8, 13])] + [source.randrange(97) for _ in range(source.randint(1, 20))]
        start, count = source.choice([1, len(ids), (len(ids) + 1) // 2]), number % 3
        request = Request(ids, GREEDY, count, prompt_logprobs=source.choice([0, 3]), prompt_logprobs_start=start)
        asked[engine.add(request)] = (ids, request)
    told = run(engine)
    for request_id, (ids, request) in asked.items():
        scored = [output for output in told[request_id] if output.prompt_logprobs is not None]
        assert scored == [next(output for output in told[request_id] if output.index == 0)]
        assert_scores(
            scored[0], whole_logprobs(plain, ids), ids, request.prompt_logprobs_start, request.prompt_logprobs or 0
        )
        for index in range(request.num_sequences):
            said = [output.token for output in told[request_id] if output.index == index]
            assert [token.id for token in said if token] == [token.id for token in generate(model, ids, GREEDY)]
        if not request.num_sequences:
            (output,) = told[request_id]
            assert (output.token, output.text, output.finish_reason) == (None, "", "length")
    assert engine.statistics().num_pages_used == 0
    assert (engine.statistics().preemptions_total > 0) == (pages == 14)


def test_tokens_before_the_first_that_is_scored_are_shared_and_no_others(
    tiny_config: ModelConfig, build: Build
) -> None:
    model, plain = build(tiny_config), build(tiny_config, cached=False)
    ids = [*range(20, 45)]
    for start, shared in ((1, 0), (5, 4), (17, 16), (18, 16), (25, 24)):
        engine = Engine(model, EngineOptions(page_tokens=4, num_drafts=0))
        engine.add(Request(ids, SamplingParameters(1, temperature=0)))
        run(engine)
        request = Request(ids, num_sequences=0, prompt_logprobs=0, prompt_logprobs_start=start)
        ((output,),) = run_one(engine, request)
        assert_scores(output, whole_logprobs(plain, ids), ids, start, 0)
        assert engine.statistics().shared_tokens_total == shared


def run_one(engine: Engine, request: Request) -> list[list[Output]]:
    engine.add(request)
    return list(run(engine).values())


def test_a_prompt_may_fill_the_whole_context_where_nothing_follows(tiny_config: ModelConfig, build: Build) -> None:
    model, plain = build(tiny_config), build(tiny_config, cached=False)
    ids = [n % 97 for n in range(tiny_config.max_position_embeddings)]
    ((output,),) = run_one(Engine(model), Request(ids, num_sequences=0, prompt_logprobs=2))
    assert_scores(output, whole_logprobs(plain, ids), ids, 1, 2)


def test_scores_in_fp32_are_near_those_of_float64_and_bfloat16_ones_are_finite(
    tiny_config: ModelConfig, build: Build
) -> None:
    ids = [*range(7, 40)]
    wanted = whole_logprobs(build(tiny_config, cached=False), ids)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        request = Request(ids, num_sequences=0, prompt_logprobs=1)
        ((output,),) = run_one(Engine(build(tiny_config, dtype=dtype)), request)
        assert output.prompt_logprobs is not None
        for place, token in enumerate(output.prompt_logprobs):
            assert token.logprob == pytest.approx(float(wanted[place, ids[place + 1]]), abs=tolerance)


def test_no_more_rows_of_logits_are_held_than_at_a_time(
    tiny_config: ModelConfig, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    logits = Transformer.logits
    monkeypatch.setattr(Transformer, "logits", lambda model, h: rows.append(len(h)) or logits(model, h))
    monkeypatch.setattr(module, "ROWS", 7)
    engine = Engine(build(tiny_config), EngineOptions(num_drafts=0))
    run_one(engine, Request([*range(60)], num_sequences=0, prompt_logprobs=0))
    assert sum(rows) == 59 + 1
    assert max(rows) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sequences": 0, "prompt_logprobs": None}, "num_sequences=0: must be at least 1"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1: must be at least 0"),
        ({"prompt_logprobs_start": 0}, "prompt_logprobs_start=0: must be from 1 to 3"),
        ({"prompt_logprobs_start": 4}, "prompt_logprobs_start=4: must be from 1 to 3"),
        ({"prompt_ids": [1] * 65, "num_sequences": 0}, "prompt: has 65 tokens"),
        ({"prompt_ids": [1] * 64}, "prompt: has 64 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    tiny_config: ModelConfig, build: Build, change: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Engine(build(tiny_config)).add(Request(**{"prompt_ids": [1, 2, 3], "prompt_logprobs": 0, **change}))  # type: ignore[arg-type]
