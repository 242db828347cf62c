"""The page: well-formed, closed to the outside, escaped, small, and there whatever the folder holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from abyssal.errors import UsageError
from abyssal.report.page import differences, headline, render_page
from abyssal.report.run_record import read_runs

WriteRun = Callable[..., Path]
StepRecord = Callable[..., dict[str, Any]]
ATTACK = "<script>alert(1)</script>"
VOID = {"meta"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and fails where a tag is not closed or an id stands twice."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []
        ids = [value for name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def page_of(*folders: Path) -> Reader:
    page = render_page(read_runs(folders))
    page.encode("utf-8")
    reader = Reader(page)
    assert_self_contained(reader, page)
    return reader


def assert_self_contained(reader: Reader, page: str) -> None:
    """Nothing is loaded and nothing runs: no script or handler, and every address is inside the page."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith(("#", "data:image/png;base64,"))
        assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", value))
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    assert "http://" not in page
    assert ("http-equiv", "Content-Security-Policy") in reader.attributes
    assert any(name == "content" and value.startswith("default-src 'none'; ") for name, value in reader.attributes)


def test_page_of_a_run_has_every_part(write_run: WriteRun) -> None:
    reader = page_of(write_run("a", samples=[{"prompt": "def f", "completion": "(x):", "step": 12}]))
    assert reader.tags.count("svg") == 8  # no validation in these metrics, and the expert load
    for text in ("Run small", "Folder a; finished", "Learning rate", "Expert load", "MTP 1", "after 12 steps", "25.0%"):
        assert text in reader.words
    assert 'name = "small"' in reader.words
    assert "Skipped" not in reader.words


def test_page_has_text_as_text_and_axes_with_units(write_run: WriteRun) -> None:
    page = render_page(read_runs([write_run("a")]))
    for unit in ("nats a token", "norm before clipping", "tokens/s", "MaxVio", "% of the matmul peak", "layer"):
        assert re.search(f"<text [^>]*>[^<]*{unit}", page), unit
    assert re.search("<text [^>]*>tokens</text>", page)
    assert "font-face" not in page


def test_text_from_the_folder_is_escaped(write_run: WriteRun, step_record: StepRecord) -> None:
    records = [step_record(1), step_record(2, skipped=ATTACK), {**step_record(3), ATTACK: 1}]
    sample = {"prompt": f"{ATTACK}\0", "completion": f"\"'&amp;{ATTACK}\ud800"}
    folder = write_run(f"a{ATTACK.replace('/', '')}", records, samples=[sample])
    recipe = (folder / "recipe.toml").read_text().replace('"one of the tests"', f'"{ATTACK}</pre>"')
    (folder / "recipe.toml").write_text(recipe.replace('"small"', f'"{ATTACK}"'))
    other = write_run("b")
    for reader in (page_of(folder), page_of(folder, other)):
        assert "<script>alert(1)<script>" in reader.words
        assert f"{ATTACK}</pre>" in reader.words
        assert f"\"'&amp;{ATTACK}?" in reader.words
        assert f"skipped {ATTACK}" in reader.words


def test_several_runs_are_laid_over_one_another(write_run: WriteRun, step_record: StepRecord) -> None:
    longer = [step_record(step) for step in range(1, 30)]
    reader = page_of(write_run("first"), write_run("second", longer, seed=5))
    assert "2 runs: first, second" in reader.words
    assert reader.tags.count("svg") == 8 + 1 + 1  # main model and MTP apart, and the second expert load
    assert reader.tags.count("li") == 2 * 8
    labels = [value for name, value in reader.attributes if name == "aria-label"]
    assert "nats a token over tokens: first, second" in labels
    assert all(title in reader.words for title in ("Loss, main model", "Loss, MTP module 1", "Learning rate"))


def test_runs_without_a_token_count_are_compared_by_steps(write_run: WriteRun, step_record: StepRecord) -> None:
    older = [{k: v for k, v in step_record(step).items() if k != "tokens"} for step in (1, 2)]
    reader = page_of(write_run("first"), write_run("second", older))
    labels = [value for name, value in reader.attributes if name == "aria-label"]
    assert "nats a token over steps: first, second" in labels
    assert "second: Not in metrics.jsonl, so not shown: tokens." in reader.words


