"""FLOPs a token: the published figures, and agreement with products that are counted one by one."""

import pytest

from abyssal.config import load_recipe
from abyssal.plan import count_parameters, decode_flops, forward_flops, training_flops

V3 = load_recipe("v3_671b").model


@pytest.mark.parametrize(("causal", "published"), [(True, 250e9), (False, 281e9)])
def test_training_takes_the_published_flops_a_token(causal, published):
    flops = training_flops(V3, 4096, causal=causal, mtp=False)
    assert flops.total == pytest.approx(published, rel=0.01)
    assert flops.mtp.total == 0
    assert flops.backward == 2 * flops.forward


def test_published_throughput_gives_the_published_flops_a_gpu():
    tokens_a_second = 272.80e9 / 86_400 / 2048
    assert tokens_a_second * training_flops(V3, 4096, mtp=False).total == pytest.approx(385e12, rel=0.01)
    assert tokens_a_second * training_flops(V3, 4096, causal=False, mtp=False).total == pytest.approx(432e12, rel=0.01)


def test_products_are_two_operations_a_weight_that_a_token_meets():
    flops, parts = forward_flops(V3, 4096), count_parameters(V3).activated_main
    assert flops.total - flops.attention_scores == 2 * parts.matrices
    assert flops.routed_experts == 2 * 58 * 8 * 44_040_192
    assert flops.head == 2 * 926_679_040


def test_a_causal_token_meets_half_of_the_keys_and_itself(tiny_config):
    for length in (1, 2, 7):
        causal, full = (forward_flops(tiny_config, length, causal=causal).attention_scores for causal in (True, False))
        a_pair = 2 * 3 * (11 + 5) * 3  # heads, query and value dims, layers
        assert full == a_pair * length
        assert causal * length == a_pair * sum(range(1, length + 1))
    assert forward_flops(tiny_config, 7).head == forward_flops(tiny_config, 1).head


def test_an_mtp_module_is_a_moe_layer_its_projection_and_another_use_of_the_head(tiny_config):
    one = training_flops(tiny_config, 9)
    two = training_flops(tiny_config.model_copy(update={"num_nextn_predict_layers": 2}), 9)
    assert two.main == one.main == forward_flops(tiny_config, 9)
    assert two.mtp == one.mtp + one.mtp
    assert one.mtp.head == one.main.head
    assert one.mtp.mtp_projection == 2 * 20 * 40
    assert one.mtp.attention_scores * 3 == one.main.attention_scores
    assert one.mtp.attention_projections * 3 == one.main.attention_projections
    assert one.mtp.routed_experts * 2 == one.main.routed_experts
    assert one.mtp.dense_ffn == 0
    assert two.total == 3 * (two.main.total + two.mtp.total)


def test_a_tied_head_is_multiplied_all_the_same(tiny_config):
    tied = tiny_config.model_copy(update={"tie_word_embeddings": True})
    assert training_flops(tied, 9) == training_flops(tiny_config, 9)


def test_torch_counts_the_same_forward_flops(tiny_config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    from torch.utils.flop_counter import FlopCounterMode

    every_expert_sees_all = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
    config = tiny_config.model_copy(update=every_expert_sees_all)
    torch.manual_seed(0)
    oracle = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config.to_hf()))
    oracle.set_attn_implementation("eager")
    oracle.set_experts_implementation("eager")
    length = 8
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        oracle(torch.arange(length).unsqueeze(0), use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    rotary = 2 * (config.qk_rope_head_dim // 2) * length  # its angles are a product there, a table here
    assert sum(counts.values()) - rotary == forward_flops(config, length, causal=False).total * length


@pytest.mark.parametrize("context", [1, 5])
def test_decoding_from_the_absorbed_latent_takes_as_counted_by_hand(tiny_config, context):
    absorbed = decode_flops(tiny_config, context)
    # a query meets latent and rotary key, its weights meet the latent: heads x (C + R + C) multiply-adds a key
    assert absorbed.attention_scores == 2 * 3 * (13 + 4 + 13) * context * 3
    assert absorbed.total - absorbed.attention_scores == 2 * count_parameters(tiny_config).activated_main.matrices


def test_decoding_without_absorption_expands_the_whole_context_again(tiny_config):
    plain, absorbed = (decode_flops(tiny_config, 9, absorbed=absorbed) for absorbed in (False, True))
    assert plain.attention_projections - absorbed.attention_projections == 2 * 8 * 13 * 3 * (7 + 5) * 3
    assert plain.attention_scores == forward_flops(tiny_config, 9, causal=False).attention_scores
    assert decode_flops(tiny_config, 1, absorbed=False) == forward_flops(tiny_config, 1)
