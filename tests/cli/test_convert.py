"""`abyssal convert`: what it prints, and one sentence for each thing that can be wrong."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from abyssal.checkpoint.convert import Conversion, convert_directory
from abyssal.cli.convert import parse_size
from abyssal.engine.load import load_model
from abyssal.errors import UsageError

Call = Callable[..., Any]


@pytest.fixture
def fp8_folder(model_folder: Path, tmp_path: Path) -> Path:
    """The model of random numbers in FP8."""
    convert_directory(model_folder, tmp_path / "fp8", Conversion("fp8"))
    return tmp_path / "fp8"


def names(folder: str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_converted_model_loads_and_verifies(abyssal: Call, model_folder: Path) -> None:
    result = abyssal("convert", model_folder, "out", "--to", "fp8", "--verify", "--workers", 1)
    assert (result.code, result.err) == (0, "")
    summary, compared = result.out.splitlines()
    assert re.match(r"out: [\d.]+ kB of weights in 1 file, fp8; [\d.]+ s, [\d.]+ .?B written a second$", summary)
    assert compared == "out: 6 files are as they were written"
    model, original = load_model("out").model.state_dict(), load_model(model_folder).model.state_dict()
    for name, tensor in original.items():
        assert torch.allclose(model[name].float(), tensor, rtol=2**-4, atol=2**-6 * float(tensor.abs().max())), name


def test_to_bf16_in_several_files_without_mtp(abyssal: Call, fp8_folder: Path) -> None:
    arguments = ("convert", fp8_folder, "out", "--to", "bf16", "--max-shard-size", "20KB", "--workers", 1, "--no-mtp")
    assert abyssal(*arguments).code == 0
    config = json.loads(Path("out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_nextn_predict_layers"] == 0
    assert len(list(Path("out").glob("model-*.safetensors"))) > 2
    load_model("out")
    again = abyssal(*arguments)
    assert (again.code, again.out) == (1, "")
    assert "out: exists and is not an empty folder; it has a manifest, which --verify compares it with" in again.err
    assert abyssal(*arguments, "--verify").out == f"out: {len(names('out')) - 1} files are as they were written\n"


def test_scales_come_back_from_another_directory(abyssal: Call, fp8_folder: Path) -> None:
    assert abyssal("convert", fp8_folder, "wide", "--to", "bf16").code == 0
    assert abyssal("convert", "wide", "again", "--to", "fp8", "--scales-from", fp8_folder).code == 0
    assert Path("again/model.safetensors").read_bytes() == (fp8_folder / "model.safetensors").read_bytes()


def test_interrupted_it_says_how_to_go_on(abyssal: Call, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("abyssal.checkpoint.convert.run.copy_side_files", interrupt)
        result = abyssal("convert", model_folder, "out", "--to", "bf16")
    assert result.code == 130
    assert result.err == "\ninterrupted; the same command goes on with the files that are finished\n"
    result = abyssal("convert", model_folder, "out", "--to", "bf16")
    assert result.code == 0
    assert " of it before; " in result.out


# Bad input: the folder to convert is `in`, an FP8 model


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def change_config(**fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def index_of_a_missing_file(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    weight_map = dict.fromkeys(tensors, "model.safetensors") | {"lm_head.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
SCALE = f"{O_PROJ}_scale_inv"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[SCALE][0, 0] = torch.nan


def with_nan_code(tensors: dict[str, torch.Tensor]) -> None:
    tensors[O_PROJ].view(torch.uint8)[3, 4] = 0xFF


FAULTS = {
    "truncated": (truncate, "in/model.safetensors: truncated, or not a safetensors file"),
    "missing file": (index_of_a_missing_file, "in/model-2.safetensors: no such file, but model.safetensors.index.json"),
    "scale shape": (
        change_tensors(lambda tensors: tensors.update({SCALE: torch.ones(2, 1)})),
        f"of another shape: {SCALE} ([2, 1] instead of [1, 1])",
    ),
    "no scale": (change_tensors(lambda tensors: tensors.pop(SCALE)), f"missing: {SCALE}"),
    "NaN scale": (change_tensors(with_nan), f"with values that are not finite: {SCALE}"),
    "NaN": (change_tensors(with_nan_code), f"{O_PROJ} holds NaN or infinity"),
    "surplus": (change_tensors(lambda tensors: tensors.update({"x": torch.ones(2)})), "surplus: x"),
    "pickle": (pickled, "pytorch_model.bin, a pickle, which is refused because"),
    "architecture": (change_config(model_type="llama"), "in/config.json: model_type='llama': must be one of deepseek"),
    "quantisation": (change_config(quantization_config={"quant_method": "awq"}), "quant_method='awq': only 'fp8'"),
    "integers": (
        change_tensors(
            lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(3)})
        ),
        "inv_freq (I64; possible: F64, F32, BF16, F16)",
    ),
    "gone": (shutil.rmtree, "in: no such model directory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_input_ends_in_one_sentence_and_leaves_nothing(fault: str, abyssal: Call, fp8_folder: Path) -> None:
    damage, sentence = FAULTS[fault]
    fp8_folder.rename("in")
    damage(Path("in"))
    before = names()
    result = abyssal("convert", "in", "out", "--to", "bf16")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert sentence in result.err
    assert names() == before


def test_a_flipped_bit_of_the_header_ends_in_a_sentence_or_in_equal_values(abyssal: Call, fp8_folder: Path) -> None:
    content = (fp8_folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    convert_directory(fp8_folder, Path("expected"), Conversion("bf16"))
    expected = Path("expected/model.safetensors").read_bytes()
    for bit in random.sample(range(8 * header), 25):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (fp8_folder / "model.safetensors").write_bytes(damaged)
        result = abyssal("convert", fp8_folder, "out", "--to", "bf16")
        if result.code == 0:
            assert Path("out/model.safetensors").read_bytes() == expected, bit
            shutil.rmtree("out")
        else:
            assert result.code == 1, bit
            assert result.err.startswith("error: "), bit
            assert result.err.count("\n") == 1, bit
            assert not Path("out").exists()


def test_a_full_disk_is_told_before_anything_is_written(
    abyssal: Call, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**25))
    result = abyssal("convert", model_folder, "out", "--to", "bf16")
    assert result.code == 1
    assert "out: needs 0.03 GiB, but 0.03 GiB are free on its disk; free some space there" in result.err
    assert names() == ["model"]


def test_a_disk_that_fills_up_keeps_what_is_finished(
    abyssal: Call, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("convert", model_folder, "out", "--to", "bf16", "--max-shard-size", "20KB", "--workers", 1)
    left = [70_000]

    class FullDisk(FileIO):
        def write(self, data: Any) -> int:
            if left[0] < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= len(data)
            return super().write(data)

    with monkeypatch.context() as patched:
        patched.setattr("abyssal.checkpoint.convert.output_file.FileIO", FullDisk)
        result = abyssal(*arguments)
    assert result.code == 1
    assert "No space left on device" in result.err
    assert "/.out.converting for the next call; remove it to give up)" in result.err
    assert result.err.count("\n") == 1
    assert not Path("out").exists()
    assert abyssal(*arguments).code == 0
    load_model("out")


def test_the_output_must_be_another_place_that_is_free(abyssal: Call, model_folder: Path) -> None:
    result = abyssal("convert", model_folder, model_folder / ".." / model_folder.name, "--to", "bf16")
    assert (result.code, result.err) == (
        1,
        f"error: {model_folder}: is the input; choose another folder for the output\n",
    )
    Path("full").mkdir()
    Path("full/mine.txt").touch()
    Path("file").touch()
    for target in ("full", "file"):
        result = abyssal("convert", model_folder, target, "--to", "bf16")
        assert result.code == 1
        assert f"{target}: exists and is not an empty folder; remove it or choose another one\n" in result.err
    Path("empty").mkdir()
    assert abyssal("convert", model_folder, "empty", "--to", "bf16").code == 0


def test_scales_of_another_model_or_of_none_are_refused(abyssal: Call, model_folder: Path, fp8_folder: Path) -> None:
    result = abyssal("convert", model_folder, "out", "--to", "fp8", "--scales-from", model_folder)
    assert result.code == 1
    assert "has no FP8 weights, so there are no scales to use again" in result.err
    change_tensors(lambda tensors: tensors.update({SCALE: torch.full((1, 1), 1e-9)}))(fp8_folder)
    result = abyssal("convert", model_folder, "out", "--to", "fp8", "--scales-from", fp8_folder)
    assert result.code == 1
    assert f"{O_PROJ} is not finite, or too large for the given scales" in result.err


# --verify


def test_verify_names_every_file_that_is_not_as_written(abyssal: Call, model_folder: Path) -> None:
    assert abyssal("convert", model_folder, "out", "--to", "bf16").code == 0
    weights = bytearray(Path("out/model.safetensors").read_bytes())
    weights[random.randrange(len(weights))] ^= 1 << random.randrange(8)
    Path("out/model.safetensors").write_bytes(weights)
    Path("out/README.md").unlink()
    Path("out/config.json").write_text("{}")
    Path("out/new.txt").touch()
    result = abyssal("convert", model_folder, "out", "--to", "bf16", "--verify")
    assert result.code == 1
    assert "README.md is missing, " in result.err
    assert "config.json has 2 bytes instead of " in result.err
    assert "model.safetensors has another checksum, new.txt is not in the manifest" in result.err


def test_verify_of_another_format_or_a_damaged_manifest_is_told(abyssal: Call, model_folder: Path) -> None:
    assert abyssal("convert", model_folder, "out", "--to", "bf16").code == 0
    result = abyssal("convert", model_folder, "out", "--to", "fp8", "--verify")
    assert (result.code, result.err) == (1, "error: out: is bf16, not fp8; choose another folder\n")
    Path("out/manifest.json").write_text("{")
    result = abyssal("convert", model_folder, "out", "--to", "bf16", "--verify")
    assert (result.code, result.err) == (1, "error: out/manifest.json: damaged; convert again\n")


# Options


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), ("77", 77)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", "1.2.3MB", "5 G B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must be a size such as 5GB"):
        parse_size(text)


def test_options_that_contradict_are_refused(abyssal: Call, model_folder: Path) -> None:
    for options in (("--to", "bf16", "--scale-fmt", "ue8m0"), ("--to", "bf16", "--scales-from", model_folder)):
        result = abyssal("convert", model_folder, "out", *options)
        assert result.code == 2
        assert "--to bf16: has no scales; leave out --scales-from and --scale-fmt" in result.err
    options = ("--to", "fp8", "--scale-fmt", "ue8m0", "--scales-from", model_folder)
    assert "leave out --scale-fmt" in abyssal("convert", model_folder, "out", *options).err
    assert abyssal("convert", model_folder, "out", "--to", "fp4").code == 2
