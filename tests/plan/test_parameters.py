"""Parameter counts: the published figures to the last digit, and agreement with models that are built."""

from dataclasses import replace

import pytest

from abyssal.config import ModelConfig, load_recipe
from abyssal.plan import ParametersByPart, cache_bytes_per_token, count_parameters

V3 = load_recipe("v3_671b").model
V3_16B = load_recipe("v3_16b").model
#: The report's large ablation model, but for its softmax gate.
V2 = ModelConfig(
    vocab_size=102400,
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=8,
    topk_group=3,
    first_k_dense_replace=1,
    max_position_embeddings=4096,
)


def test_the_671b_model_has_the_published_parameters():
    count = count_parameters(V3)
    assert count.total == 671_026_419_200
    assert count.activated == 37_552_297_472
    assert count.activated_without_embedding == 36_625_618_432
    assert count.activated_without_both == 35_698_939_392
    assert count.main.embedding == count.main.head == 926_679_040
    assert count.main.dense_ffn == 3 * 396_361_728
    assert count.main.attention + 61 * (1536 + 512) == 61 * 187_107_328  # published with the latents' norms
    assert count.main.routed_experts == 58 * 256 * 44_040_192
    assert count.activated_main.routed_experts == 58 * 8 * 44_040_192
    assert count.main.shared_experts == 58 * 44_040_192
    moe_layer = count.main.routed_experts + count.main.shared_experts + count.main.gate + count.main.gate_bias
    assert moe_layer == 58 * 11_320_164_608


def test_the_671b_mtp_module_makes_the_release_685b():
    count = count_parameters(V3)
    assert count.mtp.total == 11_610_068_224
    assert count.mtp.mtp_projection == 102_760_448
    assert count.mtp.total + count.copies == 13_463_426_304
    assert count.release == 684_489_845_504
    assert count.activated_mtp.total == 688_100_608
    assert count.activated_mtp.total + count.main.head == 1_614_779_648
    assert count.activated_mtp_with_both == 2_541_458_688


@pytest.mark.parametrize(
    ("config", "total", "activated", "without_embedding", "without_both"),
    [
        (V2, 235_741_434_880, 21_375_800_320, 20_851_512_320, 20_327_224_320),
        (V3_16B, 15_706_484_224, 2_661_150_208, 2_451_435_008, 2_241_719_808),
    ],
    ids=["236b", "16b"],
)
def test_the_smaller_shapes_have_the_published_parameters_but_for_the_gates_bias(
    config, total, activated, without_embedding, without_both
):
    count = count_parameters(config)
    bias = count.main.gate_bias  # DeepSeek-V2's gate has none
    assert bias == (config.num_hidden_layers - 1) * config.n_routed_experts
    assert count.total - bias == total
    assert count.activated - bias == activated
    assert count.activated_without_embedding - bias == without_embedding
    assert count.activated_without_both - bias == without_both


@pytest.mark.parametrize(("config", "size"), [(V3, 70_272), (V2, 69_120), (V3_16B, 31_104)])
def test_a_token_of_cache_takes_the_published_bytes(config, size):
    assert cache_bytes_per_token(config) == size
    assert cache_bytes_per_token(config, value_bytes=1) * 2 == size


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"first_k_dense_replace": 3}, {"n_shared_experts": 1}])
def test_the_count_is_that_of_transformers_model(tiny_config, changes):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    config = tiny_config.model_copy(update={"num_nextn_predict_layers": 0, **changes})
    with torch.device("meta"):
        oracle = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config.to_hf()))
    sizes = {name: tensor.numel() for name, tensor in oracle.state_dict().items()}
    count = count_parameters(config)
    assert count.total == sum(sizes.values())
    assert count.trainable == sum(parameter.numel() for parameter in oracle.parameters())

    def of(part):
        return sum(size for name, size in sizes.items() if part in name)

    assert count.main == ParametersByPart(
        embedding=of("embed_tokens"),
        attention=of("self_attn.") - of("a_layernorm"),
        dense_ffn=sum(of(f"layers.{layer}.mlp.") for layer in range(config.first_k_dense_replace)),
        routed_experts=of("mlp.experts."),
        shared_experts=of("shared_experts."),
        gate=of("mlp.gate.weight"),
        gate_bias=of("e_score_correction_bias"),
        norms=of("norm.weight"),
        head=of("lm_head"),
    )


def test_tied_embeddings_count_once_in_the_model_and_stand_twice_in_each_module_of_the_files(tiny_config):
    tied = count_parameters(tiny_config.model_copy(update={"tie_word_embeddings": True}))
    loose = count_parameters(tiny_config)
    assert tied.main == replace(loose.main, head=0)
    assert tied.mtp == loose.mtp
    assert tied.copies == loose.copies == 2 * 97 * 20


def test_each_mtp_module_counts_the_same(tiny_config):
    one, three = (count_parameters(tiny_config.model_copy(update={"num_nextn_predict_layers": n})) for n in (1, 3))
    assert three.mtp == one.mtp * 3
    assert three.activated_mtp == one.activated_mtp * 3
    assert three.main == one.main
    assert three.model == three.total + three.mtp.total
    assert three.trainable == three.model - three.main.gate_bias - three.mtp.gate_bias


def test_matrices_are_what_a_token_is_multiplied_with():
    parts = ParametersByPart(1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert parts.total == 1023
    assert parts.matrices == 1023 - 1 - 64 - 128


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "tie_word_embeddings": True}])
def test_the_count_is_that_of_the_built_model_with_its_mtp_modules(tiny_config, changes):
    torch = pytest.importorskip("torch")
    from abyssal.model import Transformer

    config = tiny_config.model_copy(update={"num_nextn_predict_layers": 2, **changes})
    with torch.device("meta"):
        model = Transformer(config)
    count = count_parameters(config)
    assert count.trainable == sum(parameter.numel() for parameter in model.parameters())
    assert count.model == sum(tensor.numel() for tensor in model.state_dict().values())
