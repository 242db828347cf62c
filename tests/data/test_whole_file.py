from pathlib import Path

import pytest

from abyssal.data.whole_file import PARTIAL, whole_file
from abyssal.errors import DataError


def test_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_fault_while_writing_leaves_what_was_there(tmp_path: Path, fault: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(fault), whole_file(path) as file:  # noqa: PT012
        file.write(b"new")
        raise fault
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.with_name(f"a{PARTIAL}").symlink_to("/dev/full")
    sentence = r"a: no space left on this disk; free some, or choose another folder$"
    with pytest.raises(DataError, match=sentence), whole_file(path) as file:
        file.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    sentence = r"absent/a: cannot be written \(No such file or directory\)"
    with pytest.raises(DataError, match=sentence), whole_file(tmp_path / "absent" / "a"):
        pass
