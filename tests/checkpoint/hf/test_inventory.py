from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abyssal.checkpoint.hf import ModelReader, write_model_directory
from abyssal.checkpoint.hf.inventory import WeightInventory, has_weights, weight_inventory
from abyssal.config import ModelConfig
from abyssal.model import Transformer, initialise
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config

MTP_LAYER = "model.layers.3."


def inventory_of(folder: Path) -> WeightInventory:
    return weight_inventory(ModelReader(folder, ModelConfig.from_json(folder / "config.json")))


def rewrite(folder: Path, changed: dict[str, torch.Tensor | None]) -> None:
    """Put other tensors into the file, or leave some out."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | changed
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def write(folder: Path, config: ModelConfig, dtype: torch.dtype, **options: int) -> dict[str, torch.Tensor]:
    """Write a model directory, and return what its files hold, read by the library."""
    tokenizer = Tokenizer.train(["def f(x):\n    return x * x\n"] * 3, 290)
    config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})

    def tokenizer_files(staging: Path) -> None:
        tokenizer.save(staging / "tokenizer.json")
        write_tokenizer_config(staging, tokenizer)

    tensors = initialise(Transformer(config), 5).state_dict()
    write_model_directory(folder, config, tensors, dtype=dtype, tokenizer_files=tokenizer_files, card="x", **options)
    held: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        held |= load_file(file)
    return held


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_figures_are_those_of_the_tensors_themselves(
    tmp_path: Path, tiny_config: ModelConfig, dtype: torch.dtype, tied: bool
) -> None:
    config = tiny_config.model_copy(update={"tie_word_embeddings": tied, "num_nextn_predict_layers": 2})
    held = write(tmp_path / "model", config, dtype, max_shard_bytes=20_000)
    found = inventory_of(tmp_path / "model")
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert found.num_files == len(files) > 1
    assert found.num_tensors == len(held)
    assert found.bytes == sum(tensor.nbytes for tensor in held.values())
    assert found.num_parameters == sum(t.numel() for name, t in held.items() if not name.endswith("_scale_inv"))
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
    for one, name in names.items():
        assert found.bytes_by_dtype.get(name, 0) == sum(t.nbytes for t in held.values() if t.dtype == one)
    assert found.scales == (("F32",) if dtype == torch.float8_e4m3fn else ())
    assert (found.experts, found.mtp_modules) == ("one by one", 2)
    assert found.head == ("tied to the embedding" if tied else "own")
    assert (found.missing, found.surplus, found.misshaped, found.mistyped, found.missing_files) == ([], [], {}, {}, [])


def test_what_is_missing_surplus_or_wrong_is_named(model_folder: Path) -> None:
    down = "model.layers.2.mlp.experts.{}.down_proj.weight"
    rewrite(
        model_folder,
        {
            **{down.format(expert): None for expert in (1, 2, 3, 5)},
            "lm_head.weight": None,
            "model.norm.weight": torch.ones(7),
            "model.layers.1.input_layernorm.weight": torch.ones(20, dtype=torch.int32),
            "model.layers.1.input_layernorm.bias": torch.ones(20),
        },
    )
    (model_folder / "tokenizer_config.json").unlink()
    found = inventory_of(model_folder)
    assert sorted(found.missing) == ["lm_head.weight", down.format("{1-3,5}")]
    assert found.surplus == ["model.layers.1.input_layernorm.bias"]
    assert found.misshaped == {"model.norm.weight": "[7] instead of [20]"}
    assert list(found.mistyped) == ["model.layers.1.input_layernorm.weight"]
    assert found.head == "missing"
    assert found.missing_files == ["tokenizer_config.json"]
    assert found.bytes_by_dtype["I32"] == 80


def test_mtp_modules_may_be_left_out(model_folder: Path) -> None:
    held = load_file(model_folder / "model.safetensors")
    rewrite(model_folder, {name: None for name in held if name.startswith(MTP_LAYER)})
    found = inventory_of(model_folder)
    assert (found.mtp_modules, found.missing, found.surplus) == (0, [], [])


def test_stacked_experts_are_told_apart(model_folder: Path) -> None:
    held = load_file(model_folder / "model.safetensors")
    stacked = {"model.layers.1.mlp.experts.gate_up_proj": torch.ones(6, 18, 20)}
    rewrite(model_folder, {name: None for name in held if ".mlp.experts." in name} | stacked)
    found = inventory_of(model_folder)
    assert found.experts == "stacked"
    assert found.surplus == list(stacked)


def test_a_folder_without_weights_has_none(model_folder: Path) -> None:
    assert has_weights(model_folder)
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    assert has_weights(model_folder)  # of a kind that is refused
    (model_folder / "pytorch_model.bin").unlink()
    assert not has_weights(model_folder)
