"""The training loop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from abyssal.checkpoint.state import adamw_tensors, latest_state, load_state, save_state
from abyssal.config import RunConfig
from abyssal.train.evaluation import score_documents
from abyssal.train.export import export_model
from abyssal.train.inputs import Inputs, prepare_inputs, reopen_inputs
from abyssal.train.optimizer import build_optimizer
from abyssal.train.progress import Progress
from abyssal.train.reporter import Reporter
from abyssal.train.run_folder import RunFolder
from abyssal.train.setup import build_model, decide, open_initial_weights, peak_flops, settle
from abyssal.train.step import train_step


def start(config: RunConfig, path: Path, console: Console) -> Path:
    """Begin a run in the folder `path` and train to its end; returns the model directory.

    Raises:
        AbyssalError: a fault of recipe, corpus, disk or training, as one sentence.
    """
    folder = RunFolder(path)
    folder.refuse_another()
    open_initial_weights(config)  # a wrong init_from is found before anything is written
    inputs = prepare_inputs(config, folder.data(config), console)
    config, sentences = decide(config, _device())
    for sentence in sentences:
        console.print(sentence, highlight=False)
    folder.begin(config)
    return _train(config, folder, inputs, console)


def resume(path: Path, console: Console) -> Path:
    """Go on from the newest training state of the run in `path`, with the recipe it was started with.

    The run ends as it would have undisturbed: the same losses to the bit on the same machine.
    """
    folder = RunFolder(path)
    config = folder.resolved_config()
    settle(config.train.threads)
    return _train(config, folder, reopen_inputs(config, folder.data(config), console), console)


def _train(config: RunConfig, folder: RunFolder, inputs: Inputs, console: Console) -> Path:
    device, length, total = _device(), config.train.sequence_length, config.train.tokens
    model = build_model(config, device)
    optimizer = build_optimizer(model, config.optimizer)
    tensors = {"model": model.state_dict(), "optimizer": adamw_tensors(optimizer, dict(model.named_parameters()))}
    progress = _restore(folder, tensors)
    evaluate = partial(
        score_documents, model, inputs.validation, length, tokens_a_pass=config.train.micro_batch_size * length
    )

    with Reporter(console, folder, progress, config, peak_flops(config, device)) as reporter:
        while progress.tokens < total:
            batch = inputs.loader.batch(progress.sequences, config.batch_size_at(progress.tokens))
            windows = batch.tokens.to(device)
            result = train_step(model, optimizer, windows, config, progress.tokens, lengths=batch.lengths)
            progress = progress.after(len(batch.tokens), length)
            reporter.step(progress, result)
            if progress.step % config.evaluation.every_steps == 0 and progress.tokens < total:
                with reporter.apart():
                    reporter.score(progress, evaluate(max_bytes=config.evaluation.max_bytes))
            if progress.step % config.checkpoint.every_steps == 0 or progress.tokens >= total:
                with reporter.apart():
                    save_state(folder.states, progress.step, tensors, progress.to_json(), keep=config.checkpoint.keep)
        score = evaluate()
        reporter.score(progress, score)
    export_model(folder.model, model, config, progress, tokenizer=inputs.folder, score=score)
    return folder.model


def _restore(folder: RunFolder, tensors: dict[str, Any]) -> Progress:
    """Load the newest training state into `tensors`, if there is one; cut the metrics to it."""
    newest = latest_state(folder.states)
    progress = Progress() if newest is None else Progress.from_json(load_state(newest, tensors))
    folder.cut_metrics(progress.step)
    return progress


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
