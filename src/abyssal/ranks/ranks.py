"""What the ranks of a run say to one another beside its gradients: sums, decisions, faults, work of the first alone."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from abyssal.errors import AbyssalError, RankError, first_line
from abyssal.ranks.heartbeat import Heartbeats
from abyssal.ranks.launch import Launch

T = TypeVar("T")
R = TypeVar("R")

#: How long the first rank waits for what another has to say; the others wait for its answer twice as long, since it is
#: the one that can tell who is silent.
TIMEOUT_S = 1800.0
#: How long ranks wait for work that the first does for all, such as preparing data.
FIRST_TIMEOUT_S = 7 * 86400.0
WAY_OUT = "resume from the newest training state"


@dataclass(frozen=True)
class _Fault:
    """What a rank sends instead of a value."""

    error: type[AbyssalError]
    sentence: str
    lost: bool = False  # said about a rank, not by it


class Ranks:
    """The ranks that do something together; one process without a group is the only one, and nothing here costs it.

    Values are summed over `group`. Everything else are messages over `control`, to and from the first rank only, each
    over a connection of its own. A dead rank is thus known by its number, at once; a collective would say that a
    connection broke, and leave most ranks waiting. A fault of one rank is raised on all.
    """

    def __init__(
        self,
        control: dist.ProcessGroup | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        launch: Launch | None = None,
        heartbeats: Heartbeats | None = None,
    ) -> None:
        """Take the ranks of `control`, which has a backend for the CPU (gloo) and which nobody else uses meanwhile.

        Args:
            control: none: this process alone.
            group: of the same ranks, for sums, which may be on other devices; `control` if not given.
            launch: what the launcher says about this process.
            heartbeats: that marks travel with.
        """
        self.control, self.group, self.launch = control, group or control, launch or Launch()
        self._heartbeats = heartbeats
        self.rank, self.world_size = (0, 1)
        if control is not None:
            self.rank, self.world_size = dist.get_rank(control), dist.get_world_size(control)

    @classmethod
    def of_world(cls, launch: Launch | None = None, heartbeats: Heartbeats | None = None) -> Self:
        """Return those of the default process group, if there is one; called by all ranks."""
        if not dist.is_initialized():
            return cls(launch=launch)
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=FIRST_TIMEOUT_S))
        return cls(control, group=dist.group.WORLD, launch=launch, heartbeats=heartbeats)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks, and writes what is written once."""
        return self.rank == 0

    @property
    def local_world_size(self) -> int:
        """How many ranks of the launch are on this machine."""
        return self.launch.local_world_size

    def name(self, rank: int) -> str:
        """Return how a rank is called among all ranks."""
        return f"rank {rank if self.control is None else dist.get_global_rank(self.control, rank)}"

    def mark(self, name: str, *, may_take_long: bool = False) -> None:
        """Say what this rank does next, so that a rank that hangs is named with it: "forward", "dispatch of layer 7".

        All ranks pass the same marks in the same order, from their main threads. Costs a microsecond, in one process
        nothing. Where the whole run has stood still for a while, a rank at an earlier mark than others is named and the
        run ends; not at a mark that comes for the first time, at which a machine compiles and allocates, nor at one
        that `may_take_long`: data preparation, evaluation, reading and writing states and exports.
        """
        if self._heartbeats is not None:
            self._heartbeats.mark(name, may_take_long=may_take_long)

    # Values of every rank

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks, in place where there are several."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def most(self, value: int) -> int:
        """Return the largest of all ranks' values; they come to this at about the same time."""
        if self.world_size == 1:
            return value
        largest = torch.tensor([value])
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)  # not over `control`: its patience would hide a hang
        return int(largest)

    # Work that all do or none

    def first(self, work: Callable[[], R]) -> R:
        """Let the first rank do `work`, and return its result on all; they wait as long as it takes.

        Raises:
            AbyssalError: what the work raised, on all ranks.
            RankError: it raised something else, or the first rank is gone; on the first as it came.
        """
        if self.control is None:
            return work()
        if not self.is_first:
            return self._accept(self._hear_first(FIRST_TIMEOUT_S))  # type: ignore[no-any-return]
        error, answer = self._attempt(work, of_all=True)
        self._answer([answer] * self.world_size)
        if error is not None:
            raise error
        return answer  # type: ignore[no-any-return]

    def scatter(self, part: Callable[[], T], decide: Callable[[list[T]], Sequence[R]]) -> R:
        """Run `part` on every rank, then `decide` on the first with what all returned, in the order of their ranks.

        Returns:
            This rank's own of what `decide` returned: one value a rank.

        Raises:
            AbyssalError: on every rank, of the class that the first of them met; names the rank.
            RankError: the same of anything else that a rank met, and where a rank is gone: the first, where that is who
                is missed. What is no `AbyssalError` is raised as it came on the rank that met it.
        """
        if self.control is None:
            return decide([part()])[0]
        error, message = self._attempt(part)
        if not self.is_first:
            answer = self._ask_first(message)
        else:
            messages = [message, *self._hear_others()]
            answers: Any = None
            if faults := [answered for answered in messages if isinstance(answered, _Fault)]:
                answers = _combined(faults)
            else:
                error, answers = self._attempt(lambda: decide(messages))
            if isinstance(answers, _Fault):
                answers = [answers] * self.world_size
            lost = {rank for rank, answered in enumerate(messages) if isinstance(answered, _Fault) and answered.lost}
            self._answer(answers, lost)
            answer = answers[0]
        return self._accept(answer, error)  # type: ignore[no-any-return]

    def agree(self, part: Callable[[], T], decide: Callable[[list[T]], R]) -> R:
        """Do the same where every rank gets what `decide` returned."""
        return self.scatter(part, lambda results: [decide(results)] * self.world_size)

    def together(self, part: Callable[[], T]) -> T:
        """Run `part` on every rank and return what it returned here, once none has failed."""
        results: list[T] = []
        self.agree(lambda: results.append(part()), lambda _: None)
        return results[0]

    # Messages

    def _hear_others(self) -> list[Any]:
        """Return what each other rank says; a fault in place of one that is gone.

        One that is silent ends it: gloo then breaks every connection of the group, and the others learn no more than
        that of rank 0 did.
        """
        deadline, messages = time.monotonic() + TIMEOUT_S, list[Any]()
        for rank in range(1, self.world_size):
            try:  # a message that waits already takes less than the second that is always left for it
                messages.append(self._receive(rank, max(deadline - time.monotonic(), 1.0)))
            except RuntimeError as error:
                if "Timed out" in str(error):
                    return [self._lost(rank, "gives no answer")] * (self.world_size - 1)
                messages.append(self._lost(rank, "its process ended, or the connection to it broke"))
        return messages

    def _answer(self, answers: Sequence[Any], lost: set[int] | frozenset[int] = frozenset()) -> None:
        """Send each other rank its answer.

        One that cannot be reached is passed over: what was decided holds, and whoever needs it next will miss it.
        """
        for rank, answer in enumerate(answers):
            if rank > 0 and rank not in lost:
                with suppress(RuntimeError):
                    self._send(rank, answer, TIMEOUT_S)

    def _ask_first(self, message: Any) -> Any:
        """Say something to the first rank and return its answer."""
        try:
            self._send(0, message, 2 * TIMEOUT_S)
        except RuntimeError:
            return self._first_is_lost()
        return self._hear_first(2 * TIMEOUT_S)

    def _hear_first(self, seconds: float) -> Any:
        try:
            return self._receive(0, seconds)
        except RuntimeError:
            return self._first_is_lost()

    def _send(self, rank: int, message: Any, seconds: float) -> None:
        """Send a message; ends when it is received."""
        data = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        for part in (torch.tensor([len(data)]), data):
            work = dist.isend(part, group=self.control, group_dst=rank)
            assert work is not None
            work.wait(timedelta(seconds=seconds))

    def _receive(self, rank: int, seconds: float) -> Any:
        """Return a message of one of our own ranks, which is trusted as this process is."""
        length = torch.zeros(1, dtype=torch.int64)
        self._fill(length, rank, seconds)
        data = torch.empty(int(length), dtype=torch.uint8)
        self._fill(data, rank, TIMEOUT_S)
        return pickle.loads(data.numpy().tobytes())

    def _fill(self, data: Tensor, rank: int, seconds: float) -> None:
        work = dist.irecv(data, group=self.control, group_src=rank)
        assert work is not None
        work.wait(timedelta(seconds=seconds))

    # Faults

    def _attempt(self, work: Callable[[], Any], *, of_all: bool = False) -> tuple[BaseException | None, Any]:
        """Return what `work` raised, and the message about it; the message is its result where it raised nothing."""
        try:
            return None, work()
        except BaseException as error:  # Ctrl-C too: the others wait for a message
            if not isinstance(error, AbyssalError):
                return error, _Fault(RankError, f"{self.name(self.rank)}: {first_line(error)}")
            plain = next(kind for kind in type(error).__mro__ if "__init__" not in vars(kind))  # made of a sentence
            return error, _Fault(plain, str(error) if of_all else f"{self.name(self.rank)}: {error}")

    def _accept(self, answer: Any, error: BaseException | None = None) -> Any:
        """Return an answer, or raise the fault that it is."""
        if not isinstance(answer, _Fault):
            return answer
        if error is not None and not isinstance(error, AbyssalError):
            raise error
        raise answer.error(answer.sentence) from error

    def _lost(self, rank: int, what: str) -> _Fault:
        return _Fault(RankError, f"{self.name(rank)}: {what}; {WAY_OUT}", lost=True)

    def _first_is_lost(self) -> _Fault:
        return self._lost(0, "its process ended, or it gave up waiting for another rank")


def _combined(faults: Sequence[_Fault]) -> _Fault:
    told = [fault for fault in faults if not fault.lost] or faults  # what a rank says of itself, first
    more = len(set(faults)) - 1
    return _Fault(told[0].error, told[0].sentence + (f" (and {more} more rank{'s' * (more > 1)})" if more else ""))


#: One process.
ALONE = Ranks()
