"""Fixtures that several areas share. Nothing heavy is imported here: some tests look at what importing us loads."""

from __future__ import annotations

import os
import random
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from abyssal.config import ModelConfig, RunConfig, load_recipe

# No property depends on how long the machine takes; a failure says how to draw the same again.
settings.register_profile(
    "unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("unhurried")

#: What the random draws of all tests follow from: a new number at each run; a failing test shows it.
SEED = int(os.environ.get("ABYSSAL_TEST_SEED", random.SystemRandom().randrange(2**31)))

WORDS = (
    *("def", "return", "self", "value", "for", "in", "range", "len", "print", "import"),
    *("class", "if", "else", "not", "None", "True", "path", "name", "index", "count"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed what a test draws, whatever other tests drew; torch's own draws are the same at each run."""
    random.seed(f"{SEED} {item.nodeid}")
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(zlib.crc32(item.nodeid.encode()))
    item.add_report_section("setup", "seed", f"to draw the same again: ABYSSAL_TEST_SEED={SEED}")


@pytest.fixture
def tiny_config() -> ModelConfig:
    """A model with every part of the architecture and no two dims alike: 1 dense, 2 MoE and 1 MTP layer."""
    return ModelConfig(
        vocab_size=97,
        hidden_size=20,
        intermediate_size=33,
        moe_intermediate_size=9,
        num_hidden_layers=3,
        num_nextn_predict_layers=1,
        num_attention_heads=3,
        q_lora_rank=11,
        kv_lora_rank=13,
        qk_nope_head_dim=7,
        qk_rope_head_dim=4,
        v_head_dim=5,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=2,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=1.7,
        first_k_dense_replace=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )


@pytest.fixture
def model_folder(tmp_path: Path, tiny_config: ModelConfig) -> Path:
    """A model directory of random numbers that asks for temperature 0.9."""
    import torch

    from abyssal.checkpoint.hf import write_model_directory
    from abyssal.model import Transformer, initialise
    from abyssal.text.tokenizer import Tokenizer
    from abyssal.text.tokenizer_config import write_tokenizer_config

    tokenizer = Tokenizer.train(["def f(x):\n    return x * x\n"] * 3, 290)
    config = tiny_config.model_copy(update={"vocab_size": tokenizer.vocab_size})

    def tokenizer_files(staging: Path) -> None:
        tokenizer.save(staging / "tokenizer.json")
        write_tokenizer_config(staging, tokenizer, config.max_position_embeddings)

    write_model_directory(
        tmp_path / "model",
        config,
        initialise(Transformer(config), 5).state_dict(),
        dtype=torch.float32,
        tokenizer_files=tokenizer_files,
        card="A model of random numbers.\n",
        generation={"temperature": 0.9},
    )
    return tmp_path / "model"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 60 small documents; with modulus 5 some of them are held out and some validate."""
    generator = random.Random(7)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        lines = (" ".join(generator.choices(WORDS, k=generator.randint(2, 7))) for _ in range(generator.randint(4, 12)))
        (folder / f"document{number:02d}.py").write_text(f"# {number}\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture
def small_recipe(corpus: Path, tmp_path: Path) -> Path:
    """A recipe file for that corpus: 12 steps of 4 sequences of 32 tokens, a checkpoint every 3."""
    path = tmp_path / "small.toml"
    path.write_text(
        f"""
extends = "demo"
name = "small"

[data]
corpus = ["{corpus}"]
split_modulus = 5

[model]
vocab_size = 300
hidden_size = 24
intermediate_size = 40
moe_intermediate_size = 12
num_hidden_layers = 3
q_lora_rank = 20
kv_lora_rank = 16
qk_nope_head_dim = 6
qk_rope_head_dim = 4
v_head_dim = 10
num_attention_heads = 3
max_position_embeddings = 64

[train]
tokens = {12 * 4 * 32}
sequence_length = 32
micro_batch_size = 2
compute_dtype = "float32"
threads = 1
log_every_steps = 2

[schedule.batch_size]
start = 4
segments = []

[checkpoint]
every_steps = 3

[evaluation]
every_steps = 5
"""
    )
    return path


@pytest.fixture
def small_run(small_recipe: Path) -> RunConfig:
    """That recipe, resolved."""
    return load_recipe(str(small_recipe))
