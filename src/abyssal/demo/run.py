"""From the Python standard library's source to a model that completes code, told as it happens."""

from __future__ import annotations

import gzip
import lzma
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from abyssal.config import RunConfig
from abyssal.config.run import DataConfig
from abyssal.data.corpus import STDLIB, find_documents, find_files, read_document, split_of
from abyssal.data.shards import Shards
from abyssal.engine import Engine, EngineOptions, LoadedModel, Request, SamplingParameters, load_model
from abyssal.errors import DataError
from abyssal.plan import count_parameters
from abyssal.train import loop
from abyssal.train.evaluation import score_documents
from abyssal.train.run_folder import RunFolder

PROMPTS = (
    "def read_lines(path, encoding='utf-8'):\n",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "import os\nimport sys\n\ndef main():\n",
)  # each ends where a token ends: spaces belong to the word behind them
SAMPLING = SamplingParameters(max_new_tokens=96, temperature=0.6, top_p=0.95, seed=0)


def run_demo(config: RunConfig, path: Path, console: Console, program: str = "abyssal") -> None:
    """Train the demo (or go on with it, where it was interrupted), score it, and let it complete some code.

    Args:
        config: of a new run; one that stands in `path` keeps its own.
        path: the run's folder.
        console: where the story is told.
        program: how the reader calls this program.
    """
    folder = RunFolder(path)
    begun = folder.recipe.is_file()
    introduce(folder.resolved_config() if begun else config, path, console)
    if begun and (folder.model / "config.json").is_file():
        console.print(f"The run in {escape(str(path))} is finished; remove that folder to train again.")
        model_dir = folder.model
    elif begun:
        model_dir = loop.resume(path, console)
    else:
        model_dir = loop.start(config, path, console)
    loaded = prepare_model(model_dir, folder.resolved_config())
    show_score(loaded, folder, console)
    show_completions(loaded, folder, console)
    show_commands(folder, console, program)


def introduce(config: RunConfig, path: Path, console: Console) -> None:
    """Print what will be trained, on what, and where it goes."""
    count = count_parameters(config.model)
    corpus = ", ".join("this machine's Python standard library" if c == STDLIB else c for c in config.data.corpus)
    console.print(
        f"[bold]Abyssal[/bold] trains a DeepSeek-V3 of {count.total / 1e6:.1f}M parameters "
        f"({count.activated / 1e6:.1f}M activated a token), and {count.mtp.total / 1e6:.1f}M more for multi-token "
        f"prediction, on {escape(corpus)}. Everything goes to {escape(str(path))}. "
        "Ctrl-C stops; the same command goes on.\n",
        highlight=False,
    )


def prepare_model(model_dir: Path, run: RunConfig) -> LoadedModel:
    """Load what the run has written, as anybody would, on the run's threads."""
    torch.set_num_threads(run.train.threads)
    return load_model(model_dir)


def show_score(loaded: LoadedModel, folder: RunFolder, console: Console) -> None:
    """Score the model on the held-out files, beside what general compressors need for the same text."""
    run = folder.resolved_config()
    heldout, length = Shards.open(folder.data(run), "heldout"), run.train.sequence_length
    if not heldout.documents:
        console.print("\nNo document of this corpus was held out, so there is no score on unseen text.")
        return
    score = score_documents(loaded.model, heldout, length, run.train.micro_batch_size * length)
    texts = [loaded.tokenizer.decode(heldout.document(n).tolist()) for n in range(heldout.documents)]
    text = "".join(in_path_order(texts, run.data, folder.data(run))).encode()
    xz, gz = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)), len(gzip.compress(text, 9))
    console.print(
        f"\nBits per byte on {heldout.documents:,} files that it has never seen ({score.bytes:,} bytes); "
        "less is better:\n"
        f"  [bold]{score.bits_per_byte:5.3f}[/bold]  this model\n"
        f"  {8 * xz / len(text):5.3f}  xz -9e, for comparison, on these files alone, one after another by path\n"
        f"  {8 * gz / len(text):5.3f}  gzip -9\n",
        highlight=False,
    )


def in_path_order(texts: Sequence[str], config: DataConfig, unpacked: Path) -> Sequence[str]:
    """Return the held-out `texts` in the order of their files, which suits compressors; as given if those are gone."""
    try:
        references = sorted(find_documents(config, find_files(config), unpacked), key=lambda ref: ref.key)
        held_out = (ref for ref in references if split_of(ref.key, config.split_modulus) == "heldout")
        by_path = [text for ref in held_out if (text := read_document(ref, config.text_field))]
    except DataError:
        return texts
    return by_path if Counter(by_path) == Counter(texts) else texts


def show_completions(loaded: LoadedModel, folder: RunFolder, console: Console) -> None:
    """Continue the prompts, which are printed dim, and put what comes of them into the run's report."""
    console.print(
        f"What it makes of a few beginnings (sampled at temperature {SAMPLING.temperature:g}); "
        "so small a model knows the form of Python, not its meaning:",
        highlight=False,
    )
    samples, engine = [], Engine.of(loaded, EngineOptions.single_stream())
    for prompt in PROMPTS:
        outputs = engine.stream(Request(loaded.encode_prompt(prompt), SAMPLING))
        text = "".join(output.text for output in outputs)
        console.print(Panel(f"[dim]{escape(prompt)}[/dim]{escape(text)}", expand=False), highlight=False)
        samples.append({"prompt": prompt, "completion": text})
    folder.write_samples(samples)
    folder.write_report()


def show_commands(folder: RunFolder, console: Console, program: str) -> None:
    """Print the commands that come next, whole, so that they can be pasted."""
    console.print(
        f"""
Curves, expert load and these completions on one page, for any browser: {folder.report}

What comes next:

  {program} generate {folder.model} --prompt 'class Stack:'
      lets it complete your own beginning
  {program} train demo --out runs/mine --set 'data.corpus=["my/code"]'
      trains on your own Python files (others: see docs/data.md)
  {program} inspect v3_671b
      shows the same architecture at its full size
""",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
