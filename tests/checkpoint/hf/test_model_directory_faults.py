"""A model directory is read only when it is whole and fits."""

import json

import pytest
import torch

from abyssal.checkpoint.hf import load_into, read_model_directory
from abyssal.checkpoint.hf.names import memory_tensors
from abyssal.errors import ModelDirectoryError


def test_all_that_does_not_fit_is_told_before_anything_is_copied(written, tiny, random_tensors, build_module, rewrite):
    def change(tensors):
        del tensors["model.layers.1.input_layernorm.weight"]
        for layer in (1, 2):
            del tensors[f"model.layers.{layer}.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_bias"] = torch.zeros(2)
        for expert in range(4):
            tensors[f"model.layers.2.mlp.experts.{expert}.down_proj.weight"] = torch.zeros(7, 24)
        tensors["model.norm.weight"] = torch.zeros(25)

    rewrite(written, change)
    model = build_module(random_tensors(tiny()))
    with pytest.raises(ModelDirectoryError) as caught:
        load_into(model, read_model_directory(written)[1])
    assert str(caught.value) == (
        f"{written}: the weights do not fit the model; "
        "missing: model.layers.1.input_layernorm.weight, model.layers.{1-2}.mlp.experts.3.up_proj.weight; "
        "surplus: model.layers.0.self_attn.q_bias; "
        "of another shape: model.layers.2.mlp.experts.{0-3}.down_proj.weight ([7, 24] instead of [24, 7]), "
        "model.norm.weight ([25] instead of [24])"
    )
    assert all((tensor == 7).all() for tensor in model.state_dict().values())


def test_more_experts_than_the_model_has_are_surplus(written, tiny, random_tensors, build_module):
    model = build_module(random_tensors(tiny(n_routed_experts=3)))
    with pytest.raises(ModelDirectoryError, match=r"surplus: model\.layers\.\{1-3\}\.mlp\.experts\.3\.down_proj"):
        load_into(model, read_model_directory(written)[1])


def test_a_missing_mtp_layer_must_be_allowed(written, tiny, random_tensors, build_module, rewrite):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    rewrite(written, change)
    _, reader = read_model_directory(written)
    model = build_module(random_tensors(tiny()))
    with pytest.raises(ModelDirectoryError, match=r"missing: model\.layers\.3\.enorm\.weight"):
        load_into(model, reader)
    loaded = load_into(model, reader, allow_missing_mtp=True)
    assert loaded == [spec.name for spec in memory_tensors(tiny(num_nextn_predict_layers=0))]
    for name, tensor in model.state_dict().items():
        assert (tensor == 7).all() == name.startswith("model.layers.3.")
    assert [name for name, _ in reader] == loaded


def test_half_an_mtp_layer_is_never_allowed(written, tiny, random_tensors, build_module, rewrite):
    rewrite(written, lambda tensors: tensors.pop("model.layers.3.eh_proj.weight"))
    with pytest.raises(ModelDirectoryError, match=r"missing: model\.layers\.3\.eh_proj\.weight$"):
        load_into(build_module(random_tensors(tiny())), read_model_directory(written)[1], allow_missing_mtp=True)


def test_a_model_with_mtp_starts_from_weights_without(write, tiny, random_tensors, build_module):
    _, reader = read_model_directory(
        write(tiny(num_nextn_predict_layers=0), random_tensors(tiny(num_nextn_predict_layers=0)))
    )
    model = build_module(random_tensors(tiny()))
    with pytest.raises(ModelDirectoryError, match=r"missing: model\.layers\.3"):
        load_into(model, reader)
    load_into(model, reader, allow_missing_mtp=True)


def test_copies_and_old_rope_frequencies_may_be_there_or_not(written, tiny, random_tensors, build_module, rewrite):
    def change(tensors):
        del tensors["model.layers.3.embed_tokens.weight"]
        del tensors["model.layers.3.shared_head.head.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)

    rewrite(written, change)
    load_into(build_module(random_tensors(tiny())), read_model_directory(written)[1])


def test_a_head_beside_tied_embeddings_is_skipped(write, tiny, random_tensors, build_module, rewrite):
    config = tiny(tie_word_embeddings=True)
    path = write(config, random_tensors(config))
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(41, 24)}))
    load_into(build_module(random_tensors(config)), read_model_directory(path)[1])


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_a_truncated_file_is_named(written, keep):
    content = (written / "model.safetensors").read_bytes()
    (written / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(ModelDirectoryError, match=r"model\.safetensors: truncated, or not a safetensors file"):
        read_model_directory(written)


def test_a_git_lfs_pointer_is_told_from_weights(written):
    (written / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelDirectoryError, match="run git lfs pull"):
        read_model_directory(written)


def test_a_missing_shard_is_named(write, tiny, random_tensors):
    path = write(tiny(), random_tensors(tiny()), max_shard_bytes=20_000)
    lost = sorted(path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelDirectoryError, match=rf"{lost.name}: no such file, but model.safetensors.index.json name"):
        read_model_directory(path)
    for other in path.glob("model-00001-*.safetensors"):
        other.unlink()
    with pytest.raises(
        ModelDirectoryError, match=rf"model-00001-of-\d+\.safetensors: no such file, .* nor {lost.name}"
    ):
        read_model_directory(path)


def test_an_index_that_does_not_fit_is_told(write, tiny, random_tensors):
    path = write(tiny(), random_tensors(tiny()), max_shard_bytes=20_000)
    index = path / "model.safetensors.index.json"
    right = json.loads(index.read_text())
    wrong = {**right["weight_map"], "model.other": "model-00001-of-00002.safetensors"}
    wrong["model.other"] = next(iter(right["weight_map"].values()))
    index.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(ModelDirectoryError, match=r"says that model\.other is in model-0000.*but it is not"):
        read_model_directory(path)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelDirectoryError, match=r"names '\.\./elsewhere\.safetensors'"):
        read_model_directory(path)
    for text in ("no JSON", "[]", "{}"):
        index.write_text(text)
        with pytest.raises(ModelDirectoryError, match="not an index of safetensors files"):
            read_model_directory(path)


