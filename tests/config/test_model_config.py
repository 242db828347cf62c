"""ModelConfig: Hugging Face's config.json in and out, and what it refuses."""

import json

import pytest

from abyssal.config import ModelConfig, RopeScaling
from abyssal.errors import ConfigError
from abyssal.plan import count_parameters

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
    assert read.rope_parameters["rope_type"] == "yarn"
    assert (read.rope_parameters["factor"] == 1) is not yarn
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


RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "model_type": "deepseek_v3",
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
V3 = {
    **RELEASED,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "pretraining_tp": 1,
    "quantization_config": FP8,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "seq_aux": True,
    "topk_group": 4,
    "vocab_size": 129280,
}
KIMI_K2 = {
    **V3,
    "model_type": "kimi_k2",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**V3["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
MOONLIGHT = {
    **RELEASED,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "pad_token_id": 163838,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}


@pytest.mark.parametrize(
    ("values", "parameters", "with_mtp"),
    [
        (V3, 671_026_419_200, 11_610_068_224),
        ({**V3, "quantization_config": {**FP8, "scale_fmt": "ue8m0"}}, 671_026_419_200, 11_610_068_224),
        (KIMI_K2, None, 0),
        (MOONLIGHT, None, 0),
    ],
    ids=["V3 and R1", "V3.1", "Kimi K2", "Moonlight"],
)
def test_configs_in_the_style_of_known_releases_are_read(values, parameters, with_mtp):
    config = ModelConfig.from_hf(values)
    for field in ModelConfig.model_fields.keys() & values.keys() - {"rope_scaling"}:
        assert getattr(config, field) == values[field], field
    scaling = values["rope_scaling"]
    assert (config.rope_scaling and config.rope_scaling.model_dump()) == scaling
    count = count_parameters(config)
    assert count.mtp.total == with_mtp
    if parameters is not None:
        assert count.total == parameters
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_kimi_k2_and_moonlight_have_the_sizes_of_their_names():
    """1T-A32B and 16B-A3B."""
    kimi, moonlight = (count_parameters(ModelConfig.from_hf(values)) for values in (KIMI_K2, MOONLIGHT))
    assert (round(kimi.total / 1e12, 1), round(kimi.activated / 1e9)) == (1.0, 33)
    assert round(moonlight.total / 1e9) == 16


def test_groups_of_which_all_are_kept_are_written_as_one():
    fields = shape(n_group=3, topk_group=3).to_hf()
    assert (fields["n_group"], fields["topk_group"]) == (1, 1)
    fields = shape(n_group=3, topk_group=2).to_hf()
    assert (fields["n_group"], fields["topk_group"]) == (3, 2)


def test_no_yarn_is_written_as_yarn_that_changes_nothing_and_read_as_none():
    config = shape()
    scaling = config.to_hf()["rope_scaling"]
    assert (scaling["type"], scaling["factor"], scaling["original_max_position_embeddings"]) == ("yarn", 1.0, 640)
    same = config.model_copy(update={"rope_scaling": RopeScaling.parse(scaling, "written")})
    assert same.softmax_scale == config.softmax_scale
    assert same.rope_scaling.rotary_factor == 1
    assert ModelConfig.from_hf(config.to_hf()).rope_scaling is None


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
            "rope_scaling: rope_type='default' and type='yarn' contradict each other",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_parameters: rope_theta=1000000.0 contradicts rope_theta=5000.0",
        ),
        (
            {"rope_scaling": {"type": [], "rope_type": {}, **YARN}},
            "rope_scaling: rope_type={} and type=[] contradict each other",
        ),
        ({"n_routed_experts": 10**30}, "n_routed_experts=1000000000000000000000000000000: input should be less than"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000: input should be less than or equal to 10000"),
        ({"rope_theta": 1}, "rope_theta=1: input should be greater than 1"),
        ({"rope_scaling": {"type": "yarn", **YARN, "beta_fast": 1e308}}, "rope_scaling.beta_fast=1e+308: input should"),
        ({"rope_scaling": {"type": "yarn", **YARN, "mscale_all_dim": 1e308}}, "rope_scaling.mscale_all_dim=1e+308: in"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method='awq': only 'fp8' with"),
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
