"""A model directory is Hugging Face's and appears whole or not at all."""

import errno
import json
import os
import re
import shutil
from io import FileIO
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from abyssal.checkpoint.hf import load_into, read_model_directory
from abyssal.checkpoint.hf.names import memory_tensors
from abyssal.checkpoint.hf.released import released_tensors
from abyssal.errors import ModelDirectoryError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Round trip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("depth", "q_lora_rank"), [(0, 13), (1, None), (2, 13)])
@pytest.mark.parametrize("max_shard_bytes", [20_000, 5_000_000_000])
def test_what_is_written_is_read(write, tiny, random_tensors, tied, depth, q_lora_rank, max_shard_bytes, build_module):
    config = tiny(tie_word_embeddings=tied, num_nextn_predict_layers=depth, q_lora_rank=q_lora_rank)
    tensors = random_tensors(config)
    path = write(config, dict(reversed(tensors.items())), max_shard_bytes=max_shard_bytes)
    read, reader = read_model_directory(path)
    assert read == config
    found = dict(reader)
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert reader.check() == list(tensors)

    model = build_module(tensors)
    assert sorted(load_into(model, reader)) == sorted(tensors)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_the_files_hold_the_released_tensors(written, tiny):
    with safe_open(written / "model.safetensors", "pt") as file:
        held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["format"] == "pt"
    assert held == {spec.name: spec.shape for spec in released_tensors(tiny())}
    tensors = load_file(written / "model.safetensors")
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])
    assert names(written) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_several_files_have_an_index_and_none_is_too_large(write, tiny, random_tensors):
    config = tiny()
    path = write(config, random_tensors(config), max_shard_bytes=20_000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 3
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert not (path / "model.safetensors").exists()
    sizes = {}
    for file in files:
        tensors = load_file(path / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(tensors)
        sizes[file] = sum(tensor.nbytes for tensor in tensors.values())
    assert max(sizes.values()) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert set(index["weight_map"]) == {spec.name for spec in released_tensors(config)}


def test_a_tensor_larger_than_a_file_gets_its_own(write, tiny, random_tensors):
    path = write(tiny(), random_tensors(tiny()), max_shard_bytes=1)
    assert all(len(load_file(file)) == 1 for file in path.glob("*.safetensors"))
    read_model_directory(path)[1].check()


def test_weights_are_written_in_the_dtype_and_the_bias_in_fp32(write, tiny, random_tensors):
    tensors = random_tensors(tiny())
    path = write(tiny(), tensors, dtype=torch.bfloat16)
    for name, tensor in load_file(path / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if name.endswith("bias") else torch.bfloat16), name
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    _, reader = read_model_directory(path)
    for name, tensor in reader:
        expected = tensors[name] if name.endswith("bias") else tensors[name].bfloat16()
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading_takes_the_dtype_asked_for(write, tiny, random_tensors, dtype, expected, device, build_module):
    tensors = random_tensors(tiny())
    _, reader = read_model_directory(write(tiny(), tensors))
    model = build_module(tensors, torch.float64, device)
    load_into(model, reader, dtype)
    for name, tensor in model.state_dict().items():
        wanted = torch.float32 if name.endswith("bias") else expected
        assert tensor.dtype == wanted
        assert torch.equal(tensor, tensors[name].to(wanted))
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    assert len(list(model.buffers())) == 3


def test_loading_fills_in_place(written, tiny, random_tensors, build_module):
    model = build_module(random_tensors(tiny()))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    load_into(model, read_model_directory(written)[1])
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_loaded_tensors_do_not_share_the_files_memory(written, tiny, random_tensors, build_module):
    tensors = random_tensors(tiny())
    reader = read_model_directory(written)[1]
    model = build_module(tensors, device="meta")
    load_into(model, reader)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in reader)


def test_the_other_files_say_what_they_were_given(write, tiny, random_tensors):
    generation = {"do_sample": True, "temperature": 0.6}
    path = write(tiny(), random_tensors(tiny()), generation=generation, card="# Größe\n")
    assert json.loads((path / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 1,
        **generation,
    }
    assert (path / "README.md").read_text(encoding="utf-8") == "# Größe\n"
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]


def test_the_tokenizer_may_write_its_own_files(write, tiny, random_tensors):
    def tokenizer(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text('{"mine": 1}')

    path = write(tiny(), random_tensors(tiny()), tokenizer_files=tokenizer)
    assert (path / "tokenizer_config.json").read_text() == '{"mine": 1}'


# Faults of the writer


def test_a_model_that_is_not_whole_is_not_written(write, tiny, random_tensors, tmp_path):
    config = tiny()
    before = names(tmp_path)
    tensors = random_tensors(config)
    down = tensors.pop("model.layers.2.mlp.experts.down_proj")
    with pytest.raises(ModelDirectoryError, match=r"lacks model\.layers\.2\.mlp\.experts\.down_proj"):
        write(config, tensors)
    with pytest.raises(ModelDirectoryError, match=r"down_proj is \[4, 7, 24\] instead of \[4, 24, 7\]"):
        write(config, {**tensors, "model.layers.2.mlp.experts.down_proj": down.mT})
    with pytest.raises(ModelDirectoryError, match=r"model\.other: not a tensor of this model"):
        write(config, {"model.other": down, **tensors})
    assert names(tmp_path) == before


def test_a_missing_tokenizer_is_named_and_nothing_is_written(write, tiny, random_tensors, tmp_path, tokenizer_folder):
    (tokenizer_folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelDirectoryError, match=r"tokenizer/tokenizer_config\.json: no such file"):
        write(tiny(), random_tensors(tiny()))
    with pytest.raises(ModelDirectoryError, match=r"tokenizer\.json: the tokenizer did not write"):
        write(tiny(), random_tensors(tiny()), tokenizer_files=lambda folder: None)
    assert names(tmp_path) == ["tokenizer"]


def test_a_directory_of_ours_is_replaced(write, tiny, random_tensors, tmp_path):
    write(tiny(), random_tensors(tiny()), max_shard_bytes=20_000)
    tensors = random_tensors(tiny(), seed=1)
    path = write(tiny(), tensors)
    assert names(tmp_path) == ["model", "tokenizer"]
    assert not list(path.glob("model-*"))
    assert torch.equal(dict(read_model_directory(path)[1])["lm_head.weight"], tensors["lm_head.weight"])


def test_a_directory_of_ours_stays_when_its_replacement_fails(written, write, tiny, random_tensors, monkeypatch):
    before = {file.name: file.read_bytes() for file in written.iterdir()}

    class FullDisk(FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("abyssal.checkpoint.hf.weight_files.FileIO", FullDisk)
    with pytest.raises(ModelDirectoryError, match=r"cannot write the model directory \(No space left on device; free"):
        write(tiny(), random_tensors(tiny(), seed=1))
    assert {file.name: file.read_bytes() for file in written.iterdir()} == before
    assert names(written.parent) == ["model", "tokenizer"]


def test_a_limit_on_the_size_of_files_becomes_a_sentence(write, tiny, random_tensors, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = tiny(vocab_size=8000)
    tensors = random_tensors(config)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
    try:
        with pytest.raises(ModelDirectoryError, match=r"model: cannot write the model directory \(.*File too large"):
            write(config, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["tokenizer"]


@pytest.mark.parametrize("other", ["notes.txt", "model.gguf"])
def test_a_directory_with_other_files_is_not_replaced(written, write, tiny, random_tensors, other):
    (written / other).write_text("mine")
    with pytest.raises(ModelDirectoryError, match=rf"exists and holds {re.escape(other)}, so it is not replaced"):
        write(tiny(), random_tensors(tiny()))
    assert (written / other).read_text() == "mine"


def test_a_directory_of_somebody_else_is_not_replaced(written, write, tiny, random_tensors):
    fields = json.loads((written / "config.json").read_text())
    assert fields.pop("producer") == "abyssal"
    (written / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelDirectoryError, match="was not written by Abyssal"):
        write(tiny(), random_tensors(tiny()))


def test_an_empty_folder_is_filled_and_a_file_refused(write, tiny, random_tensors, tmp_path):
    (tmp_path / "model").mkdir()
    path = write(tiny(), random_tensors(tiny()))
    shutil.rmtree(path)
    path.write_text("a file")
    with pytest.raises(ModelDirectoryError, match="cannot write a model directory there"):
        write(tiny(), random_tensors(tiny()))


def test_too_little_space_is_told_before_writing(write, tiny, random_tensors, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ModelDirectoryError, match="GiB are free on its disk"):
        write(tiny(), random_tensors(tiny()))
    assert names(tmp_path) == ["tokenizer"]


# transformers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("max_shard_bytes", [20_000, 5_000_000_000])
@pytest.mark.parametrize(("tied", "depth", "q_lora_rank"), [(False, 1, 13), (True, 0, None)])
def test_transformers_opens_what_we_write(write, tiny, random_tensors, tied, depth, q_lora_rank, max_shard_bytes):
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    config = tiny(tie_word_embeddings=tied, num_nextn_predict_layers=depth, q_lora_rank=q_lora_rank)
    tensors = random_tensors(config)
    path = write(config, tensors, max_shard_bytes=max_shard_bytes)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(re.search(r"layers\.3\.", name) for name in report["unexpected_keys"]), report["unexpected_keys"]
    state = model.state_dict()
    for spec in memory_tensors(tiny(tie_word_embeddings=tied, num_nextn_predict_layers=0, q_lora_rank=q_lora_rank)):
        assert torch.equal(state[spec.name], tensors[spec.name]), spec.name
    assert model.generation_config.eos_token_id == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_transformers_writes_is_read(write, tiny, random_tensors, tmp_path, tokenizer_folder, build_module):
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    config = tiny()
    tensors = random_tensors(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(write(config, tensors), dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path / "theirs")
    read, reader = read_model_directory(tmp_path / "theirs")
    assert read.model_copy(update={"num_nextn_predict_layers": 1}) == config
    ours = build_module(tensors)
    loaded = load_into(ours, reader, allow_missing_mtp=True)
    state = ours.state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in loaded)
    assert set(tensors) - set(loaded) == {name for name in tensors if name.startswith("model.layers.3.")}
