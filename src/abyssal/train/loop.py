"""The training loop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from abyssal.checkpoint.state import adamw_tensors, latest_state, load_state, save_state
from abyssal.config import RunConfig
from abyssal.data.batch import BatchLoader, count_windows
from abyssal.data.order import WindowOrder
from abyssal.data.prepare import prepare
from abyssal.data.shards import Shards
from abyssal.plan import training_flops
from abyssal.train.evaluation import Score, score_documents
from abyssal.train.export import export_model
from abyssal.train.optimizer import build_optimizer
from abyssal.train.progress import Progress
from abyssal.train.reporter import Reporter
from abyssal.train.run_folder import RunFolder
from abyssal.train.setup import build_model, decide, peak_flops
from abyssal.train.step import train_step


def start(config: RunConfig, path: Path, console: Console) -> Path:
    """Begin a run in the folder `path` and train to its end; returns the model directory.

    Raises:
        AbyssalError: a fault of recipe, corpus, disk or training, as one sentence.
    """
    folder = RunFolder(path)
    config, sentences = decide(config, _device())
    folder.begin(config)
    for sentence in sentences:
        console.print(sentence, highlight=False)
    return _train(config, folder, console)


def resume(path: Path, console: Console) -> Path:
    """Go on from the newest training state of the run in `path`, with the recipe it was started with.

    The run ends as it would have undisturbed: the same losses to the bit on the same machine.
    """
    folder = RunFolder(path)
    config = folder.resolved_config()
    torch.set_num_threads(config.train.threads)
    return _train(config, folder, console)


def _train(config: RunConfig, folder: RunFolder, console: Console) -> Path:
    device = _device()
    length, total = config.train.sequence_length, config.train.tokens
    prepare(
        config.data,
        config.tokenizer,
        config.model.vocab_size,
        folder.data,
        seed=config.seed,
        workers=config.train.threads,
        progress=console.is_terminal,
    )
    train_set, validation = Shards.open(folder.data, "train"), Shards.open(folder.data, "validation")
    loader = BatchLoader(train_set, WindowOrder(config.seed, count_windows(train_set, length)), length)

    model = build_model(config, device)
    optimizer = build_optimizer(model, config.optimizer)
    tensors = {"model": model.state_dict(), "optimizer": adamw_tensors(optimizer, dict(model.named_parameters()))}
    progress = _restore(folder, tensors)

    reporter = Reporter(console, folder, progress, total, config.train.log_every_steps)
    reporter.flops_per_token = training_flops(config.model, length).total
    reporter.peak_flops = peak_flops(config, device)
    score: Score | None = None
    with reporter:
        while progress.tokens < total:
            batch = loader.batch(progress.sequences, config.batch_size_at(progress.tokens))
            result = train_step(model, optimizer, batch.tokens.to(device), config, progress.tokens)
            progress = progress.after(len(batch.tokens), length)
            reporter.step(progress, result)
            last = progress.tokens >= total
            if last or progress.step % config.evaluation.every_steps == 0:
                begin = time.perf_counter()
                max_bytes = None if last else config.evaluation.max_bytes
                score = score_documents(model, validation, length, config.train.micro_batch_size * length, max_bytes)
                reporter.score(progress, score, time.perf_counter() - begin)
            if last or progress.step % config.checkpoint.every_steps == 0:
                begin = time.perf_counter()
                save_state(folder.states, progress.step, tensors, progress.to_json(), keep=config.checkpoint.keep)
                reporter.exclude(time.perf_counter() - begin)
    if score is None:  # resumed after the last step
        score = score_documents(model, validation, length, config.train.micro_batch_size * length)
    export_model(folder.model, model, config, progress, tokenizer=folder.data, score=score)
    return folder.model


def _restore(folder: RunFolder, tensors: dict[str, Any]) -> Progress:
    """Load the newest training state into `tensors`, if there is one; cut the metrics to it."""
    newest = latest_state(folder.states)
    progress = Progress() if newest is None else Progress.from_json(load_state(newest, tensors))
    folder.cut_metrics(progress.step)
    return progress


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
