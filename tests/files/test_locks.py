"""Locks that the system drops when their holder ends."""

import pytest

from abyssal.files.locks import lock, locked


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_has_one_holder_at_a_time(tmp_path, kind):
    path = tmp_path / "x"
    path.touch() if kind == "file" else path.mkdir()
    with locked(path, needed=True), pytest.raises(BlockingIOError), locked(path):
        raise AssertionError("held twice")
    with locked(path, needed=True):
        pass


def test_an_open_file_is_locked_until_it_is_closed(tmp_path):
    path = tmp_path / "x"
    with path.open("wb") as file:
        lock(file.fileno(), needed=True)
        with pytest.raises(BlockingIOError), locked(path):
            raise AssertionError("held twice")
    with locked(path, needed=True):
        pass
