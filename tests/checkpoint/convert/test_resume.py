"""Interrupted at any moment and begun again, a conversion ends with the bytes of an undisturbed one."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from abyssal.checkpoint.convert import Conversion, ConversionProgress, convert_directory
from abyssal.checkpoint.convert.run import unfinished_folder
from abyssal.errors import ModelDirectoryError

pytestmark = pytest.mark.slow

Build = Callable[..., Path]
BF16 = Conversion("bf16", max_shard_bytes=200_000)

#: What puts data or names on the disk, as attributes of `os`.
CALLS = ("write", "fsync", "replace", "rename", "unlink")
#: Converts, and ends the process without a chance to clean up at the n-th of these calls.
KILLED = """
import os, signal, sys
from pathlib import Path
from abyssal.checkpoint.convert import Conversion, convert_directory

source, target, last, *names = sys.argv[1:]
calls = 0

def counted(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for name in names:
    setattr(os, name, counted(getattr(os, name)))
convert_directory(Path(source), Path(target), Conversion("bf16", max_shard_bytes=200_000))
"""

#: Converts with two processes, tells theirs ids, and ends itself when the first bytes are written.
ORPHANING = """
import multiprocessing, os, signal, sys
from pathlib import Path
from abyssal.checkpoint.convert import Conversion, convert_directory

def watch(progress):
    if multiprocessing.active_children():
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    convert_directory(Path(sys.argv[1]), Path(sys.argv[2]), Conversion("bf16", 200_000), workers=2, on_progress=watch)
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_killed_at_drawn_moments_it_goes_on_to_the_same_bytes(
    quantised: Build, oracle: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantised(seed=random.randrange(2**31))
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        for name in CALLS:
            patched.setattr(os, name, counted(getattr(os, name)))
        convert_directory(source, tmp_path / "undisturbed", BF16)
    expected = oracle.sums(tmp_path / "undisturbed")
    moments = [random.randint(1, calls) for _ in range(2)]
    for moment in moments:  # the second time it is killed while it goes on from the first
        killed = run(KILLED, source, tmp_path / "out", moment, *CALLS)
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
        if (tmp_path / "out").exists():
            break  # killed after the rename, or fewer calls were left than drawn
    else:
        convert_directory(source, tmp_path / "out", BF16)
    assert oracle.sums(tmp_path / "out") == expected, f"killed at {moments} of {calls} calls"


@pytest.mark.parametrize("finished", [1, 3])
def test_what_is_finished_is_not_written_again(
    finished: int, quantised: Build, oracle: ModuleType, tmp_path: Path
) -> None:
    source = quantised(seed=random.randrange(2**31))
    convert_directory(source, tmp_path / "undisturbed", BF16)

    def interrupt(progress: ConversionProgress) -> None:
        if progress.files == finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_directory(source, tmp_path / "out", BF16, on_progress=interrupt)
    assert not (tmp_path / "out").exists()
    parts = unfinished_folder(tmp_path / "out") / "model"
    names = {path.name for path in parts.iterdir()}
    assert len(names) == finished
    stamps = {name: (parts / name).stat().st_mtime_ns for name in names}
    (parts / "model-00002-of-00009.safetensors.77.part").write_bytes(b"half")
    told: list[ConversionProgress] = []
    outcome = convert_directory(source, tmp_path / "out", BF16, on_progress=told.append)
    assert oracle.sums(tmp_path / "out") == oracle.sums(tmp_path / "undisturbed")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in names} == stamps
    assert outcome.kept_bytes == sum((tmp_path / "out" / name).stat().st_size for name in names)
    assert told[0].written_bytes == told[0].kept_bytes == outcome.kept_bytes
    assert not unfinished_folder(tmp_path / "out").exists()


def test_a_finished_file_that_lost_its_end_is_written_again(
    quantised: Build, oracle: ModuleType, tmp_path: Path
) -> None:
    source = quantised()
    convert_directory(source, tmp_path / "undisturbed", BF16)
    interrupt_after(source, tmp_path / "out", BF16, files=2)
    first = min((unfinished_folder(tmp_path / "out") / "model").iterdir())
    first.write_bytes(first.read_bytes()[:-1])
    convert_directory(source, tmp_path / "out", BF16)
    assert oracle.sums(tmp_path / "out") == oracle.sums(tmp_path / "undisturbed")


def interrupt_after(source: Path, target: Path, conversion: Conversion, *, files: int) -> None:
    def interrupt(progress: ConversionProgress) -> None:
        if progress.files == files:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_directory(source, target, conversion, on_progress=interrupt)


@pytest.mark.parametrize("change", ["options", "weights", "a copied file"])
def test_parts_of_another_conversion_are_not_mixed_in(change: str, quantised: Build, tmp_path: Path) -> None:
    source = quantised()
    interrupt_after(source, tmp_path / "out", BF16, files=1)
    conversion = Conversion("fp32", max_shard_bytes=200_000) if change == "options" else BF16
    touched = {"weights": "model-00001-of-00002.safetensors", "a copied file": "tokenizer.json"}.get(change)
    if touched:
        os.utime(source / touched, ns=(1, 1))
    with pytest.raises(ModelDirectoryError, match=r"\.out\.converting: holds an unfinished conversion with other opt"):
        convert_directory(source, tmp_path / "out", conversion)
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_a_conversion_that_finished_no_file(quantised: Build, tmp_path: Path) -> None:
    source = quantised()
    interrupt_after(source, tmp_path / "out", BF16, files=0)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_two_conversions_to_one_place_do_not_meet(quantised: Build, tmp_path: Path) -> None:
    source = quantised()
    met = []

    def begin_another(progress: ConversionProgress) -> None:
        if not met:
            met.append(1)
            with pytest.raises(ModelDirectoryError, match="out: another process is converting to it"):
                convert_directory(source, tmp_path / "out", BF16)

    convert_directory(source, tmp_path / "out", BF16, on_progress=begin_another)
    assert met


def test_a_killed_process_is_told_and_what_is_finished_stays(
    quantised: Build, oracle: ModuleType, tmp_path: Path
) -> None:
    source = quantised()

    def kill(progress: ConversionProgress) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(ModelDirectoryError, match=r"workers=2: one of the processes was killed, .* try fewer"):
        convert_directory(source, tmp_path / "out", BF16, workers=2, on_progress=kill)
    convert_directory(source, tmp_path / "out", BF16)
    convert_directory(source, tmp_path / "again", BF16)
    assert oracle.sums(tmp_path / "out") == oracle.sums(tmp_path / "again")


def test_processes_end_when_the_first_one_is_killed(quantised: Build, tmp_path: Path) -> None:
    (tmp_path / "orphaning.py").write_text(ORPHANING)
    words = [sys.executable, tmp_path / "orphaning.py", quantised(), tmp_path / "out"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    children = [int(word) for word in result.stdout.split()]
    assert children
    while any(alive(child) for child in children):  # the suite's limit ends this, if they do not
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
