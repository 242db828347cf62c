"""docs/paper-map.md: every equation of the report has a place in the code, and the page says where."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def paper_map():
    """The generator, which is a script and no part of the package."""
    spec = importlib.util.spec_from_file_location("paper_map", ROOT / "tools" / "paper_map.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper_map"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["paper_map"]


@pytest.fixture
def tree(tmp_path):
    """A small made-up package that marks every equation."""
    (tmp_path / "src" / "model").mkdir(parents=True)
    (tmp_path / "src" / "model" / "attention.py").write_text(
        '''"""Attention. Paper: eq. 10."""


class Attention:
    """Queries meet keys.

    Paper: §2.1.1 eq. 1-9 and
    eq. 11.
    """

    @property
    def scale(self):
        def inner():
            return 2  # eq. 12, 13
        return inner()


async def gate():  # eq. 14
    text = "eq. 15 in a string is no mark"
    return text
''',
        encoding="utf-8",
    )
    (tmp_path / "src" / "train").mkdir()
    (tmp_path / "src" / "train" / "loss.py").write_text(
        "def loss():\n    return 1  # eq. 16–20, and eq. 15\n\n\nMTP = 0.3  # eq. 21, 22, 23 and 24 and 25\n",
        encoding="utf-8",
    )
    (tmp_path / "src" / "config").mkdir()
    (tmp_path / "src" / "config" / "run.py").write_text(
        "ALPHA = 1e-4  # eq. 99 is only referred to\n", encoding="utf-8"
    )
    (tmp_path / "docs").mkdir()
    return tmp_path


def run(paper_map, tree, *arguments):
    return paper_map.main(["--source", str(tree / "src"), "--page", str(tree / "docs" / "map.md"), *arguments])


def test_the_page_is_that_of_the_code_and_every_equation_has_a_place(paper_map, capsys):
    assert paper_map.main(["--check"]) == 0, capsys.readouterr().err


def test_the_list_has_the_25_equations_of_model_and_objective(paper_map):
    assert list(paper_map.EQUATIONS) == list(range(1, 26))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("eq. 1", [1]),
        ("# eq. 1, 3", [1, 3]),
        ("Paper: §2.1.2 eq. 13-16.", [13, 14, 15, 16]),
        ("eq. 13–15, 20 and 22-23", [13, 14, 15, 20, 22, 23]),
        ("eq. 4 and eq. 6, which are 2", [4, 6]),
        ("eq.7", [7]),
        ("eq 8, seq. 9, eq. (10)", []),
    ],
)
def test_marks_name_single_equations_lists_and_ranges(paper_map, text, numbers):
    assert paper_map.numbers_in(text) == numbers


def test_places_are_files_and_dotted_names(paper_map, tree):
    places = paper_map.find_places(tree / "src")
    assert places[10] == {"model/attention.py": []}
    assert places[1] == places[9] == places[11] == {"model/attention.py": ["Attention"]}
    assert places[12] == places[13] == {"model/attention.py": ["Attention.scale.inner"]}
    assert places[14] == {"model/attention.py": ["gate"]}
    assert places[15] == places[20] == {"train/loss.py": ["loss"]}
    assert places[25] == {"train/loss.py": []}


def test_the_page_links_from_its_own_folder(paper_map, tree):
    assert run(paper_map, tree) == 0
    page = (tree / "docs" / "map.md").read_text(encoding="utf-8")
    assert "[model/attention.py](../src/model/attention.py) `Attention.scale.inner` |" in page
    assert page.count("\n| ") == 1 + 25
    assert run(paper_map, tree, "--check") == 0


def test_a_line_that_moves_leaves_the_page_fresh(paper_map, tree):
    run(paper_map, tree)
    path = tree / "src" / "train" / "loss.py"
    path.write_text("# a new first line\n\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert run(paper_map, tree, "--check") == 0


def test_a_renamed_function_makes_the_page_stale(paper_map, tree, capsys):
    run(paper_map, tree)
    path = tree / "src" / "train" / "loss.py"
    path.write_text(path.read_text(encoding="utf-8").replace("def loss", "def objective"), encoding="utf-8")
    assert run(paper_map, tree, "--check") == 1
    assert "stale" in capsys.readouterr().err


def test_a_missing_page_is_stale(paper_map, tree):
    assert run(paper_map, tree, "--check") == 1


def test_an_equation_without_a_place_is_named(paper_map, tree, capsys):
    path = tree / "src" / "train" / "loss.py"
    path.write_text("def loss():\n    return 1  # eq. 16, 18-24\n", encoding="utf-8")
    run(paper_map, tree)
    assert run(paper_map, tree, "--check") == 1
    assert "no mark in the code for eq. 15, 17, 25" in capsys.readouterr().err


def test_a_mark_of_an_unknown_equation_is_refused_with_its_place(paper_map, tree, capsys):
    path = tree / "src" / "train" / "loss.py"
    path.write_text("def loss():\n    return 1  # eq. 31\n", encoding="utf-8")
    assert run(paper_map, tree) == 1
    assert "train/loss.py: loss: eq. 31: the list ends at 25" in capsys.readouterr().err
