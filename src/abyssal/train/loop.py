"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from abyssal.checkpoint.state import StateWriter, latest_state, read_progress, set_damaged_states_aside
from abyssal.config import RunConfig
from abyssal.config.resume import resumed_changes
from abyssal.parallel.layout import describe
from abyssal.ranks.ranks import ALONE, Ranks
from abyssal.train.build import lay_out_run, open_initial_weights
from abyssal.train.evaluation import Score, score_documents
from abyssal.train.export import export_model
from abyssal.train.inputs import Inputs, check_inputs, open_inputs, prepare_inputs
from abyssal.train.reporter import Reporter
from abyssal.train.resolve import cores_of_a_rank, peak_flops, resolve, set_threads
from abyssal.train.run_folder import RunFolder
from abyssal.train.signals import StopSignals
from abyssal.train.step import RefusedUpdateError, train_step
from abyssal.train.training_state import TrainingState


def start(config: RunConfig, path: Path, console: Console, ranks: Ranks = ALONE) -> Path:
    """Begin a run in the folder `path` and train to its end; returns the model directory.

    Args:
        config: the recipe.
        path: the run's folder, which all ranks see.
        console: where the run is reported.
        ranks: that train together; all of them call this.

    Raises:
        AbyssalError: a fault of recipe, corpus, disk or training, as one sentence.
        Stopped: a signal asked for it; what was done is saved.
    """
    folder, recipe = RunFolder(path), config
    lay_out_run(config, ranks.world_size, ranks.local_world_size)  # refused before anything is written, as is init_from
    ranks.first(folder.refuse_another)
    open_initial_weights(config)
    ranks.mark("preparation of the data", may_take_long=True)
    ranks.first(lambda: prepare_inputs(config, folder.data(config), console))
    inputs = open_inputs(config, folder.data(config))
    config, sentences = ranks.first(lambda: resolve(config, _device(), ranks))
    _say(console, sentences)
    ranks.first(lambda: folder.mark_launch(ranks.launch.id, recipe))
    ranks.first(lambda: folder.begin(config))
    return _train(config, folder, inputs, console, ranks)


def resume(
    path: Path,
    console: Console,
    overrides: Sequence[str] = (),
    ranks: Ranks = ALONE,
    *,
    recipe: RunConfig | None = None,
    step_back: bool = False,
) -> Path:
    """Go on from the newest training state of the run in `path`, with the recipe it was started with.

    The run ends as it would have undisturbed: the same losses to the bit on the same machine, as many ranks and layout.

    Args:
        path: the run's folder.
        console: where the run is reported.
        overrides: `section.field=value`, of the fields that may change (`abyssal.config.resume`).
        ranks: that train together, as many as before or not; all of them call this.
        recipe: by which a launch is known again that goes on with the run, and starts its ranks again where one fails.
        step_back: whether newest states that are damaged are set aside for the one before them.

    Raises:
        DamagedStateError: the newest state is damaged, and `step_back` is not set, or none before it is intact.
    """
    folder = RunFolder(path)
    before, config = folder.resolved_config(), folder.resolved_config(overrides)
    for state in set_damaged_states_aside(folder.states, group=ranks.control) if step_back else ():
        sentence = f"{state.fault}; set aside as {state.path.name}, and the run goes back to the state before"
        console.print(sentence, style="bold red", highlight=False, markup=False)
    newest = latest_state(folder.states, group=ranks.control)
    if newest is not None:  # the stored recipe may have been edited since
        before = RunConfig.parse(read_progress(newest, group=ranks.control).get("recipe", {}), source=str(newest))
    source = f"--set {' '.join(overrides)}" if overrides else str(folder.recipe)
    _say(console, resumed_changes(before, config, source))
    lay_out_run(config, ranks.world_size, ranks.local_world_size)
    config, sentences = ranks.first(lambda: resolve(config, _device(), ranks))
    _say(console, sentences)
    if overrides:
        ranks.first(lambda: folder.begin(config))
    ranks.first(lambda: check_inputs(config, folder.data(config), console))
    inputs = open_inputs(config, folder.data(config))
    return _train(config, folder, inputs, console, ranks, resumed_as=recipe)


