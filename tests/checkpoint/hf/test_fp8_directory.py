"""FP8 model directories: what is written, what is read, and torch's own reader beside ours."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from abyssal.checkpoint.hf import load_into, read_model_directory
from abyssal.checkpoint.hf.names import memory_tensors
from abyssal.checkpoint.hf.released import released_tensors
from abyssal.config import ModelConfig
from abyssal.errors import ModelDirectoryError

#: Widths above 128 that are no multiples of it, so that every kind of edge block occurs.
WIDE = {
    "hidden_size": 150,
    "intermediate_size": 290,
    "moe_intermediate_size": 131,
    "q_lora_rank": 140,
    "kv_lora_rank": 130,
    "qk_nope_head_dim": 27,
    "qk_rope_head_dim": 6,
    "v_head_dim": 29,
}
#: From the release's list of tensors: what has scales.
PROJECTIONS = {
    *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
}


def has_scales(name: str) -> bool:
    return name.split(".")[-2] in PROJECTIONS


def grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.ceil(size / 128) for size in shape)


@pytest.fixture
def wide(tiny: Callable[..., ModelConfig]) -> Callable[..., ModelConfig]:
    return lambda **changes: tiny(**{**WIDE, **changes})


@pytest.fixture
def fp8_folder(write: Any, wide: Any, random_tensors: Any) -> Path:
    folder: Path = write(wide(), random_tensors(wide()), dtype=torch.float8_e4m3fn)
    return folder


def oracle(folder: Path) -> dict[str, Tensor]:
    """Every weight of a directory, dequantised block by block in float64, then rounded to fp32 and bf16."""
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    weights = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored[f"{name}_scale_inv"].float().double()
            wide = tensor.float().double()
            for i in range(0, tensor.shape[0], 128):
                for j in range(0, tensor.shape[1], 128):
                    wide[i : i + 128, j : j + 128] *= scale[i // 128, j // 128]
            tensor = wide.float().bfloat16()
        weights[name] = tensor
    return weights


def test_which_tensors_are_fp8_and_the_shapes_of_their_scales_are_as_released(fp8_folder: Path, wide: Any) -> None:
    stored = load_file(fp8_folder / "model.safetensors")
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for spec in released_tensors(wide()):
        if has_scales(spec.name):
            expected[spec.name] = spec.shape, torch.float8_e4m3fn
            expected[f"{spec.name}_scale_inv"] = grid(spec.shape), torch.float32
        else:
            bias = spec.name.endswith("e_score_correction_bias")
            expected[spec.name] = spec.shape, torch.float32 if bias else torch.bfloat16
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == expected


def test_config_json_says_fp8_as_the_release_does(fp8_folder: Path, wide: Any) -> None:
    fields = json.loads((fp8_folder / "config.json").read_text())
    assert fields["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert fields["torch_dtype"] == "bfloat16"
    assert read_model_directory(fp8_folder)[0] == wide()


def test_no_weight_is_further_from_its_original_than_fp8_allows(
    fp8_folder: Path, wide: Any, random_tensors: Any
) -> None:
    exact = random_tensors(wide())
    for name, tensor in read_model_directory(fp8_folder)[1]:
        if "proj" in name and "eh_proj" not in name:
            error = (tensor.double() - exact[name].double()).abs()
            largest = exact[name].abs().amax().double()
            # half a step of 3 mantissa bits, half a step of bf16, and half a step of the subnormals
            assert (error <= exact[name].double().abs() * (2.0**-4 + 2.0**-9) + largest / 448 * 2.0**-10).all(), name
            assert error.max() > 0, name
        elif name.endswith("bias"):
            assert torch.equal(tensor, exact[name])
        else:
            assert torch.equal(tensor, exact[name].bfloat16()), name


@pytest.mark.parametrize("q_lora_rank", [140, None])
@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu, torch.bfloat16], ids=str)
def test_fp8_weights_are_read_as_fp8_times_scale(
    write: Any, wide: Any, random_tensors: Any, rewrite: Any, build_module: Any, scales: torch.dtype, q_lora_rank: Any
) -> None:
    config = wide(q_lora_rank=q_lora_rank)
    tensors = random_tensors(config)
    folder = write(config, tensors, dtype=torch.float8_e4m3fn)

    def change(stored: dict[str, Tensor]) -> None:
        for name in stored:
            if name.endswith("_scale_inv"):
                power = torch.exp2(stored[name].log2().ceil())
                stored[name] = power.to(scales) if scales == torch.float8_e8m0fnu else stored[name].to(scales)

    rewrite(folder, change)
    expected = oracle(folder)
    reader = read_model_directory(folder)[1]
    model = build_module(tensors, torch.bfloat16)
    load_into(model, reader)
    for name, tensor in model.state_dict().items():
        if name.endswith("gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            parts = [
                torch.cat([expected[f"{prefix}{e}.{kind}_proj.weight"] for kind in ("gate", "up")]) for e in range(4)
            ]
            wanted = torch.stack(parts)
        elif name.endswith("experts.down_proj"):
            wanted = torch.stack([expected[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] for e in range(4)])
        else:
            wanted = expected[name]
        assert torch.equal(tensor, wanted), name
        assert torch.equal(reader.tensor(name), wanted), name


def test_a_model_in_fp32_gets_the_products_without_rounding_to_bf16(
    fp8_folder: Path, wide: Any, random_tensors: Any, build_module: Any
) -> None:
    model = build_module(random_tensors(wide()), device="meta")
    reader = read_model_directory(fp8_folder)[1]
    load_into(model, reader, torch.float32)
    name = "model.layers.0.self_attn.o_proj.weight"
    stored = load_file(fp8_folder / "model.safetensors")
    corner = stored[name][128:, 128:].float() * stored[f"{name}_scale_inv"][1, 1]
    assert torch.equal(model.state_dict()[name][128:, 128:], corner)
    assert not torch.equal(corner, corner.bfloat16().float())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_own_quantised_reader_gives_the_same_weights(
    write: Any, wide: Any, random_tensors: Any, dtype: torch.dtype
) -> None:
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

    config = wide()
    # it needs an index, so several files; and some weights lie in other files than their scales
    folder = write(config, random_tensors(config), dtype=torch.float8_e4m3fn, max_shard_bytes=22_000)
    theirs = {spec.name: torch.full(spec.shape, 7.0, dtype=dtype) for spec in released_tensors(config)}
    load(theirs, storage_reader=QuantizedHuggingFaceStorageReader(str(folder), target_dtype=dtype), no_dist=True)
    reader = read_model_directory(folder)[1]
    for name, tensor in theirs.items():
        assert torch.equal(reader.part(name, dtype).to(dtype), tensor), name
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    apart = {places[name] != places[f"{name}_scale_inv"] for name in theirs if has_scales(name)}
    assert apart == {False, True}


def test_faults_of_fp8_weights_and_scales_are_named_together(fp8_folder: Path, rewrite: Any) -> None:
    def change(stored: dict[str, Tensor]) -> None:
        layer = "model.layers.1."
        del stored[f"{layer}self_attn.o_proj.weight_scale_inv"]
        stored[f"{layer}eh_proj.weight_scale_inv"] = torch.ones(1, 1)
        name = f"{layer}self_attn.kv_b_proj.weight_scale_inv"
        stored[name] = stored[name].T.contiguous()
        stored[f"{layer}mlp.gate.weight_scale_inv"] = torch.ones(1, 2)  # the gate is bf16
        stored[f"{layer}mlp.experts.0.up_proj.weight_scale_inv"] = torch.ones(2, 2, dtype=torch.float64)
        stored[f"{layer}input_layernorm.weight"] = torch.ones(150).to(torch.float8_e4m3fn)
        stored[f"{layer}mlp.experts.1.up_proj.weight_scale_inv"][1, 0] = torch.nan
        stored[f"{layer}mlp.experts.2.up_proj.weight"].view(torch.uint8)[130, 7] = 0x7F
        stored[f"{layer}mlp.experts.3.up_proj.weight"].view(torch.uint8)[130, 7] = 0xFF

    rewrite(fp8_folder, change)
    with pytest.raises(ModelDirectoryError) as caught:
        read_model_directory(fp8_folder)[1].check(values=True)
    assert str(caught.value) == (
        f"{fp8_folder}: the weights do not fit the model; missing: model.layers.1.self_attn.o_proj.weight_scale_inv; "
        "surplus: model.layers.1.eh_proj.weight_scale_inv, model.layers.1.mlp.gate.weight_scale_inv; "
        "of another shape: model.layers.1.self_attn.kv_b_proj.weight_scale_inv ([2, 3] instead of [3, 2]); "
        "of a type that is not read: "
        "model.layers.1.input_layernorm.weight (F8_E4M3; possible: F64, F32, BF16, F16), "
        "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv (F64; possible: F32, BF16, F8_E8M0); "
        "with values that are not finite: model.layers.1.mlp.experts.1.up_proj.weight_scale_inv, "
        "model.layers.1.mlp.experts.{2-3}.up_proj.weight"
    )


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, 1e37], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_that_gives_no_finite_weight_is_named(
    fp8_folder: Path, rewrite: Any, dtype: torch.dtype, scale: float
) -> None:
    name = "model.layers.2.mlp.experts.1.up_proj.weight_scale_inv"

    def change(stored: dict[str, Tensor]) -> None:
        stored[name] = stored[name].to(dtype)
        stored[name][1, 0] = scale

    rewrite(fp8_folder, change)
    with pytest.raises(ModelDirectoryError, match=rf"with values that are not finite: {name}$"):
        read_model_directory(fp8_folder)[1].check(values=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
def test_a_model_that_is_not_finite_is_not_written(
    write: Any, wide: Any, random_tensors: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = random_tensors(wide())
    tensors["model.layers.2.mlp.experts.gate_up_proj"][3, 1, 2] = torch.inf
    tensors["model.norm.weight"][7] = torch.nan
    with pytest.raises(
        ModelDirectoryError,
        match=r"not finite in .*layers\.2\.mlp\.experts\.3\.gate_proj\.weight.*model\.norm\.weight$",
    ):
        write(wide(), tensors, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"quant_method": "compressed-tensors"}, r"quant_method='compressed-tensors': only 'fp8' with blocks of 128"),
        ({}, r"quant_method=None: only 'fp8'"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, r"weight_block_size=None"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, r"weight_block_size\.0=64: input should be 128"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
            r"fmt='e5m2': input should be 'e4m3'",
        ),
        ("fp8", r"quantization_config='fp8': must be an object"),
    ],
)
def test_other_quantisations_are_refused_with_what_is_read(fp8_folder: Path, fields: Any, sentence: str) -> None:
    config = json.loads((fp8_folder / "config.json").read_text())
    (fp8_folder / "config.json").write_text(json.dumps({**config, "quantization_config": fields}))
    with pytest.raises(ModelDirectoryError, match=sentence):
        read_model_directory(fp8_folder)


def test_the_quantisation_of_v3_1_and_of_transformers_copies_is_read(fp8_folder: Path) -> None:
    config = json.loads((fp8_folder / "config.json").read_text())
    config["quantization_config"] |= {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]}
    (fp8_folder / "config.json").write_text(json.dumps(config))
    read_model_directory(fp8_folder)[1].check(values=True)


def test_weights_without_their_scales_file_by_file_are_read_too(fp8_folder: Path) -> None:
    """An index may put scales and weights into different files; both orders of reading are one."""
    stored = load_file(fp8_folder / "model.safetensors")
    expected = dict(read_model_directory(fp8_folder)[1])
    files: dict[str, dict[str, Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in stored.items():
        files["a.safetensors" if re.search("_scale_inv$", name) else "b.safetensors"][name] = tensor
    for file, part in files.items():
        save_file(part, fp8_folder / file, metadata={"format": "pt"})
    placed = {name: file for file, part in files.items() for name in part}
    (fp8_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (fp8_folder / "model.safetensors").unlink()
    found = dict(read_model_directory(fp8_folder)[1])
    assert list(found) == list(expected) == [spec.name for spec in memory_tensors(read_model_directory(fp8_folder)[0])]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
