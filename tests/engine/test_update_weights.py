"""New weights between two steps: as if the engine had been built from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from abyssal.checkpoint.hf.expert_stacks import split_experts
from abyssal.config import ModelConfig
from abyssal.engine import Engine, EngineOptions, Request, SamplingParameters, prepare_for_inference
from abyssal.errors import UsageError
from abyssal.model import Transformer
from engine.oracle import generate

Build = Callable[..., Transformer]
PROMPT = [5, 17, 3, 80, 41, 9, 66, 12, 30]
GREEDY = SamplingParameters(14, temperature=0)


def released(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The weights as a model directory names them."""
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            yield from split_experts(name, tensor)


def ids(engine: Engine, prompt: list[int], parameters: SamplingParameters = GREEDY) -> list[int]:
    return [output.token.id for output in engine.stream(Request(prompt, parameters)) if output.token]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("drafts", [0, 2])
def test_an_engine_with_new_weights_equals_one_that_was_built_from_them(
    variant: ModelConfig, build: Build, drafts: int, dtype: torch.dtype
) -> None:
    """Also where it has pages that the old weights filled, and packed weights; tokens and log-probabilities alike."""
    old, new = build(variant, 3, dtype, cached=False), build(variant, 4, dtype, cached=False)
    weights = list(released(new))
    prepare_for_inference(old)
    options = EngineOptions.single_stream(drafts if variant.num_nextn_predict_layers else 0, share_prefixes=True)
    engine = Engine(old, options)
    before = ids(engine, PROMPT)
    engine.update_weights(iter(weights))
    prepare_for_inference(new)
    fresh = Engine(new, options)
    for parameters in (GREEDY, SamplingParameters(14, temperature=1.2, seed=6)):
        request = Request(PROMPT, parameters)
        assert [o.token for o in engine.stream(request)] == [o.token for o in fresh.stream(request)]
    assert ids(engine, PROMPT) != before
    engine.check_integrity()


def test_sequences_under_way_keep_their_tokens_and_go_on_with_the_new_weights(
    tiny_config: ModelConfig, build: Build
) -> None:
    old, new = build(tiny_config, 3), build(tiny_config, 4)
    engine = Engine(old, EngineOptions(page_tokens=4, num_drafts=2, adapt_drafts=False, max_running=2))
    prompts = {engine.add(Request(prompt, GREEDY)): prompt for prompt in (PROMPT, [60, 2], [33])}
    said: dict[int, list[int]] = {request_id: [] for request_id in prompts}

    def step() -> None:
        for output in engine.step():
            assert output.token is not None
            said[output.request_id].append(output.token.id)
        engine.check_integrity()

    for _ in range(5):
        step()
    by_old = {request_id: list(tokens) for request_id, tokens in said.items()}
    engine.update_weights(released(new))
    while engine.has_work:
        step()
    assert sum(map(bool, by_old.values())) == 2
    for request_id, prompt in prompts.items():
        start = by_old[request_id]
        assert start == [token.id for token in generate(old, prompt, GREEDY)][: len(start)]
        rest = SamplingParameters(14 - len(start), temperature=0)
        assert said[request_id][len(start) :] == [token.id for token in generate(new, [*prompt, *start], rest)]


def test_scores_that_are_not_complete_begin_again(tiny_config: ModelConfig, build: Build) -> None:
    old, new = build(tiny_config, 3), build(tiny_config, 4)
    engine, request = Engine(old, EngineOptions(4, 2, 4, num_drafts=0)), Request(PROMPT, GREEDY, 0, prompt_logprobs=2)
    engine.add(request)
    engine.step()
    engine.update_weights(released(new))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    (wanted,) = Engine(new, EngineOptions(4, 2, 4, num_drafts=0)).stream(request)
    assert [output.prompt_logprobs for output in outputs] == [wanted.prompt_logprobs]


Weights = list[tuple[str, Tensor]]
FAULTS: dict[str, Callable[[Weights], Weights]] = {
    r"weights: missing: (model\.|lm_head)": lambda weights: weights[:-1],
    r"model\.layers\.0\.x: not a tensor of this model": lambda weights: [*weights, ("model.layers.0.x", weights[0][1])],
    "comes twice": lambda weights: [*weights, weights[3]],
    r"has the shape \[96, 20\], must have \[97, 20\]": lambda weights: [
        (weights[0][0], weights[0][1][1:]),
        *weights[1:],
    ],
    "values that are not finite": lambda weights: [*weights[:-1], (weights[-1][0], weights[-1][1] / 0)],
}


@pytest.mark.parametrize("message", FAULTS)
def test_weights_that_do_not_fit_change_nothing(tiny_config: ModelConfig, build: Build, message: str) -> None:
    model = build(tiny_config, 3)
    engine = Engine(model, EngineOptions(page_tokens=4, num_drafts=0))
    before = ids(engine, PROMPT)
    request_id = engine.add(Request(PROMPT, GREEDY))
    engine.step()
    with pytest.raises(UsageError, match=message):
        engine.update_weights(FAULTS[message](list(released(build(tiny_config, 4)))))
    assert engine.is_open(request_id)
    assert engine.statistics().num_running == 1
    engine.cancel(request_id)
    assert ids(engine, PROMPT) == before
    assert engine.statistics().shared_tokens_total > 0
