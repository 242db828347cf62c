"""A run that 8 ranks began goes on at any number of ranks, and ends as one process that was never disturbed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ranks.resuming import Line, Seen, run_lines
from ranks.training import LIMITS, Run

pytestmark = pytest.mark.slow

STOP, STEPS = 5, 25
EP_4_X_DP_2 = {"parallel.ep_size": 4}
#: For each number of ranks: the compute dtype that a run was begun in, and the layout that it goes on in.
LAYOUTS: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    8: {"ep 2 * dp 4, ZeRO-2": ("float64", {"parallel.ep_size": 2, "parallel.zero_stage": 2})},
    2: {
        "ep 2": ("float64", {"parallel.ep_size": 2}),
        "dp 2, ZeRO-3": ("float64", {"parallel.ep_size": 1, "parallel.zero_stage": 3}),
        "ep 2, fp32": ("float32", {"parallel.ep_size": 2}),
    },
    1: {"one process": ("float64", {"parallel.ep_size": 1})},
}
Outcome = tuple[Run, Seen]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def fields(dtype: str) -> dict[str, Any]:
    return {
        "train.compute_dtype": dtype,
        "train.tokens": STEPS * 8 * 24,
        "train.micro_batch_size": 4,
        "schedule.batch_size.start": 8,
        "evaluation.every_steps": 1000,
    }


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Outcome]:
    return run_lines(1, folder, {dtype: Line(folder / f"alone, {dtype}", fields(dtype)) for dtype in LIMITS})


@pytest.fixture(scope="module")
def begun(folder: Path, alone: dict[str, Outcome]) -> dict[str, Outcome]:
    """The runs of 8 ranks, each stopped by a signal that one of them got."""
    lines = {
        dtype: Line(folder / f"begun, {dtype}", {**fields(dtype), **EP_4_X_DP_2}, stopped_after=STOP)
        for dtype in LIMITS
    }
    found = run_lines(8, folder, lines)
    for run, _ in found.values():
        assert run.of("step") == list(range(1, STOP + 1))
    return found


def resumed(run: Path, out: Path, layout: dict[str, Any]) -> Line:
    """Go on with a copy of a run's folder."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("model"))
    return Line(out, layout, resumed=True)


@pytest.fixture(scope="module")
def finish(folder: Path, begun: dict[str, Outcome]) -> Callable[[int], dict[str, Outcome]]:
    """Let the runs go on in the layouts of a number of ranks, in the folders of their names, once."""

    @cache
    def finish(world_size: int) -> dict[str, Outcome]:
        layouts = LAYOUTS[world_size].items()
        lines = {name: resumed(folder / f"begun, {dtype}", folder / name, new) for name, (dtype, new) in layouts}
        return run_lines(world_size, folder, lines)

    return finish


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_a_run_goes_on_at_another_number_of_ranks_as_if_undisturbed(
    world_size: int,
    alone: dict[str, Outcome],
    begun: dict[str, Outcome],
    finish: Callable[[int], dict[str, Outcome]],
) -> None:
    for name, (dtype, _) in LAYOUTS[world_size].items():
        (run, seen), (undisturbed, expected) = finish(world_size)[name], alone[dtype]
        left = begun[dtype][1].saved
        assert {f".optimizer.model.embed_tokens.weight.{moment}" for moment in ("exp_avg", "exp_avg_sq")} < left.keys()
        assert seen.restored == left, (name, [key for key in left if seen.restored.get(key) != left[key]])
        assert [*begun[dtype][1].windows, *seen.windows] == expected.windows, name
        ours, theirs = run.after(STOP), undisturbed.after(STOP)
        assert run.of("step") == undisturbed.of("step")
        assert len(ours.of("loss")) == 20
        assert ours.loss_error(theirs).size <= LIMITS[dtype][1], (name, ours.loss_error(theirs))
        if dtype == "float64":
            assert ours.of("expert_load") == theirs.of("expert_load"), name


def test_the_model_directory_of_a_state_is_the_same_from_every_layout(
    folder: Path, finish: Callable[[int], dict[str, Outcome]]
) -> None:
    ((source, (dtype, _)),) = LAYOUTS[8].items()
    state = finish(8)[source][1].saved
    expected = files(folder / source / "model")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} < expected.keys()
    for world_size in (2, 1):  # at the last step already, so that nothing is left but to write the directory
        lines = {
            name: resumed(folder / source, folder / f"{name}, written only", layout)
            for name, (begun_in, layout) in LAYOUTS[world_size].items()
            if begun_in == dtype
        }
        for name, (_, seen) in run_lines(world_size, folder, lines).items():
            assert seen.restored == state
            assert not seen.windows
            assert files(lines[name].out / "model") == expected, name


def files(model: Path) -> dict[str, str]:
    """Return the digest of every file of a directory."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in model.iterdir()}
