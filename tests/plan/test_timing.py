"""Times of operations: against published products, and against FLOPs counted elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from abyssal.config import load_recipe
from abyssal.plan.calibration import Calibration
from abyssal.plan.flops import forward_flops, muon_flops, training_flops
from abyssal.plan.hardware import Chip, packaged_chips
from abyssal.plan.layout import Layout
from abyssal.plan.operations import AttentionKernel, DeviceWork, Matmul, MemoryPass
from abyssal.plan.stage_costs import block_operations
from abyssal.plan.timing import CalibratedChip, PhaseTimes

#: rows, columns, depth, groups, and TFLOPS of DeepGEMM's first release on an H800.
PUBLISHED_PRODUCTS = [
    (4096, 7168, 16384, 1, 1358),
    (4096, 4096, 7168, 1, 1304),
    (4096, 2112, 7168, 1, 1058),
    (4096, 7168, 2048, 1, 1025),
    (4096, 24576, 1536, 1, 990),
    (4096, 32768, 512, 1, 590),
    (8192, 4096, 7168, 4, 1297),
    (8192, 7168, 2048, 4, 1099),
]


@pytest.fixture
def chip() -> CalibratedChip:
    return CalibratedChip(packaged_chips()["h800"], Calibration())


@pytest.mark.parametrize(("rows", "columns", "depth", "count", "tflops"), PUBLISHED_PRODUCTS)
def test_fp8_product_takes_as_long_as_published(
    rows: int, columns: int, depth: int, count: int, tflops: float, chip: CalibratedChip
) -> None:
    product = Matmul("x", "forward", rows, columns, depth, "fp8", count)
    assert product.flops / chip.seconds(product) / 1e12 == pytest.approx(tflops, rel=0.04)


def test_weight_gradients_are_in_the_published_range(chip: CalibratedChip) -> None:
    for tokens in (4096, 8192):
        product = Matmul("x", "weight_gradient", 7168, 2048, tokens, "fp8")
        assert 878e12 < product.flops / chip.seconds(product) < 1092e12


def test_small_product_takes_the_time_of_its_bytes(chip: CalibratedChip) -> None:
    product = Matmul("x", "forward", 1, 7168, 2048, "fp8")
    size = 1 * 2048 + 2048 * 7168 + 2 * 7168
    assert chip.seconds(product) == pytest.approx(size / (3.35e12 * 0.9), rel=1e-6)


def test_attention_of_the_published_shape_takes_as_long_as_profiled(chip: CalibratedChip) -> None:
    work = DeviceWork(load_recipe("v3_671b").model, Layout(pp_size=16, ep_size=64, schedule="dualpipe"), 4096)
    busy = replace(chip, busy_sms=20)
    seconds = {
        operation.phase: busy.seconds(operation)
        for operation in block_operations(work, "moe")
        if isinstance(operation, AttentionKernel)
    }
    assert seconds["forward"] == pytest.approx(1.24e-3, rel=0.03)
    assert seconds["input_gradient"] == pytest.approx(3.8e-3, rel=0.03)


def test_busy_multiprocessors_slow_computation_and_not_memory(chip: CalibratedChip) -> None:
    busy = replace(chip, busy_sms=33)
    attention, moved = AttentionKernel("forward", 1e12), MemoryPass("x", "forward", 1e9)
    assert busy.seconds(attention) == pytest.approx(chip.seconds(attention) / 0.75)
    assert busy.seconds(moved) == chip.seconds(moved)


def test_measured_figures_of_a_chip_replace_the_fitted_ones() -> None:
    chip = Chip(
        bf16_flops=1e12, memory_bytes=1e9, memory_bandwidth=1e12,
        matmul_peak=0.5, matmul_half_depth=100, pass_seconds_per_byte=3e-9,
    )  # fmt: skip
    chip = CalibratedChip(chip, Calibration())
    product = Matmul("x", "forward", 1000, 1000, 300, "bf16")
    assert chip.seconds(product) == pytest.approx(product.flops / (0.5e12 * 0.75))
    assert chip.seconds(MemoryPass("x", "forward", 7e6)) == pytest.approx(21e-3 * Calibration().cpu_passes)


@pytest.mark.parametrize("recipe", ["v3_671b", "v3_16b", "demo"])
def test_products_of_all_blocks_are_the_flops_of_a_token(recipe: str) -> None:
    """The list of operations and the closed form count the same, forward and backward."""
    run = load_recipe(recipe)
    config, length = run.model, 64
    work = DeviceWork(config, Layout(recompute="none", precision="bf16"), length)
    blocks = {
        "dense": config.first_k_dense_replace,
        "moe": config.num_hidden_layers - config.first_k_dense_replace,
        "mtp": config.num_nextn_predict_layers,
        "heads": 1 + config.num_nextn_predict_layers,
    }
    counted = dict.fromkeys(("forward", "input_gradient", "weight_gradient"), 0.0)
    for kind, times in blocks.items():
        for operation in block_operations(work, kind):
            if isinstance(operation, Matmul):
                counted[operation.phase] += times * operation.flops
            elif isinstance(operation, AttentionKernel) and operation.phase == "forward":
                counted["forward"] += times * operation.flops
    flops = training_flops(config, length)
    assert counted["forward"] / work.tokens == pytest.approx(flops.forward, rel=1e-9)
    products = flops.forward - flops.main.attention_scores - flops.mtp.attention_scores
    assert counted["input_gradient"] / work.tokens == pytest.approx(products, rel=1e-9)
    assert counted["weight_gradient"] / work.tokens == pytest.approx(products, rel=1e-9)


def test_expert_and_tensor_parallelism_share_the_work_without_loss() -> None:
    config = load_recipe("v3_671b").model
    whole, shared = (
        sum(
            o.flops
            for o in block_operations(DeviceWork(config, layout, 512), "moe")
            if isinstance(o, Matmul) and "again" not in o.name
        )
        for layout in (Layout(), Layout(ep_size=32, tp_size=4))
    )
    assert shared == pytest.approx(whole / 4, rel=1e-9)


def test_full_recomputation_adds_a_forward_pass() -> None:
    from abyssal.plan.stage_costs import block_costs

    run, chip = load_recipe("v3_671b"), packaged_chips()["h100"]
    none, full = (
        block_costs(DeviceWork(run.model, Layout(ep_size=8, recompute=how), 4096), chip, Calibration())["moe"]
        for how in ("none", "full")
    )
    assert full.alone.input_gradient - none.alone.input_gradient == pytest.approx(none.alone.forward)
    assert full.communication == pytest.approx(1.5 * none.communication)
    assert PhaseTimes(1, 2, 3) + PhaseTimes(1, 1, 1) * 2 == PhaseTimes(3, 4, 5)


def test_muon_counts_every_hidden_matrix_once() -> None:
    """Against the matrices' own shapes, counted through the parameters: a square one of side n costs 30 n^3."""
    config = load_recipe("demo").model.model_copy(
        update={
            "first_k_dense_replace": 0,
            "num_hidden_layers": 1,
            "num_nextn_predict_layers": 0,
            "n_routed_experts": 4,
        }
    )
    sides = [(192, 256), (192, 256), (160, 256), (128, 384), (256, 256)]  # q_a, q_b, kv_a, kv_b, o
    sides += [(256, 256)] * 3 * (4 + 1)
    assert muon_flops(config) == sum(5 * (4 * a * a * b + 2 * a**3) for a, b in sides)
    assert forward_flops(config, 8).total > 0
