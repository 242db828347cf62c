"""`import abyssal` and `abyssal --help` load little, start no thread and read no configuration."""

import json
import subprocess
import sys

import pytest

#: What the command line may load beyond the standard library; the rest waits until a command needs it.
ALLOWED = {
    "abyssal",
    "typer",  # and what it needs: click (older versions), annotated_doc, shellingham, typing_extensions
    "click",
    "annotated_doc",
    "shellingham",
    "typing_extensions",
    "rich",  # and what it needs: markdown_it, mdurl, pygments
    "markdown_it",
    "mdurl",
    "pygments",
}
HEAVY = {"torch", "numpy", "gguf", "matplotlib", "jinja2", "tokenizers", "safetensors", "transformers"}
PROGRAM = """
import json, sys, threading
before = set(sys.modules)
started = []
threading.Thread.start = lambda thread: started.append(thread.name)
sys.argv = ["abyssal", *sys.argv[1:]]
import abyssal
if sys.argv[1:]:
    from abyssal.cli.main import main
    main(sys.argv[1:])
loaded = {name for name in set(sys.modules) - before}
json.dump({"loaded": sorted(loaded), "threads": started}, sys.stderr)
"""


def load(*arguments):
    """Return the modules that a run of the program loads, and the threads it starts."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(result.stderr), result.stdout


def foreign(modules):
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"__main__"}


def test_importing_the_package_loads_nothing_but_itself():
    report, _ = load()
    assert foreign(report["loaded"]) == {"abyssal"}
    assert [name for name in report["loaded"] if name.startswith("abyssal.")] == []
    assert report["threads"] == []


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_loads_only_the_named_modules(argument):
    report, output = load(argument)
    assert "abyssal" in output
    assert foreign(report["loaded"]) <= ALLOWED
    assert report["threads"] == []
    assert own_packages(report["loaded"]) <= {"cli", "errors"}


def own_packages(modules):
    return {name.split(".")[1] for name in modules if name.startswith("abyssal.")}


def test_the_help_of_a_command_loads_none_of_what_the_command_needs():
    report, output = load("inspect", "--help")
    assert "--json" in output
    assert not foreign(report["loaded"]) & HEAVY
    assert own_packages(report["loaded"]) <= {"cli", "errors"}


def test_a_plan_needs_pydantic_and_nothing_heavier():
    report, _ = load("recipes")
    assert "pydantic" in foreign(report["loaded"])  # so the tests above can see one
    assert not foreign(report["loaded"]) & HEAVY


def test_a_schedule_is_simulated_and_drawn_with_the_standard_library_and_pydantic(tmp_path):
    report, output = load("plan", "schedule", "dualpipe", "--svg", str(tmp_path / "a.svg"))
    assert "DualPipe" in output
    assert (tmp_path / "a.svg").is_file()
    assert not foreign(report["loaded"]) & HEAVY
    assert report["threads"] == []


def test_a_plan_of_a_run_on_a_cluster_needs_no_torch():
    report, output = load("plan", "v3_671b", "--cluster", "h800:2048")
    assert "tokens/s a device" in output
    assert not foreign(report["loaded"]) & HEAVY
    assert report["threads"] == []


def test_a_report_needs_matplotlib_and_no_torch(tmp_path):
    import matplotlib.font_manager  # noqa: F401 # its first import on a machine takes long, says so, and starts a timer

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 5.5}\n')
    report, _ = load("report", str(tmp_path))
    assert (tmp_path / "report.html").is_file()
    assert foreign(report["loaded"]) & HEAVY == {"matplotlib", "jinja2", "numpy"}
    assert report["threads"] == []
