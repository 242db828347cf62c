"""The text of a model directory, continued here and by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from abyssal.config import RopeScaling
from abyssal.engine import SamplingParameters, load_model
from engine.oracle import single_stream

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
PROMPT = [5, 17, 203, 80, 41, 9, 66, 250, 12]
NEW_TOKENS = 24


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "num_nextn_predict_layers": 0},
        {"rope_scaling": YARN, "num_nextn_predict_layers": 0},
    ],
    ids=["q_lora and MTP", "no q_lora", "YaRN"],
)
def test_greedy_generation_equals_that_of_transformers(
    model_directory: Callable[..., Path], changes: dict[str, object]
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = model_directory(**changes)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        experts_implementation="eager",  # its fast one wants widths that are multiples of 16 bytes
    )
    wanted = oracle.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=2,
    )[0, len(PROMPT) :].tolist()
    loaded = load_model(folder, dtype="float32")
    found = [t.id for t in single_stream(loaded.model, PROMPT, SamplingParameters(NEW_TOKENS, temperature=0))]
    assert found == wanted
    assert len(set(found)) > 3, "a model that repeats itself proves little"
