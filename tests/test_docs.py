"""What the pages say is so: commands parse or run, examples run, links and names exist, tables agree with the code."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import typer

from abyssal import errors
from abyssal.cli.main import app, main
from abyssal.config import ModelConfig, RunConfig, load_recipe
from abyssal.config.frozen import fields_at
from abyssal.errors import ConfigError

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "abyssal"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"console", "sh", "python", "toml"}
RUN = {"inspect", "recipes", "generate", "plan"}  # cheap; the other commands are parsed, and their recipes resolved
CHEAP = {"--dry-run"}  # options with which any command is
WIDTH = "120"
#: Those of the published load balancer's example.
EXPERT_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
SERVER = "http://127.0.0.1:8000"  # in examples that are clients


@dataclass(frozen=True)
class Fence:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Example:
    """One command of a page, and the output that is shown below it."""

    fence: Fence
    command: str
    output: str

    def __str__(self) -> str:
        return f"{self.fence} {self.command}"


def fences_of(page: Path) -> Iterator[Fence]:
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if line.startswith("```") and opened is None:
            opened = number
        elif line.startswith("```"):
            assert opened is not None
            yield Fence(page, opened + 1, lines[opened][3:], "\n".join(lines[opened + 1 : number]) + "\n")
            opened = None
    assert opened is None, f"{page}:{opened}: not closed"


def examples_of(fence: Fence) -> Iterator[Example]:
    """Every line of an sh block is a command; in a console block those after `$ `, with their output below them."""
    if fence.language == "sh":
        yield from (Example(fence, line, "") for line in fence.text.splitlines())
    elif fence.language == "console":
        first, *parts = re.split(r"^\$ ", fence.text, flags=re.MULTILINE)
        assert first == "", f"{fence}: a console block begins with a command"
        for part in parts:
            command, _, output = part.partition("\n")
            yield Example(fence, command, output)


FENCES = [fence for page in PAGES for fence in fences_of(page)]
EXAMPLES = [example for fence in FENCES for example in examples_of(fence)]
HELP = [
    line.strip()
    for path in sorted((SOURCE / "cli").glob("*.py"))
    for line in re.findall(r"^        abyssal .*$", path.read_text(encoding="utf-8"), re.MULTILINE)
]
PYTHON = [fence for fence in FENCES if fence.language == "python"]
RECIPES = [fence for fence in FENCES if fence.language == "toml"]


def write_recipes(folder: Path) -> None:
    """Write every recipe of the pages under the name in its first line."""
    for fence in RECIPES:
        name = re.match(r"# (\w+\.toml)\n", fence.text)
        assert name, f"{fence}: the first line must be a comment with the file's name"
        assert not (folder / name[1]).exists(), f"{fence}: another page has a recipe of that name"
        (folder / name[1]).write_text(fence.text)


@pytest.fixture
def tiny_config(tiny_config: ModelConfig) -> ModelConfig:
    """The shape of the other tests, but with rows of whole 16 bytes, which transformers' experts want."""
    return tiny_config.model_copy(update={"moe_intermediate_size": 12})


@pytest.fixture
def place(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages take for granted: their recipes, the run of the demo, and expert loads."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    model_folder.rename(tmp_path / "runs" / "demo" / "model")
    write_recipes(tmp_path)
    (tmp_path / "loads.json").write_text(json.dumps(EXPERT_LOADS))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import os"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", WIDTH)
    return tmp_path


# Commands


def check(example: Example) -> None:
    """Raise where the command of a page is not one, or does not print what stands below it."""
    program, *arguments = shlex.split(example.command)
    if program == "make":
        (target,) = [word for word in arguments if "=" not in word]
        assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {target}"
    elif program == "abyssal":
        redirected = arguments.index("<") if "<" in arguments else None
        check_abyssal(arguments[:redirected], example.output)
    else:
        assert example.command == ". .venv/bin/activate", f"{program}: say here how to check it"


