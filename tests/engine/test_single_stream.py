from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from abyssal.config import ModelConfig
from abyssal.engine import Engine, EngineOptions, Request, SamplingParameters, new_token_limit
from abyssal.engine.paged_cache import PagedLatentCache, TokenRange
from abyssal.engine.sampler import Sampler
from abyssal.errors import ModelDirectoryError, UsageError
from abyssal.model import AbsorbedCore, Context, Transformer
from engine.oracle import generate, single_stream

Build = Callable[..., Transformer]
GREEDY = SamplingParameters(max_new_tokens=12, temperature=0)
PROMPT = [5, 17, 3, 80, 41, 9, 66]


def last_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    """A full forward pass without any cache."""
    with torch.no_grad():
        return model.logits(model(torch.tensor(ids), Context.packed([len(ids)])))[-1]


def test_greedy_generation_over_the_cache_is_the_argmax_of_full_forward_passes(
    variant: ModelConfig, build: Build
) -> None:
    """Of the oracle that all tests of the engine use."""
    cached, plain = build(variant), build(variant, cached=False)
    ids = list(PROMPT)
    for token in generate(cached, PROMPT, GREEDY):
        logits = last_logits(plain, ids)
        assert token.id == int(logits.argmax())
        assert token.logprob == pytest.approx(float(logits.log_softmax(-1)[token.id]), abs=1e-9)
        ids.append(token.id)
    assert len(ids) == len(PROMPT) + 12
    assert len(set(ids[len(PROMPT) :])) > 2, "a model that repeats itself proves little"


@pytest.mark.parametrize("tokens", [1, 3, 7, 100])
def test_log_probabilities_do_not_depend_on_how_the_prompt_is_cut_into_passes(
    variant: ModelConfig, build: Build, tokens: int
) -> None:
    parameters = SamplingParameters(1, temperature=0, top_logprobs=variant.vocab_size)
    (token,) = single_stream(build(variant), PROMPT, parameters, max_step_tokens=tokens)
    wanted = last_logits(build(variant, cached=False), PROMPT).log_softmax(-1)
    assert len(token.top) == variant.vocab_size
    for other, logprob in token.top:
        assert logprob == pytest.approx(float(wanted[other]), abs=1e-9)


def test_generation_in_fp32_gives_the_tokens_of_float64(tiny_config: ModelConfig, build: Build) -> None:
    wide = [token.id for token in single_stream(build(tiny_config), PROMPT, GREEDY)]
    narrow = [token.id for token in single_stream(build(tiny_config, dtype=torch.float32), PROMPT, GREEDY)]
    assert narrow == wide


def test_bfloat16_generates_from_a_bfloat16_cache(tiny_config: ModelConfig, build: Build) -> None:
    tokens = list(single_stream(build(tiny_config, dtype=torch.bfloat16), PROMPT, GREEDY))
    assert len(tokens) == 12
    assert all(token.logprob < 0 for token in tokens)


def test_main_layers_share_a_cache_and_each_mtp_module_is_the_only_layer_of_its_own(
    tiny_config: ModelConfig, build: Build
) -> None:
    model = build(tiny_config.model_copy(update={"num_nextn_predict_layers": 2}))
    cores = [layer.self_attn.core for layer in model.model.layers]
    assert all(isinstance(core, AbsorbedCore) for core in cores)
    assert [core.layer for core in cores] == [0, 1, 2, 0, 0]


def test_generation_ends_with_an_end_token(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config)
    ids = [token.id for token in single_stream(model, PROMPT, GREEDY)]
    place = next(n for n, token in enumerate(ids) if n >= 3 and token not in ids[:n])
    ended = [token.id for token in single_stream(model, PROMPT, GREEDY, end_ids={ids[place], 1000})]
    assert ended == ids[: place + 1]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config)

    def ids(seed: int) -> list[int]:
        return [
            t.id for t in single_stream(model, PROMPT, SamplingParameters(20, temperature=1.5, top_p=0.9, seed=seed))
        ]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_several_generations_run_by_turns_on_one_model(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config)
    prompts = (PROMPT, [60, 2], [33])
    alone = [list(single_stream(model, prompt, GREEDY)) for prompt in prompts]
    turns = list(zip(*(single_stream(model, prompt, GREEDY) for prompt in prompts), strict=True))
    assert [list(column) for column in zip(*turns, strict=True)] == alone


