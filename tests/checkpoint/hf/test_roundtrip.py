"""Logits of model directories, ours and transformers', read by the other."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from abyssal.checkpoint.hf import write_model_directory
from abyssal.engine.load import load_model
from abyssal.model import Context
from abyssal.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="the oracle of this test is an extra")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SHAPES = 25
RELEASED_TOKENIZER = Path(__file__).parents[3] / "../shared/data/deepseek_v3_tokenizer"


@pytest.fixture(scope="module")
def roundtrip() -> ModuleType:
    """The benchmark that does the same for 500 shapes."""
    spec = importlib.util.spec_from_file_location("roundtrip", Path(__file__).parents[3] / "bench/roundtrip.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["roundtrip"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(SHAPES), ids="seed{}".format)
def test_logits_equal_those_of_transformers_whoever_wrote_the_directory(
    seed: int, roundtrip: ModuleType, tmp_path: Path
) -> None:
    result = roundtrip.round_trip(seed, tmp_path)
    assert result.written_by_us <= roundtrip.TOLERANCE, result.config
    assert result.written_by_them <= roundtrip.TOLERANCE, result.config


def test_the_drawn_shapes_have_and_lack_every_optional_part(roundtrip: ModuleType) -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for seed in range(SHAPES):
        for part, kind in roundtrip.kinds(roundtrip.draw(seed)).items():
            found[part].add(kind)
    assert {part: len(kinds) for part, kinds in found.items()} == {
        "query": 2,
        "groups": 2,
        "yarn": 2,
        "shared experts": 3,
        "mtp": 3,
        "head": 2,
    }


def test_the_comparison_notices_a_change_of_one_weight(roundtrip: ModuleType, tmp_path: Path) -> None:
    config = roundtrip.draw(0)
    tokens = torch.arange(sum(roundtrip.LENGTHS)) % config.vocab_size
    tensors = roundtrip.random_tensors(config, 0)
    roundtrip.write_ours(tmp_path / "one", config, tensors, 10**9)
    tensors["model.norm.weight"][1] *= 1.001
    roundtrip.write_ours(tmp_path / "other", config, tensors, 10**9)
    logits = roundtrip.our_logits(tmp_path / "one", tokens)
    changed = (roundtrip.our_logits(tmp_path / "other", tokens) - logits).abs().max() / logits.abs().max()
    assert changed > 2 * roundtrip.TOLERANCE


def test_a_directory_with_the_released_tokenizer_and_template_opens_in_both(
    tiny: Any, random_tensors: Any, tmp_path: Path
) -> None:
    if not RELEASED_TOKENIZER.is_dir():
        pytest.skip("the released tokenizer lies beside the project only where it was fetched")
    config = tiny(vocab_size=129280, num_nextn_predict_layers=0)
    folder = tmp_path / "model"
    write_model_directory(
        folder,
        config,
        random_tensors(config),
        dtype=torch.float32,
        tokenizer_files=RELEASED_TOKENIZER,
        card="",
    )
    messages = [{"role": "user", "content": "Größe 42? 深い海"}, {"role": "assistant", "content": "x = 1"}]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert text.startswith("<｜begin▁of▁sentence｜><｜User｜>Größe 42?")
    ids = Tokenizer.load(folder).encode(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    ours = load_model(folder, dtype="float32")
    tokens = torch.tensor(ids)
    with torch.no_grad():
        expected = model(input_ids=tokens[None]).logits[0]
        found = ours.model.logits(ours.model(tokens, Context.packed((len(ids),))))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    model.save_pretrained(tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs", dtype="float32")
    assert again.tokenizer.encode(text) == ids
    with torch.no_grad():
        found = again.model.logits(again.model(tokens, Context.packed((len(ids),))))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
