"""What several ranks do as one: each does its part, the first of them decides, and all go on or all fail."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist

from abyssal.errors import AbyssalError, CheckpointError, RankError

T = TypeVar("T")
R = TypeVar("R")

#: How long the first rank waits for what another has to say; the others wait for its answer twice as long, since it is
#: the one that can tell who is silent.
TIMEOUT_S = 1800.0
WAY_OUT = "resume from the newest training state"


@dataclass(frozen=True)
class _Fault:
    """What a rank says instead of a value; the sentence names the rank."""

    sentence: str
    error: ClassVar[type[AbyssalError]] = CheckpointError


class Agreement:
    """What the ranks that share a training state agree on; without a group, this process alone.

    Messages go to and from the first rank only, each over a connection of its own. A dead rank is thus known by its
    number, at once; a collective would say that a connection broke, and leave most ranks waiting.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Speak over `group`, which has a backend for the CPU (gloo) and which nobody else uses meanwhile."""
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def name(self, rank: int) -> str:
        """Return how a rank of the group is called among all ranks."""
        return f"rank {rank if self.group is None else dist.get_global_rank(self.group, rank)}"

    def deal(self, part: Callable[[], T], decide: Callable[[list[T]], Sequence[R]]) -> R:
        """Run `part` on every rank, then `decide` on the first with what all returned, in the order of their ranks.

        Returns:
            This rank's share of what `decide` returned: one value a rank.

        Raises:
            CheckpointError: on every rank, where one of them failed; names the rank.
            RankError: on every rank, where one of them is gone; names the rank, the first where that is who is missed.
            BaseException: what is no `AbyssalError`, on the rank that met it, as it came.
        """
        if self.group is None:
            return decide([part()])[0]
        own: BaseException | None = None
        message: Any
        try:
            message = part()
        except BaseException as error:  # Ctrl-C too: the others wait for a word
            own, message = error, self._fault(error)
        if self.rank > 0:
            answer = self._ask(message)
        else:
            messages = [message, *self._hear()]
            answers: Sequence[Any]
            if faults := [found for found in messages if isinstance(found, _Fault)]:
                answers = [_joined(faults)] * self.size
            else:
                try:
                    answers = decide(messages)
                except BaseException as error:
                    own, answers = error, [self._fault(error)] * self.size
            self._answer(answers, messages)
            answer = answers[0]
        if isinstance(answer, _Fault):
            if own is not None and not isinstance(own, AbyssalError):
                raise own
            raise answer.error(answer.sentence) from own
        return answer  # type: ignore[no-any-return]

    def agree(self, part: Callable[[], T], decide: Callable[[list[T]], R]) -> R:
        """Do the same where every rank gets what `decide` returned."""
        return self.deal(part, lambda found: [decide(found)] * self.size)

    def together(self, part: Callable[[], T]) -> T:
        """Run `part` on every rank and return what it returned here, once none has failed."""
        found: list[T] = []
        self.agree(lambda: found.append(part()), lambda _: None)
        return found[0]

    def first(self, part: Callable[[], R]) -> R:
        """Run `part` on the first rank alone, and return on every rank what it returned."""
        return self.agree(lambda: None, lambda _: part())

    # Messages

    def _hear(self) -> list[Any]:
        """Return what each other rank says; a fault in place of one that is gone.

        One that is silent ends it: gloo then breaks every connection of the group, and the others learn no more than
        that of rank 0 did.
        """
        deadline, messages = time.monotonic() + TIMEOUT_S, list[Any]()
        for rank in range(1, self.size):
            try:  # a message that waits already takes less than the second that is always left for it
                messages.append(self._receive(rank, max(deadline - time.monotonic(), 1.0)))
            except RuntimeError as error:
                if "Timed out" in str(error):
                    return [_Lost(f"{self.name(rank)}: gives no answer; {WAY_OUT}")] * (self.size - 1)
                why = "its process ended, or the connection to it broke"
                messages.append(_Lost(f"{self.name(rank)}: {why}; {WAY_OUT}"))
        return messages

    def _answer(self, answers: Sequence[Any], messages: Sequence[Any]) -> None:
        """Send each other rank its answer.

        One that cannot be reached is passed over: what was decided holds, and whoever needs it next will miss it.
        """
        for rank, (answer, message) in enumerate(zip(answers, messages, strict=True)):
            if rank > 0 and not isinstance(message, _Lost):
                with suppress(RuntimeError):
                    self._send(rank, answer, TIMEOUT_S)

    def _ask(self, message: Any) -> Any:
        """Say something to the first rank and return its answer."""
        try:
            self._send(0, message, 2 * TIMEOUT_S)
            return self._receive(0, 2 * TIMEOUT_S)
        except RuntimeError:
            why = "its process ended, or it gave up waiting for another rank"
            return _Lost(f"{self.name(0)}: {why}; {WAY_OUT}")

    def _send(self, rank: int, message: Any, seconds: float) -> None:
        """Send a message; ends when it is received."""
        data = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        for part in (torch.tensor([len(data)]), data):
            work = dist.isend(part, group=self.group, group_dst=rank)
            assert work is not None
            work.wait(timedelta(seconds=seconds))

    def _receive(self, rank: int, seconds: float) -> Any:
        """Return a message of one of our own ranks, which is trusted as this process is."""
        length = torch.zeros(1, dtype=torch.int64)
        self._fill(length, rank, seconds)
        data = torch.empty(int(length), dtype=torch.uint8)
        self._fill(data, rank, TIMEOUT_S)
        return pickle.loads(data.numpy().tobytes())

    def _fill(self, data: torch.Tensor, rank: int, seconds: float) -> None:
        work = dist.irecv(data, group=self.group, group_src=rank)
        assert work is not None
        work.wait(timedelta(seconds=seconds))

    # Faults

    def _fault(self, error: BaseException) -> _Fault:
        known = isinstance(error, AbyssalError)
        return _Fault(f"{self.name(self.rank)}: {error if known else first_line(error)}")


class _Lost(_Fault):
    """Said about a rank, not by it."""

    error = RankError


def _joined(faults: Sequence[_Fault]) -> _Fault:
    told = [fault for fault in faults if not isinstance(fault, _Lost)] or faults  # what a rank says of itself, first
    more = len(set(faults)) - 1
    return type(told[0])(told[0].sentence + (f" (and {more} more rank{'s' * (more > 1)})" if more else ""))


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
