from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abyssal.config import ModelConfig
from abyssal.engine import load_model
from abyssal.errors import AbyssalError, DataError, ModelDirectoryError, UsageError
from abyssal.model import AbsorbedCore, Transformer
from abyssal.text.tokenizer import Tokenizer

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_weights_and_activations_have_the_dtype_and_the_bias_stays_fp32(
    model_directory: Write, stored: torch.dtype, dtype: str, expected: torch.dtype
) -> None:
    model = load_model(model_directory(stored), dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.compute_dtype == expected
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_loaded_weights_are_those_that_were_written(
    model_directory: Write,
    build: Callable[..., Transformer],
    tiny_config: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before they are packed, which nothing can be read back from."""
    monkeypatch.setattr("abyssal.engine.load.prepare_for_inference", lambda model: None)
    loaded = load_model(model_directory())
    wanted = build(tiny_config.model_copy(update={"vocab_size": 301}), dtype=torch.float32).state_dict()
    found = loaded.model.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_a_loaded_model_is_ready_to_generate_and_takes_no_gradient(model_directory: Write) -> None:
    loaded = load_model(model_directory())
    assert isinstance(loaded.model.model.layers[2].self_attn.core, AbsorbedCore)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_prompt_starts_with_one_bos_unless_none_is_wanted(model_directory: Write, tokenizer: Tokenizer) -> None:
    loaded = load_model(model_directory())
    ids = tokenizer.encode("def f")
    assert loaded.encode_prompt("def f") == [0, *ids]
    assert loaded.encode_prompt(f"{tokenizer.bos}def f") == [0, *ids]
    assert loaded.encode_prompt("def f", bos=False) == ids
    assert loaded.encode_prompt("") == [0]


def test_files_without_the_mtp_modules_of_their_config_load_without_them(model_directory: Write) -> None:
    folder = model_directory(num_nextn_predict_layers=2)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.4.")}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(folder)
    assert (loaded.config.num_nextn_predict_layers, len(loaded.model.mtp_modules)) == (1, 1)
    assert not any(parameter.is_meta for parameter in loaded.model.parameters())


def test_threads_are_set_for_the_process(model_directory: Write) -> None:
    before = torch.get_num_threads()
    try:
        load_model(model_directory(), threads=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# Defaults of generation


def test_defaults_come_from_generation_config(model_directory: Write) -> None:
    loaded = load_model(model_directory(generation={"temperature": 0.3, "top_k": 7, "max_new_tokens": 9}))
    parameters = loaded.defaults.parameters
    assert (parameters.temperature, parameters.top_k, parameters.max_new_tokens) == (0.3, 7, 9)
    assert parameters.top_p == 0.95, "what the file leaves out keeps our default"
    assert loaded.defaults.notes == ()


def test_do_sample_false_means_greedy(model_directory: Write) -> None:
    loaded = load_model(model_directory(generation={"do_sample": False, "temperature": 0.7}))
    assert loaded.defaults.parameters.temperature == 0


def test_a_sampling_field_that_is_not_implemented_is_told(model_directory: Write) -> None:
    loaded = load_model(model_directory(generation={"typical_p": 0.9, "use_cache": True, "min_p": None}))
    (note,) = loaded.defaults.notes
    assert note.endswith("generation_config.json: typical_p=0.9 is not implemented and has no effect")


@pytest.mark.parametrize(
    ("content", "expected"),
    [({"eos_token_id": 4}, {4}), ({"eos_token_id": [1, 6]}, {1, 6}), ({}, {1}), (None, {1})],
    ids=["one", "several", "none named: the model's", "no file: the model's"],
)
def test_end_tokens_are_the_files_else_the_models(
    model_directory: Write, content: dict[str, object] | None, expected: set[int]
) -> None:
    folder = model_directory()
    (folder / "generation_config.json").unlink()
    if content is not None:
        (folder / "generation_config.json").write_text(json.dumps(content))
    assert load_model(folder).eos_ids == expected


# Faults


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "generation_config.json: not valid JSON"),
        ("[]", "generation_config.json: must hold a JSON object"),
        ('{"temperature": -1}', r"generation_config.json: temperature=-1: must be a number of at least 0"),
        ('{"eos_token_id": "</s>"}', r"generation_config.json: eos_token_id='</s>': must be a token id"),
    ],
)
def test_a_damaged_generation_config_is_named(model_directory: Write, content: str, sentence: str) -> None:
    folder = model_directory()
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ModelDirectoryError, match=sentence):
        load_model(folder)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": "bfloat"}, r"dtype=bfloat: must be one of auto, float32, bfloat16; nearest: bfloat16"),
        ({"device": "gpu"}, "device=gpu: must be cpu, cuda or cuda:<index>"),
        ({"device": "meta"}, "device=meta: must be cpu, cuda or cuda:<index>"),
        ({"device": "cuda:99"}, r"device=cuda:99: torch sees \d+ CUDA devices here; use cpu"),
        ({"threads": 0}, "threads=0: must be at least 1"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_before_anything_is_read(
    tmp_path: Path, arguments: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_model(tmp_path / "nothing", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lost", "kind", "sentence"),
    [
        ("tokenizer.json", ModelDirectoryError, r"tokenizer.json: no such file; a model directory needs its tokenizer"),
        ("config.json", ModelDirectoryError, r"config.json: no such file"),
        ("model.safetensors", ModelDirectoryError, r"no weights to read"),
    ],
)
def test_a_missing_file_is_named(model_directory: Write, lost: str, kind: type[AbyssalError], sentence: str) -> None:
    folder = model_directory()
    (folder / lost).unlink()
    with pytest.raises(kind, match=sentence):
        load_model(folder)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match=r"nothing: no such model directory"):
        load_model(tmp_path / "nothing")


def test_a_damaged_tokenizer_is_named(model_directory: Write) -> None:
    folder = model_directory()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        load_model(folder)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(model_directory: Write, tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size > 270
    with pytest.raises(ModelDirectoryError, match=r"the tokenizer has ids up to \d+, but the model's vocab_size=270"):
        load_model(model_directory(vocab_size=270))


def test_weights_that_do_not_fit_the_config_are_named(model_directory: Write) -> None:
    folder = model_directory()
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "v_head_dim": 6}))
    with pytest.raises(ModelDirectoryError, match=r"the weights do not fit the model; of another shape: .*kv_b_proj"):
        load_model(folder)
