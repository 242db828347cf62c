"""The command line, called in this process."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from abyssal.cli.main import main


class Result(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    def command(self, opening: str) -> list[str]:
        """Return the arguments of the `abyssal` command that a line beginning with `opening` proposes."""
        lines = (self.out + self.err).splitlines()
        (line,) = [line.strip().removeprefix(opening) for line in lines if line.strip().startswith(opening)]
        name, *arguments = shlex.split(line)
        assert name == "abyssal"
        return arguments


Call = Callable[..., Result]


@pytest.fixture
def abyssal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run a command in the folder of the test, on a wide terminal, without the measurements that only cost time."""
    from abyssal.train import loop

    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setattr("sys.argv", ["abyssal"])
    monkeypatch.setattr(loop, "peak_flops", lambda config, device: 1e12)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return call
