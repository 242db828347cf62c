"""Bytes on links: against routing drawn at random, and against counts by hand."""

from __future__ import annotations

import random

import pytest

from abyssal.config import ModelConfig, load_recipe
from abyssal.plan.calibration import Calibration
from abyssal.plan.communication import (
    LinkBytes,
    dispatch_bytes,
    expected_destinations,
    layer_communication,
    reduction_bytes,
    stage_boundary_bytes,
)
from abyssal.plan.hardware import Chip, packaged_chips
from abyssal.plan.layout import Layout

CHIP = Chip(
    bf16_flops=1e12, memory_bytes=1e9, memory_bandwidth=1e9, node_size=4, nvlink_bandwidth=7.0, network_bandwidth=2.0
)


def model(**changes: int) -> ModelConfig:
    return load_recipe("v3_671b").model.model_copy(update=changes)


def places_of_random_tokens(config: ModelConfig, places: int, draws: int) -> float:
    """Draw groups, then experts in them, and count the places they lie in."""
    generator = random.Random(places)
    group = config.n_routed_experts // config.n_group
    met = 0
    for _ in range(draws):
        groups = generator.sample(range(config.n_group), config.topk_group)
        allowed = [g * group + n for g in groups for n in range(group)]
        experts = generator.sample(allowed, config.num_experts_per_tok)
        met += len({expert * places // config.n_routed_experts for expert in experts})
    return met / draws


@pytest.mark.parametrize("places", [1, 2, 4, 8, 16, 64, 256])
def test_expected_places_are_those_of_random_routing(places: int) -> None:
    config = model()
    assert expected_destinations(config, places) == pytest.approx(
        places_of_random_tokens(config, places, 6000), rel=0.02
    )


def test_expected_places_without_groups_are_those_of_random_routing() -> None:
    config = model(n_group=1, topk_group=1, n_routed_experts=60, num_experts_per_tok=7)
    assert expected_destinations(config, 5) == pytest.approx(places_of_random_tokens(config, 5, 6000), rel=0.02)


def test_a_token_meets_at_most_four_nodes_and_every_device_once() -> None:
    assert 3.5 < expected_destinations(model(), 8) <= 4
    assert expected_destinations(model(), 256) == pytest.approx(8)


def test_dispatch_crosses_the_network_once_a_node_and_nvlink_to_each_device() -> None:
    config = model()
    eight_nodes = dispatch_bytes(config, Layout(ep_size=32), CHIP, 3.0)
    assert eight_nodes.network == pytest.approx(expected_destinations(config, 8) * 7 / 8 * 7168 * 3)
    assert eight_nodes.nvlink == pytest.approx(expected_destinations(config, 32) * 3 / 4 * 7168 * 3)
    one_node = dispatch_bytes(config, Layout(ep_size=4), CHIP, 3.0)
    assert one_node.network == 0
    assert one_node.nvlink == pytest.approx(expected_destinations(config, 4) * 3 / 4 * 7168 * 3)
    assert dispatch_bytes(config, Layout(ep_size=1), CHIP, 3.0) == LinkBytes()


def test_links_work_at_once_and_the_slower_one_counts() -> None:
    assert LinkBytes(nvlink=21.0, network=4.0).seconds(CHIP) == pytest.approx(3.0)
    assert LinkBytes(nvlink=7.0, network=4.0).seconds(CHIP, 0.5) == pytest.approx(4.0)
    assert LinkBytes().seconds(CHIP) == 0.0


def test_published_all_to_all_is_the_profiled_one() -> None:
    chip = packaged_chips()["h800"]
    sent = layer_communication(model(), Layout(pp_size=16, ep_size=64), chip, 4096, moe=True)
    dispatch, combine = (t.seconds(chip, Calibration().all_to_all) for t in (sent.dispatch, sent.combine))
    assert dispatch == pytest.approx((4.3e-3 + 3.4e-3) / 2, rel=0.15)
    assert combine == pytest.approx(6.2e-3, rel=0.15)
    assert sent.exposed_s(chip) == 0.0


def test_tensor_parallelism_gathers_and_scatters_what_the_other_devices_hold() -> None:
    chip = packaged_chips()["h800"]
    moe = layer_communication(model(), Layout(tp_size=4), chip, 100, moe=True)
    dense = layer_communication(model(), Layout(tp_size=4), chip, 100, moe=False)
    assert moe.tensor == LinkBytes(nvlink=2 * 100 * 3 * 7168 * 2)
    assert dense.tensor.nvlink == 2 * moe.tensor.nvlink
    assert dense.dispatch == LinkBytes()


def test_stages_send_hidden_states_and_gradients_are_reduced_over_the_slowest_link() -> None:
    assert stage_boundary_bytes(model(), Layout(pp_size=2), CHIP, 10) == LinkBytes(nvlink=10 * 7168 * 2)
    assert stage_boundary_bytes(model(), Layout(pp_size=8), CHIP, 10) == LinkBytes(network=10 * 7168 * 2)
    assert stage_boundary_bytes(model(), Layout(), CHIP, 10) == LinkBytes()
    assert reduction_bytes(100, 4, 1, CHIP, "bf16") == LinkBytes(nvlink=75 * 6)
    assert reduction_bytes(100, 4, 2, CHIP, "fp8") == LinkBytes(network=75 * 5)
    assert reduction_bytes(100, 1, 64, CHIP, "fp8") == LinkBytes()
