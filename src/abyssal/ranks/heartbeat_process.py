"""The process beside each rank that gives its heartbeats, and ends the rank when the run has failed.

It imports the standard library only, so it starts in 0.15 s and takes 14 MB, and nothing that holds up the rank's
interpreter holds it up. It watches its own rank: a process that has ended is reported at once, and while it is stopped
there are no heartbeats. The process of the first rank hears those of all, and says who failed; each kills its own rank
then, unless that ends by itself. Messages are lines of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

from abyssal.ranks.heartbeat_monitor import WAY_OUT, Failure, Heartbeat, HeartbeatMonitor, Mark

#: How long a rank has to end by itself, once a failure is known, seconds.
GRACE_S = 10.0
#: Heartbeats within the limit of silence.
HEARTBEATS = 15
#: How a rank's mark lies in the memory that it shares: number, whether it may take long, the name's length, the name.
MARK = struct.Struct("<Q?B200s")
LONGEST_LINE = 1 << 16


class Settings(NamedTuple):
    """What a rank's heartbeat process is started with."""

    rank: int
    world_size: int
    first_of_machine: bool
    silence_s: float
    token: str  # of this attempt of the launch; who does not know it is not heard
    process: int  # the rank's
    store: tuple[str, int]  # host and port of the launch's store, to which the first rank's own address is found


class Connection:
    """A socket that lines of JSON come from and go to; nothing here waits."""

    def __init__(self, stream: socket.socket) -> None:
        """Take over a stream socket."""
        self.stream, self._rest = stream, b""
        self.rank: int | None = None  # who speaks, once it has said so
        stream.setblocking(False)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; to one that has ended, or takes nothing any more, it is lost, and its silence tells."""
        with suppress(OSError):
            self.stream.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have come, none where the other end is gone or no sense comes from it."""
        try:
            while chunk := self.stream.recv(LONGEST_LINE):
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                if lines:
                    return [dict(json.loads(line)) for line in lines]
                if len(self._rest) > LONGEST_LINE:
                    return None
        except BlockingIOError:
            return []
        except (OSError, ValueError, TypeError):  # gone, or none of ours
            pass
        return None


