"""ModelConfig: Hugging Face's config.json in and out, and what it refuses."""

import json

import pytest

from abyssal.config import ModelConfig, RopeScaling
from abyssal.errors import ConfigError

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 112,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_nextn_predict_layers": 2,
    "num_attention_heads": 3,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 6,
    "v_head_dim": 18,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 6,
    "topk_group": 3,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 2,
    "max_position_embeddings": 640,
    "rope_theta": 5000.0,
}
YARN = {
    "factor": 8.0,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 80,
}
RELEASED_YARN = RopeScaling(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)


def shape(**changes):
    return ModelConfig(**SHAPE | changes)


@pytest.mark.parametrize("scaling", [None, RopeScaling(**YARN)], ids=["plain", "yarn"])
@pytest.mark.parametrize("q_lora_rank", [28, None])
def test_what_is_written_is_read_back(scaling, q_lora_rank, tmp_path):
    config = shape(rope_scaling=scaling, q_lora_rank=q_lora_rank, bos_token_id=None, tie_word_embeddings=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_hf()), encoding="utf-8")
    assert ModelConfig.from_json(path) == config


@pytest.mark.parametrize("yarn", [False, True])
def test_both_rope_spellings_mean_the_same(yarn):
    old = dict(SHAPE)
    new = {k: v for k, v in SHAPE.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    if yarn:
        old["rope_scaling"] = {"type": "yarn", **YARN}
        new["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 5000.0, **YARN}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new) == ModelConfig.from_hf(old | new)
    assert (ModelConfig.from_hf(new).rope_scaling is not None) == yarn


@pytest.mark.parametrize("yarn", [False, True])
def test_transformers_writes_what_we_read_and_reads_what_we_write(yarn, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    ours = shape(rope_scaling=RopeScaling(**YARN) if yarn else None)
    rope = {"rope_type": "yarn", **YARN} if yarn else {"rope_type": "default"}
    theirs = transformers.DeepseekV3Config(
        **{k: v for k, v in SHAPE.items() if k != "rope_theta"},
        num_key_value_heads=3,
        rope_parameters={"rope_theta": 5000.0, **rope},
    )
    theirs.save_pretrained(tmp_path)
    assert ModelConfig.from_json(tmp_path / "config.json") == ours

    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()), encoding="utf-8")
    read = transformers.DeepseekV3Config.from_pretrained(tmp_path)
    assert read.num_key_value_heads == 3
    assert read.rope_parameters["rope_theta"] == 5000.0
    assert read.rope_parameters["rope_type"] == rope["rope_type"]
    for field, value in SHAPE.items():
        if field != "rope_theta":
            assert getattr(read, field) == value, field
    for field, value in (YARN if yarn else {}).items():
        assert read.rope_parameters[field] == value, field


def test_left_out_fields_take_hugging_faces_defaults():
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    oracle = transformers.DeepseekV3Config()
    optional = {f for f, info in ModelConfig.model_fields.items() if not info.is_required()}
    given = {f: getattr(oracle, f) for f in ModelConfig.model_fields if f not in optional}
    read = ModelConfig.from_hf(given)
    for field in sorted(optional - {"rope_theta", "rope_scaling", "num_nextn_predict_layers"}):
        assert getattr(read, field) == getattr(oracle, field), field
    assert read.num_nextn_predict_layers == 0  # no MTP weights are claimed unless the file says so


def test_the_keys_that_other_engines_need_are_written():
    fields = shape().to_hf(dtype="float32")
    assert fields["topk_method"] == "noaux_tc"
    assert fields["scoring_func"] == "sigmoid"
    assert fields["num_key_value_heads"] == 3
    assert fields["architectures"] == ["DeepseekV3ForCausalLM"]
    assert fields["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kv_lora_rnk": 4}, "kv_lora_rnk: unknown field; nearest: kv_lora_rank"),
        ({"model_type": "llama"}, "model_type='llama': must be one of deepseek_v3, kimi_k2"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax': only 'sigmoid' is implemented"),
        ({"rope_interleave": False}, "rope_interleave=False: only True is implemented"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1: must equal num_attention_heads=3"),
        ({"qk_head_dim": 64}, "qk_head_dim=64: must be qk_nope_head_dim + qk_rope_head_dim = 20"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn': must be an object"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling: factor: without a type these mean nothing; allowed: yarn"),
        ({"rope_scaling": {"type": "linear", **YARN}}, "rope_scaling.type='linear': input should be 'yarn'"),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "beta_fst": 1}},
            "rope_scaling.beta_fst: unknown field; nearest: beta_fast",
        ),
        (
            {"rope_scaling": {"type": "yarn", "rope_type": "default", **YARN}},
            "rope_scaling: rope_type and type contradict each other: ['default', 'yarn']",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_parameters: rope_theta=1000000.0 contradicts rope_theta=5000.0",
        ),
        ({"vocab_size": "many"}, "vocab_size='many': input should be a valid integer"),
        ({"hidden_size": -8}, "hidden_size=-8: input should be greater than 0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf: input should be a finite number"),
    ],
)
def test_a_foreign_or_contradictory_config_is_refused(changes, sentence):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(SHAPE | changes, source="here/config.json")
    assert str(caught.value).startswith("here/config.json: ")
    assert sentence in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_group": 5}, "n_group=5: must divide n_routed_experts=12; possible: 1, 2, 3, 4, 6, 12"),
        ({"n_group": 12}, "n_group=12: leaves 1 expert a group"),
        ({"topk_group": 7}, "topk_group=7: must be at most n_group=6"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7: at most 6 experts stand in the 3 of 6 groups"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7: must be even (RoPE rotates pairs); nearest: 8"),
        ({"first_k_dense_replace": 6}, "first_k_dense_replace=6: must be at most num_hidden_layers=5"),
        ({"eos_token_id": 320}, "eos_token_id=320: must be below vocab_size=320"),
    ],
)
def test_an_impossible_shape_is_refused_by_field_value_and_what_is_allowed(changes, sentence):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.parse(SHAPE | changes, source="mine")
    assert str(caught.value).startswith(f"mine: {sentence}")


