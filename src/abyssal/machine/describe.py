"""What this machine is: processor, memory, accelerators, and the torch that drives them."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

#: Instruction sets that decide how fast a matmul is, in the spelling of /proc/cpuinfo (x86 flags, Arm features).
MATMUL_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "bf16", "i8mm", "sve", "sve2", "sme"),
)


@dataclass(frozen=True)
class Machine:
    """A description, for people: nothing here is measured."""

    system: str
    cpu: str
    cores: int  # that this process may run on; hyperthreads count
    memory_bytes: int | None
    flags: tuple[str, ...]
    gpus: tuple[str, ...]
    python: str
    torch: str

    def rows(self) -> list[tuple[str, str]]:
        """Return (label, value) in the order to be printed."""
        memory = "unknown" if self.memory_bytes is None else f"{self.memory_bytes / 2**30:.1f} GiB"
        return [
            ("system", self.system),
            ("processor", self.cpu),
            ("cores", str(self.cores)),
            ("memory", memory),
            ("instructions", ", ".join(self.flags) or "unknown"),
            ("accelerators", ", ".join(self.gpus) or "none"),
            ("python", self.python),
            ("torch", self.torch),
        ]


def describe_machine() -> Machine:
    """Return what this machine is."""
    name, flags = read_cpuinfo(_text(Path("/proc/cpuinfo")))
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
        cpu=name or platform.processor() or platform.machine() or "unknown",
        cores=available_cores(),
        memory_bytes=memory_bytes(),
        flags=flags,
        gpus=_gpus(),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(limit_file: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Return the memory in bytes, or what a container is allowed of it; none where the system does not say."""
    known = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = _text(limit_file).strip()
    if limit.isdigit():
        known.append(int(limit))
    return min(known, default=None)


def read_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the processor's name and its flags among `MATMUL_FLAGS` out of the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or fields.get("Model", ""), tuple(flag for flag in MATMUL_FLAGS if flag in present)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gpus() -> tuple[str, ...]:
    """Return name and memory of each accelerator that torch can use."""
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        return tuple(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
    return ("Apple GPU (MPS)",) if torch.backends.mps.is_available() else ()