def test_only_what_differs_between_recipes_is_listed(write_run: WriteRun) -> None:
    first, second = write_run("first", seed=3), write_run("second", seed=4)
    runs = read_runs([first, second])
    assert [(row.field, row.values) for row in differences(runs)] == [("seed", ("3", "4"))]
    (second / "recipe.toml").write_text((second / "recipe.toml").read_text().replace("0.002", "0.004") + "[data]\nx=1")
    rows = {row.field: row.values for row in differences(read_runs([first, second]))}
    assert rows["schedule.learning_rate.segments"] == ("linear to 0.002 until 0.1", "linear to 0.004 until 0.1")
    assert rows["data.x"] == ("–", "1")


def test_headline_sums_a_run_up(write_run: WriteRun, step_record: StepRecord) -> None:
    (run,) = read_runs([write_run("a", [step_record(1), step_record(2)])])
    assert headline(run) == {
        "Steps": "2",
        "Tokens": "256 of 1.536K",
        "Training time": "4 s",
        "Tokens/s": "64",
        "MFU": "25.0%",
        "Last loss": "5.598",
        "Validation bits per byte": "–",
    }
    assert not run.finished


@pytest.mark.parametrize("number", [1, 2, 40])
def test_run_of_any_length_is_drawn(number: int, write_run: WriteRun, step_record: StepRecord) -> None:
    assert page_of(write_run("a", [step_record(step) for step in range(1, number + 1)])).tags.count("svg") == 8


def test_values_that_fit_no_logarithm_are_drawn(write_run: WriteRun, step_record: StepRecord) -> None:
    records = [step_record(step, gradient_norm=0.0, loss=-1.0, learning_rate=0) for step in (1, 2, 3)]
    assert "Gradient norm" in page_of(write_run("a", records)).words


def test_damaged_folder_gives_what_can_be_shown(write_run: WriteRun) -> None:
    folder = write_run("a", samples=["no object", {"prompt": "p", "completion": "c"}])
    (folder / "recipe.toml").write_bytes(b"name = \xff\n[")
    reader = page_of(folder)
    assert "recipe.toml is not valid TOML" in reader.words
    assert "1 of the lines of samples.jsonl could not be read." in reader.words
    assert "Run a" in reader.words
    assert reader.tags.count("svg") == 8


def test_run_without_metrics_is_a_sentence(write_run: WriteRun) -> None:
    folder = write_run("a", [])
    assert "Nothing has been measured yet, so there are no curves." in page_of(folder).words
    (folder / "metrics.jsonl").unlink()
    assert "There is no metrics.jsonl yet." in page_of(folder).words


def test_the_same_folder_gives_the_same_page(write_run: WriteRun) -> None:
    runs = read_runs([write_run("a")])
    assert render_page(runs) == render_page(runs)


def test_page_of_a_long_run_with_many_experts_stays_small(write_run: WriteRun, step_record: StepRecord) -> None:
    load = {str(layer): [(layer * 31 + expert * 17) % 50 for expert in range(64)] for layer in range(20)}
    records = [step_record(s, loss=2 + (s * 7919 % 101) / 50, gradient_norm=1 + s * 7 % 13) for s in range(1, 6000)]
    for record in records:
        record["expert_load"] = load if record["step"] % 20 == 0 else None
    assert len(render_page(read_runs([write_run("a", records)]))) < 600_000


def test_path_that_is_no_run_names_the_nearest(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("notes")
    (folder / "model").mkdir()
    (tmp_path / "empty").mkdir()
    for path, sentence in (
        (tmp_path / "note", f"no such folder of a run; nearest: {folder}"),
        (
            tmp_path,
            f"is not the folder of a run (neither recipe.toml nor metrics.jsonl is in it); runs there: {folder}",
        ),
        (folder / "model", f"is inside the folder of a run; nearest: {folder}"),
        (folder / "metrics.jsonl", f"is inside the folder of a run; nearest: {folder}"),
        (tmp_path / "empty", "is not the folder of a run (neither recipe.toml nor metrics.jsonl is in it)"),
    ):
        with pytest.raises(UsageError) as caught:
            read_runs([path])
        assert str(caught.value) == f"{path}: {sentence}"


def test_runs_of_the_same_name_are_called_by_their_paths(write_run: WriteRun, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    first, second = write_run("a"), write_run("x/a")
    assert [run.label for run in read_runs([first, second])] == [str(first), str(second)]
