"""One process as any rank of many: collectives between them are made up, so that only shapes mean something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fake_ranks(world_size: int, rank: int = 0) -> Iterator[None]:
    """Be `rank` of `world_size` ranks of torch's fake process group, of which nobody else exists.

    Process groups, meshes and DTensors on the meta device are made as in a real run. The group is destroyed at the end.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore  # its import registers the backend

    assert not dist.is_initialized(), "a process that is a rank already cannot be another one"
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
