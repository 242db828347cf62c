"""From the Python standard library's source to a model that completes code, told as it happens."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from abyssal.config import RunConfig
from abyssal.data.shards import Shards
from abyssal.engine import SamplingParameters, load_model, stream_text
from abyssal.plan import count_parameters
from abyssal.train import loop
from abyssal.train.evaluation import score_documents
from abyssal.train.run_folder import RunFolder

PROMPTS = (
    "def read_lines(path, encoding='utf-8'):\n    ",
    "class Queue:\n    def __init__(self, maxsize=0):\n        ",
    "import os\nimport sys\n\ndef main():\n    ",
)
SAMPLING = SamplingParameters(max_new_tokens=96, temperature=0.6, top_p=0.95, seed=0)


def run_demo(config: RunConfig, path: Path, console: Console) -> None:
    """Train the demo (or go on with it, where it was interrupted), score it, and let it complete some code."""
    folder = RunFolder(path)
    count = count_parameters(config.model)
    console.print(
        f"[bold]Abyssal[/bold]: training a DeepSeek-V3 of {count.total / 1e6:.1f}M parameters "
        f"({count.activated / 1e6:.1f}M activated a token) on this machine's Python standard library.\n"
        f"Everything goes to {path}; Ctrl-C stops, the same command goes on.\n",
        highlight=False,
    )
    if (folder.model / "config.json").is_file():
        console.print(f"The run in {path} is finished; remove that folder to train again.\n", highlight=False)
        model_dir = folder.model
    elif folder.recipe.is_file():
        model_dir = loop.resume(path, console)
    else:
        model_dir = loop.start(config, path, console)
    show(model_dir, folder, console)


def show(model_dir: Path, folder: RunFolder, console: Console) -> None:
    """Score the model on the held-out files, print its completions and the commands that come next."""
    run = folder.resolved_config()
    torch.set_num_threads(run.train.threads)
    loaded = load_model(model_dir)
    heldout, length = Shards.open(folder.data(run), "heldout"), run.train.sequence_length
    score = score_documents(loaded.model, heldout, length, run.train.micro_batch_size * length)
    console.print(
        f"\n[bold]{score.bits_per_byte:.3f} bits per byte[/bold] on {heldout.documents} files it has never seen "
        f"({score.bytes:,} bytes).\n",
        highlight=False,
    )
    for prompt in PROMPTS:
        chunks = stream_text(loaded, loaded.encode_prompt(prompt), SAMPLING)
        text = "".join(chunk.text for chunk in chunks)
        console.print(Panel(f"[dim]{escape(prompt)}[/dim]{escape(text)}", expand=False), highlight=False)
    console.print(
        f"""
What comes next:
  abyssal generate {model_dir} --prompt 'class Stack:'       complete your own code
  abyssal train demo --out runs/mine --set 'data.corpus=["my/project"]'    train on your own text
  abyssal inspect v3_671b                                    the same architecture at its full size
""",
        highlight=False,
    )
