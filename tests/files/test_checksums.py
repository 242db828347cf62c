"""Checksums from the disk, and of what is being written."""

import hashlib

from abyssal.files import checksums
from abyssal.files.checksums import HashingWriter, sha256


def test_the_checksum_of_a_file_and_how_far_it_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "CHUNK_BYTES", 10)
    path, content, counts = tmp_path / "x", bytes(range(37)), []
    path.write_bytes(content)
    assert sha256(path, counts.append) == hashlib.sha256(content).hexdigest()
    assert sum(counts) == 37
    assert len(counts) == 4


class Slow:
    """A raw file that takes three bytes at a time."""

    def __init__(self):
        self.content = b""

    def write(self, data):
        self.content += bytes(data[:3])
        return len(data[:3])


def test_a_writer_counts_and_hashes_all_that_it_writes():
    file = Slow()
    writer = HashingWriter(file)
    assert writer.write(b"abyssal") == 7
    assert writer.write(memoryview(b" deep")) == 5
    assert file.content == b"abyssal deep"
    assert writer.nbytes == 12
    assert writer.sha256 == hashlib.sha256(b"abyssal deep").hexdigest()
