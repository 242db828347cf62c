"""What the machine is, read from the texts that the system gives."""

import os

from abyssal.machine.describe import Machine, available_cores, describe_machine, memory_bytes, read_cpuinfo

X86 = """processor\t: 0
model name\t: Some CPU @ 2.50GHz
flags\t\t: fpu avx2 fma avx512f amx_tile amx_bf16 avx512_bf16 ht

processor\t: 1
model name\t: Another CPU
flags\t\t: fpu
"""
ARM = """processor\t: 0
Features\t: fp asimd bf16 i8mm
Model\t\t: A board
"""


def test_name_and_flags_come_from_the_first_processor():
    assert read_cpuinfo(X86) == (
        "Some CPU @ 2.50GHz",
        ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"),
    )
    assert read_cpuinfo(ARM) == ("A board", ("asimd", "bf16", "i8mm"))
    assert read_cpuinfo("") == ("", ())


def test_a_containers_limit_counts(tmp_path):
    whole = memory_bytes(tmp_path / "absent")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_bytes(tmp_path / "memory.max") == whole
    (tmp_path / "memory.max").write_text("1048576\n")
    assert memory_bytes(tmp_path / "memory.max") == 1048576


def test_this_machine_is_described():
    machine = describe_machine()
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert available_cores() == machine.cores
    assert machine.cpu
    assert machine.torch


def test_rows_say_everything():
    machine = Machine("Linux", "CPU", 2, 3 * 2**29, ("avx2",), (), "3.11.1", "2.13.0")
    assert dict(machine.rows()) == {
        "system": "Linux",
        "processor": "CPU",
        "cores": "2",
        "memory": "1.5 GiB",
        "instructions": "avx2",
        "accelerators": "none",
        "python": "3.11.1",
        "torch": "2.13.0",
    }
