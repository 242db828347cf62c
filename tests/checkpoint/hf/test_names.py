"""In-memory and released names, shapes and their mapping."""

import pytest
import torch

from abyssal.checkpoint.hf.expert_stacks import split_experts, split_names, stack_experts
from abyssal.checkpoint.hf.names import fold_names, memory_tensors
from abyssal.checkpoint.hf.released import mtp_copies, released_tensors


def test_released_names_and_shapes_of_every_kind_of_layer(tiny):
    config = tiny(num_hidden_layers=2, n_routed_experts=3)
    block = {
        "input_layernorm.weight": (24,),
        "self_attn.q_a_proj.weight": (13, 24),
        "self_attn.q_a_layernorm.weight": (13,),
        "self_attn.q_b_proj.weight": (5 * 12, 13),
        "self_attn.kv_a_proj_with_mqa.weight": (15, 24),
        "self_attn.kv_a_layernorm.weight": (11,),
        "self_attn.kv_b_proj.weight": (5 * 14, 11),
        "self_attn.o_proj.weight": (24, 30),
        "post_attention_layernorm.weight": (24,),
    }
    dense = {"gate_proj": (29, 24), "up_proj": (29, 24), "down_proj": (24, 29)}
    expert = {"gate_proj": (7, 24), "up_proj": (7, 24), "down_proj": (24, 7)}
    shared = {"gate_proj": (14, 24), "up_proj": (14, 24), "down_proj": (24, 14)}
    sparse = {
        **block,
        "mlp.gate.weight": (3, 24),
        "mlp.gate.e_score_correction_bias": (3,),
        **{f"mlp.experts.{e}.{name}.weight": shape for e in range(3) for name, shape in expert.items()},
        **{f"mlp.shared_experts.{name}.weight": shape for name, shape in shared.items()},
    }
    expected = {
        "model.embed_tokens.weight": (41, 24),
        **{f"model.layers.0.{name}": shape for name, shape in block.items()},
        **{f"model.layers.0.mlp.{name}.weight": shape for name, shape in dense.items()},
        **{f"model.layers.1.{name}": shape for name, shape in sparse.items()},
        "model.norm.weight": (24,),
        "lm_head.weight": (41, 24),
        "model.layers.2.embed_tokens.weight": (41, 24),
        "model.layers.2.enorm.weight": (24,),
        "model.layers.2.hnorm.weight": (24,),
        "model.layers.2.eh_proj.weight": (24, 48),
        **{f"model.layers.2.{name}": shape for name, shape in sparse.items()},
        "model.layers.2.shared_head.norm.weight": (24,),
        "model.layers.2.shared_head.head.weight": (41, 24),
    }
    assert [(spec.name, spec.shape) for spec in released_tensors(config)] == list(expected.items())


def test_without_q_lora_there_is_one_query_projection(tiny):
    names = {spec.name: spec.shape for spec in released_tensors(tiny(q_lora_rank=None))}
    assert names["model.layers.0.self_attn.q_proj.weight"] == (60, 24)
    assert not any("q_a_" in name or "q_b_" in name for name in names)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_memory_and_released_names_stand_for_each_other(tiny, tied, depth):
    config = tiny(tie_word_embeddings=tied, num_nextn_predict_layers=depth)
    memory = [spec.name for spec in memory_tensors(config)]
    released = {spec.name for spec in released_tensors(config)}
    stood_for = [part for name in memory for part in (*split_names(name, 4), *mtp_copies(name, config))]
    assert len(stood_for) == len(set(stood_for))
    assert set(stood_for) == released
    assert ("lm_head.weight" in released) is not tied
    assert sum(name.endswith("shared_head.head.weight") for name in released) == depth


def test_split_experts_gives_gate_the_first_rows_and_up_the_last():
    stack = torch.arange(3 * 4 * 5).reshape(3, 4, 5)
    parts = dict(split_experts("model.layers.1.mlp.experts.gate_up_proj", stack))
    assert len(parts) == 6
    assert torch.equal(parts["model.layers.1.mlp.experts.2.gate_proj.weight"], stack[2, :2])
    assert torch.equal(parts["model.layers.1.mlp.experts.2.up_proj.weight"], stack[2, 2:])
    assert all(part.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr() for part in parts.values())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.mlp.experts.gate_up_proj", (3, 4, 5)),
        ("model.layers.1.mlp.experts.down_proj", (3, 5, 2)),
        ("model.layers.1.mlp.shared_experts.gate_proj.weight", (3, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_join_experts_is_the_inverse_of_split_experts(name, shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = dict(split_experts(name, tensor))
    joined = stack_experts(name, 3, parts.__getitem__)
    assert joined.dtype == dtype
    assert torch.equal(joined, tensor)


def test_fold_names_layers_and_experts_as_ranges():
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in (3, 4, 7) for e in range(5)]
    assert fold_names(["model.norm.weight", *names]) == [
        "model.norm.weight",
        "model.layers.{3-4,7}.mlp.experts.{0-4}.up_proj.weight",
    ]
    uneven = [name for name in names if name != "model.layers.4.mlp.experts.2.up_proj.weight"]
    assert fold_names(uneven) == [
        "model.layers.{3,7}.mlp.experts.{0-4}.up_proj.weight",
        "model.layers.4.mlp.experts.{0-1,3-4}.up_proj.weight",
    ]
    assert fold_names(["model.layers.5.mlp.experts.9.up_proj.weight"]) == [
        "model.layers.5.mlp.experts.9.up_proj.weight"
    ]
    assert fold_names([]) == []
