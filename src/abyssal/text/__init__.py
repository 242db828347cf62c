"""Between characters and token ids: byte-level BPE, DeepSeek-V3's special tokens and chat format. No torch."""
