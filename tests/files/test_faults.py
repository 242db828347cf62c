"""What the system refuses becomes a sentence."""

import errno
import os

import pytest

from abyssal.errors import DataError
from abyssal.files.faults import check_free_space, os_faults


def test_too_little_free_space_is_told_in_gib(tmp_path):
    check_free_space(tmp_path / "not" / "yet", 0, DataError)
    with pytest.raises(DataError, match=r"state: needs 1048576\.00 GiB, but \d+\.\d\d GiB are free"):
        check_free_space(tmp_path / "state", 2**50, DataError)


def test_a_fault_of_the_disk_names_path_reason_and_remedy(tmp_path):
    with pytest.raises(DataError) as caught, os_faults(DataError, tmp_path / "x", "write this"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "y.bin")
    assert str(caught.value) == (
        f"{tmp_path / 'x'}: cannot write this (No space left on device: y.bin; "
        "free some space there, or choose another disk)"
    )


def test_a_file_in_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    path = tmp_path / "absent" / "a"
    with (
        pytest.raises(DataError, match=r"absent/a: cannot write it \(No such file or directory: .*absent"),
        os_faults(DataError, path, "write it"),
    ):
        path.write_text("x")
