"""The training state: in place, to the bit, whole or not at all, and never trusted with code."""

import errno
import json
import os
import pickle
import re
import resource
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save

from abyssal.checkpoint.state import (
    check_state,
    latest_state,
    load_state,
    named_tensors,
    read_progress,
    save_state,
    set_damaged_states_aside,
    states,
)
from abyssal.checkpoint.state.dcp import ReproducibleWriter
from abyssal.checkpoint.state.integrity import render
from abyssal.errors import CheckpointError, DamagedStateError
from abyssal.files.checksums import sha256
from abyssal.train.optimizer import adamw_tensors

PROGRESS = {"step": 3, "sequences": 17, "tokens": 4099, "loss": 0.1 + 0.2}


def tensors(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "a.weight": torch.randn(5, 3, generator=generator),
            "a.bias": torch.randn(5, generator=generator).to(torch.bfloat16),
            "view": torch.randn(4, 7, generator=generator).T,
            "load": torch.arange(seed, seed + 6),
        },
        "optimizer": {
            "a.weight": {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(5, 3, generator=generator)}
        },
    }


def equal(first: dict, second: dict) -> bool:
    pairs = zip(dict(named_tensors(first)).items(), dict(named_tensors(second)).items(), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def rewrite_checksums(path: Path) -> None:
    """Make the checksums right again, as whoever changes a file on purpose can."""
    sums = {file.name: sha256(file) for file in path.iterdir() if file.name != "checksums.json"}
    (path / "checksums.json").write_text(render(sums), encoding="utf-8")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_state(tmp_path / "states", 3, tensors(), PROGRESS, keep=2)


def test_a_state_is_loaded_in_place_to_the_bit(saved):
    target = tensors(seed=1)
    alias = target["model"]["a.weight"]
    assert not equal(target, tensors())
    assert load_state(saved, target) == PROGRESS
    assert equal(target, tensors())
    assert target["model"]["a.weight"] is alias
    assert saved.name == "step-00000003"
    assert read_progress(saved) == PROGRESS


def test_equal_states_are_equal_files(saved, tmp_path):
    again = save_state(tmp_path / "again", 3, tensors(), PROGRESS, keep=1)
    assert (again / "checksums.json").read_bytes() == (saved / "checksums.json").read_bytes()


def test_state_of_one_process_is_what_dcp_itself_writes(saved, tmp_path):
    """So states written before several ranks could write one are read, and are the same files."""
    theirs = tmp_path / "theirs/step-00000003"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        save(tensors(), storage_writer=ReproducibleWriter(theirs), no_dist=True)
    (theirs / "progress.json").write_text(json.dumps(PROGRESS, indent=1) + "\n")
    rewrite_checksums(theirs)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == {
        file.name: file.read_bytes() for file in theirs.iterdir()
    }
    target = tensors(seed=1)
    assert load_state(theirs, target) == PROGRESS
    assert equal(target, tensors())


@pytest.mark.parametrize("fused", [False, True])
def test_fused_adamw_goes_on_to_the_bit(tmp_path, fused):
    def build() -> tuple[torch.nn.Module, torch.optim.AdamW]:
        torch.manual_seed(5)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2, bias=False))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), fused=fused)

    def step(model: torch.nn.Module, optimizer: torch.optim.AdamW, seed: int) -> None:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def whole(model: torch.nn.Module, optimizer: torch.optim.AdamW) -> dict:
        parameters = dict(model.named_parameters())
        return {"model": model.state_dict(), "optimizer": adamw_tensors(optimizer, parameters)}

    model, optimizer = build()
    for seed in range(3):
        step(model, optimizer, seed)
    path = save_state(tmp_path, 3, whole(model, optimizer), {}, keep=1)
    step(model, optimizer, 3)

    resumed, fresh = build()
    load_state(path, whole(resumed, fresh))
    assert {float(s["step"]) for s in fresh.state.values()} == {3.0}
    assert set(next(iter(fresh.state.values()))) == {"step", "exp_avg", "exp_avg_sq"}
    step(resumed, fresh, 3)
    assert equal(whole(resumed, fresh), whole(model, optimizer))


