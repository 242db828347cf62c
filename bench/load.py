"""From a model directory to first logits: Abyssal against transformers, 1.5B random parameters in bf16.

    python bench/load.py

Each candidate runs in a process of its own, in turns; its imports are timed apart. What is measured is loading and one
forward pass over a short prompt: `load_model` and a pass over the latent cache, against
`AutoModelForCausalLM.from_pretrained` and its forward, with the tokenizer in both. The files are warm: read once
before each run. The fastest of the rounds counts. The angle between both sets of logits is stated: bf16 and random
routing leave it well away from 1; that both compute the same is shown in fp32 by bench/roundtrip.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from abyssal.checkpoint.hf import write_model_directory
from abyssal.checkpoint.hf.names import memory_tensors
from abyssal.config import ModelConfig
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config
from record import record

CANDIDATES = ("abyssal", "transformers")
PROMPT = [0, 5, 70, 123, 7, 250, 33, 4]
#: 1.5B parameters, most of them in 16 layers of 28 experts.
CONFIG = ModelConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=4096,
    moe_intermediate_size=960,
    num_hidden_layers=17,
    num_attention_heads=16,
    q_lora_rank=512,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=28,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    max_position_embeddings=4096,
)


def write_directory(folder: Path) -> int:
    """Write a model of random numbers, tensor by tensor, and return its parameters."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = Tokenizer.train(["def f(x):\n    return x * x\n"] * 3, 290)

    def tokenizer_files(staging: Path) -> None:
        tokenizer.save(staging / "tokenizer.json")
        write_tokenizer_config(staging, tokenizer, CONFIG.max_position_embeddings)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.03, generator=generator)

    specs = list(memory_tensors(CONFIG))
    write_model_directory(
        folder,
        CONFIG,
        {spec.name: tensor(spec.shape) for spec in specs},
        dtype=torch.bfloat16,
        tokenizer_files=tokenizer_files,
        card="Random numbers.\n",
        max_shard_bytes=1_000_000_000,
    )
    return sum(spec.numel for spec in specs)


def first_logits(name: str, folder: Path) -> dict[str, Any]:
    """Load with one candidate, and return its times [s], its memory and its last logits."""
    begin = time.perf_counter()
    if name == "abyssal":
        from abyssal.engine import load_model
        from abyssal.engine.paged_cache import PagedLatentCache, TokenRange
    else:
        import transformers
        from transformers.models.deepseek_v3 import modeling_deepseek_v3  # noqa: F401 - imported lazily otherwise
    imported = time.perf_counter()
    if name == "abyssal":
        loaded = load_model(folder)
        ready = time.perf_counter()
        cache = PagedLatentCache(loaded.config, 1, len(PROMPT), loaded.model.compute_dtype, "cpu")
        with torch.inference_mode():
            hidden = loaded.model(torch.tensor(PROMPT), cache.begin([TokenRange([0], 0, len(PROMPT))]))
            logits = loaded.model.logits(hidden[-1:])[0]
    else:
        transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        ready = time.perf_counter()
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPT])).logits[0, -1]
    end = time.perf_counter()
    return {
        "import_s": imported - begin,
        "load_s": ready - imported,
        "forward_s": end - ready,
        "total_s": end - imported,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "logits": logits.float().tolist(),
    }


def warm(folder: Path) -> None:
    """Read every file once, so that the system holds it in memory."""
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def measure(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Run the candidates in turns and return the fastest run of each."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name in CANDIDATES:
            warm(folder)
            command = [sys.executable, __file__, "--candidate", name, "--folder", str(folder)]
            result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            shown = ", ".join(f"{part[:-2]} {result[part]:.2f} s" for part in ("import_s", "load_s", "forward_s"))
            print(f"{name}: {shown}; {result['peak_gib']:.1f} GiB resident, mapped files among it", flush=True)
            best[name] = min(best.get(name, result), result, key=lambda run: run["total_s"])
    return best


def main() -> None:
    """Write the directory, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the directory is, or is to be kept")
    parser.add_argument("--candidate", choices=CANDIDATES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.candidate:
        print(json.dumps(first_logits(arguments.candidate, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if not folder.exists():
            write_directory(folder)
        parameters = sum(spec.numel for spec in memory_tensors(CONFIG))
        best = measure(folder, arguments.rounds)
    ours, theirs = (torch.tensor(best[name].pop("logits")) for name in CANDIDATES)
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    ratio = best["transformers"]["total_s"] / best["abyssal"]["total_s"]
    figures = {
        "parameters": parameters,
        "runs": {name: {part: round(value, 3) for part, value in run.items()} for name, run in best.items()},
        "cosine_of_logits": round(cosine, 4),
        "ratio": round(ratio, 2),
    }
    path = record("load", " ".join(["python", "bench/load.py", *sys.argv[1:]]), figures)
    print(f"abyssal is {ratio:.2f}x as fast to first logits; cosine of the logits {cosine:.3f}; written to {path}")


if __name__ == "__main__":
    main()