def _train(
    config: RunConfig,
    folder: RunFolder,
    inputs: Inputs,
    console: Console,
    ranks: Ranks,
    *,
    resumed_as: RunConfig | None = None,
) -> Path:
    device, length = _device(), config.train.sequence_length
    set_threads(min(config.train.threads, cores_of_a_rank(ranks)))
    ranks.mark("building and reading the state", may_take_long=True)
    state = TrainingState(config, device, ranks)
    if ranks.world_size > 1:
        console.print(describe(state.layout, config.model), highlight=False, markup=False)
    if newest := latest_state(folder.states, group=ranks.control):
        state.restore(newest)
    if resumed_as is not None:  # not before: a launch that has not come so far was asked by hand
        ranks.first(lambda: folder.mark_launch(ranks.launch.id, resumed_as))
    ranks.first(lambda: folder.cut_records(state.progress.step))
    evaluate = partial(
        score_documents,
        state.model,
        inputs.validation,
        length,
        tokens_a_pass=config.train.micro_batch_size * length,
        ranks=ranks,
    )
    export = partial(export_model, model=state.model, config=config, tokenizer=inputs.folder, group=ranks.control)
    peak = ranks.first(lambda: peak_flops(config, device)) * ranks.world_size
    with Reporter(console, folder, state.progress, config, peak, speaks=ranks.is_first) as reporter:
        _steps(state, folder, inputs, reporter, evaluate=evaluate, export=export)
        ranks.mark("last evaluation and model directory", may_take_long=True)
        reporter.score(state.progress, evaluate())
    export(folder.model, progress=state.progress, score=reporter.last_score)
    if state.average is not None:
        state.model.load_state_dict(state.average.tensors)
        score = evaluate()
        reporter.average_score(state.progress, score)
        export(folder.average_model, progress=state.progress, score=score)
    ranks.first(folder.write_report)
    return folder.model


def _steps(
    state: TrainingState,
    folder: RunFolder,
    inputs: Inputs,
    reporter: Reporter,
    *,
    evaluate: Callable[..., Score],
    export: Callable[..., None],
) -> None:
    """Make every step that is left, and what is due after it; end early, saved, where a signal asks for it."""
    config, device, total, due = state.config, _device(), state.config.train.tokens, state.config.checkpoint
    ranks = state.ranks
    keep_multiples_of = due.keep_every * due.every_steps
    with StopSignals(speaks=ranks.is_first) as signals:
        with StateWriter(
            folder.states, keep=due.keep, keep_multiples_of=keep_multiples_of, group=ranks.control
        ) as writer:
            while state.progress.tokens < total and not signals.agree(ranks.most):
                ranks.mark("next batch")
                batch, seen = state.next_batch(inputs.loader), state.progress.tokens
                try:
                    windows = batch.tokens.to(device)
                    result = train_step(
                        state.model,
                        state.optimizer,
                        windows,
                        config,
                        seen,
                        judge=state.judge,
                        lengths=batch.lengths,
                        ranks=ranks,
                    )
                except RefusedUpdateError as refused:
                    state.refuse(batch)
                    reporter.refused(state.progress, batch.ranges, refused)
                    if state.guard.in_trouble(config.guard):
                        writer.wait()  # the newest state may be under way still
                        trouble = state.progress.step
                        state.roll_back(folder.states, inputs.loader, refused)
                        reporter.rolled_back(state.progress, trouble, state.guard.skipped)
                    continue
                state.accept(len(windows) * ranks.world_size, result)
                progress, ended = state.progress, state.progress.tokens >= total
                reporter.step(progress, result)
                ranks.mark("evaluation, export and training state", may_take_long=True)
                with reporter.apart():
                    if progress.step % config.evaluation.every_steps == 0 and not ended:
                        reporter.score(progress, evaluate(max_bytes=config.evaluation.max_bytes))
                    if due.export_every_steps and progress.step % due.export_every_steps == 0:
                        export(folder.export(progress.step), progress=progress, score=reporter.last_score)
                    if progress.step % due.every_steps == 0 or ended:
                        writer.save(progress.step, state.tensors, state.record())
                    writer.check()
            if signals.agree(ranks.most) and not writer.has(state.progress.step):
                writer.save(state.progress.step, state.tensors, state.record())
        signals.stop()  # not before the last state is on the disk


def _say(console: Console, sentences: Sequence[str]) -> None:
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
