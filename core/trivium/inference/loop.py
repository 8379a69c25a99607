"""The one thread that owns a backend: what is asked goes in through a queue, what is made comes out as events.

A backend is not safe for several threads, and a step of it may take long; so a thread of its own steps it, and the
server's event loop never waits for it. Whoever asked and left is taken out before the next step.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from trivium.errors import BackendError, TriviumError
from trivium.inference.protocol import Backend, Stats
from trivium.inference.sampling import NOTHING_ALLOWED
from trivium.types import Request, TokenEvent

T = TypeVar("T")
BEAT = 0.5
"""Seconds between two signs of life of a thread that has nothing to do."""


def aside(call: Callable[[], T]) -> T:
    """What a call gives, made in a thread that then ends: for whatever computes beside an engine, loading it too.

    OpenMP keeps helpers for each thread that ever computed, and with more of them than cores none waits awake for the
    next operation: the engine, in its own thread, took up to twice as long for a token (LOG.md).
    """
    made: Future[T] = Future()

    def run() -> None:
        try:
            made.set_result(call())
        except BaseException as error:
            made.set_exception(error)

    thread = threading.Thread(target=run, name="aside", daemon=True)
    thread.start()
    try:
        return made.result()
    finally:
        thread.join()  # Ctrl-C too: Python cannot end in the middle of what it computes


class Overloaded(TriviumError):
    """There is no room for another request now; later there may be."""


class EngineFailure(TriviumError):
    """The engine failed on a request that it had taken: nothing that who asked could mend."""


class Reply:
    """What comes of requests that were asked for together. Used in the event loop alone.

    first, last: when the first and the newest event came, by the monotonic clock.
    """

    def __init__(self, loop: EngineLoop, requests: Sequence[Request]) -> None:
        self._loop, self._left = loop, {request.id for request in requests}
        self._events: deque[TokenEvent] = deque()
        self._came = asyncio.Event()
        self._broken: TriviumError | None = None
        self.began, self.first, self.last = time.monotonic(), 0.0, 0.0

    def __aiter__(self) -> Reply:
        return self

    async def __anext__(self) -> TokenEvent:
        """The next event; the end once every request has ended. Raises EngineFailure, and BackendError where the reader
        was too slow or the request's own conditions leave no token to draw."""
        while not self._events:
            if self._broken is not None:
                raise self._broken
            if not self._left:
                raise StopAsyncIteration
            self._came.clear()
            await self._came.wait()
        event = self._events.popleft()
        if event.request_id not in self._left:  # ended from this side
            return await self.__anext__()
        if event.finish_reason is not None:
            self._left.discard(event.request_id)
        if event.error == NOTHING_ALLOWED:  # what was asked leaves nothing to say
            raise BackendError(event.error)
        if event.finish_reason == "error":
            raise EngineFailure(event.error or "the engine failed on this request")
        return event

    def end(self, request_id: str) -> None:
        """One of the requests needs no more."""
        if request_id in self._left:
            self._left.discard(request_id)
            self._loop._forget([request_id])

    def close(self) -> None:
        """None of them needs more."""
        left, self._left = self._left, set()
        self._events.clear()
        self._loop._forget(left)

    def _put(self, event: TokenEvent, most: int) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self._events.append(event)
        if len(self._events) > most:
            self._break(BackendError(f"more than {most} tokens were made and not read; the request was given up"))
            self._loop._forget(self._left)
        self._came.set()

    def _break(self, error: TriviumError) -> None:
        self._broken = self._broken or error
        self._came.set()


