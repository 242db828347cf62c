"""A training state written by several ranks is read to the bit in any other layout, and by one process.

Layouts are (dp_replicate, edp, ep); one process has none of them, and plain tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from abyssal.checkpoint.state import check_state, load_state, named_tensors, save_state
from abyssal.config import load_recipe
from abyssal.model import Transformer
from abyssal.train.optimizer import adamw_tensors
from ranks import run_ranks

pytestmark = pytest.mark.slow

Layout = tuple[int, int, int]
#: Small, all dims different; no dense one is a multiple of 4, so that the ranks' parts are of different lengths.
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 27,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "q_lora_rank": 13,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
PROGRESS = {"step": 7, "tokens": 4099}


def build(layout: Layout | None) -> nn.Module:
    """Build the demo's model, small, spread over all ranks as they train it; its values are what memory held."""
    config = load_recipe("demo", [f"model.{name}={value}" for name, value in SHAPE.items()]).model
    model = Transformer(config)
    if layout is None:
        return model
    mesh = init_device_mesh("cpu", layout, mesh_dim_names=("dp_replicate", "edp", "ep"))
    shard = mesh["edp", "ep"]._flatten("shard")
    dense = mesh["dp_replicate", "shard"] if layout[0] > 1 else shard
    for block in [module for module in model.modules() if hasattr(module, "mlp")]:
        experts = getattr(block.mlp, "experts", None)
        if experts is not None:
            for name, parameter in list(experts.named_parameters()):
                part = parameter.detach().chunk(layout[2])[mesh["ep"].get_local_rank()].clone()
                setattr(experts, name, nn.Parameter(DTensor.from_local(part, mesh["ep"], [Shard(0)])))
            over = mesh["dp_replicate", "edp"] if layout[0] > 1 else mesh["edp"]
            fully_shard(experts, mesh=over, shard_placement_fn=lambda _: Shard(1))
        fully_shard(block, mesh=dense)
    return fully_shard(model, mesh=dense)


class Run:
    """A model and its AdamW, and their live tensors as a run that begins has them, filled from a seed."""

    def __init__(self, layout: Layout | None, seed: int) -> None:
        self.model = build(layout)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        self.parameters = dict(self.model.named_parameters())
        moments = adamw_tensors(self.optimizer, self.parameters)
        self.tensors = {"model": self.model.state_dict(), "optimizer": moments}
        for name, tensor in self.named():
            tensor.copy_(drawn(name, tensor, seed))

    def named(self) -> Iterator[tuple[str, Tensor]]:
        return ((".".join(path), tensor) for path, tensor in named_tensors(self.tensors))

    def wrong(self, seed: int) -> list[str]:
        """Return the names of the tensors that are not, to the bit, what a seed fills them with."""
        return [name for name, tensor in self.named() if not torch.equal(gathered(tensor), value(name, tensor, seed))]

    def placements(self) -> set[str]:
        return {str(tensor.placements) if isinstance(tensor, DTensor) else "plain" for _, tensor in self.named()}

    def step(self) -> None:
        """Let AdamW make a step with gradients that depend on the names alone."""
        for name, parameter in self.parameters.items():
            parameter.grad = drawn(name, parameter, seed=-1)
        self.optimizer.step()


