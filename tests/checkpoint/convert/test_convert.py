"""The values, names, files and config of a converted directory, against an arithmetic of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from abyssal.checkpoint.convert import Conversion, convert_directory, verify_directory
from abyssal.config import ModelConfig

Build = Callable[..., Path]
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def fields(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def seed() -> int:
    return random.randrange(2**31)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_fp8_becomes_bf16_by_one_product_in_fp32_and_one_rounding(
    scale_dtype: torch.dtype, quantised: Build, oracle: ModuleType, tmp_path: Path
) -> None:
    source = quantised(scale_dtype, seed=seed())
    convert_directory(source, tmp_path / "out", Conversion("bf16"))
    before, after = load(source), load(tmp_path / "out")
    assert after.keys() == {name for name in before if not name.endswith("_scale_inv")}
    for name, tensor in after.items():
        if oracle.is_projection(name):
            scale = before[f"{name}_scale_inv"].to(torch.float32).numpy().astype(np.float64)
            codes = oracle.widen_fp8(before[name].view(torch.uint8).numpy())
            product = (codes * oracle.spread(scale, codes.shape)).astype(np.float32)  # exact in float64, rounded once
            assert (oracle.bf16_bits(tensor) == oracle.to_bf16_bits(product)).all(), name
        else:
            assert tensor.dtype == before[name].dtype
            assert bits(tensor) == bits(before[name]), name


def test_fp8_becomes_fp32_by_one_product(quantised: Build, oracle: ModuleType, tmp_path: Path) -> None:
    source = quantised(seed=seed())
    convert_directory(source, tmp_path / "out", Conversion("fp32"))
    before, after = load(source), load(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    for name in filter(oracle.is_projection, after):
        codes = oracle.widen_fp8(before[name].view(torch.uint8).numpy())
        scale = before[f"{name}_scale_inv"].numpy().astype(np.float64)
        assert (after[name].numpy() == (codes * oracle.spread(scale, codes.shape)).astype(np.float32)).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("power_of_two", [False, True], ids=["float", "ue8m0"])
def test_weights_become_fp8_with_amax_over_448_a_block(
    dtype: torch.dtype, power_of_two: bool, plain: Build, oracle: ModuleType, tmp_path: Path
) -> None:
    source = plain(dtype, seed=seed())
    convert_directory(source, tmp_path / "out", Conversion("fp8", power_of_two=power_of_two))
    before, after = load(source), load(tmp_path / "out")
    projections = set(filter(oracle.is_projection, before))
    assert after.keys() == before.keys() | {f"{name}_scale_inv" for name in projections}
    for name in projections:
        weight = before[name].to(torch.float64).numpy()
        grid = [-(-size // 128) for size in weight.shape]
        largest = np.zeros(grid)
        np.maximum.at(
            largest, np.ix_(np.arange(weight.shape[0]) // 128, np.arange(weight.shape[1]) // 128), abs(weight)
        )
        scale = (largest / 448).astype(np.float32)
        if power_of_two:  # by the logarithm in float64: in fp32 it is a whole number next to a power of two, too
            scale = np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32)
        assert (after[f"{name}_scale_inv"].numpy() == scale).all()
        assert after[name].dtype == torch.float8_e4m3fn
        codes = oracle.widen_fp8(after[name].view(torch.uint8).numpy())
        quotient = weight / oracle.spread(scale.astype(np.float64), weight.shape)
        step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(abs(quotient), 2.0**-9))), -6) - 3)
        assert (abs(codes - quotient) <= step * 0.500001).all(), name
    for name in before.keys() - projections:
        expected = before[name] if name.endswith("bias") else before[name].to(torch.bfloat16)
        assert bits(after[name]) == bits(expected), name


def test_a_block_of_zeros_has_scale_1(plain: Build, oracle: ModuleType, shape: ModelConfig, tmp_path: Path) -> None:
    tensors = oracle.draw(shape, seed(), torch.bfloat16)
    name = "model.layers.0.mlp.down_proj.weight"  # [140, 259]
    tensors[name][:128, 128:256] = 0
    convert_directory(oracle.save_directory(tmp_path / "in", shape, tensors), tmp_path / "out", Conversion("fp8"))
    scale = load(tmp_path / "out")[f"{name}_scale_inv"]
    assert scale[0, 1] == 1
    assert (scale == 1).sum() == 1


@pytest.mark.parametrize("through", ["bf16", "fp32"])
@pytest.mark.parametrize("scheme", [{}, {"scale_fmt": "ue8m0"}], ids=["float", "ue8m0"])
def test_fp8_comes_back_from_bf16_and_fp32_with_its_own_scales(
    through: str, scheme: dict[str, str], quantised: Build, tmp_path: Path
) -> None:
    source = quantised(seed=seed(), **scheme)
    convert_directory(source, tmp_path / "wide", Conversion(through))
    convert_directory(tmp_path / "wide", tmp_path / "out", Conversion("fp8"), scales_from=source)
    before, after = load(source), load(tmp_path / "out")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert bits(tensor) == bits(before[name]), name
    assert fields(tmp_path / "out")["quantization_config"] == fields(source)["quantization_config"]


def test_fp8_to_fp8_keeps_every_bit_in_other_files(quantised: Build, oracle: ModuleType, tmp_path: Path) -> None:
    source = quantised(seed=seed())
    convert_directory(source, tmp_path / "out", Conversion("fp8", max_shard_bytes=100_000))
    before, after = load(source), load(tmp_path / "out")
    assert {name: bits(tensor) for name, tensor in after.items()} == {name: bits(t) for name, t in before.items()}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_large_tensors_are_taken_in_row_blocks(
    plain: Build, oracle: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = plain(seed=seed())
    convert_directory(source, tmp_path / "whole", Conversion("fp8"))
    monkeypatch.setattr("abyssal.checkpoint.hf.file_plan.BLOCK_VALUES", 1)
    convert_directory(source, tmp_path / "out", Conversion("fp8"))
    assert oracle.sums(tmp_path / "out") == oracle.sums(tmp_path / "whole")


# Files


def test_the_index_names_every_tensor_and_no_file_is_larger_than_asked(plain: Build, tmp_path: Path) -> None:
    convert_directory(plain(), tmp_path / "out", Conversion("fp8", max_shard_bytes=80_000))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = {file.name: load_file(file) for file in sorted((tmp_path / "out").glob("*.safetensors"))}
    count = len(tensors)
    assert list(tensors) == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert index["weight_map"] == {name: file for file, part in tensors.items() for name in part}
    sizes = {file: sum(tensor.nbytes for tensor in part.values()) for file, part in tensors.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert max(sizes.values()) <= 80_000
    following = list(sizes.values())[1:]
    assert all(size + 78_400 > 80_000 for size in following[:-1])  # eh_proj, the largest, has 78,400
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_number_of_processes(
    quantised: Build, oracle: ModuleType, tmp_path: Path
) -> None:
    source = quantised(seed=seed())
    told = []
    for workers in (1, 2):
        conversion = Conversion("bf16", max_shard_bytes=300_000)
        out = tmp_path / f"out{workers}"
        convert_directory(source, out, conversion, workers=workers, on_progress=lambda now: told.append(now))
    assert oracle.sums(tmp_path / "out1") == oracle.sums(tmp_path / "out2")
    last = told[-1]
    weights = sum(file.stat().st_size for file in (tmp_path / "out2").glob("*.safetensors"))
    assert (last.written_bytes, last.total_bytes, last.kept_bytes, last.files) == (
        weights,
        weights,
        0,
        last.total_files,
    )


def test_other_files_come_along_and_the_manifest_has_the_checksum_of_all(
    plain: Build, oracle: ModuleType, tmp_path: Path
) -> None:
    source = plain()
    (source / "figures").mkdir()
    (source / "model.gguf").write_bytes(b"GGUF")
    outcome = convert_directory(source, tmp_path / "out", Conversion("fp32"))
    copied = {"README.md", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    found = oracle.sums(tmp_path / "out")
    assert found.keys() == copied | {"config.json", "manifest.json", "model.safetensors"}
    assert {name: found[name] for name in copied} == {name: oracle.sums_of(source / name) for name in copied}
    assert outcome.left_out == ("figures/", "model.gguf")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {name: record["sha256"] for name, record in manifest["files"].items()} == {
        name: value for name, value in found.items() if name != "manifest.json"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]
    verify_directory(tmp_path / "out")


def test_without_mtp_the_layer_is_gone_from_weights_and_config(
    quantised: Build, shape: ModelConfig, tmp_path: Path
) -> None:
    source = quantised()
    convert_directory(source, tmp_path / "out", Conversion("bf16", mtp=False))
    assert load(tmp_path / "out").keys() == {
        name for name in load(source) if not name.startswith("model.layers.2.") and not name.endswith("_scale_inv")
    }
    assert fields(tmp_path / "out")["num_nextn_predict_layers"] == 0
    verify_directory(tmp_path / "out")


def test_the_config_says_how_many_mtp_layers_the_files_hold(plain: Build, oracle: ModuleType, tmp_path: Path) -> None:
    without = plain(name="without")
    convert_directory(without, tmp_path / "main", Conversion("bf16", mtp=False))
    config = fields(tmp_path / "main") | {"num_nextn_predict_layers": 1}
    (tmp_path / "main" / "config.json").write_text(json.dumps(config))
    convert_directory(tmp_path / "main", tmp_path / "out", Conversion("fp32"))
    assert fields(tmp_path / "out")["num_nextn_predict_layers"] == 0


def test_a_tied_head_stays_away(oracle: ModuleType, shape: ModelConfig, tmp_path: Path) -> None:
    tied = shape.model_copy(update={"tie_word_embeddings": True})
    source = oracle.save_directory(tmp_path / "in", tied, oracle.draw(tied, seed(), torch.bfloat16))
    convert_directory(source, tmp_path / "out", Conversion("fp8"))
    assert "lm_head.weight" not in load(tmp_path / "out")
    assert fields(tmp_path / "out")["tie_word_embeddings"] is True
    verify_directory(tmp_path / "out")


def test_rope_frequencies_keep_fp32(oracle: ModuleType, shape: ModelConfig, tmp_path: Path) -> None:
    tensors = oracle.draw(shape, seed(), torch.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(3)
    convert_directory(oracle.save_directory(tmp_path / "in", shape, tensors), tmp_path / "out", Conversion("bf16"))
    after = load(tmp_path / "out")
    assert {name for name, tensor in after.items() if tensor.dtype == torch.float32} == {
        name for name in tensors if name.endswith(("bias", "inv_freq"))
    }


# config.json


def test_the_config_changes_in_its_number_format_only(quantised: Build, oracle: ModuleType, tmp_path: Path) -> None:
    source = quantised()
    before = fields(source) | {"dtype": "bfloat16", "auto_map": {"AutoConfig": "x.Y"}, "model_type": "kimi_k2"}
    (source / "config.json").write_text(json.dumps(before))
    convert_directory(source, tmp_path / "fp32", Conversion("fp32"))
    plain = {name: value for name, value in before.items() if name != "quantization_config"}
    assert fields(tmp_path / "fp32") == plain | {"torch_dtype": "float32", "dtype": "float32"}
    convert_directory(tmp_path / "fp32", tmp_path / "fp8", Conversion("fp8", power_of_two=True))
    expected = oracle.QUANTIZATION | {"scale_fmt": "ue8m0"}
    assert fields(tmp_path / "fp8") == plain | {"dtype": "bfloat16", "quantization_config": expected}


def test_keys_that_other_engines_need_are_added(plain: Build, tmp_path: Path) -> None:
    source = plain()
    before = fields(source)
    for name in ("topk_method", "scoring_func", "rope_interleave", "rope_scaling", "rope_theta"):
        del before[name]
    before["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    (source / "config.json").write_text(json.dumps(before))
    convert_directory(source, tmp_path / "out", Conversion("fp32"))
    after = fields(tmp_path / "out")
    assert (after["topk_method"], after["scoring_func"], after["rope_interleave"]) == ("noaux_tc", "sigmoid", True)
    assert after["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    assert ModelConfig.from_hf(after) == ModelConfig.from_hf(before)


@pytest.mark.parametrize("kept", ["n_group", "topk_group"])
def test_a_group_field_that_is_left_out_keeps_its_meaning(
    kept: str, oracle: ModuleType, shape: ModelConfig, tmp_path: Path
) -> None:
    grouped = shape.model_copy(update={"n_routed_experts": 16})
    source = oracle.save_directory(tmp_path / "in", grouped, oracle.draw(grouped, seed(), torch.bfloat16))
    before = fields(source)
    del before["n_group"], before["topk_group"]
    before[kept] = 4  # transformers' own values are 8 and 4
    (source / "config.json").write_text(json.dumps(before))
    convert_directory(source, tmp_path / "out", Conversion("fp32"))
    assert ModelConfig.from_hf(fields(tmp_path / "out")) == ModelConfig.from_hf(before)
    assert ModelConfig.from_hf(before).n_group == (4 if kept == "n_group" else 8)
