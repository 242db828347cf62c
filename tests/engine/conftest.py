"""Tiny models, ready to generate, and model directories of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.checkpoint.hf import write_model_directory
from abyssal.config import ModelConfig, RopeScaling
from abyssal.engine import use_latent_cache
from abyssal.model import Transformer, initialise
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config

#: What the models of these tests differ in; the rest is `tiny_config`.
VARIANTS: dict[str, dict[str, Any]] = {
    "q_lora and MTP": {},
    "no q_lora": {"q_lora_rank": None, "num_nextn_predict_layers": 0},
    "YaRN": {
        "rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)
    },
    "tied embeddings, two MTP modules": {"tie_word_embeddings": True, "num_nextn_predict_layers": 2},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> ModelConfig:
    """One configuration after the other."""
    return tiny_config.model_copy(update=request.param)


@pytest.fixture
def build() -> Callable[..., Transformer]:
    """Build a model with random weights, by default in float64 and prepared for the cache."""

    def make(
        config: ModelConfig, seed: int = 3, dtype: torch.dtype = torch.float64, *, cached: bool = True
    ) -> Transformer:
        model = initialise(Transformer(config, compute_dtype=dtype), seed).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        for buffer in model.buffers():  # a balancing bias of zero could hide where it belongs
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.3)
        if cached:
            use_latent_cache(model)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer with few merges, so that characters beyond ASCII take several tokens."""
    return Tokenizer.train(["def f(x):\n    return x * x\n"] * 3, 290)


@pytest.fixture
def model_directory(
    tmp_path: Path, tiny_config: ModelConfig, tokenizer: Tokenizer, build: Callable[..., Transformer]
) -> Callable[..., Path]:
    """Write a model directory of a random tiny model, with some of the configuration's fields changed."""

    def write(dtype: torch.dtype = torch.float32, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
        config = tiny_config.model_copy(update={"vocab_size": 301, **changes})
        model = build(config, dtype=torch.float32)

        def tokenizer_files(folder: Path) -> None:
            tokenizer.save(folder / "tokenizer.json")
            write_tokenizer_config(folder, tokenizer, config.max_position_embeddings)

        write_model_directory(
            tmp_path / "model",
            config,
            model.state_dict(),
            dtype=dtype,
            tokenizer_files=tokenizer_files,
            card="A model of random numbers.\n",
            generation=generation,
        )
        return tmp_path / "model"

    return write