def check_abyssal(arguments: list[str], output: str) -> None:
    if arguments[0].startswith("-") or arguments[0] in RUN or CHEAP & set(arguments):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(arguments) == 0
        if output:
            lines = [line.rstrip() for line in printed.getvalue().splitlines()]
            assert matches("\n".join(lines) + "\n", output), f"printed was:\n{printed.getvalue()}"
        return
    assert output == "", f"{arguments[0]} is not run here, so nobody compares its output"
    command = typer.main.get_command(app)
    with command.make_context("abyssal", list(arguments)) as context:
        name, subcommand, rest = command.resolve_command(context, list(arguments))
        inner = subcommand.make_context(name, list(rest), parent=context)
        if isinstance(subcommand, type(command)):  # a group such as `abyssal bench`
            name, subcommand, rest = subcommand.resolve_command(inner, list(rest))
            inner = subcommand.make_context(name, rest, parent=inner)
        given = inner.params
    if "recipe" in given or name == "demo":
        load_recipe(given.get("recipe", "demo"), given["overrides"] or [])


def matches(printed: str, shown: str) -> bool:
    """Whether `shown` is what was printed; a line `...` stands for any lines."""
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in shown.splitlines())
    return re.fullmatch(pattern, printed) is not None


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert {str(fence) for fence in FENCES if fence.language not in LANGUAGES} == set()
    assert EXAMPLES
    assert PYTHON
    assert RECIPES


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_command_is_one_and_prints_what_is_shown(example: Example, place: Path) -> None:
    check(example)


@pytest.mark.parametrize("command", [line for line in HELP if "generate" not in line])
@pytest.mark.slow
def test_example_in_the_help_is_a_command(command: str, place: Path) -> None:
    check(Example(FENCES[0], command, ""))


def test_help_of_commands_with_arguments_has_examples() -> None:
    assert {line.split()[1] for line in HELP} == {
        *("demo", "train", "generate", "chat", "serve", "report", "prepare", "inspect", "convert", "plan", "machine"),
        "bench",
    }


@pytest.mark.parametrize(
    ("command", "output", "fault"),
    [
        ("abyssal trane demo", "", typer.TyperException),
        ("abyssal bench serve http://127.0.0.1:8000 --rat 2", "", typer.TyperException),
        ("abyssal train demo --overwrite", "", typer.TyperException),
        ("abyssal train demo --set train.token=3", "", ConfigError),
        ("abyssal prepare gone.toml --out x", "", ConfigError),
        ("abyssal train demo", "step 1\n", AssertionError),
        ("abyssal train demo --dry-run", "step 1\n", AssertionError),
        ("abyssal train v3_671b --dry-run --world-size 2000", "", AssertionError),
        ("abyssal inspect nothing", "", AssertionError),
        ("abyssal inspect demo", "...\nbatch size  33\n...\n", AssertionError),
        ("abyssal generate runs/demo/model --prompt x --top-p 2", "", AssertionError),
        ("make demmo", "", AssertionError),
        ("pip install abyssal", "", AssertionError),
    ],
)
def test_wrong_command_or_output_is_found(command: str, output: str, fault: type[Exception], place: Path) -> None:
    with pytest.raises(fault):
        check(Example(FENCES[0], command, output))


@pytest.mark.parametrize("fence", PYTHON, ids=str)
def test_python_example_runs(fence: Fence, place: Path, request: pytest.FixtureRequest) -> None:
    if "transformers" in fence.text:
        pytest.importorskip("transformers", reason="the example opens the model with transformers")
    if "runs/demo/data" in fence.text:
        prepare_data(request.getfixturevalue("small_run"), place / "runs" / "demo" / "data")
    text = fence.text
    with contextlib.ExitStack() as until_done:
        if SERVER in text:
            text = text.replace(SERVER, until_done.enter_context(serving(place / "runs" / "demo" / "model")))
        exec(compile(text, str(fence), "exec"), {"__name__": "example"})