def test_generation_leaves_the_callers_autograd_mode_alone(tiny_config: ModelConfig, build: Build) -> None:
    for _ in single_stream(build(tiny_config), PROMPT, GREEDY):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_the_number_of_tokens_is_cut_where_the_context_ends(tiny_config: ModelConfig, build: Build) -> None:
    context = tiny_config.max_position_embeddings
    assert new_token_limit(tiny_config, 10, 5) == 5
    assert new_token_limit(tiny_config, context - 3, 5) == 3
    prompt = [1 + n % 90 for n in range(context - 3)]
    assert len(list(single_stream(build(tiny_config), prompt, GREEDY))) == 3


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config)
    assert len(list(single_stream(model, [7] * 63, GREEDY))) == 1
    with pytest.raises(UsageError, match=r"prompt: has 64 tokens, .* at most 63 are possible"):
        single_stream(model, [7] * 64, GREEDY)


@pytest.mark.parametrize("prompt", [[3, 97], [-1, 3]], ids=str)
def test_ids_beyond_the_vocabulary_are_refused(tiny_config: ModelConfig, build: Build, prompt: list[int]) -> None:
    with pytest.raises(UsageError, match=r"token id (97|-1) is not one of the model's, 0 to 96"):
        single_stream(build(tiny_config), prompt, GREEDY)


def test_an_empty_prompt_is_refused(tiny_config: ModelConfig, build: Build) -> None:
    with pytest.raises(UsageError, match="prompt: has no tokens"):
        single_stream(build(tiny_config), [], GREEDY)


def test_a_model_that_was_not_prepared_is_refused_instead_of_forgetting(tiny_config: ModelConfig, build: Build) -> None:
    with pytest.raises(RuntimeError, match="use_latent_cache"):
        next(single_stream(build(tiny_config, cached=False), PROMPT, GREEDY))


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_end_in_a_sentence(
    tiny_config: ModelConfig, build: Build, value: float, temperature: float
) -> None:
    model = build(tiny_config)
    with torch.no_grad():
        model.lm_head.weight[4] = value
    with pytest.raises(ModelDirectoryError, match="logits are not finite"):
        next(single_stream(model, PROMPT, SamplingParameters(temperature=temperature)))


def test_logprobs_are_those_before_temperature_and_top_p() -> None:
    logits = torch.tensor([0.1, 2.0, 1.0, -3.0])
    parameters = SamplingParameters(temperature=5.0, top_p=0.7, seed=0)
    sampler = Sampler(parameters, PROMPT)
    for token in [sampler.choose(logits) for _ in range(10)]:
        assert token.logprob == pytest.approx(float(logits.log_softmax(-1)[token.id]), abs=1e-6)


def test_one_sequence_equals_the_oracle_to_the_bit(tiny_config: ModelConfig, build: Build) -> None:
    """In fp32, over pages side by side: tokens and log-probabilities, greedy and seeded, whole prompts in one pass."""
    model = build(tiny_config, dtype=torch.float32)
    for parameters in (GREEDY, SamplingParameters(40, temperature=1.3, top_p=0.9, seed=4)):
        assert list(single_stream(model, PROMPT, parameters)) == generate(model, PROMPT, parameters)


def test_a_later_token_costs_one_row_a_layer(
    tiny_config: ModelConfig, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in passes of 4 (4 + 3 tokens), then one token a pass, the last token never fed back."""
    passes = []
    begin = PagedLatentCache.begin

    def watch(cache: PagedLatentCache, ranges: list[TokenRange], first_layer: int = 0) -> Context:
        passes.extend((new.start, new.count) for new in ranges)
        return begin(cache, ranges, first_layer)

    monkeypatch.setattr(PagedLatentCache, "begin", watch)
    list(single_stream(build(tiny_config), PROMPT, SamplingParameters(4, temperature=0), max_step_tokens=4))
    assert passes == [(0, 4), (4, 3), (7, 1), (8, 1), (9, 1)]
    assert all(start + n == following for (start, n), (following, _) in pairwise(passes))


def test_leaving_a_stream_frees_its_pages_and_one_that_was_never_read_takes_none(
    tiny_config: ModelConfig, build: Build
) -> None:
    engine = Engine(build(tiny_config), EngineOptions.single_stream())
    outputs = engine.stream(Request(PROMPT, GREEDY))
    assert not engine.has_work
    next(outputs)
    assert engine.statistics().num_pages_used == 1
    outputs.close()
    assert not engine.has_work
    assert engine.statistics().num_pages_used == 0
    engine.check_integrity()
