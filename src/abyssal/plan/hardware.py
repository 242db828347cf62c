"""Chips and links as data, each figure with its source, and clusters of them: `h800:2048`."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from abyssal.config.frozen import Frozen
from abyssal.errors import UsageError, nearest

#: More than anybody has; a larger number is a slip of the keyboard.
MAX_DEVICES = 10_000_000


class Chip(Frozen):
    """One kind of device, and the links it hangs on. FLOP/s are dense; bandwidths are bytes/s in one direction."""

    description: str = ""
    bf16_flops: PositiveFloat
    fp8_flops: PositiveFloat | None = Field(default=None, description="none: the chip has no FP8")
    memory_bytes: PositiveFloat
    memory_bandwidth: PositiveFloat
    sms: PositiveInt | None = Field(default=None, description="multiprocessors; none: no chip of that kind")
    node_size: PositiveInt = Field(default=1, description="devices that share one NVLink")
    nvlink_bandwidth: PositiveFloat | None = Field(default=None, description="a device, inside the node")
    network_bandwidth: PositiveFloat | None = Field(default=None, description="a device, between nodes")
    matmul_peak: float | None = Field(default=None, gt=0, le=1, description="measured; none: the calibration's")
    matmul_half_depth: PositiveFloat | None = Field(default=None, description="measured; none: the calibration's")
    pass_seconds_per_byte: PositiveFloat | None = Field(default=None, description="measured; none: from the bandwidth")
    sources: dict[str, str] = Field(default={}, description="where each figure comes from")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.node_size > 1 and self.nvlink_bandwidth is None:
            raise ValueError(f"nvlink_bandwidth: required where node_size={self.node_size} is more than 1")
        for name in self.sources:
            if name not in type(self).model_fields:
                raise ValueError(f"sources.{name}: no such figure{nearest(name, type(self).model_fields)}")
        return self

    def flops(self, precision: str) -> float:
        """Return the peak of a matmul in `fp8` or `bf16`; a chip without FP8 multiplies it in bf16."""
        return self.fp8_flops if precision == "fp8" and self.fp8_flops is not None else self.bf16_flops


@dataclass(frozen=True)
class Cluster:
    """So many devices of one kind."""

    name: str
    chip: Chip
    devices: int

    @property
    def nodes(self) -> int:
        """Nodes, the last of them perhaps not full."""
        return -(-self.devices // self.chip.node_size)


def packaged_chips() -> dict[str, Chip]:
    """Return the chips inside the package by name."""
    text = (resources.files("abyssal.plan") / "hardware.toml").read_text(encoding="utf-8")
    return _parse(text, "hardware.toml")


def read_chips(path: Path) -> dict[str, Chip]:
    """Read chips from a TOML file: one table a chip, its figures, and optionally `[NAME.sources]`.

    Raises:
        UsageError: the file cannot be read, is no TOML, or a chip in it lacks a figure or has an unknown one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{path}: cannot read these chips ({reason})") from None
    return _parse(text, str(path))


def parse_cluster(text: str, chips: dict[str, Chip]) -> Cluster:
    """Read `CHIP:DEVICES`, such as `h800:2048`.

    Raises:
        UsageError: another form, a chip that is not among `chips`, or an impossible number.
    """
    name, colon, number = text.partition(":")
    if name not in chips:
        raise UsageError(
            f"--cluster {text}: no chip {name!r}{nearest(name.lower(), chips)}; there are {', '.join(sorted(chips))}, "
            "and --hardware FILE.toml adds your own"
        )
    if not colon or not re.fullmatch(r"[+-]?\d+", number):
        raise UsageError(f"--cluster {text}: must read CHIP:DEVICES, such as {name}:64")
    if not 1 <= int(number) <= MAX_DEVICES:
        raise UsageError(f"--cluster {text}: the number of devices must be from 1 to {MAX_DEVICES:,}")
    cluster = Cluster(name, chips[name], int(number))
    if cluster.nodes > 1 and cluster.chip.network_bandwidth is None:
        raise UsageError(
            f"--cluster {text}: {name} has no network_bandwidth, so at most its node_size={cluster.chip.node_size}"
        )
    return cluster


def _parse(text: str, source: str) -> dict[str, Chip]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source}: not valid TOML ({error})") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{source}: {name}={table!r}: must be a table of a chip's figures, [{name}]")
    return {name: Chip.parse(table, source=f"{source}: {name}") for name, table in tables.items()}
