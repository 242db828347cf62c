"""Small model directories, in bf16 and in FP8, with several blocks a weight."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from abyssal.config import ModelConfig

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The module beside this file: drawn directories, and FP8 and bf16 computed in another way."""
    spec = importlib.util.spec_from_file_location("convert_oracle", Path(__file__).with_name("oracle.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shape(oracle: ModuleType) -> ModelConfig:
    return ModelConfig(**oracle.SHAPE)


@pytest.fixture
def plain(tmp_path: Path, shape: ModelConfig, oracle: ModuleType) -> Build:
    """Write a directory without FP8."""

    def build(dtype: torch.dtype = torch.bfloat16, name: str = "plain", seed: int = 0, **fields: Any) -> Path:
        return oracle.save_directory(tmp_path / name, shape, oracle.draw(shape, seed, dtype), **fields)

    return build


@pytest.fixture
def quantised(tmp_path: Path, shape: ModelConfig, oracle: ModuleType) -> Build:
    """Write a directory of random FP8 codes and scales."""

    def build(scale_dtype: torch.dtype = torch.float32, name: str = "quantised", seed: int = 0, **scheme: Any) -> Path:
        tensors = oracle.quantise_randomly(oracle.draw(shape, seed, torch.bfloat16), seed + 1, scale_dtype)
        quantization = oracle.QUANTIZATION | scheme
        return oracle.save_directory(tmp_path / name, shape, tensors, quantization_config=quantization)

    return build
