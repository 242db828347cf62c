"""Commands that the program proposes can be pasted into the shell that called it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from abyssal.cli.program import program


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with spaces in its name that holds a program `abyssal`."""
    path = tmp_path / "my bin" / "abyssal"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_program_on_the_path_is_its_name(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(installed.parent))
    monkeypatch.setattr(sys, "argv", [str(installed), "demo"])
    assert program() == "abyssal"


def test_program_off_the_path_is_called_as_it_was(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(installed.parent.parent)
    monkeypatch.setattr(sys, "argv", ["my bin/abyssal", "demo"])
    assert program() == "'my bin/abyssal'"


def test_another_program_on_the_path_is_not_taken_for_this_one(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "abyssal"
    other.write_text("")
    monkeypatch.setenv("PATH", str(installed.parent))
    monkeypatch.setattr(sys, "argv", [str(other)])
    assert program() == shlex.quote(str(other))


def test_module_is_called_by_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/site-packages/abyssal/__main__.py", "demo"])
    assert program() == f"{shlex.quote(sys.executable)} -m abyssal"
