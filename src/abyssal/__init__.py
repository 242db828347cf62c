"""Abyssal: the DeepSeek-V3 system as open, runnable Python."""

__version__ = "0.1.0"
