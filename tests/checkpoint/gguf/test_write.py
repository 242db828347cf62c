"""A GGUF file says of a model directory what llama.cpp needs, and nothing else."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

from abyssal.checkpoint.gguf.config import unsayable
from abyssal.checkpoint.gguf.write import DTYPES, write_gguf
from abyssal.config import RopeScaling
from abyssal.errors import ModelDirectoryError, UsageError
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config

YARN = RopeScaling(factor=8.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.7)
VARIANTS = {
    "q_lora, MTP, dense layer": {},
    "no q_lora": {"q_lora_rank": None, "num_nextn_predict_layers": 0},
    "tied head, two MTP modules": {"tie_word_embeddings": True, "num_nextn_predict_layers": 2},
    "dense layers only": {"first_k_dense_replace": 3},
    "no dense layer": {"first_k_dense_replace": 0},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def f(x):\n    return x * x\n"] * 3, 290)


@pytest.fixture
def directory(write, tiny, random_tensors, tokenizer):
    """Write the model directory of a tiny random model with a tokenizer, some fields of the configuration changed."""

    def build(dtype=torch.float32, scale: float = 1.0, **changes) -> Path:
        config = tiny(vocab_size=301, **changes)

        def tokenizer_files(folder: Path) -> None:
            tokenizer.save(folder / "tokenizer.json")
            write_tokenizer_config(folder, tokenizer, config.max_position_embeddings)

        tensors = {name: tensor * scale for name, tensor in random_tensors(config, seed=4).items()}
        return write(config, tensors, dtype=dtype, tokenizer_files=tokenizer_files)

    return build


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "out" / "model.gguf"


def fields(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, tuple[GGMLQuantizationType, np.ndarray]]:
    """Return the type and values of every tensor, as fp32, the slowest dim first."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = (tensor.tensor_type, values.reshape(tensor.shape[::-1].tolist()))
    return found


def derived(directory: Path) -> dict[str, np.ndarray]:
    """Derive, in float64 and from the released tensors alone, what the file must hold under its names."""
    config = json.loads((directory / "config.json").read_text())
    released = {name: tensor.double().numpy() for name, tensor in load_file(directory / "model.safetensors").items()}
    wanted = {
        "token_embd.weight": released["model.embed_tokens.weight"],
        "output_norm.weight": released["model.norm.weight"],
    }
    if not config["tie_word_embeddings"]:
        wanted["output.weight"] = released["lm_head.weight"]
    nope, value, rank = config["qk_nope_head_dim"], config["v_head_dim"], config["kv_lora_rank"]
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        kv_b = released[f"{ours}self_attn.kv_b_proj.weight"]
        k_b = np.empty((config["num_attention_heads"], rank, nope))
        v_b = np.empty((config["num_attention_heads"], value, rank))
        for head in range(config["num_attention_heads"]):
            first = head * (nope + value)
            k_b[head] = kv_b[first : first + nope].T
            v_b[head] = kv_b[first + nope : first + nope + value]
        wanted |= {f"{theirs}attn_k_b.weight": k_b, f"{theirs}attn_v_b.weight": v_b}
        named = {
            "attn_norm": "input_layernorm",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
        }
        if config["q_lora_rank"] is None:
            named |= {"attn_q": "self_attn.q_proj"}
        else:
            named |= {
                "attn_q_a": "self_attn.q_a_proj",
                "attn_q_a_norm": "self_attn.q_a_layernorm",
                "attn_q_b": "self_attn.q_b_proj",
            }
        if layer < config["first_k_dense_replace"]:
            named |= {f"ffn_{kind}": f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
        else:
            named |= {f"ffn_{kind}_shexp": f"mlp.shared_experts.{kind}_proj" for kind in ("gate", "up", "down")}
            named |= {"ffn_gate_inp": "mlp.gate"}
            wanted[f"{theirs}exp_probs_b.bias"] = released[f"{ours}mlp.gate.e_score_correction_bias"]
            for kind in ("gate", "up", "down"):
                experts = range(config["n_routed_experts"])
                each = [released[f"{ours}mlp.experts.{e}.{kind}_proj.weight"] for e in experts]
                wanted[f"{theirs}ffn_{kind}_exps.weight"] = np.stack(each)
        wanted |= {f"{theirs}{name}.weight": released[f"{ours}{hf}.weight"] for name, hf in named.items()}
    return wanted


# Tensors


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_tensors_are_those_that_the_released_ones_give(directory, target, changes):
    source = directory(**changes)
    remarks = write_gguf(source, target, dtype="f32")
    wanted, found = derived(source), tensors(target)
    assert set(found) == set(wanted)
    for name, (kind, values) in found.items():
        assert kind == GGMLQuantizationType.F32
        assert values.shape == wanted[name].shape, name
        assert np.array_equal(values, wanted[name]), name
    assert [remark.startswith("without the MTP layers") for remark in remarks] == [True] * bool(
        changes.get("num_nextn_predict_layers", 1)
    )


def test_bf16_is_rounded_to_nearest_even_and_the_router_stays_fp32(directory, target):
    source = directory()
    write_gguf(source, target)
    wanted = derived(source)
    for name, (kind, values) in tensors(target).items():
        exact = wanted[name].astype(np.float32)
        if exact.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            assert kind == GGMLQuantizationType.F32
            assert np.array_equal(values, exact), name
        else:
            assert kind == GGMLQuantizationType.BF16
            bits = exact.view(np.uint32).astype(np.uint64)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
            assert np.array_equal(values, rounded), name


#: All rows but those of k_b (N = 8) and q_b (13) are multiples of 32.
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "num_attention_heads": 4,
    "v_head_dim": 16,
}


