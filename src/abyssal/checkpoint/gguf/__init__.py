"""GGUF files of a model directory, for llama.cpp and what is built on it."""
