"""`generate --input`: the answers are those of each line alone, and interruptions neither lose nor repeat one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.cli.main import main
from abyssal.engine import Engine, SamplingParameters, batch, load, load_model
from abyssal.text.chat_template import ChatTemplate
from engine.oracle import generate_text

Capture = pytest.CaptureFixture[str]
WORDS = ("def", "f(x)", "return", "x", "* x", "naïve", "if", "\n")


def random_lines(count: int) -> list[dict[str, Any]]:
    """Prompts and conversations, some with parameters of their own."""
    draw = random.Random(random.randrange(2**32))
    lines: list[dict[str, Any]] = []
    for number in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 5)))
        line: dict[str, Any] = {"prompt": text} if draw.random() < 0.7 else {"messages": [user(text[:8])]}
        line |= {"max_new_tokens": draw.randint(1, 9)} if draw.random() < 0.5 else {}
        line |= {"temperature": 1.5, "seed": draw.randint(0, 99)} if draw.random() < 0.4 else {}
        line |= {"id": f"q{number}", "metadata": {"n": [number]}} if draw.random() < 0.5 else {}
        lines.append(line)
    return lines


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a precision in which no text depends on who else runs: in fp32 one in many thousand tokens does."""
    monkeypatch.setitem(load.DTYPES, "float64", torch.float64)