def value(name: str, like: Tensor, seed: int) -> Tensor:
    """Draw the whole of a tensor from its name: positive, as second moments are."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(like.shape, generator=generator).to(like.dtype)


def drawn(name: str, like: Tensor, seed: int) -> Tensor:
    """Draw the same where `like` is spread over ranks."""
    whole = value(name, like, seed)
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


def gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_and_read(root: Path, layouts: list[Layout]) -> list[tuple[set[str], list[str]]]:
    """Write a state in the first layout and read it in all, and one that a single process wrote; go on from there."""
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    run, found = Run(layouts[0], seed=1), []
    for folder in ("spread", "again"):
        save_state(root / folder, 7, run.tensors, PROGRESS, keep=1, group=group)
    for layout in layouts:
        run, faults = Run(layout, seed=2), []
        for folder, seed in (("single", 3), ("spread", 1)):
            assert load_state(root / folder / "step-00000007", run.tensors, group=group) == PROGRESS
            faults += run.wrong(seed)
        found.append((run.placements(), faults))
        run.step()
        save_state(root / "stepped", 7 + len(found), run.tensors, {}, keep=9, group=group)
    return found


def read_by_all(path: Path, layout: Layout, seed: int) -> list[str]:
    dist.init_process_group("gloo")
    run = Run(layout, seed=2)
    load_state(path, run.tensors, group=dist.new_group(backend="gloo"))
    return run.wrong(seed)


def test_state_of_any_layout_is_read_to_the_bit_in_any_other(tmp_path: Path) -> None:
    save_state(tmp_path / "single", 7, Run(None, seed=3).tensors, PROGRESS, keep=1)
    layouts: list[Layout] = [(1, 2, 2), (1, 1, 4), (1, 4, 1), (2, 1, 2)]
    results = run_ranks(4, write_and_read, tmp_path, layouts)
    assert [faults for found in results for _, faults in found] == [[]] * 16
    experts, dense = "(Shard(dim=1), Shard(dim=0))", "(Shard(dim=0),)"
    copies = {"(Replicate(), Shard(dim=1), Shard(dim=0))", "(Replicate(), Shard(dim=0))"}
    placements = [{experts, dense, "plain"}] * 3 + [copies | {"plain"}]
    assert [found for found, _ in results[3]] == placements, "the layouts are not those of the test's name"

    path = tmp_path / "spread/step-00000007"
    assert sorted(file.name for file in path.glob("*.distcp")) == [f"__{rank}_0.distcp" for rank in range(4)]
    check_state(path)
    run = Run(None, seed=2)
    assert load_state(path, run.tensors) == PROGRESS
    assert run.wrong(seed=1) == []
    assert run_ranks(2, read_by_all, path, (1, 1, 2), 1) == [[], []]

    again = tmp_path / "again/step-00000007"
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        file.name: file.read_bytes() for file in again.iterdir()
    }, "equal states are different files"

    run.step()
    for step in range(8, 12):  # AdamW goes on alike in every layout
        other = Run(None, seed=4)
        load_state(tmp_path / f"stepped/step-{step:08d}", other.tensors)
        for (name, ours), (_, theirs) in zip(run.named(), other.named(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=name)


def write_and_read_strided(root: Path, whole: Tensor) -> tuple[str, bool]:
    """Let FSDP shard the dim that is spread over ranks already: placements that name the axes in the other order."""
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    module = nn.Module()
    part = whole.chunk(2)[mesh["ep"].get_local_rank()].clone()
    module.weight = nn.Parameter(DTensor.from_local(part, mesh["ep"], [Shard(0)], shape=whole.shape, stride=(3, 1)))
    fully_shard(module, mesh=mesh["edp"])
    tensors = module.state_dict()
    path = save_state(root, 1, tensors, {}, keep=1, group=group)
    tensors["weight"].zero_()
    load_state(path, tensors, group=group)
    return str(tensors["weight"].placements), torch.equal(tensors["weight"].full_tensor(), whole)


def test_state_of_a_dim_that_is_sharded_twice_is_read_to_the_bit(tmp_path: Path) -> None:
    whole = torch.randn(10, 3)  # 5 rows for each of ep, of which FSDP makes 3 and 2
    results = run_ranks(4, write_and_read_strided, tmp_path, whole)
    assert results == [("(_StridedShard(dim=0, sf=2), Shard(dim=0))", True)] * 4
    target = {"weight": torch.zeros(10, 3)}
    load_state(tmp_path / "step-00000001", target)
    assert torch.equal(target["weight"], whole)
