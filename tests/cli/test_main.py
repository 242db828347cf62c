"""The program's exit codes and error sentences."""

import os
import signal
import subprocess
import sys

import pytest
import typer

from abyssal import __version__
from abyssal.cli import main as program
from abyssal.errors import AbyssalError, DataError, UsageError


@pytest.fixture
def run(capfd):
    """Run the command line in this process: exit code, stdout, stderr."""

    def call(*arguments):
        code = program.main(arguments)
        return code, *capfd.readouterr()

    return call


def raising(fault):
    """A command line whose one command raises `fault`."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def only():
        raise fault

    return app


def test_version_is_printed(run):
    assert run("--version") == (0, f"abyssal {__version__}\n", "")


def test_no_argument_prints_the_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "Usage: abyssal" in out
    assert "inspect" in out


@pytest.mark.parametrize(
    ("arguments", "sentence", "see"),
    [
        (["inspct"], "error: No such command 'inspct'. Did you mean 'inspect'?", "see: abyssal --help"),
        (["inspect", "demo", "--jsn"], "error: No such option: --jsn", "see: abyssal inspect --help"),
        (["inspect"], "error: Missing argument 'RECIPE|MODEL_DIR'.", "see: abyssal inspect --help"),
    ],
)
def test_wrong_usage_is_a_sentence_and_exit_code_2(run, arguments, sentence, see):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert err.endswith(f"{see}\n")


@pytest.mark.parametrize(("fault", "code"), [(AbyssalError("a"), 1), (DataError("a"), 1), (UsageError("a"), 2)])
def test_a_users_fault_is_its_sentence_and_its_exit_code(run, monkeypatch, fault, code):
    monkeypatch.setattr(program, "app", raising(fault))
    assert run("--") == (code, "", "error: a\n")


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(program, "app", raising(RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        program.main(["--"])


def test_an_interruption_is_quiet_and_130(run, monkeypatch):
    monkeypatch.setattr(program, "app", raising(KeyboardInterrupt()))
    assert run("--") == (130, "", "")


def test_the_exit_code_that_a_command_asks_for_is_kept(run, monkeypatch):
    monkeypatch.setattr(program, "app", raising(typer.Exit(7)))
    assert run("--") == (7, "", "")


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no pipes of this kind here")
@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "demo", "--json"], ["recipes"]], ids=" ".join)
def test_a_reader_that_leaves_early_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "abyssal", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert result.stderr == ""
    assert result.returncode == 1


def test_the_package_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "abyssal", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"abyssal {__version__}\n"
