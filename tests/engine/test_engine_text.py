"""Requests with text: stop strings, end tokens, log-probabilities, constraints, and what cannot be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.engine import (
    Engine,
    EngineOptions,
    LoadedModel,
    Output,
    Request,
    SamplingParameters,
    load_model,
)
from abyssal.engine.sequence import SequenceState
from abyssal.errors import UsageError
from abyssal.model import Context, Transformer
from abyssal.ops.routing import affinities, choose_experts
from engine.oracle import generate, generate_text

Build = Callable[..., Transformer]
SMALL = EngineOptions(page_tokens=4, max_running=4, max_step_tokens=24, adapt_drafts=False)


@pytest.fixture
def loaded(model_directory: Callable[..., Path]) -> LoadedModel:
    return load_model(model_directory())


def run(engine: Engine) -> dict[tuple[int, int], list[Output]]:
    told: dict[tuple[int, int], list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            told.setdefault((output.request_id, output.index), []).append(output)
        engine.check_integrity()
    return told


def always_right(engine: Engine, future: Mapping[int, list[int]]) -> None:
    """Let every draft be the token that will be said."""
    inner = engine._drafter.draft

    def draft(wanted: Mapping[SequenceState, int]) -> None:
        inner(wanted)
        for sequence, count in wanted.items():
            said = len(sequence.tokens) - sequence.num_prompt_tokens
            sequence.drafts = future[sequence.request_id][said : said + count]

    engine._drafter.draft = draft  # type: ignore[method-assign]


@pytest.mark.parametrize("drafts", [0, 4])
def test_stop_strings_end_each_text_as_they_end_it_alone(loaded: LoadedModel, drafts: int) -> None:
    prompts = [loaded.encode_prompt(text) for text in ("def f", "return x", "x")]
    free = [list(generate_text(loaded, ids, SamplingParameters(30, temperature=0))) for ids in prompts]
    options = EngineOptions(page_tokens=4, max_running=4, num_drafts=drafts, adapt_drafts=False)
    engine = Engine.of(loaded, options)
    asked: dict[int, tuple[list[int], SamplingParameters]] = {}
    future: dict[int, list[int]] = {}
    always_right(engine, future)
    for ids, chunks in zip(prompts, free, strict=True):
        text = "".join(chunk.text for chunk in chunks)
        for place in range(1, len(text) - 3, 11):
            parameters = SamplingParameters(30, temperature=0, stop=("never", text[place : place + 2]))
            request_id = engine.add(Request(ids, parameters))
            asked[request_id] = (ids, parameters)
            future[request_id] = [chunk.token.id for chunk in chunks]
    told = run(engine)
    for request_id, (ids, parameters) in asked.items():
        alone = list(generate_text(loaded, ids, parameters))
        found = told[request_id, 0]
        assert [(o.text, o.token and o.token.id, o.finish_reason) for o in found] == [
            (chunk.text, chunk.token.id, chunk.finish_reason) for chunk in alone
        ]
    assert {outputs[-1].finish_reason for outputs in told.values()} == {"stop"}


@pytest.mark.parametrize("drafts", [0, 3])
def test_end_tokens_end_a_text_within_an_accepted_span_too(tiny_config: ModelConfig, build: Build, drafts: int) -> None:
    model = build(tiny_config, dtype=torch.float32)
    prompt = [5, 17, 3, 80]
    plain = [token.id for token in generate(model, prompt, SamplingParameters(20, temperature=0))]
    engine = Engine(model, EngineOptions(page_tokens=3, num_drafts=drafts, adapt_drafts=False), end_ids={plain[0]})
    future: dict[int, list[int]] = {}
    always_right(engine, future)
    wanted = {}
    for end in sorted(set(plain)):
        request_id = engine.add(Request(prompt, SamplingParameters(20, temperature=0), end_ids=frozenset({end, 500})))
        future[request_id], wanted[request_id] = plain, plain[: plain.index(end) + 1]
    future[own := engine.add(Request(prompt, SamplingParameters(20, temperature=0)))] = plain
    told = run(engine)
    for request_id, ids in wanted.items():
        assert [o.token and o.token.id for o in told[request_id, 0]] == ids
        assert told[request_id, 0][-1].finish_reason == ("eos" if len(ids) < 20 or ids[-1] == plain[19] else "length")
    assert len(told[own, 0]) == 1
    if drafts:
        outputs = told[max(wanted, key=lambda n: len(wanted[n])), 0]
        assert [o.was_draft for o in outputs[:6]] == [False, True, True, True, False, True]


def test_several_texts_of_a_request_end_each_for_itself(loaded: LoadedModel) -> None:
    engine = Engine.of(loaded, SMALL)
    ids = loaded.encode_prompt("def f(x):")
    parameters = SamplingParameters(10, temperature=1.5, seed=3, stop=("e",))
    request_id = engine.add(Request(ids, parameters, num_sequences=5))
    told = run(engine)
    assert sorted(told) == [(request_id, index) for index in range(5)]
    for index in range(5):
        alone = SamplingParameters(10, temperature=1.5, seed=3 + index, stop=("e",))
        text = "".join(chunk.text for chunk in generate_text(loaded, ids, alone))
        assert "".join(output.text for output in told[request_id, index]) == text
    assert not engine.is_open(request_id)


def test_log_probabilities_are_the_models_own_whatever_is_drafted(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config, dtype=torch.float32)
    parameters = SamplingParameters(12, temperature=0, top_logprobs=4)
    plain = list(generate(model, [5, 17, 3], parameters))
    for drafts in (0, 3):
        engine = Engine(model, EngineOptions(page_tokens=3, num_drafts=drafts, adapt_drafts=False))
        future = {0: [token.id for token in plain]}
        always_right(engine, future)
        engine.add(Request([5, 17, 3], parameters))
        for output, token in zip(run(engine)[0, 0], plain, strict=True):
            assert output.token is not None
            assert output.token.id == token.id == output.token.top[0][0]
            assert output.token.logprob == pytest.approx(token.logprob, abs=1e-4)
            assert len(output.token.top) == 4


@pytest.mark.parametrize("drafts", [0, 3])
def test_experts_are_those_that_the_place_before_a_token_chose(
    tiny_config: ModelConfig, build: Build, drafts: int
) -> None:
    model, plain = build(tiny_config), build(tiny_config, cached=False)
    prompt, parameters = [5, 17, 3], SamplingParameters(9, temperature=0)
    said, text = ([token.id for token in generate(model, ids, parameters)] for ids in ([60, 61], prompt))
    chosen: list[list[list[int]]] = []  # layer, place, experts by their weight
    for number in (1, 2):
        layer = plain.model.layers[number]

        def note(module: Any, inputs: Any, normed: torch.Tensor, gate: Any = layer.mlp.gate) -> None:
            cfg = tiny_config
            scores = affinities(normed, gate.weight)
            groups = {"n_group": cfg.n_group, "topk_group": cfg.topk_group, "top_k": cfg.num_experts_per_tok}
            experts = choose_experts(scores, gate.e_score_correction_bias, **groups).tolist()
            pairs = zip(scores.tolist(), experts, strict=True)
            chosen.append([sorted(row, key=lambda e: -values[e]) for values, row in pairs])

        layer.post_attention_layernorm.register_forward_hook(note)
    with torch.no_grad():
        plain(torch.tensor([*prompt, *text]), Context.packed([12]))
    for wants in (True, False):
        engine = Engine(model, EngineOptions(page_tokens=3, num_drafts=drafts, adapt_drafts=False))
        always_right(engine, {0: said, 1: text})
        engine.add(Request([60, 61], parameters))  # somebody who does not ask, in the same pass
        engine.add(Request(prompt, parameters, wants_experts=wants))
        told = run(engine)
        for place, output in enumerate(told[1, 0], start=2):
            assert output.experts == (tuple(tuple(layer[place]) for layer in chosen) if wants else ())
        assert {output.experts for output in told[0, 0]} == {()}


class OneOfEach:
    """Every token once, lowest third of the vocabulary only."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self) -> torch.Tensor | None:
        mask = torch.zeros(97, dtype=torch.bool)
        mask[:32] = True
        mask[self.taken] = False
        return mask

    def advance(self, token: int) -> None:
        self.taken.append(token)


