"""`abyssal convert`: a model directory in another number format, or as a GGUF file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

if TYPE_CHECKING:
    from abyssal.checkpoint.convert import Conversion

SHARD_SIZE = "5GB"


class Format(StrEnum):
    """What the weights can become."""

    BF16 = "bf16"
    FP8 = "fp8"
    FP32 = "fp32"
    GGUF = "gguf"


class GgufType(StrEnum):
    """What the matrices of a GGUF file can be."""

    F32 = "f32"
    BF16 = "bf16"
    Q8_0 = "q8_0"


class ScaleFormat(StrEnum):
    """How FP8 scales are rounded."""

    FLOAT = "float"
    UE8M0 = "ue8m0"


Source = Annotated[Path, typer.Argument(metavar="IN", help="A model directory.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, new or empty; the file, --to gguf.")]
To = Annotated[Format, typer.Option("--to", help="The format of the weights.")]
MaxShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="The most bytes of tensors in one file: 5GB, 500MB, 2GiB.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes; each holds less than 1 GiB. 0: one a core, at most 8.")]
Mtp = Annotated[bool, typer.Option("--mtp/--no-mtp", help="Keep the MTP layers, or leave them out.")]
ScalesFrom = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="With --to fp8: use the scales of this FP8 copy of the same model again."),
]
ScaleFmt = Annotated[ScaleFormat, typer.Option(help="With --to fp8: scales as they come, or raised to powers of two.")]
DType = Annotated[
    GgufType | None, typer.Option("--dtype", help="With --to gguf: what matrices become; bf16 by default.")
]
Verify = Annotated[bool, typer.Option("--verify", help="Read OUT again and compare it; alone where OUT is finished.")]


def convert(
    source: Source,
    target: Target,
    to: To,
    max_shard_size: MaxShardSize = SHARD_SIZE,
    workers: Workers = 0,
    mtp: Mtp = True,
    scales_from: ScalesFrom = None,
    scale_fmt: ScaleFmt = ScaleFormat.FLOAT,
    dtype: DType = None,
    verify: Verify = False,
) -> None:
    """Convert a model directory to bf16, FP8 or fp32, or to a GGUF file, a few rows at a time.

    OUT appears whole or not at all. Interrupted, the same command goes on with what is finished. Examples:

        abyssal convert DeepSeek-V3 DeepSeek-V3-bf16 --to bf16
        abyssal convert runs/demo/model runs/demo/model-fp8 --to fp8 --verify
        abyssal convert DeepSeek-V3-bf16 again --to fp8 --scales-from DeepSeek-V3
        abyssal convert runs/demo/model demo.gguf --to gguf --dtype q8_0
    """
    from abyssal.checkpoint.convert import MANIFEST, Conversion
    from abyssal.cli.gguf import convert_to_gguf
    from abyssal.errors import UsageError

    if to is Format.GGUF:
        others = {
            "--max-shard-size": max_shard_size != SHARD_SIZE,
            "--workers": workers > 0,
            "--scales-from": scales_from is not None,
            "--scale-fmt": scale_fmt is not ScaleFormat.FLOAT,
            "--verify": verify,
        }
        convert_to_gguf(source, target, (dtype or GgufType.BF16).value, others)
        return
    if dtype is not None:
        raise UsageError(f"--dtype {dtype}: is for --to gguf; leave it out")
    if to is not Format.FP8 and (scales_from is not None or scale_fmt is not ScaleFormat.FLOAT):
        raise UsageError(f"--to {to}: has no scales; leave out --scales-from and --scale-fmt, or convert --to fp8")
    if scales_from is not None and scale_fmt is not ScaleFormat.FLOAT:
        raise UsageError("--scales-from: gives the scales as they are; leave out --scale-fmt")
    directory_format = cast("Literal['bf16', 'fp8', 'fp32']", to.value)  # gguf has returned
    conversion = Conversion(directory_format, parse_size(max_shard_size), mtp, scale_fmt is ScaleFormat.UE8M0)
    if not (verify and (target / MANIFEST).is_file()):
        _convert(source, target, conversion, workers, scales_from)
    if verify:
        _verify(target, conversion)


def parse_size(text: str) -> int:
    """Return the bytes that `5GB`, `500 MB` or `2GiB` means.

    Raises:
        UsageError: it is no size.
    """
    import re

    from abyssal.errors import UsageError

    powers = {"": 1, **{f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", 1)}}
    powers |= {f"{prefix}IB": 1024**n for n, prefix in enumerate("KMGT", 1)}
    size_and_unit = re.fullmatch(r"([\d.]+)\s*([A-Z]*)", text.strip().upper())
    try:
        size = int(float(size_and_unit[1]) * powers[size_and_unit[2]]) if size_and_unit else 0
    except (ValueError, KeyError):
        size = 0
    if size < 1:
        raise UsageError(f"--max-shard-size {text}: must be a size such as 5GB, 500MB or 2GiB")
    return size


def _convert(source: Path, target: Path, conversion: Conversion, workers: int, scales_from: Path | None) -> None:
    import time

    from rich.console import Console

    from abyssal.checkpoint.convert import convert_directory
    from abyssal.cli.byte_progress import ByteProgress
    from abyssal.machine.describe import available_cores
    from abyssal.report.numbers import byte_size

    begin = time.monotonic()
    try:
        with ByteProgress("converting") as progress:
            outcome = convert_directory(
                source,
                target,
                conversion,
                workers=workers or min(available_cores(), 8),
                scales_from=scales_from,
                on_progress=lambda now: progress.show(now.written_bytes, now.total_bytes, now.kept_bytes),
            )
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; the same command goes on with the files that are finished", err=True)
        raise
    seconds, written = time.monotonic() - begin, outcome.total_bytes - outcome.kept_bytes
    console = Console(highlight=False, soft_wrap=True, markup=False)
    kept = f", {byte_size(outcome.kept_bytes)} of it before" if outcome.kept_bytes else ""
    console.print(
        f"{target}: {byte_size(outcome.total_bytes)} of weights in {outcome.files} "
        f"{'file' if outcome.files == 1 else 'files'}, {conversion.to}{kept}; "
        f"{seconds:.1f} s, {byte_size(written / max(seconds, 1e-9))} written a second"
    )
    if outcome.left_out:
        console.print(f"left out: {', '.join(outcome.left_out)}")


def _verify(target: Path, conversion: Conversion) -> None:
    from rich.console import Console

    from abyssal.checkpoint.convert import verify_directory
    from abyssal.cli.byte_progress import ByteProgress
    from abyssal.errors import ModelDirectoryError

    with ByteProgress("comparing") as progress:
        manifest = verify_directory(target, progress.show)
    if manifest.format != conversion.to:
        raise ModelDirectoryError(f"{target}: is {manifest.format}, not {conversion.to}; choose another folder")
    Console(highlight=False, soft_wrap=True, markup=False).print(
        f"{target}: {len(manifest.files)} files are as they were written"
    )