def test_every_fault_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        ModelConfig.parse(SHAPE | {"vocab_size": 0, "hiden_size": 4}, source="mine")
    assert "vocab_size=0" in str(caught.value)
    assert "hiden_size: unknown field; nearest: hidden_size" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such file"),
        ("[1]", "must hold a JSON object"),
        ("{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_an_unreadable_config_json_is_one_sentence(content, sentence, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=sentence) as caught:
        ModelConfig.from_json(path)
    assert str(path) in str(caught.value)


def test_a_folder_in_place_of_a_config_json_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelConfig.from_json(tmp_path)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        shape().hidden_size = 64


def test_softmax_scale_under_yarn_is_the_released_one():
    released = shape(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=RELEASED_YARN)
    assert released.softmax_scale == pytest.approx(0.1352338, rel=1e-6)
    assert released.rope_scaling.attention_factor(1.0) == pytest.approx(1.3688879, rel=1e-7)
    assert released.rope_scaling.rotary_factor == 1.0
    assert shape(qk_nope_head_dim=128, qk_rope_head_dim=64).softmax_scale == pytest.approx(192**-0.5, rel=1e-15)


def test_mscale_moves_the_amplitude_and_mscale_all_dim_the_scale():
    both = RopeScaling(**YARN)
    ln = 2.0794415416798357  # ln 8
    assert both.rotary_factor == pytest.approx((1 + 0.07 * ln) / (1 + 0.09 * ln), rel=1e-15)
    assert shape(rope_scaling=both).softmax_scale == pytest.approx(20**-0.5 * (1 + 0.09 * ln) ** 2, rel=1e-15)


def test_dense_layers_come_first_and_mtp_layers_route():
    config = shape()
    assert [config.is_moe(layer) for layer in range(config.num_layers)] == [False] * 2 + [True] * 5
    assert config.shared_intermediate_size == 80