def test_a_constraint_holds_at_every_place_of_a_verification(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config, dtype=torch.float32)
    parameters = SamplingParameters(20, temperature=0.9, seed=2)
    texts: list[list[int]] = []
    for drafts in (0, 4):
        made: list[OneOfEach] = []

        def make(made: list[OneOfEach] = made) -> OneOfEach:
            made.append(OneOfEach())
            return made[-1]

        engine = Engine(model, EngineOptions(page_tokens=3, num_drafts=drafts, adapt_drafts=False))
        if drafts:
            always_right(engine, {0: texts[0]})
        engine.add(Request([5, 17, 3], parameters, constraint=make))
        texts.append([output.token.id for output in run(engine)[0, 0] if output.token])
        assert made[0].taken == texts[-1]
        assert len(set(texts[-1])) == 20
        assert max(texts[-1]) < 32
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "prompt: has no tokens"),
        ({"prompt_ids": [97]}, "prompt: token id 97 is not one of the model's, 0 to 96"),
        ({"prompt_ids": [1] * 64}, "prompt: has 64 tokens, but the model can attend to 64"),
        ({"num_sequences": 0}, "num_sequences=0: must be at least 1"),
        ({"parameters": SamplingParameters(stop=("x",))}, "stop: needs a tokenizer"),
        ({"parameters": SamplingParameters(logit_bias=((97, 1.0),))}, "logit_bias: token id 97 is not one"),
        ({"prompt_ids": [1] * 30}, "prompt: 30 tokens and 34 new ones do not fit the latent cache of 40 tokens"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    tiny_config: ModelConfig, build: Build, change: dict[str, Any], message: str
) -> None:
    config = tiny_config
    width = (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_layers * 8
    engine = Engine(build(config), EngineOptions(page_tokens=4, cache_bytes=10 * 4 * width))
    with pytest.raises(UsageError, match=message):
        engine.add(Request(**{"prompt_ids": [1, 2], "parameters": SamplingParameters(99), **change}))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_tokens": 0}, "page_tokens=0: must be at least 1"),
        ({"max_running": 9, "max_step_tokens": 8}, "max_running=9: must be at most max_step_tokens=8"),
        ({"num_drafts": -1}, "num_drafts=-1: must be at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineOptions(**options)


def test_drafts_need_mtp_modules_and_are_left_out_without(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config.model_copy(update={"num_nextn_predict_layers": 0}))
    with pytest.raises(UsageError, match="num_drafts=2: drafts come from MTP modules, and this model has none"):
        Engine(model, EngineOptions(num_drafts=2))
    engine = Engine(model)
    engine.add(Request([1, 2], SamplingParameters(4, temperature=0)))
    assert len(run(engine)[0, 0]) == 4
    assert not engine.statistics().makes_drafts


def test_a_model_that_does_not_write_to_the_cache_is_found(tiny_config: ModelConfig, build: Build) -> None:
    engine = Engine(build(tiny_config, cached=False))
    engine.add(Request([1, 2]))
    with pytest.raises(RuntimeError, match="call use_latent_cache"):
        engine.step()


def test_drafts_stop_where_they_do_not_pay_and_the_text_stays_the_same(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config, dtype=torch.float32)
    engine = Engine(model, EngineOptions(page_tokens=4, num_drafts=1))
    observe = engine._adaptive.observe
    engine._adaptive.observe = lambda running, drafts, tokens, **_: observe(  # type: ignore[method-assign]
        running, drafts, tokens, pass_s=3.0 if drafts else 1.0, draft_s=1.0
    )
    parameters = SamplingParameters(55, temperature=0)
    engine.add(Request([5, 17, 3], parameters))
    told = run(engine)[0, 0]
    assert [o.token and o.token.id for o in told] == [token.id for token in generate(model, [5, 17, 3], parameters)]
    assert engine.statistics().drafted == (17,), "the last is made before the pass that decides is measured"
    assert not engine.statistics().makes_drafts
