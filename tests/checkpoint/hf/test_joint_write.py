"""A model directory is the same from every layout, to the byte, and is read back into every layout."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from abyssal.checkpoint.hf import load_into, read_model_directory, write_model_directory
from abyssal.checkpoint.hf.names import memory_tensors
from abyssal.config import ModelConfig
from abyssal.errors import ModelDirectoryError
from abyssal.model import Transformer
from ranks import run_ranks
from ranks.spread import LAYOUTS, ONE, SHAPE, spread

pytestmark = pytest.mark.slow

#: Fields of the model, and the arguments of the writer.
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"dtype": torch.float32}),
    ({"num_nextn_predict_layers": 2}, {"dtype": torch.bfloat16, "max_shard_bytes": 9_000}),
    ({"tie_word_embeddings": True, "q_lora_rank": None}, {"dtype": torch.bfloat16, "max_shard_bytes": 40_000}),
]


def model_of(fields: dict[str, Any], seed: int, layout: tuple[int, int, int] = ONE) -> Transformer:
    """A model of random numbers, norms and biases too, spread over the ranks."""
    config = ModelConfig(**{**SHAPE, **fields})
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    model.load_state_dict({spec.name: torch.randn(spec.shape, generator=generator) for spec in memory_tensors(config)})
    return spread(model, layout)


def write_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")


def write(folder: Path, model: Transformer, **options: Any) -> None:
    options = {"dtype": torch.float32, "tokenizer_files": write_tokenizer, "card": "# A model\n", **options}
    write_model_directory(folder, model.config, model.state_dict(), **options)


def sums(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def no_gathering(self: DTensor, **_: Any) -> Tensor:
    raise AssertionError("a tensor was gathered")


# Writing


def write_in_every_layout(folder: Path, seed: int) -> None:
    """Write each case in each layout under `folder`; nothing may be gathered."""
    DTensor.full_tensor = DTensor.redistribute = no_gathering  # type: ignore[assignment, method-assign]
    for name, layout in LAYOUTS.items():
        for number, (fields, options) in enumerate(CASES):
            model = model_of(fields, seed, layout)
            write(folder / name / str(number), model, group=dist.group.WORLD, **options)


def test_every_layout_writes_the_same_bytes(tmp_path: Path) -> None:
    seed = random.randrange(2**31)
    run_ranks(4, write_in_every_layout, tmp_path, seed)
    for number, (fields, options) in enumerate(CASES):
        model = model_of(fields, seed)
        write(tmp_path / "one" / str(number), model, **options)
        expected = sums(tmp_path / "one" / str(number))
        assert (len(expected) > 6) == ("max_shard_bytes" in options), "one file, or several and their index"
        for name in LAYOUTS:
            assert sums(tmp_path / name / str(number)) == expected, (name, number)
        read = read_model_directory(tmp_path / "one" / str(number))[1]
        for name, tensor in read:
            assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*LAYOUTS, "one"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_file_is_what_safetensors_own_writer_makes_of_its_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path / "model", model_of({}, random.randrange(2**31)), dtype=dtype)
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file), tmp_path / "theirs", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "theirs").read_bytes()


# Faults


def failing(path: Path, make: Callable[[Transformer], dict[str, Any]], layout: tuple[int, int, int]) -> str:
    """Write to `path`, where `make` lets a rank fail, and return the class of the fault and its sentence."""
    model = model_of({}, 1, layout)
    options = {"group": dist.group.WORLD, **make(model)}
    try:
        write(options.pop("path", path), model, **options)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def spoil(model: Transformer) -> dict[str, Any]:
    if dist.get_rank() == 3:
        held = dict(model.named_parameters())
        for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.embed_tokens.weight"):
            tensor: Any = held[name]
            tensor.to_local().detach().flatten()[-1] = torch.nan
    return {}


def fill_the_disk(model: Transformer) -> dict[str, Any]:
    if dist.get_rank() == 2:
        write = FileIO.write

        class FullDisk(FileIO):
            def write(self, data: Any) -> int:
                if self.tell() > 40_000:
                    raise OSError(28, "No space left on device")
                return write(self, data)

        import abyssal.checkpoint.hf.weight_files as module

        module.FileIO = FullDisk  # type: ignore[misc, attr-defined]
    return {}


def stand_elsewhere(model: Transformer) -> dict[str, Any]:
    folder = Path(os.environ["HERE"], f"rank {dist.get_rank()}")
    folder.mkdir()
    os.chdir(folder)
    return {"path": Path("model")}


def leave_out(model: Transformer) -> dict[str, Any]:
    names = ["model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
    state = model.state_dict()
    model.state_dict = lambda: {k: v for k, v in state.items() if k not in names}  # type: ignore[method-assign]
    return {}


def interrupt(model: Transformer) -> dict[str, Any]:
    state, rank = model.state_dict(), dist.get_rank()

    class Interrupted(dict[str, Tensor]):
        def items(self) -> Any:
            if rank == 1:
                raise KeyboardInterrupt
            return super().items()

    model.state_dict = lambda: Interrupted(state)  # type: ignore[method-assign]
    return {}


def fp8(model: Transformer) -> dict[str, Any]:
    return {"dtype": torch.float8_e4m3fn}


def fail_in_turn(path: Path) -> list[str]:
    """Return what each way to fail says on this rank."""
    os.environ["HERE"] = str(path.parent)
    layout = LAYOUTS["edp 2 x ep 2"]
    return [failing(path, way, layout) for way in (spoil, leave_out, interrupt, fp8, fill_the_disk, stand_elsewhere)]


def test_what_fails_on_a_rank_fails_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(path, model_of({}, 2))
    before = sums(path)
    found = run_ranks(4, fail_in_turn, path)
    said = [
        f"ModelDirectoryError: {path}: the model to write is not finite in model.embed_tokens.weight, "
        "model.layers.1.mlp.experts.7.up_proj.weight",
        f"ModelDirectoryError: rank 0: {path}: the model to write lacks "
        "model.layers.1.mlp.gate.e_score_correction_bias, model.norm.weight",
        "RankError: rank 1: KeyboardInterrupt: ",
        f"ModelDirectoryError: {path}: blocks of FP8 weights lie across ranks, so one process writes them; write "
        "bfloat16 here, which `abyssal convert` makes FP8",
        f"ModelDirectoryError: rank 2: {path}: cannot write the model directory (No space left on device; free some "
        "space there, or choose another disk)",
        "ModelDirectoryError: rank 1: model: what the first rank makes there is not seen here; all ranks of a run need "
        "one file system (and 2 more ranks)",
    ]
    for rank, sentences in enumerate(found):
        assert sentences == [*said[:2], "KeyboardInterrupt: " if rank == 1 else said[2], *said[3:]]
    assert sums(path) == before
    assert sorted(file.name for file in tmp_path.rglob("*") if file.parent != path) == [
        "model",
        *(f"rank {rank}" for rank in range(4)),
    ]


# Reading


def read_in_every_layout(folder: Path, damaged: Path) -> list[str]:
    """Read the directory into each layout, compare it with one process, and return what a damaged one says."""
    reader, said = read_model_directory(folder)[1], []
    expected = Transformer(reader.config)
    loaded = load_into(expected, reader)
    for name, layout in LAYOUTS.items():
        model = spread(Transformer(reader.config), layout)
        assert load_into(model, reader, group=dist.group.WORLD) == loaded
        for key, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(whole, expected.state_dict()[key]), (name, key)
        model = model_of({}, 7, layout)
        try:
            load_into(model, read_model_directory(damaged)[1], group=dist.group.WORLD)
        except ModelDirectoryError as error:
            said.append(str(error))
        for tensor in (t for t in model.state_dict().values() if isinstance(t, DTensor)):
            assert not torch.isnan(tensor.to_local()).any()
    return said


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [(torch.bfloat16, {}), (torch.float8_e4m3fn, {"intermediate_size": 290, "moe_intermediate_size": 134})],
    ids=str,
)
def test_every_layout_reads_the_same_weights(tmp_path: Path, dtype: torch.dtype, fields: dict[str, int]) -> None:
    folder, damaged = tmp_path / "model", tmp_path / "damaged"
    write(folder, model_of(fields, random.randrange(2**31)), dtype=dtype, max_shard_bytes=20_000)
    write(damaged, model_of({}, 3))
    stored = load_file(damaged / "model.safetensors")
    for name in ("lm_head.weight", "model.layers.2.mlp.experts.5.down_proj.weight"):
        stored[name][-1, 3] = torch.nan
    save_file(stored, damaged / "model.safetensors", metadata={"format": "pt"})
    sentence = (
        f"{damaged}: the weights do not fit the model; with values that are not finite: "
        "model.layers.2.mlp.experts.5.down_proj.weight, lm_head.weight"
    )
    assert run_ranks(4, read_in_every_layout, folder, damaged) == [[sentence] * len(LAYOUTS)] * 4