@pytest.fixture
def files(model_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Write an input, and return the arguments of the command."""

    def write(lines: list[dict[str, Any]], *options: str) -> list[str]:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "in.jsonl").write_text(text)
        arguments = ["generate", str(model_folder), "--input", str(tmp_path / "in.jsonl")]
        return [*arguments, "--output", str(tmp_path / "out.jsonl"), *options]

    return write


def answers(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def alone(folder: Path, lines: list[dict[str, Any]], defaults: SamplingParameters) -> list[str]:
    """What the engine for a single text makes of each line; line n has the seed n - 1 behind the first."""
    loaded, template = load_model(folder, dtype="float64"), ChatTemplate.load(folder)
    texts = []
    for number, line in enumerate(lines):
        assert defaults.seed is not None
        own = {name: line[name] for name in ("max_new_tokens", "temperature", "seed") if name in line}
        parameters = replace(defaults, **{"seed": defaults.seed + number, **own})
        if "prompt" in line:
            ids = loaded.encode_prompt(line["prompt"])
        else:
            ids = loaded.tokenizer.encode(template.render(line["messages"], add_generation_prompt=True))
        texts.append("".join(chunk.text for chunk in generate_text(loaded, ids, parameters)))
    return texts


OPTIONS = (
    *("--seed", "11", "--max-new-tokens", "7", "--max-running", "3", "--temperature", "0.8"),
    *("--dtype", "float64"),
)
DEFAULTS = SamplingParameters(7, temperature=0.8, seed=11)


def test_each_line_is_answered_as_if_it_were_alone_in_the_order_of_the_input(
    files: Callable[..., list[str]], model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    lines = random_lines(17)
    assert main(files(lines, *OPTIONS)) == 0
    found = answers(tmp_path)
    assert [answer["line"] for answer in found] == list(range(1, 18))
    assert [answer["text"] for answer in found] == alone(model_folder, lines, DEFAULTS)
    for line, answer in zip(lines, found, strict=True):
        assert {name: answer.get(name) for name in ("id", "metadata")} == {
            name: line.get(name) for name in ("id", "metadata")
        }
        assert answer["usage"]["completion_tokens"] <= line.get("max_new_tokens", 7)
    assert "17 lines in" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_without_losing_or_repeating_a_line(
    files: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = random_lines(13)
    arguments = files(lines, *OPTIONS)
    assert main(arguments) == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    step, wanted = Engine.step, 0

    def written() -> int:
        out = tmp_path / "out.jsonl"
        return out.read_bytes().count(b"\n") if out.exists() else 0

    def interrupted(engine: Engine) -> list[Any]:
        if written() >= wanted:  # and others are half done
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    for wanted in (1, 4):  # noqa: B007
        assert main(arguments) == 130
        with (tmp_path / "out.jsonl").open("ab") as file:
            file.write(b'{"line": 12, "text": "x')  # a write that was cut short
    wanted = len(lines) + 1
    capsys.readouterr()
    assert main(arguments) == 0
    assert "of 13 lines are answered already" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    monkeypatch.setattr(batch, "run_batch", None)  # nothing is left to be done
    assert main(arguments) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_answers_to_another_input_other_options_or_another_model_are_not_mixed(
    files: Callable[..., list[str]], model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    lines: list[dict[str, Any]] = [{"prompt": "a", "seed": 1}, {"prompt": "b"}]
    arguments = files(lines, "--max-new-tokens", "2")
    assert main(arguments) == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    assert main(files([*lines[:1], {"prompt": "c"}], "--max-new-tokens", "2")) == 2
    assert "has an answer to line 2 that was asked otherwise" in capsys.readouterr().err
    assert main(files(lines, "--max-new-tokens", "3")) == 2
    files(lines)
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert main(arguments) == 2
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_bad_lines_are_named_with_their_numbers_before_anything_is_loaded(
    files: Callable[..., list[str]], model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = files([])
    bad = [
        ('{"prompt": "x"', "is not JSON"),
        ('{"prompt": 3}', "prompt=3: must be a string"),
        ('{"promt": "x"}', "promt: not a field of a line"),
        ('{"prompt": "x", "messages": []}', "either a prompt or messages"),
        ('{"messages": []}', "messages: must be a list of objects"),
        ('{"messages": [{"content": "x"}]}', "messages[0]: must be an object with a role"),
        ('{"prompt": "x", "temperature": "hot"}', "temperature='hot': must be a number"),
        ('{"prompt": "x", "top_p": NaN}', "NaN is no number"),
        ('{"prompt": "x", "stop": [""]}', "stop=('',): must be"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"prompt": "x", "id": [1]}', "id=[1]: must be a string or a whole number"),
        ("[1]", "must be an object"),
        ("[" * 100_000, "nested too deeply"),
        ("\xff", "byte 0 is not UTF-8"),
    ]
    good = '{"prompt": "x"}'
    text = "\n".join(part for line, _ in bad for part in (good, "", line))
    (tmp_path / "in.jsonl").write_bytes(text.encode("latin-1"))
    (model_folder / "model.safetensors").write_bytes(b"")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"{len(bad)} of {2 * len(bad)} lines cannot be taken" in error
    for place, (_, sentence) in enumerate(bad):
        assert f"  line {3 * place + 3}: " in error
        assert sentence in error
    assert not (tmp_path / "out.jsonl").exists()


def test_a_line_that_the_model_cannot_take_is_answered_with_the_reason(
    files: Callable[..., list[str]], tmp_path: Path, capsys: Capture
) -> None:
    lines = [{"prompt": "x"}, {"prompt": "x" * 70}, {"messages": [{"role": "wizard", "content": ""}]}, {"prompt": "y"}]
    assert main(files(lines, "--max-new-tokens", "2", "--temperature", "0")) == 1
    assert "2 of 4 lines have an error in place of a text; the first is line 2" in capsys.readouterr().err
    first, second, third, fourth = answers(tmp_path)
    assert "prompt: has 71 tokens" in second["error"]
    assert "wizard" in third["error"]
    assert first["finish_reason"] == fourth["finish_reason"] == "length"
    assert "error" not in first


def test_somebody_elses_file_is_left_alone(files: Callable[..., list[str]], tmp_path: Path, capsys: Capture) -> None:
    arguments = files([{"prompt": "x"}])
    for text in ("a shopping list", "a\nb\n", '{"line": 1}\n', "[1]\n"):
        (tmp_path / "out.jsonl").write_text(text)
        assert main(arguments) == 2
        assert "is not the output of a batch" in capsys.readouterr().err
        assert (tmp_path / "out.jsonl").read_text() == text
    source = (tmp_path / "in.jsonl").read_text()
    assert main([*arguments[:-1], str(tmp_path / "in.jsonl")]) == 2
    assert "is the input" in capsys.readouterr().err
    assert (tmp_path / "in.jsonl").read_text() == source


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--input", "a"], "--input and --output go together"),
        (["--output", "a"], "--input and --output go together"),
        (["--input", "a", "--output", "b", "--prompt", "x"], "--input and --output go together"),
        (["--input", "a", "--output", "b", "--speculate"], "--speculate: many lines are drafted for"),
        (["--input", "a", "--output", "b", "--max-running", "0"], "max_running=0: must be at least 1"),
        (["--input", "a", "--output", "b"], "a: cannot be read"),
        ([], "give a --prompt"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    model_folder: Path, options: list[str], sentence: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    assert main(["generate", str(model_folder), *options]) in (1, 2)
    assert sentence in capsys.readouterr().err