@contextlib.contextmanager
def serving(model: Path) -> Iterator[str]:
    """Serve a model directory in a thread and give its address."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    pytest.importorskip("openai", reason="the example is a client of OpenAI's")
    from abyssal.engine import load_model
    from abyssal.server import ServerOptions, create_app
    from abyssal.server.process import listen
    from abyssal.text.chat_template import ChatTemplate

    options = ServerOptions(model_name="demo")
    app = create_app(load_model(model), template=ChatTemplate.load(model), options=options)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def prepare_data(run: RunConfig, folder: Path) -> None:
    from abyssal.data.prepare import prepare

    prepare(run.data, run.tokenizer, run.model.vocab_size, folder, seed=0)


# Links and names


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Return the relative links in `text` whose file, or heading in that file, is not there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if link.startswith(("http:", "https:")):
            continue
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_broken_link_is_found() -> None:
    page = ROOT / "docs" / "data.md"
    text = "[a](training.md#bits-per-byte) [b](training.md#bits) [c](gone.md) [d](https://example.org) [e](#splits)"
    assert broken_links(page, text) == ["training.md#bits", "gone.md"]


def definitions(path: Path) -> set[str]:
    """Return the functions, classes and methods of a file, methods as `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


#: A link to a source file, and the first name in backticks behind it.
PLACE = re.compile(r"\]\((?:\.\./)?(src/abyssal/[\w/]+\.py)\)[)\s]*`([\w.]+)`")


def unknown_places(text: str) -> list[str]:
    return [f"{path} {name}" for path, name in PLACE.findall(text) if name not in definitions(ROOT / path)]


def test_tour_names_functions_that_stand_in_the_files_it_links() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    assert len(PLACE.findall(text)) > 30
    assert unknown_places(text) == []


def test_unknown_function_is_found() -> None:
    text = "[a](../src/abyssal/train/loop.py)\n`start`, ([b](../src/abyssal/train/step.py) `train_stop`)"
    assert unknown_places(text) == ["src/abyssal/train/step.py train_stop"]


def test_tour_gives_the_sizes_of_the_recipes() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \w \| `([\w.]+)`.* \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 12
    for field, *sizes in rows:
        section, name = field.split(".")
        recipes = [load_recipe("demo"), load_recipe("v3_671b")]
        assert [int(size) for size in sizes] == [getattr(getattr(run, section), name) for run in recipes], field


def test_readme_lists_every_folder_on_its_floor() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    floors = {
        name: floor
        for floor, cell in re.findall(r"^\| (\d) \| ([^|(]+)", contributing, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cell)
    }
    assert {name: floor for floor, name in rows} == floors
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert set(floors) == packages | {"errors"}


# StrictFields, metrics, sentences


def sections() -> dict[str, Any]:
    return {name: field.annotation for name, field in RunConfig.model_fields.items()}


def unknown_fields(text: str) -> list[str]:
    """Return what reads like a field of a recipe, in backticks or behind --set, and is none."""
    spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"--set '?([\w.]+)", text)
    names = {name for span in spans for name in re.findall(r"^[a-z_]+(?:\.[a-z_]+)+(?=$|[=\[])", span)}
    unknown = []
    for name in sorted(names):
        section, *rest = name.split(".")
        if section not in sections() or rest in (["json"], ["safetensors"]):  # names of files
            continue
        for depth, part in enumerate(rest):
            if part not in fields_at(RunConfig, (section, *rest[:depth])):
                unknown.append(name)
                break
    return unknown


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/data.md", "docs/tour.md"])
def test_fields_that_a_page_names_exist(page: str) -> None:
    assert unknown_fields((ROOT / page).read_text(encoding="utf-8")) == []


def test_unknown_field_is_found() -> None:
    text = "`train.tokens` `train.token` `schedule.batch_size.start` `schedule.batch_size.end` `--set model.x=1`"
    assert unknown_fields(text) == ["model.x", "schedule.batch_size.end", "train.token"]


def test_every_field_of_a_recipe_is_in_the_table_with_its_default() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \|([^|]*)\| ", text.partition("### Every field")[2], re.MULTILINE))
    expected: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is None:
            expected[name] = field
        elif name != "model":
            expected |= {f"{name}.{key}": value for key, value in inner.items()}
    assert set(expected) - set(rows) == set()
    for name, field in expected.items():
        written = rows[name].strip()
        if isinstance(field.default, bool | str) and field.default:
            assert written == f"`{field.default}`", name
        elif isinstance(field.default, bool):
            assert written == "`false`", name
        elif isinstance(field.default, int | float):
            assert float(written.replace(",", "")) == field.default, name
        elif field.is_required():
            assert written in ("", "the file's"), name


def test_every_sampling_parameter_is_in_the_table_with_its_default() -> None:
    from abyssal.engine import SamplingParameters

    text = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    table = text.partition("## What a request can ask")[2].partition("## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\| ", table, re.MULTILINE))
    assert set(rows) == {field.name for field in fields(SamplingParameters)}
    for field in fields(SamplingParameters):
        if isinstance(field.default, int | float):
            assert float(rows[field.name]) == field.default, field.name


def test_every_field_of_a_request_is_in_the_table() -> None:
    from abyssal.server.protocol import ChatCompletionRequest, CompletionRequest

    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    table = text.partition("## Fields of a request")[2].partition("`usage` counts")[0]
    cells = re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) == len(set(names))
    assert set(names) == {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}


def test_every_field_of_a_line_of_a_batch_is_in_the_table() -> None:
    from abyssal.engine.batch_input import FIELDS

    text = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE)
    assert sorted(name for cell in cells for name in re.findall(r"`(\w+)`", cell)) == sorted(FIELDS)


def test_every_metric_of_the_server_is_named() -> None:
    from abyssal.engine import EngineStatistics
    from abyssal.server.metrics import ServerMetrics

    numbers = {field.name: 1 for field in fields(EngineStatistics)} | {"drafted": (2,), "accepted": (1,)}
    metrics = ServerMetrics("any", lambda: EngineStatistics(**numbers))
    metrics.count_response("/", 200)
    metrics.count_finished("stop")
    families = dict(re.findall(r"^# TYPE (\S+) (\w+)$", metrics.text().decode(), re.MULTILINE))
    served = {name for name in families if not name.endswith("_created")}
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`((?:vllm|abyssal):\w+)`", text)) == served


def test_every_field_of_the_metrics_is_in_the_table() -> None:
    from abyssal.train.progress import Progress
    from abyssal.train.step import StepResult

    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    described = text.partition("A line of `metrics.jsonl`")[2].partition("## Resume")[0]
    reporter = (SOURCE / "train" / "reporter.py").read_text(encoding="utf-8")
    names = {field.name for cls in (Progress, StepResult) for field in fields(cls)}
    names |= set(re.findall(r'"(tokens_per_s|mfu|validation_\w+|refused\w*|rolled_back_from|skipped)":', reporter))
    names |= {"refused_loss", "refused_gradient_norm"}
    assert set(re.findall(r"`(\w+)`", described)) - {"data"} >= names
    assert set(re.findall(r"`(\w+)`", described)) - names == set()


VALUE = "\0"  # stands for a value in a message


def messages(code: str) -> Iterator[tuple[str, str]]:
    """Yield each string of a module that is no docstring, f-strings whole, and the exception raised with it."""
    tree = ast.parse(code)
    raised = {
        id(part): ast.unparse(node.exc.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        for part in ast.walk(node.exc)
    }
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    inside |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values]
            yield "".join(parts), raised.get(id(node), "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value, raised.get(id(node), "")


def says(message: str, sentence: str) -> bool:
    """Whether a message has a sentence of the table, in whole words."""
    return re.search(rf"(?<!\w){re.escape(sentence)}(?!\w)", message) is not None


def test_sentences_of_the_table_of_faults_are_messages_with_these_exit_codes() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| ([12, ]+) \| ", text.partition("## When something is wrong")[2], re.MULTILINE)
    sentences = [(sentence, codes) for cell, codes in rows for sentence in re.findall(r"`([^`]+)`", cell)]
    assert len(sentences) > 40
    all_messages = [m for path in SOURCE.rglob("*.py") for m in messages(path.read_text(encoding="utf-8"))]
    faults = []
    for sentence, codes in sentences:
        exceptions = [raised for message, raised in all_messages if says(message, sentence)]
        exits = {str(getattr(errors, name).exit_code) for name in exceptions if hasattr(errors, name)}
        if len(sentence.split()) < 2 or not exceptions or not exits <= set(codes.split(", ")):
            faults.append((sentence, codes, exits or exceptions))
    assert faults == []


def test_messages_are_read_without_docstrings_and_sentences_in_whole_words() -> None:
    code = 'def f(x):\n    "no such run"\n    raise UsageError(f"{x}: no such " f"folder of a run{x}")\ny = "else"'
    assert list(messages(code)) == [("else", ""), (f"{VALUE}: no such folder of a run{VALUE}", "UsageError")]
    assert says("a: no such folder; go", "no such folder")
    assert not says("a: no such folder; go", "no such fold")
    assert not says("a: no such folder; go", "o such folder")
