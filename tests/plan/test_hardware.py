"""Chips: each figure has its source, files of one's own, and clusters that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from abyssal.errors import AbyssalError, UsageError
from abyssal.plan.hardware import Chip, packaged_chips, parse_cluster, read_chips

MINE = """
[mine]
bf16_flops = 3e12
memory_bytes = 5e9
memory_bandwidth = 7e10
"""


def test_every_figure_of_a_packaged_chip_has_a_source() -> None:
    chips = packaged_chips()
    assert {"h800", "h100", "h200", "b200", "gb200", "a100"} <= set(chips)
    for name, chip in chips.items():
        given = {field for field in Chip.model_fields if getattr(chip, field) is not None}
        assert set(chip.sources) == given - {"description", "sources"}, name
        assert chip.description, name


def test_fp8_of_a_chip_is_twice_its_bf16_and_falls_back_to_it() -> None:
    chips = packaged_chips()
    assert chips["h800"].flops("fp8") == pytest.approx(2 * chips["h800"].flops("bf16"), rel=2e-3)
    assert chips["a100"].flops("fp8") == chips["a100"].flops("bf16") == 312e12


def test_file_of_ones_own_adds_a_chip(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    cluster = parse_cluster("mine:1", packaged_chips() | read_chips(tmp_path / "mine.toml"))
    assert (cluster.chip.bf16_flops, cluster.devices, cluster.nodes) == (3e12, 1, 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[mine]\nbf16_flops = 3e12\nmemory_bytes = 5e9\n", "memory_bandwidth: required"),
        (MINE + "nodesize = 8\n", "nodesize: unknown field; nearest: node_size"),
        (MINE + "node_size = 8\n", "nvlink_bandwidth: required where node_size=8"),
        (MINE.replace("3e12", "-3e12"), "bf16_flops=-3000000000000.0"),
        (MINE + "[mine.sources]\nsmss = 'a'\n", "sources.smss: no such figure; nearest: sms"),
        ("mine = 3\n", "mine=3: must be a table"),
        ("[mine\n", "not valid TOML"),
    ],
)
def test_fault_of_a_file_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(AbyssalError) as caught:
        read_chips(tmp_path / "mine.toml")
    assert sentence in str(caught.value)


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.toml: cannot read these chips"):
        read_chips(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("h80:8", "no chip 'h80'; nearest: h800"),
        ("H100:8", "nearest: h100"),
        ("h100", "must read CHIP:DEVICES, such as h100:64"),
        ("h100:many", "must read CHIP:DEVICES"),
        ("h100:0", "from 1 to 10,000,000"),
        ("h100:-8", "from 1 to 10,000,000"),
        ("h100:99999999999", "from 1 to 10,000,000"),
        ("lone:2", "has no network_bandwidth, so at most its node_size=1"),
    ],
)
def test_cluster_that_cannot_be_is_refused(text: str, sentence: str) -> None:
    lone = Chip(bf16_flops=1e12, memory_bytes=1e9, memory_bandwidth=1e9)
    with pytest.raises(UsageError) as caught:
        parse_cluster(text, packaged_chips() | {"lone": lone})
    assert sentence in str(caught.value)
