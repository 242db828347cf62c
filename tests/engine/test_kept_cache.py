"""A cache that outlives a call changes what runs, never what comes out."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.engine import KeptCache, SamplingParameters, Speculation, generate, generate_speculatively
from abyssal.engine.generate import run_pass
from abyssal.engine.latent_cache import ContiguousLatentCache
from abyssal.model import Transformer

Build = Callable[..., Transformer]


@pytest.fixture
def model(variant: ModelConfig, build: Build) -> Transformer:
    return build(variant)


def stream(
    model: Transformer, prompt: list[int], parameters: SamplingParameters, drafts: int, kept: KeptCache | None
) -> Iterator[Any]:
    if drafts and model.mtp_modules:
        return generate_speculatively(model, prompt, parameters, (), Speculation(drafts), kept)
    return generate(model, prompt, parameters, (), kept)


def test_random_turns_over_one_cache_give_what_fresh_caches_give(model: Transformer) -> None:
    """Prompts that extend, cut or leave the text before; drafts on and off; answers broken off; float64."""
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    kept, text, reused = KeptCache(model), [5, 9], 0
    for _ in range(14):
        if draw.random() < 0.4 or len(text) > 30:
            text = text[: draw.randint(1, min(len(text), 50))]  # of 64 places
        text = text + [draw.randrange(97) for _ in range(draw.randint(0, 6))]
        parameters = SamplingParameters(draw.randint(1, 12), temperature=draw.choice([0, 1.3]), seed=draw.randrange(99))
        drafts = draw.randint(0, 3)
        wanted = list(generate(model, text, parameters))
        stop = draw.randint(1, len(wanted))
        found = []
        for token in stream(model, text, parameters, drafts, kept):
            found.append(token)
            if len(found) == stop:
                break
        assert [token.id for token in found] == [token.id for token in wanted[:stop]], seed
        assert [token.logprob for token in found] == pytest.approx([t.logprob for t in wanted[:stop]], abs=1e-9)
        assert 0 <= kept.reused < len(text)
        kept.cache.check_integrity()
        reused += kept.reused
        text = text + [token.id for token in found]
    assert reused > 0


@pytest.mark.parametrize("drafts", [0, 2])
def test_only_what_is_new_runs(
    tiny_config: ModelConfig, build: Build, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_config)
    kept, lengths = KeptCache(model), []

    def counted(model: Transformer, tokens: torch.Tensor, cache: ContiguousLatentCache) -> torch.Tensor:
        lengths.append(len(tokens))
        return run_pass(model, tokens, cache)

    for module in ("generate", "speculate"):
        monkeypatch.setattr(sys.modules[f"abyssal.engine.{module}"], "run_pass", counted)
    prompt = list(range(20, 40))
    answer = [token.id for token in stream(model, prompt, SamplingParameters(6, temperature=0), drafts, kept)]
    assert lengths[0] == 20
    lengths.clear()
    question = [*prompt, *answer, 3, 1, 4]
    list(stream(model, question, SamplingParameters(1, temperature=0), drafts, kept))
    modules = tiny_config.num_nextn_predict_layers
    # the last token of an answer has never run; entries of the MTP modules wait for so many tokens after theirs
    assert lengths == [4] if drafts == 0 else [4 + modules]
    assert kept.reused == len(question) - lengths[0]


class BrokenOffError(Exception):
    """In place of Ctrl-C."""


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_pass_that_is_broken_off_leaves_a_cache_that_serves(
    tiny_config: ModelConfig, build: Build, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off in the middle of the layers, at every append in turn."""
    model = build(tiny_config.model_copy(update={"num_nextn_predict_layers": 2}))
    append = ContiguousLatentCache.append
    prompt, parameters = [7, 70, 17, 27], SamplingParameters(7, temperature=0)
    wanted = [token.id for token in generate(model, prompt, parameters)]
    appends = 0
    for fatal in range(1, 60, 5):
        kept, appends = KeptCache(model), 0

        def breaking(cache: ContiguousLatentCache, *args: Any, fatal: int = fatal) -> list[torch.Tensor]:
            nonlocal appends
            appends += 1
            if appends == fatal:
                raise BrokenOffError
            return append(cache, *args)

        monkeypatch.setattr(ContiguousLatentCache, "append", breaking)
        broken = False
        try:
            list(stream(model, prompt, parameters, drafts, kept))
        except BrokenOffError:
            broken = True
        monkeypatch.setattr(ContiguousLatentCache, "append", append)
        assert broken == (appends >= fatal)
        assert [token.id for token in stream(model, prompt, parameters, drafts, kept)] == wanted