def test_pickles_are_refused_with_the_reason(written):
    (written / "model.safetensors").unlink()
    with pytest.raises(ModelDirectoryError, match=r"no model\.safetensors"):
        read_model_directory(written)
    torch.save({"lm_head.weight": torch.zeros(2)}, written / "pytorch_model.bin")
    with pytest.raises(ModelDirectoryError, match=r"pytorch_model\.bin, a pickle, which is refused .* run code"):
        read_model_directory(written)


@pytest.mark.parametrize(
    ("dtype", "letters"), [(torch.int8, "I8"), (torch.float8_e5m2, "F8_E5M2"), (torch.bool, "BOOL")], ids=str
)
def test_weights_of_another_type_are_named_with_those_that_are_read(written, rewrite, dtype, letters):
    rewrite(written, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(41, 24).to(dtype)}))
    with pytest.raises(
        ModelDirectoryError,
        match=rf"of a type that is not read: lm_head\.weight \({letters}; possible: F64, F32, BF16, F16, F8_E4M3\)",
    ):
        read_model_directory(written)[1].check()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_that_are_not_finite_are_all_named_and_nothing_is_copied(
    written, tiny, random_tensors, build_module, rewrite, dtype, bad
):
    places = ["model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"]

    def change(tensors):
        for name in places:
            tensors[name] = tensors[name].to(dtype)
            tensors[name].view(-1)[-1] = bad

    rewrite(written, change)
    reader = read_model_directory(written)[1]
    reader.check()  # headers only
    model = build_module(random_tensors(tiny()))
    with pytest.raises(ModelDirectoryError) as caught:
        load_into(model, reader)
    assert str(caught.value).endswith(f"do not fit the model; with values that are not finite: {', '.join(places)}")
    assert all((tensor == 7).all() for tensor in model.state_dict().values())


def test_every_kind_of_fault_stands_in_one_report(written, rewrite):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.other"] = torch.zeros(2)
        tensors["lm_head.weight"] = torch.zeros(41, 25)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(29, 24, dtype=torch.int32)
        for expert in range(4):
            tensors[f"model.layers.2.mlp.experts.{expert}.down_proj.weight"][3, 5] = torch.nan

    rewrite(written, change)
    with pytest.raises(ModelDirectoryError) as caught:
        read_model_directory(written)[1].check()
    assert str(caught.value) == (
        f"{written}: the weights do not fit the model; missing: model.norm.weight; surplus: model.other; "
        "of another shape: lm_head.weight ([41, 25] instead of [41, 24]); "
        "of a type that is not read: model.layers.0.mlp.up_proj.weight (I32; possible: F64, F32, BF16, F16, F8_E4M3); "
        "with values that are not finite: model.layers.2.mlp.experts.{0-3}.down_proj.weight"
    )


def test_what_is_not_loaded_may_hold_anything(written, tiny, random_tensors, build_module, rewrite):
    rewrite(written, lambda tensors: tensors["model.layers.3.embed_tokens.weight"].fill_(torch.nan))
    load_into(build_module(random_tensors(tiny())), read_model_directory(written)[1])


def test_missing_parts_of_a_directory_are_named(written, tmp_path):
    with pytest.raises(ModelDirectoryError, match="nowhere: no such model directory"):
        read_model_directory(tmp_path / "nowhere")
    with pytest.raises(ModelDirectoryError, match=r"config\.json: is a file; give the model directory, perhaps"):
        read_model_directory(written / "config.json")
    (written / "tokenizer.json").unlink()
    with pytest.raises(ModelDirectoryError, match=r"tokenizer\.json: no such file"):
        read_model_directory(written)
    read_model_directory(written, needs_tokenizer=False)
    (written / "config.json").unlink()
    with pytest.raises(ModelDirectoryError, match=r"config\.json: no such file"):
        read_model_directory(written)
