"""Model directories: Hugging Face `deepseek_v3` checkpoints, read tensor by tensor and written whole or not at all."""

from abyssal.checkpoint.hf.model_directory import ModelReader, load_into, read_model_directory, write_model_directory

__all__ = ["ModelReader", "load_into", "read_model_directory", "write_model_directory"]
