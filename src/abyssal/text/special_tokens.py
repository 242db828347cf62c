"""DeepSeek-V3's special tokens, spelt as released: full-width bars (U+FF5C) and lower blocks (U+2581)."""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"

#: What a tokenizer trained here starts with: the id of each is its place. The released tokenizer has the same ids
#: for the first three; the others stand behind its 128,000 base tokens.
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT)

#: Those that decoding leaves out. The rest is marked as ordinary text in the released tokenizer, and so it is here.
SKIPPED_TOKENS = (BOS, EOS, PAD)
