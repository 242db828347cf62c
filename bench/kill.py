"""kill -9, ten times, at random moments and while a training state is written: every run ends as the undisturbed one.

    python bench/kill.py [--times 10] [--seed 0]

Odd runs are killed at a random moment, even ones while a state is being written. Each is resumed, and its losses and
weights are compared to the bit with those of the undisturbed run. Exits with 1 at the first difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ("def", "return", "self", "value", "for", "in", "range", "len", "print", "import", "class", "if", "else", "not")
RECIPE = """
extends = "demo"
name = "kill"

[data]
corpus = ["{corpus}"]
split_modulus = 5

[model]
vocab_size = 400
hidden_size = 96
intermediate_size = 160
moe_intermediate_size = 48
max_position_embeddings = 64

[train]
tokens = {tokens}
sequence_length = 32
micro_batch_size = 4
compute_dtype = "float32"
threads = 1

[schedule.batch_size]
start = 4
segments = []

[checkpoint]
every_steps = 7

[evaluation]
every_steps = 20

[ema]
decay = 0.9
"""
STEPS = 60


def write_recipe(folder: Path) -> Path:
    generator = random.Random(7)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(60):
        lines = (" ".join(generator.choices(WORDS, k=generator.randint(2, 9))) for _ in range(20))
        (corpus / f"document{number:02d}.py").write_text(f"# {number}\n" + "\n".join(lines) + "\n")
    recipe = folder / "kill.toml"
    recipe.write_text(RECIPE.format(corpus=corpus, tokens=STEPS * 4 * 32))
    return recipe


def outcome(run: Path) -> tuple[list[tuple[float, ...]], bytes, bytes]:
    """Return what must not depend on a kill: losses, weights, averaged weights."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [(r["step"], r["loss"], *r["mtp_losses"], r["gradient_norm"]) for r in records if "loss" in r]
    weights = [(run / name / "model.safetensors").read_bytes() for name in ("model", "model-ema")]
    return losses, weights[0], weights[1]


def begun(run: Path) -> bool:
    return (run / "metrics.jsonl").exists()


def writing(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*.writing-*"))


def kill(command: list[str], run: Path, while_writing: bool, seconds: float) -> str:
    """Start a run, kill it in the middle, and say where that was."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not begun(run):
        time.sleep(0.001)
    time.sleep(random.random() * seconds)
    while while_writing and process.poll() is None and not writing(run):
        pass
    process.send_signal(signal.SIGKILL)
    ended = process.wait()
    steps = sum('"loss"' in line for line in (run / "metrics.jsonl").read_text().splitlines())
    return f"killed after step {steps}, {'a state half written' if writing(run) else 'no state under way'}" * (
        ended < 0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(folder)
        program = [sys.executable, "-m", "abyssal", "train", str(recipe), "--out"]
        begin = time.perf_counter()
        subprocess.run([*program, str(folder / "whole")], check=True, stdout=subprocess.DEVNULL)
        print(f"undisturbed: {STEPS} steps, {time.perf_counter() - begin:.1f} s")
        lines = (folder / "whole" / "metrics.jsonl").read_text().splitlines()
        rate = next(r["tokens_per_s"] for r in map(json.loads, reversed(lines)) if "tokens_per_s" in r)
        expected = outcome(folder / "whole")
        for number in range(1, arguments.times + 1):
            run = folder / f"run{number}"
            where = kill([*program, str(run)], run, number % 2 == 0, 0.8 * STEPS * 4 * 32 / rate)
            subprocess.run([*program, str(run), "--resume"], check=True, stdout=subprocess.DEVNULL)
            equal = outcome(run) == expected
            print(f"{number:3d}  {where or 'ended before the kill'}: {'equal to the bit' if equal else 'DIFFERENT'}")
            if not equal:
                sys.exit(1)


if __name__ == "__main__":
    main()
