"""A small corpus and a recipe that trains on it in seconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from abyssal.config import RunConfig, load_recipe

WORDS = "def return self value for in range len print import class if else not None True path name index count".split()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Return a folder of 60 small documents; with modulus 5 some of them are held out and some validate."""
    generator = random.Random(7)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        lines = (" ".join(generator.choices(WORDS, k=generator.randint(2, 7))) for _ in range(generator.randint(4, 12)))
        (folder / f"document{number:02d}.py").write_text(f"# {number}\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture
def small_recipe(corpus: Path, tmp_path: Path) -> Path:
    """Return a recipe file for that corpus: 12 steps of 4 sequences."""
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
unset = []
[train]
tokens = {12 * 4 * 32}
sequence_length = 32
micro_batch_size = 2
compute_dtype = "float32"
threads = 1
log_every_steps = 2
[schedule.batch_size]
start = 4
[checkpoint]
every_steps = 3
[evaluation]
every_steps = 5
""".replace("unset = []\n", "")
        .replace("extends", 'unset = ["train.time_budget_s"]\nextends')
        .replace("start = 4\n", "start = 4\nsegments = []\n")
    )
    return path


@pytest.fixture
def small_run(small_recipe: Path) -> RunConfig:
    """Return that recipe, resolved."""
    return load_recipe(str(small_recipe))
