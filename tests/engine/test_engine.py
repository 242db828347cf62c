"""What the engine says depends neither on who else runs nor on how the work is cut: random schedules."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abyssal.config import ModelConfig, RopeScaling
from abyssal.engine import Engine, EngineOptions, Output, Request, SamplingParameters, prepare_for_inference
from abyssal.engine.drafter import MTPDrafter
from abyssal.engine.sequence import SequenceState
from abyssal.model import Transformer
from abyssal.ops.kernels import choose_kernels
from engine.oracle import generate

Build = Callable[..., Transformer]
VOCABULARY = 97
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)
SHAPES: dict[str, dict[str, Any]] = {
    "one module": {},
    "YaRN, tied, two modules": {
        "rope_scaling": YARN,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 2,
        "q_lora_rank": None,
    },
}
SERVED = "as it is served"
#: What a draft is, given the token that will be said at its place and how far it stands behind the newest one.
STUBS: dict[str, Callable[[int, int], int] | None] = {
    "of the modules": None,
    "always right": lambda place, token: token,
    "always wrong": lambda place, token: (token + 1) % VOCABULARY,
    "right, then wrong": lambda place, token: token if place < 1 else (token + 1) % VOCABULARY,
}
ASKED: dict[str, SamplingParameters] = {
    "greedy": SamplingParameters(14, temperature=0),
    "long": SamplingParameters(31, temperature=0),
    "one token": SamplingParameters(1, temperature=0),
    "seed": SamplingParameters(17, temperature=1.3, top_p=0.9, seed=5),
    "another seed": SamplingParameters(11, temperature=0.8, top_k=20, seed=2**63 - 1),
}


def make_prompts() -> list[list[int]]:
    """Twelve prompts of 1 to 30 tokens, half of which begin like another one."""
    source = random.Random(11)
    prompts = [[source.randrange(VOCABULARY) for _ in range(n)] for n in (1, 2, 5, 8, 13, 24)]
    return prompts + [prompt + [source.randrange(VOCABULARY)] * (1 + n) for n, prompt in enumerate(prompts)]


PROMPTS = make_prompts()


@dataclass
class World:
    """A model and what it says alone, computed once."""

    model: Transformer
    told: dict[tuple[int, str], list[int]] = field(default_factory=dict)

    def alone(self, prompt: int, asked: str) -> list[int]:
        if (prompt, asked) not in self.told:
            tokens = generate(self.model, PROMPTS[prompt], ASKED[asked])
            self.told[prompt, asked] = [token.id for token in tokens]
        return self.told[prompt, asked]


@pytest.fixture(params=[*SHAPES, SERVED])
def world(request: pytest.FixtureRequest, tiny_config: ModelConfig, build: Build) -> World:
    """In float64, and once with all that serving does to a model in fp32: its sums are rounded in another order."""
    if request.param != SERVED:
        return World(build(tiny_config.model_copy(update=SHAPES[request.param]), seed=8))
    model = build(tiny_config, seed=8, dtype=torch.float32, cached=False)
    model.kernels = choose_kernels(torch.device("cpu"), torch.float32, "decode")
    prepare_for_inference(model)
    return World(model)


def pages(engine_model: Transformer, count: int, page_tokens: int) -> int:
    """The bytes of so many pages."""
    config = engine_model.config
    width = (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_layers
    return count * page_tokens * width * engine_model.compute_dtype.itemsize


class StubDrafter:
    """Lets the modules run all the same, then puts other drafts in the place of theirs."""

    def __init__(self, inner: MTPDrafter, rule: Callable[[int, int], int], future: Mapping[int, list[int]]) -> None:
        self.inner, self.rule, self.future = inner, rule, future

    def draft(self, wanted: Mapping[SequenceState, int]) -> None:
        self.inner.draft(wanted)
        for sequence, count in wanted.items():
            assert len(sequence.drafts) == count
            said = len(sequence.tokens) - sequence.num_prompt_tokens
            coming = self.future[sequence.request_id][said : said + count]
            assert len(coming) == count, "a draft behind the last token"
            sequence.drafts = [self.rule(place, token) for place, token in enumerate(coming)]


def collect(outputs: Sequence[Output], texts: dict[int, list[int]]) -> None:
    for output in outputs:
        assert output.token is not None
        assert output.token.logprob < 1e-6
        texts.setdefault(output.request_id, []).append(output.token.id)


def assert_all_free(engine: Engine) -> None:
    statistics = engine.statistics()
    assert (statistics.num_running, statistics.num_waiting, statistics.num_pages_used) == (0, 0, 0)
    assert not engine.has_work


OPTIONS = st.fixed_dictionaries(
    {
        "page_tokens": st.integers(2, 7),
        "num_pages": st.integers(0, 12),  # beyond what the longest text needs: so few that texts are preempted
        "max_running": st.integers(1, 6),
        "more_step_tokens": st.integers(0, 20),
        "share_prefixes": st.booleans(),
        "num_drafts": st.integers(0, 4),
        "stub": st.sampled_from(sorted(STUBS)),
    }
)
#: What happens, in order: a request comes, steps are made, a request is cancelled.
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, len(PROMPTS) - 1), st.sampled_from(sorted(ASKED))),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
    ),
    min_size=3,
    max_size=25,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(drawn=OPTIONS, events=EVENTS)
@pytest.mark.slow
def test_any_schedule_gives_the_tokens_of_each_request_alone(
    world: World, drawn: dict[str, Any], events: list[Any]
) -> None:
    size = drawn["page_tokens"]
    num_pages = -(-(len(PROMPTS[-1]) + 31) // size) + drawn["num_pages"]
    engine = Engine(
        world.model,
        EngineOptions(
            max_step_tokens=drawn["max_running"] + drawn["more_step_tokens"],
            max_running=drawn["max_running"],
            page_tokens=size,
            cache_bytes=pages(world.model, num_pages, size),
            share_prefixes=drawn["share_prefixes"],
            num_drafts=drawn["num_drafts"],
            adapt_drafts=False,
        ),
    )
    wanted: dict[int, list[int]] = {}
    if (rule := STUBS[drawn["stub"]]) is not None:
        engine._drafter = StubDrafter(engine._drafter, rule, wanted)  # type: ignore[assignment]
    texts: dict[int, list[int]] = {}
    cancelled: set[int] = set()

    def step() -> None:
        collect(engine.step(), texts)
        engine.check_integrity()

    for event in events:
        if event[0] == "add":
            wanted[engine.add(Request(PROMPTS[event[1]], ASKED[event[2]]))] = world.alone(*event[1:])
        elif event[0] == "cancel":
            engine.cancel(event[1])
            cancelled.add(event[1])
            engine.check_integrity()
        else:
            for _ in range(event[1]):
                step()
    most = 10 + sum(len(PROMPTS[-1]) + len(text) for text in wanted.values()) * 3
    while engine.has_work:
        step()
        assert engine.statistics().steps_total < most, "nobody gets on"
    assert_all_free(engine)
    for request_id, text in wanted.items():
        if request_id in cancelled:
            assert texts.get(request_id, []) == text[: len(texts.get(request_id, []))]
        else:
            assert texts[request_id] == text
    statistics = engine.statistics()
    if drawn["stub"] == "always right":
        assert statistics.accepted == statistics.drafted
    elif drawn["stub"] == "always wrong":
        assert sum(statistics.accepted) == 0


# What the schedules above meet by chance, each made certain


def run(engine: Engine) -> dict[int, list[int]]:
    texts: dict[int, list[int]] = {}
    while engine.has_work:
        collect(engine.step(), texts)
        engine.check_integrity()
    assert_all_free(engine)
    return texts


def test_texts_are_preempted_where_pages_run_short_and_end_as_they_would(world: World) -> None:
    engine = Engine(
        world.model,
        EngineOptions(page_tokens=4, cache_bytes=pages(world.model, 15, 4), max_running=5, num_drafts=0),
    )
    asked = [(prompt, "long") for prompt in (5, 4, 11, 3, 5)]
    ids = [engine.add(Request(PROMPTS[prompt], ASKED[name])) for prompt, name in asked]
    texts = run(engine)
    assert [texts[i] for i in ids] == [world.alone(*one) for one in asked]
    assert engine.statistics().preemptions_total > 2


def test_the_first_to_arrive_is_never_preempted_and_ends_first(world: World) -> None:
    engine = Engine(
        world.model,
        EngineOptions(page_tokens=4, cache_bytes=pages(world.model, 15, 4), max_running=5, num_drafts=0),
    )
    first, *others = [engine.add(Request(PROMPTS[5], ASKED["long"])) for _ in range(4)]
    ended: list[int] = []
    while engine.has_work:
        ended += [output.request_id for output in engine.step() if output.finish_reason]
        assert first in ended or engine._scheduler.running[0].request_id == first
    assert ended == [first, *others]


def test_a_prompt_that_was_computed_before_is_not_computed_again(world: World) -> None:
    for drafts in (0, 2):
        engine = Engine(world.model, EngineOptions(page_tokens=4, num_drafts=drafts, adapt_drafts=False))
        first = engine.add(Request(PROMPTS[5], ASKED["greedy"]))
        assert run(engine)[first] == world.alone(5, "greedy")
        again, longer = (engine.add(Request(PROMPTS[n], ASKED["greedy"])) for n in (5, 11))
        texts = run(engine)
        assert texts == {again: world.alone(5, "greedy"), longer: world.alone(11, "greedy")}
        # 24 tokens are 6 pages, the last of which ends with the token that is computed for its output. With MTP a page
        # is shared where the tokens behind it, which its entries know, are the same.
        assert engine.statistics().shared_tokens_total == (20 + 20 if drafts else 20 + 24)


def test_pages_are_shared_among_texts_that_the_mtp_layers_follow_and_among_the_others(world: World) -> None:
    engine = Engine(world.model, EngineOptions(page_tokens=4, num_drafts=1))
    for follows, shared in ((False, 0), (True, 0), (True, 20), (False, 20)):
        engine._adaptive.follows = lambda running, follows=follows: follows  # type: ignore[method-assign, misc]
        before = engine.statistics().shared_tokens_total
        request = engine.add(Request(PROMPTS[5], ASKED["greedy"]))
        assert run(engine)[request] == world.alone(5, "greedy")
        assert engine.statistics().shared_tokens_total - before == shared


def test_continuations_of_one_request_share_its_prompt_and_have_seeds_of_their_own(world: World) -> None:
    parameters = SamplingParameters(9, temperature=1.4, seed=31)
    engine = Engine(world.model, EngineOptions(page_tokens=4, num_drafts=1, adapt_drafts=False))
    engine.add(Request(PROMPTS[5], parameters, num_sequences=4))
    texts: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.token is not None
            texts.setdefault(output.index, []).append(output.token.id)
        engine.check_integrity()
    for index in range(4):
        alone = SamplingParameters(9, temperature=1.4, seed=31 + index)
        assert texts[index] == [token.id for token in generate(world.model, PROMPTS[5], alone)]
    assert engine.statistics().shared_tokens_total == 3 * 20
    assert_all_free(engine)


def test_cancelling_frees_every_continuation_at_any_moment(world: World) -> None:
    for steps in range(12):
        engine = Engine(world.model, EngineOptions(page_tokens=3, num_drafts=2, max_running=2, max_step_tokens=9))
        kept = engine.add(Request(PROMPTS[3], ASKED["greedy"]))
        gone = engine.add(Request(PROMPTS[5], ASKED["long"], num_sequences=3))
        texts: dict[int, list[int]] = {}
        for _ in range(steps):
            collect(engine.step(), texts)
        engine.cancel(gone)
        engine.cancel(gone)
        engine.cancel(77)
        engine.check_integrity()
        collect_rest = run(engine)
        assert texts.get(kept, []) + collect_rest.get(kept, []) == world.alone(3, "greedy")
        assert gone not in collect_rest


def test_bfloat16_parts_from_plain_generation_only_where_two_tokens_are_nearly_equal(
    tiny_config: ModelConfig, build: Build
) -> None:
    model = build(tiny_config, dtype=torch.bfloat16)
    parameters = SamplingParameters(12, temperature=0, top_logprobs=2)
    engine = Engine(model, EngineOptions(page_tokens=4, num_drafts=2, adapt_drafts=False, max_step_tokens=20))
    ids = [engine.add(Request(prompt, parameters)) for prompt in PROMPTS]
    told: dict[int, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            told.setdefault(output.request_id, []).append(output)
    for request_id, prompt in zip(ids, PROMPTS, strict=True):
        for output, token in zip(told[request_id], generate(model, prompt, parameters), strict=True):
            assert output.token is not None
            if output.token.id != token.id:
                (_, likeliest), (_, next_one) = token.top
                assert likeliest - next_one < 0.02
                break


# Drafts


@pytest.mark.parametrize(("modules", "drafts"), [(1, 1), (1, 4), (2, 1), (3, 4)])
@pytest.mark.slow
def test_drafts_are_those_of_a_single_text_however_it_is_cut_shared_or_preempted(
    tiny_config: ModelConfig, build: Build, modules: int, drafts: int
) -> None:
    """In float64, against an engine with one sequence, which is held against what the modules see in training."""
    model = build(tiny_config.model_copy(update={"num_nextn_predict_layers": modules}))
    seen: dict[tuple[int, ...], list[int]] = {}
    parameters = SamplingParameters(16, temperature=0)
    for prompt in PROMPTS:
        engine = Engine(model, EngineOptions.single_stream(drafts))
        engine.add(Request(prompt, parameters))
        while engine.has_work:
            engine.step()
            seen |= {tuple(sequence.tokens): sequence.drafts for sequence in engine._scheduler.running}
    compared = 0
    for num_pages, step_tokens in ((18, 11), (60, 50)):
        engine = Engine(
            model,
            EngineOptions(
                page_tokens=4,
                cache_bytes=pages(model, num_pages, 4),
                num_drafts=drafts,
                adapt_drafts=False,
                max_step_tokens=step_tokens,
                max_running=6,
            ),
        )
        inner = engine._drafter.draft

        def look(wanted: Mapping[SequenceState, int], inner: Any = inner) -> None:
            nonlocal compared
            inner(wanted)
            for sequence in wanted:
                made = sequence.drafts
                alone = seen.get(tuple(sequence.tokens), [])
                compared += bool(made and alone)
                assert made[: len(alone)] == alone[: len(made)] or not alone

        engine._drafter.draft = look  # type: ignore[method-assign]
        for prompt in (*PROMPTS, *PROMPTS):
            engine.add(Request(prompt, parameters))
        run(engine)
    assert engine.statistics().shared_tokens_total > 0
    assert compared > 100