def test_q8_0_is_within_half_a_step_of_its_block(directory, target):
    source = directory(**WIDE)
    remarks = write_gguf(source, target, dtype="q8_0")
    wanted = derived(source)
    kinds = {}
    for name, (kind, values) in tensors(target).items():
        kinds.setdefault(kind.name, set()).add(name.split(".")[-2])
        if kind == GGMLQuantizationType.Q8_0:
            exact = wanted[name].reshape(-1, 32)
            step = np.abs(exact).max(axis=1, keepdims=True) / 127
            # half a step, and the rounding of the step itself to fp16 times at most 127 steps
            bound = step * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-25
            assert (np.abs(values.reshape(-1, 32) - exact) <= bound).all(), name
            assert not np.array_equal(values.reshape(-1, 32), exact)
    assert kinds["BF16"] == {"attn_k_b", "attn_q_b"}
    assert {"attn_v_b", "ffn_down_exps", "token_embd", "output"} <= kinds["Q8_0"]
    assert kinds["F32"] >= {"ffn_gate_inp", "exp_probs_b", "attn_norm"}
    assert remarks[-1] == "in bf16, as their rows are no multiples of 32: attn_k_b, attn_q_b"


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-38, 1e7])
def test_q8_0_takes_blocks_of_any_size(directory, target, scale):
    source = directory(scale=scale, **WIDE)
    write_gguf(source, target, dtype="q8_0")
    wanted = derived(source)
    for name, (_, values) in tensors(target).items():
        assert np.abs(values - wanted[name]).max() <= max(np.abs(wanted[name]).max() / 200, 127 * 2.0**-25), name


def test_blocks_of_rows_and_experts_give_the_same_file(directory, target, monkeypatch):
    source = directory(**WIDE)
    for dtype in DTYPES:
        whole, pieces = target.with_name(f"{dtype}.gguf"), target.with_name(f"{dtype}-pieces.gguf")
        write_gguf(source, whole, dtype=dtype)
        with monkeypatch.context() as patch:
            patch.setattr("abyssal.checkpoint.gguf.write.BLOCK_VALUES", 100)
            write_gguf(source, pieces, dtype=dtype)
        assert whole.read_bytes() == pieces.read_bytes()


def test_bf16_weights_become_fp32_as_they_are(directory, target):
    source = directory(dtype=torch.bfloat16)
    write_gguf(source, target, dtype="f32")
    wanted = derived(source)
    for name, (_, values) in tensors(target).items():
        assert np.array_equal(values, wanted[name]), name


def test_fp8_weights_are_their_product_with_the_scale(directory, target):
    source = directory(dtype=torch.float8_e4m3fn)
    released = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    wanted = released[name].double() * released[f"{name}_scale_inv"].double()[0, 0]
    write_gguf(source, target, dtype="f32")
    _, found = tensors(target)["blk.2.ffn_down_exps.weight"]
    assert np.array_equal(found[3], wanted.float().numpy())


# Keys


