"""llama.cpp reads our GGUF files and computes what we compute: greedy text, log-probabilities, token ids.

    python tests/external/check_llama_cpp.py MODEL --python /path/to/llama-environment/bin/python

MODEL is a trained model directory, `runs/demo/model` for instance: its fp32 file must continue every prompt with the
same 64 tokens as our engine. Random models of other shapes follow, whose log-probabilities must agree.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from abyssal.checkpoint.gguf.write import DTYPES, write_gguf
from abyssal.config import ModelConfig, RopeScaling
from abyssal.engine import SamplingParameters, generate, load_model
from abyssal.text.tokenizer import Tokenizer
from models import ROOT, TEXTS, ask, log_probabilities, record, write_random_model

NEW_TOKENS = 64
TOLERANCE = 1e-3
PROMPTS = ["def main():", "class Stack:\n    def push(self", "import os\n\n", "for i in range(10):\n    print("]
RELEASED_TOKENIZER = ROOT / "../shared/data/deepseek_v3_tokenizer"

SHAPE = {
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 3,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
}
YARN = RopeScaling(factor=8.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.7)
MODELS: dict[str, dict[str, Any]] = {
    "no query latent": {"q_lora_rank": None},
    "groups": {"n_group": 4, "topk_group": 2},
    "as many groups as may be used": {"n_group": 2, "topk_group": 2, "n_shared_experts": 2},
    "YaRN": {"rope_scaling": YARN},
    "YaRN as released": {
        "rope_scaling": YARN.model_copy(update={"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0})
    },
    "tied head, weights not normalised": {"tie_word_embeddings": True, "norm_topk_prob": False},
    "26 layers without a query latent": {"num_hidden_layers": 26, "q_lora_rank": None},
    "the released tokenizer": {"vocab_size": 129280},
}


def compare(python: Path, directory: Path, prompts: list[list[int]], dtype: str) -> dict[str, Any]:
    """Return how llama.cpp's ids, greedy tokens and log-probabilities compare with ours in fp32."""
    tokenizer = Tokenizer.load(directory)
    model = load_model(directory, dtype="float32").model
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        write_gguf(directory, file, dtype=dtype)
        request = {"model": str(file), "prompts": prompts, "new_tokens": NEW_TOKENS, "texts": TEXTS}
        answer = ask(python, "read_llama_cpp.py", request)
    greedy = SamplingParameters(max_new_tokens=NEW_TOKENS, temperature=0.0)
    ours = [[token.id for token in generate(model, prompt, greedy)] for prompt in prompts]
    differences, divergences = [], []
    for prompt, continued, theirs in zip(prompts, answer["greedy"], answer["arrays"], strict=True):
        expected = log_probabilities(model, prompt + continued)
        differences.append(np.abs(expected - theirs).max())
        divergences.append((np.exp(expected) * (expected - theirs)).sum(axis=-1).mean())
    return {
        "version": answer["version"],
        "ids_equal": answer["ids"] == [tokenizer.encode(text) for text in TEXTS],
        "texts_equal": answer["texts"] == TEXTS,
        "bos_first": answer["with_bos"][0] == tokenizer.bos_id,
        "greedy_equal": sum(a == b for a, b in zip(ours, answer["greedy"], strict=True)),
        "prompts": len(prompts),
        "largest_difference": float(max(differences)),
        "mean_kl_divergence": float(np.mean(divergences)),
    }


def random_model(python: Path, changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """Compare a random model, in fp32, on random prompts."""
    config = ModelConfig(**{**SHAPE, **changes})
    released = config.vocab_size == MODELS["the released tokenizer"]["vocab_size"]
    if released and not RELEASED_TOKENIZER.is_dir():
        return {"skipped": f"{RELEASED_TOKENIZER.resolve()} is not there"}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "model")
        write_random_model(directory, config, seed, RELEASED_TOKENIZER if released else None)
        generator = np.random.default_rng(seed)
        prompts = [generator.integers(config.vocab_size, size=n).tolist() for n in (5, 33, 90)]
        return compare(python, directory, prompts, "f32")


def agrees(found: dict[str, Any]) -> bool:
    """Whether an fp32 file gave the same ids and the same distributions; a model that was left out does no harm."""
    if "skipped" in found:
        return True
    return (
        found["ids_equal"] and found["texts_equal"] and found["bos_first"] and found["largest_difference"] < TOLERANCE
    )


def main() -> int:
    """Compare every model and write the figures; 1 if an fp32 file disagrees."""
    parser = argparse.ArgumentParser(description="llama.cpp's answers against ours")
    parser.add_argument("model", type=Path, help="a trained model directory")
    parser.add_argument("--python", type=Path, required=True, help="an interpreter with llama-cpp-python")
    parser.add_argument("--record", action="store_true", help="write the figures to bench/results")
    options = parser.parse_args()
    tokenizer = Tokenizer.load(options.model)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    trained = {dtype: compare(options.python, options.model, prompts, dtype) for dtype in DTYPES}
    drawn = {name: random_model(options.python, changes, seed) for seed, (name, changes) in enumerate(MODELS.items())}
    for name, found in {**trained, **drawn}.items():
        print(f"{name}: {found}")
    if options.record:
        command = "python tests/external/check_llama_cpp.py MODEL --python PYTHON --record"
        record("external-llama-cpp", command, {"trained": trained, "random": drawn})
    whole = trained["f32"]["greedy_equal"] == len(PROMPTS)
    return int(not whole or not all(map(agrees, [trained["f32"], *drawn.values()])))


if __name__ == "__main__":
    sys.exit(main())
