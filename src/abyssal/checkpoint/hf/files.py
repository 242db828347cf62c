"""What the files of a model directory are called."""

from __future__ import annotations

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Weights in these are refused: to read a pickle can run code of whoever wrote it.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