def test_keys_leave_llama_cpp_nothing_to_guess(directory, target):
    source = directory(
        n_routed_experts=6,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        rope_theta=5e4,
        rope_scaling=YARN,
        rms_norm_eps=1e-5,
    )
    remarks = write_gguf(source, target)
    found = {name: value for name, value in fields(target).items() if not name.startswith("tokenizer.")}
    assert found == pytest.approx(
        {
            "general.architecture": "deepseek2",
            "general.type": "model",
            "general.name": "model",
            "general.file_type": 32,
            "general.quantization_version": 2,
            "general.size_label": found["general.size_label"],
            "deepseek2.vocab_size": 301,
            "deepseek2.context_length": 64,
            "deepseek2.embedding_length": 24,
            "deepseek2.block_count": 3,
            "deepseek2.feed_forward_length": 29,
            "deepseek2.attention.layer_norm_rms_epsilon": 1e-5,
            "deepseek2.attention.head_count": 5,
            "deepseek2.attention.head_count_kv": 1,
            "deepseek2.attention.q_lora_rank": 13,
            "deepseek2.attention.kv_lora_rank": 11,
            "deepseek2.attention.key_length": 11 + 4,
            "deepseek2.attention.value_length": 11,
            "deepseek2.attention.key_length_mla": 8 + 4,
            "deepseek2.attention.value_length_mla": 6,
            "deepseek2.rope.dimension_count": 4,
            "deepseek2.rope.freq_base": 5e4,
            "deepseek2.rope.scaling.type": "yarn",
            "deepseek2.rope.scaling.factor": 8.0,
            "deepseek2.rope.scaling.original_context_length": 16,
            "deepseek2.rope.scaling.yarn_beta_fast": 32.0,
            "deepseek2.rope.scaling.yarn_beta_slow": 1.0,
            "deepseek2.rope.scaling.yarn_log_multiplier": 0.07,
            "deepseek2.leading_dense_block_count": 1,
            "deepseek2.expert_count": 6,
            "deepseek2.expert_used_count": 3,
            "deepseek2.expert_shared_count": 2,
            "deepseek2.expert_feed_forward_length": 7,
            "deepseek2.expert_gating_func": 2,
            "deepseek2.expert_weights_norm": True,
            "deepseek2.expert_weights_scale": 2.5,
            "deepseek2.expert_group_count": 3,
            "deepseek2.expert_group_used_count": 2,
        }
    )
    assert remarks == [
        "without the MTP layers, which llama.cpp's own conversion of this architecture leaves out too",
        "llama.cpp has one eps for all norms: those on the latents get rms_norm_eps=1e-05 in place of 1e-06",
    ]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"q_lora_rank": None}, {"attention.q_lora_rank": 0, "rope.scaling.type": "none"}),
        ({"norm_topk_prob": False}, {"expert_weights_norm": False, "expert_weights_scale": 1.0}),
        ({"rope_scaling": YARN.model_copy(update={"mscale": 0.4, "factor": 1.0})}, {"rope.scaling.type": "none"}),
    ],
)
def test_keys_of_other_shapes(directory, target, changes, wanted):
    write_gguf(directory(**changes), target)
    found = fields(target)
    assert {name: found[f"deepseek2.{name}"] for name in wanted} == wanted


def test_groups_that_limit_nothing_become_one(directory, target):
    source = directory()
    values = json.loads((source / "config.json").read_text())  # ours say 1 already, others' may not
    (source / "config.json").write_text(json.dumps({**values, "n_group": 2, "topk_group": 2}))
    write_gguf(source, target)
    found = fields(target)
    assert (found["deepseek2.expert_group_count"], found["deepseek2.expert_group_used_count"]) == (1, 1)


@pytest.mark.parametrize(("dtype", "number"), [("f32", 0), ("bf16", 32), ("q8_0", 7)])
def test_the_file_type_is_llama_cpps_number(directory, target, dtype, number):
    write_gguf(directory(), target, dtype=dtype)
    assert fields(target)["general.file_type"] == number


# Faults


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 27}, "num_hidden_layers=27: llama.cpp takes a model of so many layers for one"),
        ({"num_hidden_layers": 48, "vocab_size": 128256}, "only q_lora_rank=null can be written, not 13"),
        ({"n_routed_experts": 1, "num_experts_per_tok": 1}, "n_routed_experts=1: llama.cpp needs at least 2"),
        (
            {"rope_scaling": {"mscale": 1.0, "mscale_all_dim": 0.7}},
            "mscale=1.0, mscale_all_dim=0.7: llama.cpp computes",
        ),
        ({"rope_scaling": {"mscale": 0.0, "mscale_all_dim": 0.0}}, "no other pair can be written"),
        (
            {"rope_scaling": {"mscale_all_dim": 1.0, "beta_fast": 16}},
            "beta_fast=16.0, beta_slow=1.0: llama.cpp computes",
        ),
    ],
)
def test_a_shape_that_gguf_cannot_say_is_refused(directory, target, changes, sentence):
    source = directory(num_nextn_predict_layers=0)
    values = json.loads((source / "config.json").read_text())
    if "rope_scaling" in changes:
        yarn = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
        changes = {"rope_scaling": {**yarn, **changes["rope_scaling"]}}
    (source / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(ModelDirectoryError) as caught:
        write_gguf(source, target)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"{source}: cannot become a GGUF file: ")
    assert not target.parent.exists()


