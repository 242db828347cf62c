"""Model directories: Hugging Face `deepseek_v3` checkpoints, read tensor by tensor and written whole or not at all.

Files: config.json, model.safetensors (or several and model.safetensors.index.json), generation_config.json,
tokenizer.json, tokenizer_config.json, README.md.
"""

from abyssal.checkpoint.hf.load import load_into
from abyssal.checkpoint.hf.read import ModelReader, read_model_directory
from abyssal.checkpoint.hf.write import write_model_directory

__all__ = ["ModelReader", "load_into", "read_model_directory", "write_model_directory"]
