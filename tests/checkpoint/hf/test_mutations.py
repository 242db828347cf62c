"""Random damage to small model directories: a sentence, or what the directory now says; never a traceback."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from abyssal.checkpoint.hf.expert_stacks import split_experts
from abyssal.config import ModelConfig
from abyssal.engine.load import load_model
from abyssal.errors import AbyssalError
from abyssal.model import Context
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config

MUTATIONS, SEED = 200, 4
#: Fields that a config.json may spell in another way than ours, or that the files of weights decide.
SPELT_OTHERWISE = {"rope_scaling", "num_nextn_predict_layers"}
INDEX = "model.safetensors.index.json"
#: What a field or entry may be replaced by.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "yarn", "default", "..", "\ud800", "a\x00b", "x" * 300, [], [1], {}, {"type": []}, {"type": "yarn"}),
)


@pytest.fixture
def folders(write: Any, tiny: Any, random_tensors: Any, tmp_path: Path) -> list[Path]:
    """One directory in bf16 and one in FP8, each of several files and with a tokenizer."""
    tokenizer = Tokenizer.train(["def f(x):\n    return x * x\n"] * 3, 280)
    tokenizer.save(tmp_path / "tokenizer" / "tokenizer.json")
    write_tokenizer_config(tmp_path / "tokenizer", tokenizer)
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale_all_dim": 1.0}
    shape = {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 2, "n_routed_experts": 3}
    config = tiny(**shape, num_experts_per_tok=2, rope_scaling=yarn)
    found = []
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        folder = write(config, random_tensors(config), dtype=dtype, max_shard_bytes=20_000)
        found.append(folder.rename(tmp_path / str(dtype).removeprefix("torch.")))
    return found


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def any_file(folder: Path, rng: random.Random) -> Path:
    others = [INDEX, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    return rng.choice([*weight_files(folder), *(folder / name for name in others)])


# The kinds of damage


def flip_bits(folder: Path, rng: random.Random) -> None:
    file = any_file(folder, rng)
    content = bytearray(file.read_bytes())
    # half of them where the header is: elsewhere they only change a weight
    end = len(content) if rng.random() < 0.5 else min(len(content), 1500)
    for _ in range(rng.choice([1, 1, 3, 40])):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def overwrite_bytes(folder: Path, rng: random.Random) -> None:
    file = rng.choice(weight_files(folder))
    content = bytearray(file.read_bytes())
    start, count = rng.randrange(len(content)), rng.choice([1, 8, 200])
    part = rng.choice([b"\xff", b"\x7f", b"\x00", rng.randbytes(1)]) * count
    content[start : start + count] = part[: len(content) - start]
    file.write_bytes(content)


def cut_or_grow(folder: Path, rng: random.Random) -> None:
    file = any_file(folder, rng)
    content = file.read_bytes()
    where = rng.randrange(len(content))
    file.write_bytes(rng.choice([content[:where], content + content[:where], content[:where] + content[where + 1 :]]))


def change_config(folder: Path, rng: random.Random) -> None:
    fields = json.loads((folder / "config.json").read_text())
    place = fields
    if rng.random() < 0.3:
        inner = [value for value in fields.values() if isinstance(value, dict)]
        place = rng.choice(inner)
    name = rng.choice(sorted(place))
    change = rng.choice(["value", "value", "value", "remove", "near", "rename"])
    if change == "remove":
        del place[name]
    elif change == "rename":
        place[f"{name}x"] = place.pop(name)
    elif change == "near" and isinstance(place[name], int):
        place[name] += rng.choice([-1, 1])
    else:
        place[name] = rng.choice(VALUES)
    (folder / "config.json").write_text(json.dumps(fields))


def change_index(folder: Path, rng: random.Random) -> None:
    index = json.loads((folder / INDEX).read_text())
    places = index["weight_map"]
    name = rng.choice(sorted(places))
    change = rng.choice(["remove", "value", "file", "rename", "map"])
    if change == "remove":
        del places[name]
    elif change == "value":
        places[name] = rng.choice(VALUES)
    elif change == "file":
        places[name] = rng.choice(sorted(set(places.values())))
    elif change == "rename":
        places[name + rng.choice(["x", "\ud800", "\n"])] = places.pop(name)
    else:
        index["weight_map"] = rng.choice(VALUES)
    (folder / INDEX).write_text(json.dumps(index))


def lose_a_file(folder: Path, rng: random.Random) -> None:
    file = any_file(folder, rng)
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()


DAMAGE: tuple[Callable[[Path, random.Random], None], ...] = (
    *(flip_bits, flip_bits, overwrite_bytes, cut_or_grow, change_config, change_config, change_index),
    lose_a_file,
)


# What became of it


def load(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Load a model, run it, and return its config and the weights by released name."""
    loaded = load_model(folder, dtype="float32")
    with torch.no_grad():
        loaded.model.logits(loaded.model(torch.arange(6), Context.packed((4, 2))))
    state = {name: t for name, t in loaded.model.state_dict().items() if name not in tied(loaded.config)}
    return loaded.config, {part: t for name, value in state.items() for part, t in split_experts(name, value)}


def tied(config: ModelConfig) -> tuple[str, ...]:
    return ("lm_head.weight",) if config.tie_word_embeddings else ()


def as_it_stands(folder: Path) -> dict[str, Tensor]:
    """The weights in a directory's files, FP8 ones as fp8 * scale; every tensor here is one block."""
    placed = json.loads((folder / INDEX).read_text())["weight_map"] if (folder / INDEX).is_file() else {}
    stored: dict[str, Tensor] = {}
    for file in weight_files(folder):
        if file.name in placed.values():
            tensors = load_file(file)
            stored |= {name: t for name, t in tensors.items() if placed.get(name, file.name) == file.name}
    return {
        name: t.float() * stored[f"{name}_scale_inv"].float() if t.dtype == torch.float8_e4m3fn else t
        for name, t in stored.items()
    }


@pytest.mark.slow
def test_200_random_mutations_end_in_a_sentence_or_in_what_the_directory_says(
    folders: list[Path], tmp_path: Path
) -> None:
    outcomes = Counter[str]()
    for number in range(MUTATIONS):
        rng = random.Random(f"{SEED} {number}")
        damage, folder = rng.choice(DAMAGE), tmp_path / "damaged"
        shutil.copytree(rng.choice(folders), folder)
        damage(folder, rng)
        told = f"seed {SEED}, mutation {number}: {damage.__name__}"
        try:
            config, weights = load(folder)
        except AbyssalError as error:
            sentence = str(error)
            assert sentence.startswith(str(folder)), told
            assert sentence.encode(), told
            assert len(sentence) < 20_000, told
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(told) from error
        else:
            fields = json.loads((folder / "config.json").read_text())
            for name in ModelConfig.model_fields.keys() & fields.keys() - SPELT_OTHERWISE:
                assert fields[name] in (getattr(config, name), None), f"{told}: {name}"
            present = as_it_stands(folder)
            for name, weight in weights.items():
                assert weight.isfinite().all(), told
                assert torch.equal(weight, present[name].float()), f"{told}: {name}"
            outcomes["accepted"] += 1
        shutil.rmtree(folder)
    assert outcomes.total() == MUTATIONS
    assert min(outcomes.values()) > MUTATIONS / 10, outcomes