class EngineLoop:
    """A backend, its thread, and who waits for what. Every method is for the event loop that `start` was called in.

    most: answers that may be made or waited for at once. most_unread: events of a reply that nobody has read.
    """

    def __init__(self, backend: Backend, *, most: int = 256, most_unread: int = 4096) -> None:
        self.backend, self.most, self.most_unread = backend, most, most_unread
        self.capabilities = backend.capabilities()
        self.stats: Stats = backend.stats()
        """Of the newest step."""
        self.failures = 0
        """Steps that raised."""
        self._replies: dict[str, Reply] = {}
        self._reserved = 0
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._known: set[str] = set()  # what the backend holds; the thread's own
        self._beat = time.monotonic()
        self._stopping = False
        self._refused: str = ""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._events = asyncio.get_running_loop()
        self._thread.start()

    # ---- the event loop's side

    @property
    def live(self) -> int:
        """Answers that are being made or waited for, and room that is reserved for more."""
        return len(self._replies) + self._reserved

    @property
    def age(self) -> float:
        """Seconds since the thread's last sign of life."""
        return time.monotonic() - self._beat

    def healthy(self, stale: float) -> bool:
        """Whether the thread lives and gave a sign of life in the last `stale` seconds."""
        return self._thread.is_alive() and self.age < stale and self.backend.health()

    def full(self, wanted: int = 1) -> bool:
        """Whether there is no room for so many answers."""
        return self.live + wanted > self.most

    def overloaded(self) -> Overloaded:
        """Why nothing is taken now."""
        said = f"{self.live} of {self.most} answers are being made or waited for; try again later"
        return Overloaded(self._refused or said)

    async def ask(self, requests: Sequence[Request]) -> Reply:
        """Have requests answered. Raises Overloaded, and BackendError for what can never be served; then none is."""
        if self._refused or self.full(len(requests)):
            raise self.overloaded()
        reply = Reply(self, requests)
        for request in requests:
            self._replies[request.id] = reply
        try:
            await self._call(lambda: self._add(requests))
        except BaseException:
            reply.close()
            raise
        return reply

    async def call(self, job: Callable[[], T]) -> T:
        """Run `job` in the engine's thread, between two steps. Raises Overloaded, and what it raises."""
        if self._refused or self.full():
            raise self.overloaded()
        self._reserved += 1
        try:
            return await self._call(job, queued=True)
        finally:
            self._reserved -= 1

    def refuse(self, why: str) -> None:
        """Take nothing new from now on; what was taken goes on."""
        self._refused = why

    def break_off(self, why: str) -> None:
        """End whatever is still being answered: its readers get EngineFailure."""
        for reply in set(self._replies.values()):
            reply._break(EngineFailure(why))
        self._forget(list(self._replies))

    async def stop(self) -> None:
        """End the thread, after the step that it is in. Waits for BEAT seconds at most: a step may take long."""
        self.refuse("the server is shutting down")
        self.break_off("the server is shutting down")
        self._stopping = True
        self._orders.put(lambda: None)
        await asyncio.to_thread(self._thread.join, BEAT)

    def _forget(self, ids: Sequence[str] | set[str]) -> None:
        gone = [name for name in ids if self._replies.pop(name, None) is not None]
        if gone:
            self._orders.put(lambda: self._drop(gone))

    async def _call(self, job: Callable[[], T], *, queued: bool = False) -> T:
        done: Future[T] = Future()
        if queued:
            self._orders.put(lambda: self._jobs.append((job, done)))
        else:
            self._orders.put(lambda: _do(job, done))
        waiting = asyncio.wrap_future(done)
        while not waiting.done():
            await asyncio.wait([waiting], timeout=BEAT)
            if not waiting.done() and not self._thread.is_alive():
                done.cancel()
                raise EngineFailure("the engine's thread has died")
        return waiting.result()

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            reply = self._replies.get(event.request_id)
            if reply is None:
                continue
            if event.finish_reason is not None:
                del self._replies[event.request_id]
            reply._put(event, self.most_unread)

    def _died(self, why: str) -> None:
        self.refuse(why)
        replies, self._replies = set(self._replies.values()), {}
        for reply in replies:
            reply._break(EngineFailure(why))

    # ---- the thread's side

    def _add(self, requests: Sequence[Request]) -> None:
        added = []
        try:
            for request in requests:
                self.backend.add(request)
                added.append(request.id)
        except BaseException:
            self._drop(added)
            raise
        self._known.update(added)

    def _drop(self, ids: Sequence[str]) -> None:
        for name in ids:
            self._known.discard(name)
            self.backend.drop(name)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:  # dropping failed, too: there is no backend left to go on with
            self._tell(self._died, f"the engine has stopped: {type(error).__name__}: {error}")

    def _turn(self) -> None:
        """What was asked since the last step, then a step, then at most one job."""
        idle = not (self.backend.busy or self._jobs)
        self._beat = time.monotonic()
        try:
            while True:
                self._orders.get(block=idle, timeout=BEAT)()
                idle = False
        except queue.Empty:
            pass
        self._beat = time.monotonic()
        if self.backend.busy:
            self._step()
        if self._jobs:
            job, done = self._jobs.popleft()
            _do(job, done)
        self.stats = self.backend.stats()

    def _step(self) -> None:
        try:
            events = self.backend.step()
        except Exception as error:  # a backend names the request that fails; here it could not, so all of them do
            self.failures += 1
            why = f"{type(error).__name__}: {error}"
            events = [TokenEvent(name, -1, 0.0, "error", error=why) for name in self._known]
            self._drop([*self._known])
        self._known.difference_update(e.request_id for e in events if e.finish_reason is not None)
        self.stats = self.backend.stats()
        if events:
            self._tell(self._deliver, events)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._events.call_soon_threadsafe(function, *args)
        except RuntimeError:  # nobody listens any more
            self._stopping = True


def _do(job: Callable[[], T], done: Future[T]) -> None:
    if not done.set_running_or_notify_cancel():  # who asked has left
        return
    try:
        done.set_result(job())
    except BaseException as error:
        done.set_exception(error)
