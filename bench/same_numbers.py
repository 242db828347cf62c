"""Whether two commits compute the same numbers, to the bit: what a refactoring must keep.

    python bench/same_numbers.py REVISION [--only NAME ...] [--keep DIR]

Checks REVISION out beside this tree and drives both through the commands that users type, one thread each:

- training, 20 steps of a small demo: losses, norms and scores of every step, every tensor of every training state,
  every byte of the data and of the model directory; with AdamW and Muon, document masks and FIM, an average of weights,
  in float64, and on four ranks (experts over 2, data over 2, ZeRO-1 and ZeRO-3);
- texts of a model that REVISION trained: greedy and seeded, with drafts and without, filling a gap, a batch of prompts;
- answers of the server: chat and completions with log-probabilities, a stream.

Prints a line for each case and exits with 1 at any difference. It compares in fp32 and float64; `bfloat16` runs where
it is asked for (--only bfloat16).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROOT = Path(__file__).parents[1]
WORDS = ("def", "return", "self", "value", "for", "in", "range", "len", "print", "import", "class", "if", "else", "not")
SMALL = {
    "data.split_modulus": 4,
    "tokenizer.train_bytes": 100_000,
    "model.vocab_size": 320,
    "model.hidden_size": 48,
    "model.intermediate_size": 80,
    "model.moe_intermediate_size": 32,
    "model.num_hidden_layers": 3,
    "model.num_attention_heads": 2,
    "model.q_lora_rank": 28,
    "model.kv_lora_rank": 20,
    "model.qk_nope_head_dim": 12,
    "model.qk_rope_head_dim": 8,
    "model.v_head_dim": 16,
    "train.sequence_length": 24,
    "train.micro_batch_size": 4,
    "train.tokens": 20 * 16 * 24,
    "train.threads": 1,
    "train.compute_dtype": "float32",
    "evaluation.every_steps": 10,
    "checkpoint.every_steps": 10,
}
#: Fields of a run: name, recipe fields beside `SMALL`, ranks.
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "adamw": ({"optimizer.name": "adamw", "ema.decay": 0.9}, 1),
    "muon": ({}, 1),
    "masks": ({"optimizer.name": "adamw", "data.mask_documents": True, "data.fim_rate": 0.5}, 1),
    "float64": ({"train.compute_dtype": "float64"}, 1),
    "two_mtp_modules": ({"optimizer.name": "adamw", "model.num_nextn_predict_layers": 2}, 1),
    "ep2_dp2": ({"parallel.ep_size": 2, "optimizer.name": "adamw"}, 4),
    "ep2_dp2_muon_zero3": ({"parallel.ep_size": 2, "parallel.zero_stage": 3}, 4),
    "bfloat16": ({"train.compute_dtype": "bfloat16"}, 1),
}
ON_REQUEST = {"bfloat16"}
#: What of a step is a measurement of the machine; and loads, which moved to another file: the biases follow them.
MEASURED = {"tokens_per_s", "mfu", "seconds", "expert_load"}
PROMPTS = ("def value", "class", "for self in range", "import len if not", "x")
TEXTS: dict[str, list[str]] = {
    "greedy": ["--temperature", "0"],
    "greedy_drafts": ["--temperature", "0", "--speculate"],
    "greedy_three_drafts": ["--temperature", "0", "--drafts", "3"],
    "seeded": ["--temperature", "0.9", "--top-p", "0.95", "--seed", "5"],
    "seeded_drafts": ["--temperature", "0.9", "--top-p", "0.95", "--seed", "5", "--speculate"],
    "penalised_top_k": ["--temperature", "1.3", "--top-k", "17", "--seed", "11", "--no-bos"],
}


@dataclass(frozen=True)
class Tree:
    """A checkout, and how its program is called."""

    path: Path

    def environment(self) -> dict[str, str]:
        """Return an environment in which its package is the one that is imported."""
        fixed = {"PYTHONPATH": str(self.path / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
        return {**os.environ, **fixed}

    def run(self, *arguments: str, ranks: int = 1) -> str:
        """Run `abyssal ARGUMENTS`, on as many ranks, and return its standard output."""
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        ended = subprocess.run(
            [*start, "-m", "abyssal", *arguments], env=self.environment(), capture_output=True, text=True
        )
        if ended.returncode:
            raise SystemExit(f"{self.path}: abyssal {' '.join(arguments)}\n{ended.stdout}\n{ended.stderr}")
        return ended.stdout

    @contextlib.contextmanager
    def serving(self, model: Path) -> Iterator[str]:
        """Serve a model and give the address."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "abyssal", "serve", str(model), "--port", str(port), "--name", "m"]
        process = subprocess.Popen(
            [*command, "--dtype", "float32", "--threads", "1", "--drafts", "0"],  # drafts elsewhere depend on their pay
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    raise SystemExit(f"{self.path}: the server did not start\n{process.communicate()[1]}")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.communicate()


def write_corpus(folder: Path) -> None:
    """Write 60 small files that are the same wherever they are written."""
    generator = random.Random(7)
    folder.mkdir(parents=True)
    for number in range(60):
        lines = (" ".join(generator.choices(WORDS, k=generator.randint(2, 9))) for _ in range(20))
        (folder / f"document{number:02d}.py").write_text(f"# {number}\n" + "\n".join(lines) + "\n")


def train(tree: Tree, run: Path, corpus: Path, fields: dict[str, Any], ranks: int) -> None:
    """Train one case into the folder `run`."""
    given = {**SMALL, **fields, "data.corpus": [str(corpus)]}
    options = [x for name, value in given.items() for x in ("--set", f"{name}={json.dumps(value)}")]
    tree.run("train", "demo", "--out", str(run), *options, ranks=ranks)


def numbers_of_run(run: Path) -> dict[str, str]:
    """Return everything that a run computed, by name, as text or as a digest."""
    found: dict[str, str] = {}
    for number, line in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        for name, value in json.loads(line).items():
            if name not in MEASURED:
                found[f"metrics line {number}: {name}"] = json.dumps(value)
    for state in sorted((run / "checkpoints").iterdir()):
        for name, tensor in read_state(state).items():
            found[f"{state.name}: {name}"] = f"{tensor.dtype} {tuple(tensor.shape)} {digest(tensor)}"
        found[f"{state.name}: progress"] = json.dumps(progress_of(state), sort_keys=True)
    for part in ("data", "model", "model-ema"):
        for path in sorted((run / part).rglob("*")):
            if path.is_file():
                found[f"{part}/{path.relative_to(run / part)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a training state, whatever program wrote it."""
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def progress_of(state: Path) -> dict[str, Any]:
    """Return what a training state knows beside its tensors, without the recipe and its places."""
    values: dict[str, Any] = json.loads((state / "progress.json").read_text())
    return {name: value for name, value in values.items() if name != "recipe"}


def digest(tensor: torch.Tensor) -> str:
    """Return a digest of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def texts_of(tree: Tree, model: Path, folder: Path) -> dict[str, str]:
    """Return what a tree generates from a model directory."""
    fixed = ["--dtype", "float32", "--threads", "1", "--max-new-tokens", "40"]
    found = {
        f"{name}: {prompt!r}": tree.run("generate", str(model), "--prompt", prompt, *fixed, *options)
        for name, options in TEXTS.items()
        for prompt in PROMPTS[: 5 if name == "greedy" else 2]
    }
    suffix = ["--suffix", "return value", "--temperature", "0"]
    found["fill in the middle"] = tree.run("generate", str(model), "--prompt", "def x", *fixed, *suffix)
    lines = folder / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"id": str(i), "prompt": p}) + "\n" for i, p in enumerate(PROMPTS * 3)))
    answers = folder / "batch.jsonl"
    batch = ["--input", str(lines), "--output", str(answers), "--seed", "3", "--temperature", "0.8", "--drafts", "0"]
    tree.run("generate", str(model), *batch, *fixed)
    for line in sorted(answers.read_text().splitlines()):
        found[f"batch: {json.loads(line).get('id')}"] = line
    return found


def answers_of(tree: Tree, model: Path) -> dict[str, str]:
    """Return what a tree's server answers."""
    chat = {"model": "m", "messages": [{"role": "user", "content": "def value"}], "max_tokens": 24, "seed": 4}
    completion = {"model": "m", "prompt": ["def value", "for self"], "max_tokens": 24, "seed": 4}
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "chat": ("chat/completions", chat),
        "chat with log-probabilities": ("chat/completions", {**chat, "logprobs": True, "top_logprobs": 3, "n": 2}),
        "chat, streamed": ("chat/completions", {**chat, "stream": True, "stream_options": {"include_usage": True}}),
        "completion": ("completions", completion),
        "completion with log-probabilities": ("completions", {**completion, "logprobs": 2, "temperature": 0}),
        "completion with stop": ("completions", {**completion, "stop": ["self", "\n"]}),
    }
    found = {}
    with tree.serving(model) as url:
        for name, (path, body) in asked.items():
            request = urllib.request.Request(
                f"{url}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read().decode()
            text = re.sub(r'"id":\s*"[^"]*"', '"id":""', text)
            found[name] = re.sub(r'"created":\s*\d+', '"created":0', text)
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
            found["models"] = re.sub(r'"created":\s*\d+', '"created":0', answer.read().decode())
    return found


def compare(name: str, before: dict[str, str], after: dict[str, str]) -> bool:
    """Print whether two sets of numbers are equal, and the first differences."""
    different = [
        (key, before.get(key, "missing"), after.get(key, "missing"))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
    equal = len(before) - len([key for key, old, _ in different if old != "missing"])
    print(f"{'equal' if not different else 'DIFFERENT':9} {name:28} {equal:,} of {len(before):,} values", flush=True)
    for key, old, new in different[:8]:
        print(f"          {key}: {old[:200]} -> {new[:200]}")
    if len(different) > 8:
        print(f"          and {len(different) - 8:,} more")
    return not different


@contextlib.contextmanager
def checkout(revision: str, folder: Path) -> Iterator[Tree]:
    """Check a revision out into `folder` for a while."""
    add = ["git", "worktree", "add", "--detach", str(folder), revision]
    subprocess.run(add, cwd=ROOT, check=True, capture_output=True)
    try:
        yield Tree(folder)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="the commit to compare with")
    parser.add_argument("--only", nargs="+", choices=[*RUNS, "texts", "server"], help="these cases alone")
    parser.add_argument("--keep", type=Path, help="keep what both computed in this folder")
    given = parser.parse_args()
    cases = given.only or [name for name in (*RUNS, "texts", "server") if name not in ON_REQUEST]
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        before = stack.enter_context(checkout(given.revision, folder.resolve() / "checkout"))
        trees = {"before": before, "after": Tree(ROOT)}
        corpus = folder / "corpus"
        if not corpus.exists():
            write_corpus(corpus)
        alike = [check_run(name, trees, folder, corpus) for name in RUNS if name in cases]
        if {"texts", "server"} & set(cases):
            fields = {"optimizer.name": "adamw", "data.fim_rate": 0.5, "model.max_position_embeddings": 256}
            train(before, folder / "generating", corpus, {**fields, "train.tokens": 60 * 16 * 24}, 1)
        model = folder / "generating" / "model"
        sources: dict[str, Callable[[Tree, Path], dict[str, str]]] = {
            "texts": lambda tree, place: texts_of(tree, model, place),
            "server": lambda tree, place: answers_of(tree, model),
        }
        for name, numbers in sources.items():
            if name in cases:
                results = []
                for side, tree in trees.items():
                    (place := folder / side).mkdir(exist_ok=True)
                    results.append(numbers(tree, place))
                alike.append(compare(name, *results))
    sys.exit(0 if all(alike) else 1)


def check_run(name: str, trees: dict[str, Tree], folder: Path, corpus: Path) -> bool:
    """Train one case with both trees and compare."""
    fields, ranks = RUNS[name]
    results = []
    for side, tree in trees.items():
        run = folder / side / name
        train(tree, run, corpus, fields, ranks)
        results.append(numbers_of_run(run))
    return compare(name, *results)


if __name__ == "__main__":
    main()
