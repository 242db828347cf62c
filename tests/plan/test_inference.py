"""Serving: the published bounds, MTP's ceilings, and what a decoding step is made of."""

from __future__ import annotations

import random

import pytest

from abyssal.config import ModelConfig, load_recipe
from abyssal.plan.calibration import Calibration
from abyssal.plan.hardware import packaged_chips, parse_cluster
from abyssal.plan.inference import (
    compute_bound_batch,
    decode_step,
    draft_bytes,
    expert_parallel_bound,
    experts_touched,
    inference_facts,
    mtp_ceiling,
    prefill_rate,
    step_bytes,
    unit_sizes,
)

V3 = load_recipe("v3_671b").model
H800 = parse_cluster("h800:2048", packaged_chips())


@pytest.mark.parametrize(("bandwidth", "milliseconds", "tokens"), [(50e9, 14.76, 67), (900e9, 0.82, 1200)])
def test_expert_parallel_bound_is_the_published_one(bandwidth: float, milliseconds: float, tokens: float) -> None:
    """With 7K read as 7,000, as printed."""
    seconds = expert_parallel_bound(bandwidth, hidden_size=7000, layers=61)
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.01)
    assert 1 / seconds == pytest.approx(tokens, rel=0.02)


def other_shape(**changes: int) -> ModelConfig:
    """The two shapes of peers' figures that stand in no recipe."""
    fields = {
        "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536, "moe_intermediate_size": 192,
        "num_hidden_layers": 8, "num_nextn_predict_layers": 1, "num_attention_heads": 8, "q_lora_rank": 192,
        "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 32,
        "num_experts_per_tok": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


LARGER = {
    "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "q_lora_rank": 384, "kv_lora_rank": 256,
    "n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 4, "moe_intermediate_size": 512,
    "intermediate_size": 3072,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "at_70", "at_85"), [(V3, 1.07, 1.17), (other_shape(), 0.97, 1.05), (other_shape(**LARGER), 1.00, 1.09)]
)
def test_mtp_ceiling_at_batch_one_is_what_was_worked_out_by_hand(
    model: ModelConfig, at_70: float, at_85: float
) -> None:
    assert mtp_ceiling(model, 1, 0.70) == pytest.approx(at_70, abs=0.006)
    assert mtp_ceiling(model, 1, 0.85) == pytest.approx(at_85, abs=0.006)


def test_mtp_ceiling_nears_the_published_gain_at_large_batches_only() -> None:
    ceilings = [mtp_ceiling(V3, batch, 0.85, context=4096) for batch in (1, 8, 64, 256)]
    assert ceilings[0] < 1.2
    assert ceilings[1] < ceilings[0]  # the second token's experts come before they are shared
    assert 1.75 < ceilings[-1] < 1.85  # 1.8 is published at 85 to 90% acceptance
    assert mtp_ceiling(V3, 256, 0.0) < 1


def test_touched_experts_are_those_of_random_routing() -> None:
    generator = random.Random(3)
    for tokens in (1, 2, 7, 40):
        draws = [len({e for _ in range(tokens) for e in generator.sample(range(256), 8)}) for _ in range(400)]
        assert experts_touched(V3, tokens) == pytest.approx(sum(draws) / len(draws), rel=0.02)


def test_one_token_reads_what_it_activates_and_a_cached_token_its_latents() -> None:
    assert step_bytes(V3, 1) == pytest.approx(36_625_618_432, rel=1e-3)
    assert step_bytes(V3, 1, cached=10) - step_bytes(V3, 1) == pytest.approx(702_720)
    assert draft_bytes(V3, 1) == pytest.approx(1_614_779_648, rel=1e-3)


def test_decoding_turns_from_memory_to_arithmetic_at_the_batch_that_is_named() -> None:
    chip, context = H800.chip, 4096
    batch = compute_bound_batch(V3, chip, Calibration(), devices=320, context=context)
    assert batch is not None
    for requests, computes in ((batch - 1, False), (batch, True)):
        step = decode_step(V3, chip, Calibration(), devices=320, batch=requests, context=context)
        assert (step.arithmetic_s >= step.memory_s) == computes
    assert compute_bound_batch(V3, chip, Calibration(), devices=320, context=context, most=batch - 1) is None


def test_decode_step_takes_its_longest_part_and_grows_with_batch_and_context() -> None:
    chip = H800.chip
    steps = [
        decode_step(V3, chip, Calibration(), devices=320, batch=batch, context=context)
        for batch, context in ((8, 1000), (8, 9000), (64, 9000))
    ]
    for step in steps:
        assert step.seconds == max(step.memory_s, step.arithmetic_s, step.communication_s)
    assert steps[0].memory_s < steps[1].memory_s < steps[2].memory_s
    assert steps[0].communication_s == steps[1].communication_s
    # the cache's part of the difference, by hand
    cached = 8 * 8000 * 70_272 / (3.35e12 * 0.9)
    assert steps[1].memory_s - steps[0].memory_s == pytest.approx(cached)


def test_published_rates_lie_below_the_ceilings() -> None:
    """A node of eight: 14.8k tokens/s out at 4,989 cached tokens; 52.3k tokens/s in (SGLang, 96 H100)."""
    step = decode_step(V3, H800.chip, Calibration(), devices=144, batch=88, context=4989)
    assert 14_800 / 8 < step.tokens_per_device_s < 2.5 * 14_800 / 8
    h100 = parse_cluster("h100:96", packaged_chips())
    assert 52_300 / 8 < prefill_rate(V3, h100, Calibration(), devices=32, length=4096) < 1.5 * 52_300 / 8


def test_units_are_the_reports_where_they_can_be() -> None:
    assert unit_sizes(V3, H800) == (32, 320)
    assert unit_sizes(V3, parse_cluster("h800:64", packaged_chips())) == (32, 64)
    assert unit_sizes(load_recipe("v3_16b").model, H800) == (32, 64)
    assert unit_sizes(load_recipe("demo").model, parse_cluster("h100:1", packaged_chips())) == (1, 1)


def test_facts_of_a_model_without_mtp_on_one_device_have_neither_ceiling_nor_bound() -> None:
    model = load_recipe("demo").model.model_copy(update={"num_nextn_predict_layers": 0})
    facts = inference_facts(model, parse_cluster("h100:1", packaged_chips()), Calibration())
    assert facts["mtp_ceiling"] == []
    assert facts["decode"]["expert_parallel_bound_s"] is None
