"""Pages that outlive a request change what runs, never what comes out: the turns of a conversation on one engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.engine import Engine, EngineOptions, Request, SamplingParameters
from abyssal.engine.paged_cache import PagedCacheView, PagedLatentCache, TokenRange
from abyssal.model import Context, Transformer
from engine.oracle import generate

Build = Callable[..., Transformer]


def engine_for(model: Transformer, drafts: int) -> Engine:
    return Engine(model, EngineOptions.single_stream(drafts if model.mtp_modules else 0, share_prefixes=True))


def test_random_turns_on_one_engine_give_what_fresh_engines_give(variant: ModelConfig, build: Build) -> None:
    """Prompts that extend, cut or leave the text before; answers broken off; float64."""
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    model = build(variant)
    for drafts in (0, 1, 3):
        engine, text = engine_for(model, drafts), [5, 9]
        for _ in range(8):
            if draw.random() < 0.4 or len(text) > 30:
                text = text[: draw.randint(1, min(len(text), 50))]  # of 64 places
            text = text + [draw.randrange(97) for _ in range(draw.randint(0, 6))]
            temperature = draw.choice([0, 1.3])
            parameters = SamplingParameters(draw.randint(1, 12), temperature=temperature, seed=draw.randrange(99))
            wanted = generate(model, text, parameters)
            stop = draw.randint(1, len(wanted))
            outputs = engine.stream(Request(text, parameters))
            found = [output.token for output, _ in zip(outputs, range(stop), strict=False) if output.token]
            outputs.close()
            assert [token.id for token in found] == [token.id for token in wanted[:stop]], seed
            assert [token.logprob for token in found] == pytest.approx([t.logprob for t in wanted[:stop]], abs=1e-9)
            engine.check_integrity()
            assert engine.statistics().num_pages_used == 0
            text = text + [token.id for token in found]
        assert engine.statistics().shared_tokens_total > 0, seed


@pytest.mark.parametrize("drafts", [0, 2])
def test_only_what_is_new_runs(
    tiny_config: ModelConfig, build: Build, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, lengths = engine_for(build(tiny_config), drafts), []
    begin = PagedLatentCache.begin

    def counted(cache: PagedLatentCache, ranges: list[TokenRange], first_layer: int = 0) -> Context:
        if first_layer == 0:
            lengths.append(sum(new.count for new in ranges))
        return begin(cache, ranges, first_layer)

    monkeypatch.setattr(PagedLatentCache, "begin", counted)
    prompt = list(range(20, 40))
    outputs = engine.stream(Request(prompt, SamplingParameters(6, temperature=0)))
    answer = [output.token.id for output in outputs if output.token]
    assert lengths[0] == 20
    lengths.clear()
    question = [*prompt, *answer, 3, 1, 4]
    list(engine.stream(Request(question, SamplingParameters(1, temperature=0))))
    modules = tiny_config.num_nextn_predict_layers
    # the last token of an answer has never run; entries of the MTP modules wait for so many tokens after theirs
    assert lengths == [4] if drafts == 0 else [4 + modules]


class BrokenOffError(Exception):
    """In place of Ctrl-C."""


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_pass_that_is_broken_off_leaves_an_engine_that_serves(
    tiny_config: ModelConfig, build: Build, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off in the middle of the layers, at every append in turn."""
    model = build(tiny_config.model_copy(update={"num_nextn_predict_layers": 2}))
    append = PagedCacheView.append
    request = Request([7, 70, 17, 27], SamplingParameters(7, temperature=0))
    wanted = [token.id for token in generate(model, request.prompt_ids, request.parameters)]
    appends = 0
    for fatal in range(1, 60, 5):
        engine, appends = engine_for(model, drafts), 0

        def breaking(cache: PagedCacheView, *args: Any, fatal: int = fatal) -> Any:
            nonlocal appends
            appends += 1
            if appends == fatal:
                raise BrokenOffError
            return append(cache, *args)

        monkeypatch.setattr(PagedCacheView, "append", breaking)
        broken = False
        try:
            list(engine.stream(request))
        except BrokenOffError:
            broken = True
        monkeypatch.setattr(PagedCacheView, "append", append)
        assert broken == (appends >= fatal)
        engine.check_integrity()
        assert [output.token.id for output in engine.stream(request) if output.token] == wanted


def test_the_cache_takes_memory_only_where_it_is_written_to(tiny_config: ModelConfig) -> None:
    cache = PagedLatentCache(tiny_config, 2**22, 16, torch.bfloat16, "cpu")
    assert cache.bytes > 2**32
    assert cache._storage.data_ptr() % 64 == 0
    assert not cache._storage[-1, -1].any()