@pytest.mark.parametrize("fused", [False, True])
def test_an_empty_adamw_state_starts_as_torchs_own(fused):
    def steps(prepare: bool) -> list[torch.Tensor]:
        weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        if prepare:
            adamw_tensors(optimizer, {"weight": weight})
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return [weight.detach(), *optimizer.state[weight].values()]

    for ours, theirs in zip(steps(True), steps(False), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_the_newest_states_stay(tmp_path):
    for step in (1, 5, 20, 30):
        save_state(tmp_path, step, tensors(), PROGRESS, keep=2)
    assert [path.name for path in states(tmp_path)] == ["step-00000020", "step-00000030"]
    save_state(tmp_path, 25, tensors(), PROGRESS, keep=1)
    assert [path.name for path in states(tmp_path)] == ["step-00000025", "step-00000030"], "a later step was removed"
    assert latest_state(tmp_path) == tmp_path / "step-00000030"


def test_there_may_be_no_state(tmp_path):
    assert latest_state(tmp_path / "nowhere") is None
    (tmp_path / "step-1").mkdir()
    (tmp_path / ".step-00000004.writing-00000000").mkdir()
    assert latest_state(tmp_path) is None
    with pytest.raises(CheckpointError, match="no such training state"):
        load_state(tmp_path / "step-00000009", tensors())


def test_steps_of_nine_digits_are_later(tmp_path):
    for step in (99_999_999, 100_000_000):
        save_state(tmp_path, step, {"x": torch.zeros(1)}, {}, keep=2)
    assert latest_state(tmp_path) == tmp_path / "step-100000000"


def test_an_existing_state_is_not_written_again(saved):
    with pytest.raises(CheckpointError, match=r"step-00000003: cannot write the training state \(File exists"):
        save_state(saved.parent, 3, tensors(1), PROGRESS, keep=1)
    check_state(saved)


def test_a_leaf_that_is_no_tensor_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"optimizer\.lr: .* not float"):
        save_state(tmp_path / "states", 1, {"optimizer": {"lr": 0.1}}, {}, keep=1)
    assert not (tmp_path / "states").exists()


def damage(state, name="__0_0.distcp"):
    content = bytearray((state / name).read_bytes())
    content[len(content) // 2] ^= 1
    (state / name).write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "progress.json", "checksums.json"])
def test_damage_names_the_file(saved, name):
    damage(saved, name)
    target = tensors(seed=1)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: damaged"):
        load_state(saved, target)
    assert equal(target, tensors(seed=1)), "values were copied from a damaged state"


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "progress.json", "checksums.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: (missing|no such file)"):
        load_state(saved, tensors())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_damaged_states_are_set_aside_back_to_the_newest_that_is_intact(tmp_path, count):
    paths = [save_state(tmp_path, step, tensors(), PROGRESS, keep=3) for step in (2, 4, 6)]
    (tmp_path / "damaged-step-00000006").mkdir()  # of an earlier time
    damaged = paths[3 - count :][::-1]
    for path in damaged:
        damage(path)
    aside = set_damaged_states_aside(tmp_path)
    assert states(tmp_path) == paths[: 3 - count]
    assert [path.name for path, _ in aside] == [f"damaged-{path.name}" for path in damaged]
    for (path, fault), before in zip(aside, damaged, strict=True):
        assert fault == f"{before / '__0_0.distcp'}: damaged (its sha256 is not the one written with it)"
        assert (path / "__0_0.distcp").is_file()
    assert set_damaged_states_aside(tmp_path) == []


def test_where_no_state_is_intact_none_is_set_aside(tmp_path):
    assert set_damaged_states_aside(tmp_path) == []
    paths = [save_state(tmp_path, step, tensors(), PROGRESS, keep=2) for step in (2, 4)]
    for path in paths:
        damage(path, ".metadata")
    with pytest.raises(
        DamagedStateError, match=r"step-00000004/\.metadata: damaged .*; no state before step-00000004 is intact"
    ):
        set_damaged_states_aside(tmp_path)
    assert states(tmp_path) == paths


def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch):
    save_state(tmp_path, 2, tensors(), PROGRESS, keep=2)
    latest = save_state(tmp_path, 4, tensors(), PROGRESS, keep=2)

    def unreadable(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("abyssal.checkpoint.state.integrity.sha256", unreadable)
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        set_damaged_states_aside(tmp_path)
    assert not isinstance(caught.value, DamagedStateError)
    assert states(tmp_path)[-1] == latest


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_one_changed_byte_is_found_in_its_file(saved, data):
    name = data.draw(st.sampled_from(["__0_0.distcp", ".metadata", "progress.json", "checksums.json"]))
    whole = (saved / name).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.integers(1, 255))
    (saved / name).write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
    try:
        with pytest.raises(CheckpointError, match=rf"/{re.escape(name)}: "):
            check_state(saved)
    finally:
        (saved / name).write_bytes(whole)
    check_state(saved)


def test_another_structure_is_told_before_anything_is_loaded(saved):
    target = tensors(seed=1)
    target["model"]["b"] = torch.zeros(2)
    target["model"]["a.weight"] = torch.zeros(3, 5)
    target["model"]["a.bias"] = torch.zeros(5)
    del target["optimizer"]
    with pytest.raises(CheckpointError) as caught:
        load_state(saved, target)
    sentence = str(caught.value)
    assert "missing: model.b;" in sentence
    assert "surplus: optimizer.a.weight.exp_avg, optimizer.a.weight.step;" in sentence
    assert "model.a.weight ([5, 3] float32 instead of [3, 5] float32)" in sentence
    assert "model.a.bias ([5] bfloat16 instead of [5] float32)" in sentence
    assert torch.equal(target["model"]["load"], torch.arange(1, 7)), "values were copied"


