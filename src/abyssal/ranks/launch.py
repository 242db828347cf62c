"""What the launcher says that this process is: by torchrun's environment variables, or those of a scheduler alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from abyssal.errors import UsageError

#: What launchers say where nobody named the launch.
NO_ID = ("", "none")


@dataclass(frozen=True)
class Launch:
    """This process among those of its launch; by default it is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    host: str = "127.0.0.1"  # of the store through which the ranks find each other
    port: int = 0
    id: str = ""  # equal however often the launcher starts its processes again; none: it does not say
    agent_store: bool = False  # the launcher holds the store, and it outlives the ranks


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Return what the launcher says about this process, or one that is alone.

    Raises:
        UsageError: a part of it is missing or no number.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Launch()
    numbers = {}
    for name, default in (
        ("RANK", None),
        ("WORLD_SIZE", None),
        ("LOCAL_RANK", "0"),
        ("LOCAL_WORLD_SIZE", "1"),
        ("MASTER_PORT", "0" if environment["WORLD_SIZE"] == "1" else None),
    ):
        value = environment.get(name, default)
        if value is None or not value.isdecimal():
            raise UsageError(
                f"{name}={value or ''}: must be a number, since RANK is set; start with torchrun, or unset RANK"
            )
        numbers[name] = int(value)
    if not numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise UsageError(f"RANK={numbers['RANK']}: must be below WORLD_SIZE={numbers['WORLD_SIZE']}")
    run_id = environment.get("TORCHELASTIC_RUN_ID", "")
    return Launch(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_world_size=numbers["LOCAL_WORLD_SIZE"],
        host=environment.get("MASTER_ADDR", Launch.host),
        port=numbers["MASTER_PORT"],
        id="" if run_id in NO_ID else run_id,
        agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )
