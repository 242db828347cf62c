"""A directory that several ranks write together: planned once, each rank's part by itself, put in place once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from abyssal.errors import AbyssalError
from abyssal.files.faults import os_faults
from abyssal.ranks.ranks import Ranks

Offer = TypeVar("Offer")
Plan = TypeVar("Plan")
Written = TypeVar("Written")


class JointWrite(ABC, Generic[Offer, Plan, Written]):
    """The steps of one write, as a format fills them in: every rank offers and writes, the first plans and finishes.

    Only the first rank makes the staging folder, holds its lock and renames it. Whichever rank is killed, and whenever,
    there is the whole directory or what was there before, and the next write removes what was left.
    """

    #: What a fault of the disk becomes, and what could not be done then.
    fault: ClassVar[type[AbyssalError]]
    doing: ClassVar[str]

    def __init__(self, ranks: Ranks, target: Path) -> None:
        """Prepare to write the directory `target`, which all of `ranks` see."""
        self.ranks, self.target = ranks, target

    @abstractmethod
    def offer(self) -> Offer:
        """Return what this rank holds; on every rank."""

    @abstractmethod
    def plan(self, offers: Sequence[Offer]) -> Sequence[Plan]:
        """Return what each rank writes; on the first, before anything is on the disk."""

    @abstractmethod
    def staging(self) -> AbstractContextManager[Path]:
        """Yield the folder to write into, which takes its place when the context ends; on the first."""

    @abstractmethod
    def write(self, folder: Path, plan: Plan) -> Written:
        """Write this rank's part, flushed to the disk; on every rank."""

    @abstractmethod
    def finish(self, folder: Path, written: Sequence[Written]) -> str | None:
        """Add what is no rank's own, and return why the directory must not appear, if it must not; on the first."""

    def run(self) -> None:
        """Take all steps, together with the other ranks: the directory appears whole or not at all.

        Raises:
            AbyssalError: on all ranks, `fault` where one of them could not.
            RankError: a rank is gone.
        """
        with ExitStack() as stack:
            name, plan = self.ranks.scatter(self.offer, lambda offers: self._begin(offers, stack))
            folder = self.target.resolve().with_name(name)
            refusal = self.ranks.agree(
                lambda: self._write(folder, plan), lambda written: self._finish(folder, written, stack)
            )
            if refusal is not None:
                raise self.fault(refusal)

    def _begin(self, offers: Sequence[Offer], stack: ExitStack) -> list[tuple[str, Plan]]:
        plans = self.plan(offers)
        with os_faults(self.fault, self.target, self.doing):
            folder = stack.enter_context(self.staging())
        return [(folder.name, plan) for plan in plans]

    def _write(self, folder: Path, plan: Plan) -> Written:
        if not folder.is_dir():
            raise self.fault(
                f"{self.target}: what the first rank makes there is not seen here; all ranks of a run need one file "
                "system"
            )
        with os_faults(self.fault, self.target, self.doing):
            return self.write(folder, plan)

    def _finish(self, folder: Path, written: Sequence[Written], stack: ExitStack) -> str | None:
        with os_faults(self.fault, self.target, self.doing):
            refusal = self.finish(folder, written)
            if refusal is None:
                stack.close()
        return refusal
