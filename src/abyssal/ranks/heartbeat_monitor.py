"""Which rank of a run is dead, silent or hangs: rules over heartbeats, without a process or clock of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

#: A rank that lives, but does not lose the others, is blamed after so many times the limit: silent ones come first.
LOST = 1.2
#: A rank at an earlier mark than others is blamed once no rank has moved for so many times the limit.
STILL = 1.5
WAY_OUT = "started again, the run goes on from its newest training state"


class Mark(NamedTuple):
    """What a rank's main thread does."""

    number: int = 0  # among those that it has passed; all ranks pass the same
    name: str = ""
    may_take_long: bool = True


class Heartbeat(NamedTuple):
    """What a rank says of itself, some times within the limit of silence."""

    mark: Mark = Mark()
    lost: bool = False  # its main thread has lost contact with the others, and waits to hear who failed
    done: bool = False  # its work is done, and it may leave


class Failure(NamedTuple):
    """Why the run ends."""

    sentence: str
    rank: int | None = None  # that others found dead, silent or hanging; none: it reported a fault of its own
    reporter: int | None = None


@dataclass
class _Seen:
    """The last that was heard of a rank."""

    place: str  # " (process 4711 on gpu08)"; empty: it has not come yet
    heard: float  # seconds
    moved: float  # when its mark was another, seconds
    heartbeat: Heartbeat


class HeartbeatMonitor:
    """What was heard last of all ranks, and what follows from it."""

    def __init__(self, world_size: int, silence_s: float, now: float) -> None:
        """Begin at `now`, seconds of a clock that stands still while the machine sleeps."""
        self.silence_s = silence_s
        self.seen = {rank: _Seen("", now, now, Heartbeat()) for rank in range(world_size)}
        self._first_lost: float | None = None

    def come(self, rank: int, place: str, now: float) -> None:
        """Take in that a rank has come, and from where."""
        self.seen[rank] = _Seen(f" ({place})", now, now, Heartbeat())

    def hear(self, rank: int, heartbeat: Heartbeat, now: float) -> None:
        """Take in a heartbeat."""
        seen = self.seen[rank]
        if heartbeat.mark.number != seen.heartbeat.mark.number:
            seen.moved = now
        seen.heard, seen.heartbeat = now, heartbeat

    def ended(self, rank: int) -> Failure | None:
        """Take in that a rank's process has ended, and return the failure that it is before its work was done."""
        return None if self.seen[rank].heartbeat.done else self._failure(rank, "its process ended")

    def judge(self, now: float) -> Failure | None:
        """Return the failure of a rank that is silent, or alone in not losing the others, or that all others wait for.

        Ranks that are done are not looked at.
        """
        at_work = {rank: seen for rank, seen in self.seen.items() if not seen.heartbeat.done}
        for rank, seen in at_work.items():
            if now - seen.heard > self.silence_s:
                return self._failure(rank, f"gave no sign of life for {self.silence_s:.0f} s")
        return self._not_lost(at_work, now) or self._behind(at_work, now)

    def _not_lost(self, at_work: dict[int, _Seen], now: float) -> Failure | None:
        """Blame who does not lose the others although these lost contact long ago, as after a collective's limit."""
        there = [rank for rank, seen in at_work.items() if not seen.heartbeat.lost]
        if len(there) == len(at_work):
            return None
        self._first_lost = self._first_lost or now
        if there and now - self._first_lost > LOST * self.silence_s:
            return self._hangs(there[0], now)
        return None

    def _behind(self, at_work: dict[int, _Seen], now: float) -> Failure | None:
        """Blame who stands at the earliest mark, others at later ones, while the whole run stands still."""
        if not at_work or any(now - seen.moved <= STILL * self.silence_s for seen in at_work.values()):
            return None
        marks = {rank: seen.heartbeat.mark for rank, seen in at_work.items()}
        last = min(marks, key=lambda rank: marks[rank].number)
        if marks[last].may_take_long or marks[last].number == max(mark.number for mark in marks.values()):
            return None
        return self._hangs(last, now)

    def _hangs(self, rank: int, now: float) -> Failure:
        seen = self.seen[rank]
        where = f" in {seen.heartbeat.mark.name!r} since {now - seen.moved:.0f} s" if seen.heartbeat.mark.name else ""
        return self._failure(rank, f"hangs{where}: it lives, but does not come to where the others wait for it")

    def _failure(self, rank: int, what: str) -> Failure:
        return Failure(f"rank {rank}{self.seen[rank].place}: {what}; {WAY_OUT}", rank)
