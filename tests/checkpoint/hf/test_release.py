"""The 671B release by name: its list of tensors, written down here from its published rules, not from our code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

import pytest
import torch

from abyssal.checkpoint.hf.fp8_scales import is_quantised
from abyssal.checkpoint.hf.released import released_tensors, stored_tensors
from abyssal.config import ModelConfig, load_recipe
from abyssal.plan import count_parameters

FP8, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
#: [rows, columns] of a weight, and of its scales where it is FP8: `README_WEIGHTS.md` of the release, and arithmetic.
ATTENTION = {
    "q_a_proj": ((1536, 7168), (12, 56)),
    "q_b_proj": ((24576, 1536), (192, 12)),
    "kv_a_proj_with_mqa": ((576, 7168), (5, 56)),
    "kv_b_proj": ((32768, 512), (256, 4)),
    "o_proj": ((7168, 16384), (56, 128)),
}
DENSE = {
    "gate_proj": ((18432, 7168), (144, 56)),
    "up_proj": ((18432, 7168), (144, 56)),
    "down_proj": ((7168, 18432), (56, 144)),
}
EXPERT = {
    "gate_proj": ((2048, 7168), (16, 56)),
    "up_proj": ((2048, 7168), (16, 56)),
    "down_proj": ((7168, 2048), (56, 16)),
}
Tensors = Iterator[tuple[str, tuple[int, ...], torch.dtype]]


def fp8(prefix: str, weights: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> Tensors:
    for name, (shape, scales) in weights.items():
        yield f"{prefix}{name}.weight", shape, FP8
        yield f"{prefix}{name}.weight_scale_inv", scales, FP32


def block(layer: int) -> Tensors:
    prefix = f"model.layers.{layer}."
    yield f"{prefix}input_layernorm.weight", (7168,), BF16
    yield f"{prefix}post_attention_layernorm.weight", (7168,), BF16
    yield f"{prefix}self_attn.q_a_layernorm.weight", (1536,), BF16
    yield f"{prefix}self_attn.kv_a_layernorm.weight", (512,), BF16
    yield from fp8(f"{prefix}self_attn.", ATTENTION)
    if layer < 3:
        yield from fp8(f"{prefix}mlp.", DENSE)
        return
    yield f"{prefix}mlp.gate.weight", (256, 7168), BF16
    yield f"{prefix}mlp.gate.e_score_correction_bias", (256,), FP32
    yield from fp8(f"{prefix}mlp.shared_experts.", EXPERT)
    for expert in range(256):
        yield from fp8(f"{prefix}mlp.experts.{expert}.", EXPERT)


def release() -> Tensors:
    yield "model.embed_tokens.weight", (129280, 7168), BF16
    for layer in range(62):
        yield from block(layer)
    yield "model.norm.weight", (7168,), BF16
    yield "lm_head.weight", (129280, 7168), BF16
    yield "model.layers.61.embed_tokens.weight", (129280, 7168), BF16
    yield "model.layers.61.enorm.weight", (7168,), BF16
    yield "model.layers.61.hnorm.weight", (7168,), BF16
    yield "model.layers.61.eh_proj.weight", (7168, 14336), BF16
    yield "model.layers.61.shared_head.norm.weight", (7168,), BF16
    yield "model.layers.61.shared_head.head.weight", (129280, 7168), BF16


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return load_recipe("v3_671b").model


def test_every_name_shape_and_type_is_that_of_the_release(config: ModelConfig) -> None:
    ours = [(spec.name, spec.shape, dtype) for spec, dtype in stored_tensors(config, FP8)]
    theirs = list(release())
    assert len(ours) == len(set(ours)) == len(theirs)
    assert set(ours) == set(theirs)
    assert {name for name, _, dtype in theirs if dtype == FP8} == {
        spec.name for spec in released_tensors(config) if is_quantised(spec.name)
    }


def test_numbers_of_tensors_are_those_of_the_release() -> None:
    places = Counter(name.startswith("model.layers.61.") for name, _, _ in release())
    assert places == {False: 90_427, True: 1_564}
    assert places.total() == 91_991
    assert sum(not name.endswith("_scale_inv") for name, _, _ in release()) == 46_183


def test_numbers_of_parameters_are_those_of_the_release(config: ModelConfig) -> None:
    main = mtp = copies = activated = 0
    for name, shape, _ in release():
        if name.endswith("_scale_inv"):
            continue
        if not name.startswith("model.layers.61."):
            main += prod(shape)
            routed = ".mlp.experts." in name
            activated += prod(shape) if not routed or int(name.split(".")[5]) < 8 else 0
        elif name.endswith((".embed_tokens.weight", ".head.weight")):
            copies += prod(shape)
        else:
            mtp += prod(shape)
    count = count_parameters(config)
    assert main == count.total == 671_026_419_200
    assert activated == count.activated == 37_552_297_472
    assert mtp == count.mtp.total == 11_610_068_224
    assert main + mtp + copies == count.release == 684_489_845_504


def test_bytes_are_those_of_the_release(config: ModelConfig) -> None:
    sizes = {name: prod(shape) * dtype.itemsize for name, shape, dtype in release()}
    total = sum(sizes.values())
    assert total == sum(spec.numel * dtype.itemsize for spec, dtype in stored_tensors(config, FP8))
    last = sum(size for name, size in sizes.items() if name.startswith("model.layers.61."))
    assert (round((total - last) / 1e9, 2), round(last / 1e9, 2)) == (673.15, 15.42)
