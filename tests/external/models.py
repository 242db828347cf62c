"""What the checks of other engines share: models to hand over, our own answers, and a process of the engine."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abyssal.checkpoint.hf import write_model_directory
from abyssal.checkpoint.hf.names import BIAS, memory_tensors
from abyssal.config import ModelConfig
from abyssal.model import Context, Transformer
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from record import record  # noqa: E402, F401 - bench/ is no package

#: Text for tokenizers to learn from and to disagree about: scripts, marks, digits, signs, runs of white space.
TEXTS = [
    "def f(x):\n\treturn  x**2 + 12345.678e-9\r\n\r\n   # done\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; 1234567 mal.",
    "我想在apple工作1314151天～ ひらがなカタカナ한국어 العربية ไทย हिन्दी",
    "e\u0301 \u200d \u00a0 \u2009x 🚀👩‍👩‍👧 ½²③ Ⅻ … — “quoted” 'RE you sure? I've''''",
    "  leading\n \n  \n\n\ttabs\t\t and trailing   ",
    "https://example.org/a_b-c?d=e&f=%20#g !!!??? ===>>>~~~ [x](y) {z} \\n $5.00 €3",
]


def random_tensors(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Return weights large enough that attention, routing and groups all decide something."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in memory_tensors(config):
        values = torch.randn(spec.shape, generator=generator)
        if spec.name.endswith(BIAS):
            tensors[spec.name] = 0.1 * values
        elif len(spec.shape) == 1:
            tensors[spec.name] = 1.0 + 0.2 * values
        else:
            tensors[spec.name] = values * 1.5 / math.sqrt(spec.shape[-1])
    return tensors


def write_random_model(path: Path, config: ModelConfig, seed: int, tokenizer: Path | None = None) -> None:
    """Write the model directory of a random model, with the tokenizer in a folder or a new one of 300 tokens."""
    learnt = Tokenizer.train(TEXTS, 300)

    def tokenizer_files(folder: Path) -> None:
        learnt.save(folder / "tokenizer.json")
        write_tokenizer_config(folder, learnt, config.max_position_embeddings)

    write_model_directory(
        path,
        config,
        random_tensors(config, seed),
        dtype=torch.float32,
        tokenizer_files=tokenizer or tokenizer_files,
        card="A model of random numbers.\n",
    )


@torch.no_grad()
def log_probabilities(model: Transformer, tokens: Sequence[int]) -> np.ndarray:
    """Return our log-probabilities [T, vocabulary] after each of the tokens, from one naive pass."""
    logits = model.logits(model(torch.tensor(tokens), Context.packed([len(tokens)])))
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def ask(python: Path, script: str, request: dict[str, Any], limit_s: float = 600.0) -> dict[str, Any]:
    """Run a script of this folder in another environment; request and answer are JSON files.

    Arrays, if it writes any, stand beside the answer, and come as `arrays`.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, answer, arrays = (Path(folder, name) for name in ("request.json", "answer.json", "answer.npz"))
        question.write_text(json.dumps(request), encoding="utf-8")
        command = [str(python), str(HERE / script), str(question), str(answer)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{script} ended with {result.returncode}:\n{result.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        if arrays.exists():
            with np.load(arrays) as file:
                found["arrays"] = [file[name] for name in file.files]
        return found
