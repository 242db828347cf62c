"""`abyssal demo`: trained once, shown as often as one likes."""

from __future__ import annotations

import html
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abyssal.demo.run import PROMPTS
from abyssal.train import loop

pytestmark = pytest.mark.slow

Call = Callable[..., Any]

SMALL = {
    "data.split_modulus": 5,
    "model.vocab_size": 300,
    "model.hidden_size": 24,
    "model.intermediate_size": 40,
    "model.moe_intermediate_size": 12,
    "model.num_hidden_layers": 2,
    "model.max_position_embeddings": 192,
    "train.sequence_length": 32,
    "train.micro_batch_size": 2,
    "train.compute_dtype": '"float32"',
    "train.threads": 1,
    "schedule.batch_size.start": 2,
}


@pytest.fixture
def small(corpus: Path) -> list[str]:
    """The options of a demo that takes a moment."""
    changes = {**SMALL, "data.corpus": f'["{corpus}"]'}
    return [word for field, value in changes.items() for word in ("--set", f"{field}={value}")]


def test_demo_trains_once_and_then_only_shows(abyssal: Call, small: list[str], corpus: Path) -> None:
    first = abyssal("demo", "--out", "d", "--minutes", "0.01", *small)
    assert (first.code, first.err) == (0, "")
    assert f"on {corpus}. Everything goes to d." in first.out
    assert "   step   loss" in first.out
    story = first.out[first.out.index("Bits per byte on") :]
    assert story.startswith("Bits per byte on 10 files that it has never seen")
    for line in "".join(PROMPTS).split("\n"):
        assert line.strip() in story
    page = Path("d/report.html").read_text()
    assert "any browser: d/report.html" in story
    assert all(html.escape(prompt) in page.replace("&#34;", "&quot;").replace("&#39;", "&#x27;") for prompt in PROMPTS)

    weights = Path("d/model/model.safetensors")
    written = weights.stat().st_mtime_ns
    again = abyssal("demo", "--out", "d")
    assert (again.code, again.err) == (0, "")
    assert "The run in d is finished" in again.out
    assert "step   loss" not in again.out
    assert again.out.endswith(story)
    assert weights.stat().st_mtime_ns == written

    for opening in ("abyssal generate", "abyssal inspect"):
        (line,) = [line for line in story.splitlines() if line.strip().startswith(opening)]
        arguments = shlex.split(line)[1:]
        assert abyssal(*arguments).code == 0


def test_interrupted_demo_goes_on_and_names_the_options_it_cannot_take(
    abyssal: Call, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    command = ("demo", "--out", "d", *small, "--set", "train.time_budget_s=0.1")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        first = abyssal(*command)
    assert (first.code, first.err) == (130, "\ninterrupted; the same command goes on from the newest checkpoint\n")
    second = abyssal(*command)
    assert second.code == 0
    assert second.err == (
        "note: --set: no effect, since the run in d keeps the recipe it was started with; "
        "choose another --out for another run\n"
    )
    assert "step   loss" in second.out
    assert "tokens: " not in second.out  # the length of the run is not decided anew


def test_corpus_without_held_out_documents_gives_no_score(abyssal: Call, small: list[str]) -> None:
    changes = ("--set", "data.split_modulus=1000000000", "--set", "train.time_budget_s=0.1")
    result = abyssal("demo", "--out", "d", *small, *changes)
    assert result.code == 0
    assert "No document of this corpus was held out, so there is no score on unseen text." in result.out
    assert "Bits per byte on" not in result.out


def test_time_must_be_more_than_nothing(abyssal: Call) -> None:
    result = abyssal("demo", "--minutes", "0")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: Invalid value for '--minutes'")
    assert not Path("runs").exists()
