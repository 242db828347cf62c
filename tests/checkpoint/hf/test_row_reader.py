from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abyssal.checkpoint.hf import row_reader
from abyssal.checkpoint.hf.headers import read_headers
from abyssal.checkpoint.hf.row_reader import can_read_into, read_into
from abyssal.engine import load_model
from abyssal.errors import ModelDirectoryError


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_places_hold_what_the_library_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, threads: int
) -> None:
    monkeypatch.setattr(row_reader, "CHUNK_BYTES", 64)
    shapes = [(random.randint(1, 9), random.randint(1, 40)) for _ in range(12)] + [(0, 3)]
    save_file({f"t{n}": torch.randn(shape).to(dtype) for n, shape in enumerate(shapes)}, tmp_path / "model.safetensors")
    headers, wanted = read_headers(tmp_path), load_file(tmp_path / "model.safetensors")
    stack = torch.full((12, 9, 40), torch.nan, dtype=dtype)  # places are parts of larger tensors, as experts are
    names = [f"t{n}" for n in range(12)]
    places = {
        name: row.view(-1)[: wanted[name].numel()].view(wanted[name].shape)
        for name, row in zip(names, stack, strict=True)
    }
    assert all(can_read_into(headers[name], place) for name, place in places.items())
    assert read_into(places, headers, threads) == []
    for (name, place), row in zip(places.items(), stack, strict=True):
        assert torch.equal(place, wanted[name])
        assert row.view(-1)[place.numel() :].isnan().all()


def test_values_that_are_not_finite_are_found_wherever_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_reader, "CHUNK_BYTES", 32)
    tensors = {f"t{n}": torch.zeros(21) for n in range(21)}
    for n in range(0, 21, 2):
        tensors[f"t{n}"][n] = random.choice((torch.nan, torch.inf, -torch.inf))
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_into({name: torch.empty(21) for name in tensors}, read_headers(tmp_path), 2)
    assert sorted(found) == sorted(f"t{n}" for n in range(0, 21, 2))


@pytest.mark.parametrize(
    "place",
    [torch.empty(3, dtype=torch.bfloat16), torch.empty(6)[::2], torch.empty(3, device="meta")],
    ids=("type", "layout", "device"),
)
def test_another_type_layout_or_device_is_not_read_directly(tmp_path: Path, place: torch.Tensor) -> None:
    save_file({"t": torch.ones(3)}, tmp_path / "model.safetensors")
    assert not can_read_into(read_headers(tmp_path)["t"], place)


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(300)}, file)
    headers = read_headers(tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelDirectoryError, match=r"model\.safetensors: ends too early"):
        read_into({"t": torch.empty(300)}, headers, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_the_same_either_way(model_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """float32 as stored, directly; bfloat16 by way of mapped files."""
    from abyssal.engine import load

    direct, calls = load.read_into, []
    monkeypatch.setattr(load, "prepare_for_inference", lambda model: None)  # leaves the weights as they were read
    monkeypatch.setattr(load, "read_into", lambda *arguments: calls.append(1) or direct(*arguments))
    state = load_model(model_folder, dtype=dtype).model.state_dict()
    assert calls == ([1] if dtype == "float32" else [])
    monkeypatch.setattr(load, "can_read_into", lambda *_: False)
    mapped = load_model(model_folder, dtype=dtype).model.state_dict()
    assert len(calls) == (dtype == "float32")
    for name, tensor in mapped.items():
        assert torch.equal(state[name], tensor)


def test_a_model_with_nan_is_refused(model_folder: Path) -> None:
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    for expert in (2, 3):
        tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ModelDirectoryError, match=r"not finite: model\.layers\.1\.mlp\.experts\.\{2-3\}"):
        load_model(model_folder)
