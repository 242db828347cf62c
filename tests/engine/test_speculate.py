"""Speculation changes how often the main model runs, never what it says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.config import ModelConfig, RopeScaling
from abyssal.engine import (
    DraftStatistics,
    Engine,
    EngineOptions,
    Request,
    SamplingParameters,
    ScoredToken,
    load_model,
    prepare_for_inference,
)
from abyssal.engine.drafter import MTPDrafter
from abyssal.engine.sequence import SequenceState
from abyssal.errors import ModelDirectoryError, UsageError
from abyssal.model import Context, Transformer, next_tokens
from abyssal.ops.kernels import choose_kernels
from engine.oracle import generate, generate_text

Build = Callable[..., Transformer]
PROMPT = [5, 17, 3, 80, 41, 9, 66]
YARN = RopeScaling(factor=16.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)
SHAPES: dict[str, dict[str, Any]] = {
    "one module": {},
    "no q_lora": {"q_lora_rank": None},
    "YaRN, two modules": {"rope_scaling": YARN, "num_nextn_predict_layers": 2},
    "tied, three modules": {"tie_word_embeddings": True, "num_nextn_predict_layers": 3},
}
#: What a draft is, given the tokens that the main model will say at this place and after it.
STUBS: dict[str, Callable[[int, int], int] | None] = {
    "of the modules": None,
    "always right": lambda place, token: token,
    "always wrong": lambda place, token: (token + 1) % 97,
    "right, then wrong": lambda place, token: token if place < 2 else (token + 1) % 97,
}


def ids_of(tokens: Iterable[Any]) -> list[int]:
    return [token.id for token in tokens]


def speculate(
    model: Transformer, prompt: Sequence[int], parameters: SamplingParameters, drafts: int = 3, **kwargs: Any
) -> tuple[list[ScoredToken], DraftStatistics]:
    engine = Engine(model, EngineOptions.single_stream(drafts), end_ids=kwargs.get("end_ids", ()))
    outputs = engine.stream(Request(prompt, parameters))
    return [output.token for output in outputs if output.token], engine.draft_statistics


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let drafts be made from the tokens that will come; the modules run all the same."""

    def replace(future: list[int], rule: Callable[[int, int], int] | None) -> None:
        if rule is None:
            return
        draft = MTPDrafter.draft

        def made_up(drafter: MTPDrafter, wanted: Mapping[SequenceState, int]) -> None:
            draft(drafter, wanted)
            for sequence, count in wanted.items():
                assert len(sequence.drafts) == count
                start = len(sequence.tokens) - sequence.num_prompt_tokens
                sequence.drafts = [rule(place, token) for place, token in enumerate(future[start : start + count])]

        monkeypatch.setattr(MTPDrafter, "draft", made_up)

    return replace


