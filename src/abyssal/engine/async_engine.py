"""An engine for an asyncio program: requests in, streams of outputs back, the steps in a thread of their own.

Only that thread touches the engine once it runs. What others ask for waits as a call that the thread makes between two
steps; the outputs of a step go to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from abyssal.engine.engine import Engine
from abyssal.engine.request import Output, Request
from abyssal.engine.sampling import SamplingParameters
from abyssal.engine.statistics import EngineStatistics
from abyssal.errors import AbyssalError, UsageError


class QueueFullError(AbyssalError):
    """As many requests wait as may; this one may be sent again later."""


class DrainingError(AbyssalError):
    """The engine is about to stop: it takes no request any more, or ended this one early."""


class EngineFailedError(AbyssalError):
    """The engine failed by a defect of ours, its cause, and with it every request under way."""


#: While the last step is one that failed, an idle engine tries itself so often.
PROBE_S = 1.0
PROBE = Request([0], SamplingParameters(1, temperature=0))


class OutputStream:
    """The outputs of one request as they come; it ends when all its sequences have.

    Leaving it before, by `aclose` or out of an `async with`, cancels the request and frees its pages.
    """

    def __init__(self, driver: AsyncEngine, num_sequences: int) -> None:
        """Made by `AsyncEngine.submit`."""
        self.num_open = num_sequences  #: sequences that have not ended
        self._driver = driver
        self._ready: deque[Output] = deque()
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Output]:
        """Return this stream."""
        return self

    async def __anext__(self) -> Output:
        """Return the next output.

        Raises:
            AbyssalError: what ended the request before its time.
        """
        while not self._ready:
            if self._error is not None:
                raise self._error
            if not self.num_open:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._ready.popleft()

    async def __aenter__(self) -> OutputStream:
        """Return this stream."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancel what has not ended."""
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel the request if it has not ended; nothing more comes."""
        self._ready.clear()
        self._driver._forget(self)

    def _take(self, outputs: Sequence[Output]) -> None:
        """Add outputs; one with an error ends the request."""
        for output in outputs:
            if output.error is not None:
                self._fail(output.error)
                return
            self._ready.append(output)
            self.num_open -= output.finish_reason is not None
        if not self.num_open:
            self._driver._forget(self)
        self._changed.set()

    def _fail(self, error: BaseException) -> None:
        """End the request by an error, behind what has come already."""
        self._error = error
        self._driver._forget(self)
        self._changed.set()


class AsyncEngine:
    """Runs an engine's steps in a thread while there is work; every method belongs to the event loop's thread.

    Use as `async with AsyncEngine(engine) as driver`, which ends by cancelling what is under way; `drain` before that
    lets it end.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 256) -> None:
        """Take over `engine`; up to `max_waiting` sequences may wait behind those that it can run at a time."""
        if max_waiting < 0:
            raise UsageError(f"max_waiting={max_waiting}: must be at least 0; 0 takes what can run at once")
        self._engine, self._max_sequences = engine, engine.options.max_running + max_waiting
        self._streams: set[OutputStream] = set()
        self._is_draining = False
        self._empty = asyncio.Event()
        self._statistics = engine.statistics()
        self._failure: EngineFailedError | None = None
        self._has_ended = False
        # between the threads, under the condition:
        self._condition = threading.Condition()
        self._calls: list[Callable[[], None]] = []
        self._is_stopping = False
        # of the engine's thread alone:
        self._step_failed = False
        self._by_id: dict[int, OutputStream] = {}
        self._id_of: dict[OutputStream, int] = {}
        self._thread = threading.Thread(target=self._work, name="abyssal-engine", daemon=True)

    async def __aenter__(self) -> AsyncEngine:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancel what is under way and stop the thread."""
        await self.drain(timeout_s=0)
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join)

    # What others ask for

    def submit(self, request: Request) -> OutputStream:
        """Queue a request and return its outputs to come.

        Raises:
            UsageError: the request cannot be.
            QueueFullError: too many wait; DrainingError: the engine is about to stop.
        """
        self._engine.check(request)
        count, most = max(request.num_sequences, 1), self._max_sequences
        if count > most:
            raise UsageError(f"num_sequences={count}: at most {most} texts can run and wait here")
        if self._is_draining or self._has_ended:
            raise DrainingError("the engine is about to stop and takes no further request; try another one")
        if self.num_sequences + count > most:
            raise QueueFullError(f"{self.num_sequences} texts run and wait, of at most {most}; try again later")
        stream = OutputStream(self, count)
        self._streams.add(stream)
        self._empty.clear()
        self._call(lambda: self._add(stream, request))
        return stream

    @property
    def num_sequences(self) -> int:
        """Texts that have not ended."""
        return sum(stream.num_open for stream in self._streams)

    @property
    def statistics(self) -> EngineStatistics:
        """The engine's counts after its latest step."""
        return self._statistics

    @property
    def is_draining(self) -> bool:
        """Whether requests are refused."""
        return self._is_draining

    @property
    def failure(self) -> EngineFailedError | None:
        """Why the engine does not work at present: its last step failed, or its thread has ended."""
        return self._failure

    @property
    def has_ended(self) -> bool:
        """Whether the thread has ended by a fault, so that nothing is served any more."""
        return self._has_ended

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Refuse further requests and wait for those under way; after `timeout_s` end them with a DrainingError.

        Returns:
            Whether all ended by themselves.
        """
        self._is_draining = True
        if not self._streams:
            return True
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            for stream in list(self._streams):
                stream._fail(DrainingError("the engine stops, and this request had not ended in time"))
            return False
        return True

    # Between the threads

    def _call(self, call: Callable[[], None]) -> None:
        """Let the engine's thread make a call before its next step."""
        with self._condition:
            self._calls.append(call)
            self._condition.notify()

    def _forget(self, stream: OutputStream) -> None:
        """Let go of a stream; if its request has not ended, cancel it."""
        if stream not in self._streams:
            return
        self._streams.remove(stream)
        if stream.num_open:
            stream.num_open = 0
            self._call(lambda: self._cancel(stream))
        if not self._streams:
            self._empty.set()

    def _deliver(self, batch: dict[OutputStream, list[Output]], statistics: EngineStatistics) -> None:
        """Hand the outputs of a step to their streams."""
        self._statistics, self._failure = statistics, None
        for stream, outputs in batch.items():
            if stream in self._streams:
                stream._take(outputs)

    def _fail_all(self, failure: EngineFailedError, *, has_ended: bool = False) -> None:
        """End everything under way by a failure of the engine."""
        self._failure, self._has_ended = failure, has_ended
        for stream in list(self._streams):
            stream._fail(failure)

    # The engine's thread

    def _work(self) -> None:
        """Make calls and steps until told to stop.

        A step that fails costs the requests under way; the engine starts again, empty. If that fails too, or something
        asks the process to end, the thread ends, and says so.
        """
        try:
            while True:
                with self._condition:
                    self._condition.wait_for(
                        lambda: self._calls or self._engine.has_work or self._is_stopping,
                        PROBE_S if self._step_failed else None,
                    )
                    calls, self._calls = self._calls, []
                    if self._is_stopping and not calls:
                        return
                self._step(calls)
        except BaseException as error:
            failure = _failure(error, "the engine has ended; start the server again")
            self._loop.call_soon_threadsafe(lambda: self._fail_all(failure, has_ended=True))

    def _step(self, calls: Sequence[Callable[[], None]]) -> None:
        """Make the calls and one step, and send its outputs."""
        try:
            for call in calls:
                call()
            if self._step_failed and not self._engine.has_work:
                self._engine.add(PROBE)
            outputs = self._engine.step()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a native library is no Exception
            self._step_failed = True
            self._by_id.clear()
            self._id_of.clear()
            failure = _failure(error, "send the request again")
            self._loop.call_soon_threadsafe(self._fail_all, failure)
            self._engine.restart()
            return
        self._step_failed = False
        batch: dict[OutputStream, list[Output]] = {}
        for output in outputs:
            if (stream := self._by_id.get(output.request_id)) is not None:
                batch.setdefault(stream, []).append(output)
        for stream in [self._by_id[n] for n in self._by_id if not self._engine.is_open(n)]:
            del self._by_id[self._id_of.pop(stream)]
        self._loop.call_soon_threadsafe(self._deliver, batch, self._engine.statistics())

    def _add(self, stream: OutputStream, request: Request) -> None:
        try:
            request_id = self._engine.add(request)
        except AbyssalError as error:  # of the request's constraint; all else was checked
            self._loop.call_soon_threadsafe(stream._fail, error)
            return
        self._by_id[request_id], self._id_of[stream] = stream, request_id

    def _cancel(self, stream: OutputStream) -> None:
        request_id = self._id_of.pop(stream, None)
        if request_id is not None:
            del self._by_id[request_id]
            self._engine.cancel(request_id)


def _failure(error: BaseException, advice: str) -> EngineFailedError:
    failure = EngineFailedError(f"the engine's step failed ({type(error).__name__}); {advice}")
    failure.__cause__ = error
    return failure