@pytest.mark.parametrize(("num_hidden_layers", "vocab_size"), [(27, 301), (48, 301), (28, 128256)])
def test_layers_alone_are_no_reason_to_refuse(tiny, num_hidden_layers, vocab_size):
    rank = None if num_hidden_layers == 27 else 13
    assert unsayable(tiny(num_hidden_layers=num_hidden_layers, vocab_size=vocab_size, q_lora_rank=rank)) is None


@pytest.mark.parametrize(
    ("value", "dtype", "sentence"),
    [
        (float("nan"), "f32", "holds nan; F32 holds no more than 3.4e+38"),
        (float("-inf"), "bf16", "holds inf; BF16 holds no more than 3.39e+38"),
        (1e7, "q8_0", "holds 1e+07; Q8_0 holds no more than 8.32e+06"),
    ],
)
def test_a_value_that_the_type_cannot_hold_is_refused(directory, rewrite, target, value, dtype, sentence):
    source = directory(**WIDE)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"

    def change(held):
        held[name][3, 5] = value

    rewrite(source, change)
    with pytest.raises(ModelDirectoryError, match=f"{name} ") as caught:
        write_gguf(source, target, dtype=dtype)
    assert sentence in str(caught.value)
    assert list(target.parent.iterdir()) == []


def test_a_directory_that_is_not_whole_is_refused(directory, rewrite, target):
    source = directory()
    rewrite(source, lambda held: held.pop("model.layers.2.self_attn.o_proj.weight"))
    with pytest.raises(ModelDirectoryError, match=r"missing: model\.layers\.2\.self_attn\.o_proj\.weight"):
        write_gguf(source, target)
    with pytest.raises(ModelDirectoryError, match="nowhere: no such model directory"):
        write_gguf(source.with_name("nowhere"), target)
    assert not target.parent.exists()


def test_mtp_layers_may_be_missing(directory, rewrite, target):
    source = directory()

    def without_mtp(held):
        for name in [name for name in held if name.startswith("model.layers.3.")]:
            held.pop(name)

    write_gguf(source, target, dtype="f32")
    rewrite(source, without_mtp)
    again = target.with_name("again.gguf")
    write_gguf(source, again, dtype="f32")
    assert again.read_bytes() == target.read_bytes()


def test_a_file_that_exists_and_an_unknown_dtype_are_refused(directory, target):
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(ModelDirectoryError, match=r"model\.gguf: exists, and is not replaced; remove it"):
        write_gguf(directory(), target)
    assert target.read_text() == "mine"
    with pytest.raises(UsageError, match="dtype=q8: must be one of f32, bf16, q8_0; nearest: q8_0"):
        write_gguf(directory(), target.with_name("other.gguf"), dtype="q8")


def test_a_full_disk_leaves_nothing(directory, target, monkeypatch):
    source = directory()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("abyssal.files.flush.os.fsync", full)
    with pytest.raises(ModelDirectoryError, match=r"cannot write the GGUF file \(No space left on device; free some"):
        write_gguf(source, target)
    assert list(target.parent.iterdir()) == []


def test_too_little_room_is_told_before_anything_is_written(directory, target, monkeypatch):
    source = directory()
    monkeypatch.setattr("abyssal.files.faults.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(ModelDirectoryError, match=r"model\.gguf: needs \d\.\d\d GiB, but 0\.00 GiB are free"):
        write_gguf(source, target)
    assert list(target.parent.iterdir()) == []


def test_progress_ends_at_the_bytes_of_all_tensors(directory, target, monkeypatch):
    monkeypatch.setattr("abyssal.checkpoint.gguf.write.BLOCK_VALUES", 200)
    seen = []
    write_gguf(directory(), target, on_progress=lambda done, total: seen.append((done, total)))
    done = [done for done, _ in seen]
    assert len(seen) > 100
    assert done == sorted(set(done))
    assert {total for _, total in seen} == {done[-1]} == {sum(tensor.n_bytes for tensor in GGUFReader(target).tensors)}