@pytest.mark.parametrize("drafts", [1, 2, 4])
@pytest.mark.parametrize("rule", STUBS)
@pytest.mark.parametrize("shape", SHAPES)
def test_speculative_text_is_the_greedy_one_in_fp32(
    tiny_config: ModelConfig, build: Build, stub: Callable[..., None], shape: str, rule: str, drafts: int
) -> None:
    """48 cases of 60 tokens each."""
    model = build(tiny_config.model_copy(update={**SHAPES[shape], "max_position_embeddings": 128}), dtype=torch.float32)
    parameters = SamplingParameters(60, temperature=0)
    plain = generate(model, PROMPT, parameters)
    wanted = ids_of(plain)
    stub(wanted, STUBS[rule])
    found, speculation = speculate(model, PROMPT, parameters, drafts)
    assert ids_of(found) == wanted
    for mine, other in zip(found, plain, strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert len(set(wanted)) > 3, "a model that repeats itself proves little"
    assert speculation.tokens == 59  # the first comes of the prompt
    if rule == "always right":
        assert speculation.accepted == speculation.drafted
        assert speculation.passes == math.ceil(59 / (drafts + 1))
    elif rule == "always wrong":
        assert speculation.accepted == [0] * drafts
        assert speculation.passes == 59
    elif rule == "right, then wrong":
        assert speculation.accepted[:2] == speculation.drafted[:2]
        assert speculation.accepted[2:] == [0] * (drafts - min(drafts, 2))


@pytest.mark.slow
def test_speculative_text_is_the_greedy_one_over_1000_tokens(
    tiny_config: ModelConfig, build: Build, stub: Callable[..., None]
) -> None:
    """In fp32, with weights packed as `load_model` packs them, and drafts that are right and wrong by turns."""
    config = tiny_config.model_copy(update={"num_hidden_layers": 2, "max_position_embeddings": 1024})
    model = build(config, dtype=torch.float32)
    model.kernels = choose_kernels(torch.device("cpu"), torch.float32, "decode")
    prepare_for_inference(model)
    parameters = SamplingParameters(1000, temperature=0)
    wanted = ids_of(generate(model, PROMPT, parameters))
    stub(wanted, STUBS["right, then wrong"])
    found, speculation = speculate(model, PROMPT, parameters, 3)
    assert len(found) == 1000
    assert ids_of(found) == wanted
    assert speculation.accepted[2] == 0 < speculation.accepted[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_seed_gives_the_same_tokens_with_drafts_and_without(
    tiny_config: ModelConfig, build: Build, shape: str
) -> None:
    """In float64, where how a pass is cut does not matter: a token takes one random number either way."""
    model = build(tiny_config.model_copy(update=SHAPES[shape]))
    for seed, drafts in itertools.product(range(3), (1, 3)):
        parameters = SamplingParameters(30, temperature=1.2, top_p=0.9, top_k=50, seed=seed)
        assert ids_of(speculate(model, PROMPT, parameters, drafts)[0]) == ids_of(generate(model, PROMPT, parameters))


# Which places the modules see


def trained_prediction(model: Transformer, ids: list[int], k: int) -> int:
    """What module k says behind the last entry that it has in training."""
    ctx = Context.packed([len(ids)])
    tokens = torch.tensor(ids)
    with torch.no_grad():
        further = next_tokens(tokens, len(model.mtp_modules))
        hidden, _ = list(model.predict_further(model(tokens, ctx), further, ctx))[k - 1]
        return int(model.logits(hidden[-1]).argmax())


@pytest.mark.parametrize("tokens", [2, 5, 256])
@pytest.mark.parametrize("modules", [1, 2, 3])
def test_drafts_are_what_the_modules_predict_in_training(
    tiny_config: ModelConfig, build: Build, monkeypatch: pytest.MonkeyPatch, modules: int, tokens: int
) -> None:
    """However the prompt was cut, module k drafts what it says over the whole sequence with the drafts before."""
    config = tiny_config.model_copy(update={"num_nextn_predict_layers": modules})
    model, plain = build(config), build(config, cached=False)
    seen: list[tuple[list[int], list[int]]] = []
    draft = MTPDrafter.draft

    def watch(drafter: MTPDrafter, wanted: Mapping[SequenceState, int]) -> None:
        draft(drafter, wanted)
        seen.extend((list(sequence.tokens), list(sequence.drafts)) for sequence in wanted)

    monkeypatch.setattr(MTPDrafter, "draft", watch)
    parameters = SamplingParameters(25, temperature=1.5, seed=2)
    options = EngineOptions(tokens, 1, 4, num_drafts=modules, adapt_drafts=False)
    for prompt in (PROMPT, [4]):
        seen.clear()
        list(Engine(model, options).stream(Request(prompt, parameters)))
        assert sum(bool(drafts) for _, drafts in seen) > 5
        for ids, drafts in seen:
            for k, token in enumerate(drafts, start=1):
                assert trained_prediction(plain, [*ids, *drafts[: k - 1]], k) == token


def test_the_last_module_goes_on_from_its_own_normed_output(tiny_config: ModelConfig, build: Build) -> None:
    """The second draft of one module: an entry of its own behind the newest one, on the first draft's output."""
    model, plain = build(tiny_config), build(tiny_config, cached=False)
    ids = [*PROMPT, 50]
    tokens = torch.tensor(ids)
    (module,) = plain.mtp_modules
    with torch.no_grad():
        h = plain(tokens[:-1], Context.packed([7]))
        entries = plain.with_rotary(Context.packed([7]))
        first = module.predict(h, plain.embed(tokens[1:]), entries)
        d1 = int(plain.logits(first[-1]).argmax())
        longer = plain.with_rotary(Context.packed([8]))
        stream = torch.cat((h, first[-1:]))  # the module's output stands in for the main model's
        second = module.predict(stream, plain.embed(torch.tensor([*ids[1:], d1])), longer)
        d2 = int(plain.logits(second[-1]).argmax())
    engine = Engine(model, EngineOptions.single_stream(2))
    engine.add(Request(PROMPT, SamplingParameters(9, temperature=0, logit_bias=((50, 1e6),))))
    engine.step()
    (sequence,) = engine._scheduler.running
    assert sequence.tokens == ids
    assert sequence.drafts == [d1, d2]


def test_drafts_agree_where_the_module_has_learned_the_main_models_output(
    tiny_config: ModelConfig, build: Build
) -> None:
    """A module that passes the main model's own computation through is accepted; a wrong input would show here.

    The embedding of token i + 1 alone decides the main model's output here (blocks add nothing), and the module, with
    eh_proj taking the embedding half, computes the same.
    """
    model = build(tiny_config.model_copy(update={"num_nextn_predict_layers": 1}), dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for name, parameter in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "mlp.experts.down_proj")):
                    parameter.zero_()
        (module,) = model.mtp_modules
        width = tiny_config.hidden_size
        module.eh_proj.weight.copy_(torch.cat((torch.eye(width), torch.zeros(width, width)), -1))
    found, speculation = speculate(model, PROMPT, SamplingParameters(30, temperature=0), 4)
    assert ids_of(found) == ids_of(generate(model, PROMPT, SamplingParameters(30, temperature=0)))
    assert speculation.accepted == speculation.drafted


# Where a text ends


def test_an_end_token_within_an_accepted_span_ends_the_text(
    tiny_config: ModelConfig, build: Build, stub: Callable[..., None]
) -> None:
    model = build(tiny_config)
    parameters = SamplingParameters(30, temperature=0)
    plain = ids_of(generate(model, PROMPT, parameters))
    stub(plain, STUBS["always right"])
    for place in range(3, 20):
        if plain[place] in plain[:place]:
            continue
        found, _ = speculate(model, PROMPT, parameters, 5, end_ids={plain[place]})
        assert ids_of(found) == plain[: place + 1]


def test_a_stop_string_within_an_accepted_span_ends_the_text(
    model_directory: Callable[..., Path], stub: Callable[..., None]
) -> None:
    loaded = load_model(model_directory())
    prompt = loaded.encode_prompt("def f")
    free = generate_text(loaded, prompt, SamplingParameters(40, temperature=0))
    text = "".join(chunk.text for chunk in free)
    stub([chunk.token.id for chunk in free], STUBS["always right"])
    for place in range(2, len(text) - 2, 3):
        parameters = SamplingParameters(40, temperature=0, stop=(text[place : place + 2],))
        plain = generate_text(loaded, prompt, parameters)
        found = Engine.of(loaded, EngineOptions.single_stream(4)).stream(Request(prompt, parameters))
        assert [(output.text, output.token and output.token.id, output.finish_reason) for output in found] == [
            (chunk.text, chunk.token.id, chunk.finish_reason) for chunk in plain
        ]


@pytest.mark.parametrize("rule", ["of the modules", "always right"])
@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("room", [1, 2, 3, 9])
def test_text_goes_to_the_last_place_of_the_context_and_no_draft_beyond(
    tiny_config: ModelConfig, build: Build, stub: Callable[..., None], room: int, modules: int, rule: str
) -> None:
    model = build(tiny_config.model_copy(update={"num_nextn_predict_layers": modules}))
    prompt = [1 + n % 90 for n in range(tiny_config.max_position_embeddings - room)]
    parameters = SamplingParameters(50, temperature=0)
    plain = ids_of(generate(model, prompt, parameters))
    stub(plain, STUBS[rule])
    found, speculation = speculate(model, prompt, parameters, 4)
    assert ids_of(found) == plain
    assert len(found) == room
    assert sum(speculation.drafted) <= room * (room - 1) // 2


def test_bfloat16_drafts_from_a_bfloat16_cache(tiny_config: ModelConfig, build: Build) -> None:
    found, speculation = speculate(build(tiny_config, dtype=torch.bfloat16), PROMPT, SamplingParameters(12), 2)
    assert len(found) == 12
    assert sum(speculation.drafted) > 0


# Counts and faults


def test_counts_are_by_the_place_of_the_draft() -> None:
    speculation = DraftStatistics(2)
    assert str(speculation) == "nothing was drafted"
    for drafts, accepted in ((2, 2), (2, 0), (2, 1), (1, 1), (0, 0)):
        speculation.count_pass(drafts)
        for place in range(accepted + 1):
            speculation.count_token(place, accepted=place < accepted)
    assert (speculation.drafted, speculation.accepted) == ([4, 3], [3, 1])
    assert (speculation.passes, speculation.tokens) == (5, 9)
    assert str(speculation) == "4/7 drafts accepted, 57% (by place: 3/4, 1/3); 1.80 tokens a pass"


def test_there_is_a_draft_for_each_module_unless_more_are_asked_for(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config.model_copy(update={"num_nextn_predict_layers": 2}))
    for asked, made in ((None, 2), (5, 5)):
        assert Engine(model, EngineOptions(num_drafts=asked)).draft_statistics.num_drafts == made


def test_faults_are_those_of_generation_without_drafts(tiny_config: ModelConfig, build: Build) -> None:
    model = build(tiny_config)
    with pytest.raises(UsageError, match="prompt: has no tokens"):
        speculate(model, [], SamplingParameters())
    with pytest.raises(UsageError, match="prompt: has 64 tokens"):
        speculate(model, [7] * 64, SamplingParameters())
    with torch.no_grad():
        model.lm_head.weight[4] = float("nan")
    with pytest.raises(ModelDirectoryError, match="logits are not finite"):
        speculate(model, PROMPT, SamplingParameters())
