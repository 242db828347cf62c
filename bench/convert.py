"""`abyssal convert` on one layer of the released shapes against a plain copy of the same files, in one run.

    python bench/convert.py [--to bf16|fp8] [--experts 64] [--workers 2] [--rounds 1] [--folder DIR]

Builds a model of one MoE layer of DeepSeek-V3 with random numbers, FP8 or, to convert to FP8, bf16 (experts in FP8: 2.8
GB with 64, 11.3 GB with 256). Rates are bytes read plus bytes written a second; hashing, the start of the
processes and the flush to the disk are in it. A copy is read, written and flushed file by file, without hashing. Peak
memory is anonymous (RssAnon), the largest sum over all processes and the largest of one worker, looked at 20 times a
second. Input is in the system's cache where memory holds it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from abyssal.checkpoint.convert import Conversion, convert_directory, verify_directory
from abyssal.checkpoint.hf.fp8_scales import is_quantised
from abyssal.checkpoint.hf.names import BIAS
from abyssal.checkpoint.hf.released import released_tensors
from abyssal.config import ModelConfig, load_recipe
from abyssal.config.quantization import BlockFP8
from abyssal.ops.block_fp8 import scale_shape
from record import record

FILE_BYTES = 1_000_000_000
SHARD_BYTES = 1_000_000_000


def layer_config(experts: int) -> ModelConfig:
    """Return the 671B shape with one layer of `experts` experts and a small vocabulary."""
    changes = {
        "vocab_size": 1280,
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": 0,
        "n_routed_experts": experts,
    }
    return ModelConfig(**(load_recipe("v3_671b").model.model_dump() | changes))


def build(folder: Path, config: ModelConfig, *, fp8: bool) -> None:
    """Write a directory of random numbers, file after file."""
    folder.mkdir()
    scheme = {"quantization_config": BlockFP8().to_hf()} if fp8 else {}
    (folder / "config.json").write_text(json.dumps(config.to_hf() | scheme))
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(0, 0x7F, (2**26,), generator=generator, dtype=torch.uint8)  # no NaN
    weight_map, pending = {}, dict[str, torch.Tensor]()

    def write() -> None:
        file = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(pending, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, file))
        pending.clear()

    for spec in released_tensors(config):
        if is_quantised(spec.name):
            repeats = -(-spec.numel // len(pool))
            codes = pool.repeat(repeats)[: spec.numel].clone().view(spec.shape)
            pending[spec.name] = codes.view(torch.float8_e4m3fn)
        if is_quantised(spec.name) and not fp8:
            pending[spec.name] = pending[spec.name].to(torch.bfloat16)
        elif is_quantised(spec.name):
            pending[f"{spec.name}_scale_inv"] = torch.rand(scale_shape(spec.shape), generator=generator) * 1e-3
        else:
            dtype = torch.float32 if spec.name.endswith(BIAS) else torch.bfloat16
            pending[spec.name] = torch.randn(spec.shape, generator=generator).to(dtype)
        if sum(tensor.nbytes for tensor in pending.values()) > FILE_BYTES:
            write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def copy(source: Path, target: Path) -> None:
    """Copy a directory file by file, each flushed to the disk."""
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as stream:
            os.fsync(stream.fileno())


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


class Memory:
    """Watches the anonymous memory of this process and those it starts."""

    def __enter__(self) -> Memory:
        self.peak = self.peak_of_one = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
            sizes = [anonymous(pid) for pid in [*workers, os.getpid()]]
            self.peak = max(self.peak, sum(sizes))
            self.peak_of_one = max(self.peak_of_one, *sizes[:-1], 0)


def anonymous(pid: int) -> int:
    """Return the bytes of anonymous memory of a process, 0 where it has ended."""
    try:
        found = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measure(source: Path, place: Path, conversion: Conversion, options: argparse.Namespace) -> dict[str, float]:
    """Copy and convert by turns; return the best rate of each, and the largest memory."""
    copies, conversions, peaks = [], [], []
    converted = place / conversion.to
    for _ in range(options.rounds):
        for folder in (place / "copy", converted):
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        copies.append(2 * size(source) / timed(lambda: copy(source, place / "copy")))
        shutil.rmtree(place / "copy")
        os.sync()
        with Memory() as memory:
            seconds = timed(lambda: convert_directory(source, converted, conversion, workers=options.workers))
        conversions.append((size(source) + size(converted)) / seconds)
        peaks.append((memory.peak, memory.peak_of_one))
    return {
        "read_gb": round(size(source) / 1e9, 3),
        "written_gb": round(size(converted) / 1e9, 3),
        "copy_mb_per_s": round(max(copies) / 1e6, 1),
        "convert_mb_per_s": round(max(conversions) / 1e6, 1),
        "ratio": round(max(conversions) / max(copies), 3),
        "peak_anonymous_gib": round(max(peak for peak, _ in peaks) / 2**30, 3),
        "peak_anonymous_gib_of_a_worker": round(max(peak for _, peak in peaks) / 2**30, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's temporary folder otherwise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        source = Path(place) / "source"
        # in a process of its own, so that what it leaves in memory is not counted
        builder = multiprocessing.get_context("spawn").Process(
            target=build, args=(source, layer_config(options.experts)), kwargs={"fp8": options.to == "bf16"}
        )
        builder.start()
        builder.join()
        figures = measure(source, Path(place), Conversion(options.to, SHARD_BYTES), options)
        verify_directory(Path(place) / options.to)
    print(json.dumps(figures))
    words = (f"--{name} {getattr(options, name)}" for name in ("to", "experts", "workers", "rounds"))
    shape = {"experts": options.experts, "workers": options.workers, "shard_gb": SHARD_BYTES / 1e9}
    name = f"convert-{options.experts}-experts-to-{options.to}"
    print(record(name, f"python bench/convert.py {' '.join(words)}", shape | figures))


if __name__ == "__main__":
    main()