class HeartbeatProcess:
    """One rank's; of the first rank, also the one that hears all."""

    def __init__(self, settings: Settings, control: socket.socket, mark: mmap) -> None:
        """Speak with the rank over `control` and read its mark from shared memory."""
        self.settings, self.control, self.mark = settings, Connection(control), mark
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ, self._hear_rank)
        self.server: Connection | None = None  # to the first rank's process
        self.heard = time.monotonic()  # when it last answered
        self.clients: list[Connection] = []
        self.monitor: HeartbeatMonitor | None = None
        self.lost = self.done = self.leaves = self.rank_ended = False
        self.failure: Failure | None = None
        self.kill_at: float | None = None
        self.end_at: float | None = None

    def run(self) -> None:
        """Go on until the rank has ended, and all who wait for it have heard of that."""
        next_beat, interval = 0.0, self.settings.silence_s / HEARTBEATS
        if self.settings.rank == 0:
            self._listen()
        while self.end_at is None or (self.clients and time.monotonic() < self.end_at):
            for key, _ in self.selector.select(min(interval, 0.2)):
                if self.selector.get_map().get(key.fd) is key:  # not dropped by one before it
                    key.data(key.fileobj)
            now = time.monotonic()
            if not self.rank_ended and os.getppid() != self.settings.process:
                self._hear_rank()  # what it said before
                self._end_of_rank()
            if now >= next_beat and not is_stopped(self.settings.process):
                next_beat = now + interval
                self._beat()
            self._look(now)

    # The rank beside

    def _hear_rank(self, _: socket.socket | None = None) -> None:
        if self.rank_ended:
            return
        messages = self.control.receive()
        for message in messages or []:
            if "connect" in message:
                self._connect(message["connect"])
            elif "report" in message:
                self.leaves = True
                self._say({"report": message["report"]})
            else:
                self.lost, self.done = self.lost or "lost" in message, self.done or "done" in message
                self.leaves = self.leaves or self.lost
                self._beat()
        if messages is None:
            self._end_of_rank()

    def _end_of_rank(self) -> None:
        """Say that the rank's process has ended; it may be a connection that is closed by one that lives on."""
        if not self.rank_ended:
            self.rank_ended, self.kill_at = True, None
            self.selector.unregister(self.control.stream)
            self._say({"ended": True})
            self.end_at = time.monotonic() + GRACE_S
            if self.server is not None and self.settings.rank:
                self._drop(self.server)

    def _look(self, now: float) -> None:
        """Find a failure, and kill the rank where it does not end by itself."""
        limit = self.settings.silence_s
        if self.monitor is not None and self.failure is None and (failure := self.monitor.judge(now)):
            self._decide(failure)
        if self.server is not None and self.settings.rank and now - self.heard > limit and not self.done:
            self._miss_first(f"gave no sign of life for {limit:.0f} s")
        if self.kill_at is not None and now >= self.kill_at and not self.leaves:
            self.kill_at = None
            with suppress(ProcessLookupError):
                os.kill(self.settings.process, signal.SIGKILL)

    # The first rank's process, as the others see it

    def _connect(self, address: tuple[str, int]) -> None:
        try:
            stream = socket.create_connection(address, timeout=self.settings.silence_s)
        except OSError as error:
            return self._miss_first(f"its heartbeat process at {address[0]}:{address[1]} cannot be reached ({error})")
        self.server, self.heard = Connection(stream), time.monotonic()
        self.selector.register(stream, selectors.EVENT_READ, self._hear_first)
        place = f"process {self.settings.process} on {socket.gethostname()}"
        self._say({"token": self.settings.token, "rank": self.settings.rank, "place": place})
        self._beat()

    def _hear_first(self, _: socket.socket) -> None:
        assert self.server is not None
        messages = self.server.receive()
        self.heard = time.monotonic()
        for message in messages or []:
            if "failure" in message:
                self._take(Failure(*message["failure"]))
        if messages is None:
            self._drop(self.server)
            self._hear_rank()  # that it is done was said before the first could leave
            if not self.done:
                self._miss_first("its process ended, or the connection to it broke")

    def _say(self, message: dict[str, Any]) -> None:
        if self.server is not None:
            self.server.send(message)

    def _beat(self) -> None:
        number, may_take_long, length, name = MARK.unpack(self.mark[: MARK.size])
        mark = Mark(number, name[:length].decode(errors="replace"), may_take_long)
        self._say({"heartbeat": Heartbeat(mark, self.lost, self.done)})

    def _miss_first(self, what: str) -> None:
        """Fail without the first rank, each machine for itself."""
        if self.failure is None:
            failure = Failure(f"rank 0: {what}; {WAY_OUT}", 0)
            if self.settings.first_of_machine or self.settings.rank == 1:
                show(failure)
            self._take(failure)

    def _take(self, failure: Failure) -> None:
        """Tell the rank of a failure, and let it end."""
        if self.failure is None:
            self.failure = failure
            self.control.send({"failure": failure})
            self.kill_at = time.monotonic() + (0.0 if failure.rank == self.settings.rank else GRACE_S)

    # The first rank's process

    def _listen(self) -> None:
        """Wait for all ranks, this one's own process among them, and tell the rank the address."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each rank has a connection
        if dual := socket.has_dualstack_ipv6():
            listener = socket.create_server(("", 0), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=dual)
        else:
            listener = socket.create_server(("", 0), backlog=4096)
        self.selector.register(listener, selectors.EVENT_READ, self._accept)
        self.monitor = HeartbeatMonitor(self.settings.world_size, self.settings.silence_s, time.monotonic())
        self.control.send({"address": [own_host(*self.settings.store), listener.getsockname()[1]]})

    def _accept(self, listener: socket.socket) -> None:
        try:
            client = Connection(listener.accept()[0])
        except OSError:  # gone again
            return
        self.selector.register(client.stream, selectors.EVENT_READ, lambda _: self._hear(client))
        self.clients.append(client)

    def _hear(self, client: Connection) -> None:
        assert self.monitor is not None
        now, messages = time.monotonic(), client.receive()
        for message in messages or []:
            if client.rank is None:
                if message.get("token") != self.settings.token:
                    return self._drop(client)
                client.rank = message["rank"]
                self.monitor.come(message["rank"], message["place"], now)
            elif "heartbeat" in message:
                mark, *rest = message["heartbeat"]
                self.monitor.hear(client.rank, Heartbeat(Mark(*mark), *rest), now)
                client.send({})
            elif "report" in message:
                self._decide(Failure(message["report"], None, client.rank))
            elif "ended" in message:
                messages = None
        if messages is None:
            self._drop(client)
            if client.rank is not None and (failure := self.monitor.ended(client.rank)):
                self._decide(failure)
        elif self.failure is not None:
            client.send({"failure": self.failure})  # it may have come too late to hear of it

    def _decide(self, failure: Failure) -> None:
        """Make this the failure of the run, unless there is one already, and tell all."""
        if self.failure is None:
            if failure.rank is not None:
                show(failure)
            for client in self.clients:
                client.send({"failure": failure})
            self._take(failure)

    def _drop(self, connection: Connection) -> None:
        self.selector.unregister(connection.stream)
        connection.stream.close()
        if connection is self.server:
            self.server = None
        else:
            self.clients.remove(connection)


def is_stopped(process: int) -> bool:
    """Whether a process of this machine was stopped by a signal, or by a debugger."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:  # it has ended, or this is not Linux
        import subprocess

        state = subprocess.run(["ps", "-o", "state=", "-p", str(process)], capture_output=True, text=True).stdout
    return state.strip()[:1] in ("T", "t")


def own_host(host: str, port: int) -> str:
    """Return the address by which others than this machine reach it: the one from which it would speak to the store.

    Empty where that is this machine's own: then others reach it as they reach the store.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
    return "" if own.startswith("127.") or own == "::1" else own


def show(failure: Failure) -> None:
    """Write the sentence of a failure where the rank writes."""
    os.write(2, f"error: {failure.sentence}\n".encode())


def main() -> None:
    """Run as `heartbeat.Heartbeats` starts it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # what ends a rank reaches this process with its end
    control, memory, settings = int(sys.argv[1]), int(sys.argv[2]), Settings(*json.loads(sys.argv[3]))
    HeartbeatProcess(settings, socket.socket(fileno=control), mmap(memory, MARK.size)).run()
