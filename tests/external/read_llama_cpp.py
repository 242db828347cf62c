"""Runs in the environment of llama-cpp-python: what llama.cpp makes of a GGUF file. Knows nothing of Abyssal.

    python read_llama_cpp.py REQUEST ANSWER

Request: model, prompts (ids), new_tokens, texts. Answer: version, for each prompt the greedy ids, for each text its ids
with special tokens parsed and the text that they give. Arrays: for each prompt the log-probabilities after each token.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def greedy(model: llama_cpp.Llama, prompt: list[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
    model.reset()
    model.eval(prompt)
    ids: list[int] = []
    for _ in range(new_tokens):
        ids.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(ids[-1:])
    return ids, log_softmax(model.scores[: model.n_tokens]).astype(np.float32)


def main(request_file: str, answer_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    longest = max(len(prompt) for prompt in request["prompts"]) + request["new_tokens"]
    model = llama_cpp.Llama(
        request["model"],
        n_ctx=longest + 1,
        logits_all=True,
        n_threads=1,
        n_threads_batch=1,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,  # the cache would be fp16
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    found = [greedy(model, prompt, request["new_tokens"]) for prompt in request["prompts"]]
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]]
    answer = {
        "version": llama_cpp.__version__,
        "greedy": [continued for continued, _ in found],
        "ids": ids,
        "texts": [model.detokenize(tokens, special=True).decode() for tokens in ids],
        "with_bos": model.tokenize(b"x", add_bos=True),
    }
    np.savez(answer_file.removesuffix(".json"), *(after for _, after in found))
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
