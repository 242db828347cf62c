"""A folder or file appears whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from abyssal.files.atomic import atomic_directory, atomic_file, remove_directory, remove_stale, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Abrupt(BaseException):
    """As DCP's CheckpointException: not an Exception."""


def test_a_folder_appears_only_when_the_body_has_ended(tmp_path):
    target = tmp_path / "new" / "state"
    with atomic_directory(target) as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("x")
        assert not target.exists()
        assert staging.parent == target.parent
    assert (target / "inner" / "file").read_text() == "x"
    assert names(target.parent) == ["state"]


@pytest.mark.parametrize("fault", [ValueError, OSError, KeyboardInterrupt, Abrupt])
@pytest.mark.parametrize("replace", [False, True])
def test_any_exception_leaves_nothing_behind(tmp_path, fault, replace):
    if replace:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "old").write_text("old")
    before = names(tmp_path)
    with pytest.raises(fault), atomic_directory(tmp_path / "state", replace=replace) as staging:  # noqa: PT012
        (staging / "file").write_text("x")
        raise fault
    assert names(tmp_path) == before
    if replace:
        assert names(tmp_path / "state") == ["old"]


def test_an_existing_target_is_refused_and_kept(tmp_path):
    target = tmp_path / "state"
    target.mkdir()
    with pytest.raises(FileExistsError, match="state"), atomic_directory(target):
        raise AssertionError("the body must not run")
    assert names(tmp_path) == ["state"]


def test_replacing_swaps_the_whole_folder(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic_directory(target, replace=True) as staging:
        (staging / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(tmp_path) == ["model"]
    assert names(target) == ["new"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def failing(self, to):
        if ".writing-" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space"), atomic_directory(target, replace=True):
        pass
    assert names(tmp_path) == ["model"]
    assert names(target) == ["old"]


def test_files_are_flushed_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync

    def recording(descriptor):
        flushed.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), (tmp_path / "state").exists()))
        real(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to see which file a descriptor is of")
    monkeypatch.setattr(os, "fsync", recording)
    with atomic_directory(tmp_path / "state") as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("x")
        aside = str(staging.resolve())
    root = str(tmp_path.resolve())
    assert flushed == [(f"{aside}/inner/file", False), (f"{aside}/inner", False), (aside, False), (root, True)]


@pytest.mark.parametrize("kind", ["atomic_directory", "atomic_file"])
def test_what_a_killed_run_left_is_removed_and_what_is_being_written_stays(tmp_path, kind):
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from abyssal.files.atomic import {kind}
        with {kind}(Path(sys.argv[1])) as staging:
            (staging / "half" if staging.is_dir() else staging).write_text("x")
            print("ready", flush=True)
            time.sleep(600)
    """)
    command = [sys.executable, "-c", script, str(tmp_path / "state")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        left = names(tmp_path)
        assert len(left) == 1
        remove_stale(tmp_path)
        assert names(tmp_path) == left, "what is under way was taken for left behind"
        process.send_signal(signal.SIGKILL)
    remove_stale(tmp_path, "other")
    assert names(tmp_path) == left, "what another target left was removed"
    remove_stale(tmp_path, "state")
    assert names(tmp_path) == []


def test_a_replacement_that_was_cut_short_is_undone_or_finished(tmp_path):
    (tmp_path / ".a.replaced-12345678").mkdir()
    (tmp_path / ".b.replaced-12345678").mkdir()
    (tmp_path / "b").mkdir()
    remove_stale(tmp_path)
    assert names(tmp_path) == ["a", "b"]


def test_remove_directory_removes_all(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "file").write_text("x")
    remove_directory(tmp_path / "state")
    assert names(tmp_path) == []


def test_a_text_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text(path, "first")
    write_text(path, "second ü")
    assert path.read_text(encoding="utf-8") == "second ü"

    def failing(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "third")
    assert path.read_text(encoding="utf-8") == "second ü"
    assert names(tmp_path) == ["file.json"]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_file_appears_only_when_the_body_has_ended(tmp_path, fault):
    target = tmp_path / "x.bin"
    with atomic_file(target) as staging:
        staging.write_bytes(b"new")
        assert not target.exists()
        assert staging.parent == target.parent
    assert target.read_bytes() == b"new"
    with pytest.raises(fault), atomic_file(target) as staging:  # noqa: PT012
        staging.write_bytes(b"half")
        raise fault
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["x.bin"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_leaves_what_was_there(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"old")
    with pytest.raises(OSError, match="No space"), atomic_file(tmp_path / "x.bin") as staging:  # noqa: PT012
        staging.unlink()
        staging.symlink_to("/dev/full")
        staging.write_bytes(b"new")
    assert (tmp_path / "x.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["x.bin"]