def test_many_unfit_names_are_counted(saved):
    with pytest.raises(CheckpointError, match=r"b0, b1, .*b15 and 12 more;"):
        load_state(saved, {**tensors(), **{f"b{n}": torch.zeros(1) for n in range(20)}})


# Faults of the disk


@pytest.fixture
def small_files():
    """No file may grow beyond 256 KiB, as a full disk would have it: the write itself fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_midway_leaves_earlier_states_untouched(saved, small_files):
    large = {**tensors(), "large": torch.zeros(2**18)}
    with pytest.raises(CheckpointError) as caught:
        save_state(saved.parent, 4, large, PROGRESS, keep=1)
    assert re.search(r"step-00000004: cannot write the training state \(File too large.*ulimit -f", str(caught.value))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    target = tensors(seed=1)
    load_state(saved, target)
    assert equal(target, tensors())


def test_a_disk_without_space_is_refused_before_writing(saved, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GiB, but 0\.00 GiB are free"):
        save_state(saved.parent, 4, tensors(), PROGRESS, keep=1)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("where", ["write_data", "finish"])
def test_a_full_disk_inside_dcp_becomes_a_sentence(saved, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"abyssal.checkpoint.state.save.ReproducibleWriter.{where}", full)
    with pytest.raises(CheckpointError, match=r"step-00000004: .*\(No space left on device; free some space"):
        save_state(saved.parent, 4, tensors(), PROGRESS, keep=1)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_full_disk_after_dcp_becomes_a_sentence(saved, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("abyssal.files.atomic.flush_tree", full)
    with pytest.raises(CheckpointError, match=r"step-00000004: .*\(No space left on device; free some space"):
        save_state(saved.parent, 4, tensors(), PROGRESS, keep=1)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_ctrl_c_inside_dcp_stays_ctrl_c(saved, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("abyssal.checkpoint.state.save.ReproducibleWriter.write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_state(saved.parent, 4, tensors(), PROGRESS, keep=1)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_becomes_a_sentence(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            save_state(tmp_path / "states", 1, tensors(), PROGRESS, keep=1)
    finally:
        tmp_path.chmod(0o700)


def test_a_file_where_the_folder_should_be_becomes_a_sentence(tmp_path):
    (tmp_path / "states").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot write the training state"):
        save_state(tmp_path / "states", 1, tensors(), PROGRESS, keep=1)


# Strangers


class Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_the_metadata_is_not_run(saved, tmp_path, protocol):
    touched = tmp_path / "touched"
    (saved / ".metadata").write_bytes(pickle.dumps(Call(os.mkdir, str(touched)), protocol))
    rewrite_checksums(saved)
    with pytest.raises(CheckpointError, match=r"\.metadata: not the metadata .* asks for (posix|nt)\.mkdir"):
        load_state(saved, tensors())
    assert not touched.exists()


def test_torchs_functions_are_no_records_either(saved):
    (saved / ".metadata").write_bytes(pickle.dumps(Call(torch.load, "x")))
    rewrite_checksums(saved)
    with pytest.raises(CheckpointError, match=r"asks for torch\.serialization\.load"):
        load_state(saved, tensors())


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"a": 1})])
def test_other_metadata_becomes_a_sentence(saved, content):
    (saved / ".metadata").write_bytes(content)
    rewrite_checksums(saved)
    with pytest.raises(CheckpointError, match=r"\.metadata: not the metadata of a training state"):
        load_state(saved, tensors())


def test_metadata_that_points_out_of_the_folder_is_refused(saved):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    rewrite_checksums(saved)
    with pytest.raises(CheckpointError, match=r"names '\.\./elsewhere', which is no file of this training state"):
        load_state(saved, tensors())


def test_an_entry_of_bytes_which_torch_would_unpickle_freely_is_refused(saved):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    records = torch.distributed.checkpoint.metadata
    metadata.state_dict_metadata["model.load"] = records.BytesStorageMetadata()
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    rewrite_checksums(saved)
    with pytest.raises(CheckpointError, match=r"model\.load \(no tensor\)"):
        load_state(saved, tensors())


def test_code_among_the_tensors_is_not_run(saved, tmp_path):
    touched = tmp_path / "touched"
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    whole = (saved / "__0_0.distcp").read_bytes()
    torch.save(Call(os.mkdir, str(touched)), tmp_path / "evil")
    evil = (tmp_path / "evil").read_bytes()
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "model.load")
    info.offset, info.length = len(whole), len(evil)
    (saved / "__0_0.distcp").write_bytes(whole + evil)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    rewrite_checksums(saved)
    with pytest.raises(CheckpointError, match="cannot read the training state"):
        load_state(saved, tensors())
    assert not touched.exists()


def test_checksums_of_files_elsewhere_are_refused(saved):
    sums = json.loads((saved / "checksums.json").read_text())["files"]
    (saved / "checksums.json").write_text(render({**sums, "../other": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"checksums\.json: damaged"):
        check_state(saved)
