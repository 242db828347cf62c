"""The whole life of a small DeepSeek-V3, in one command."""
