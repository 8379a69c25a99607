"""Items of training data in order, made by the training process or by workers: the same items either way.

An item is a pure function of its number, so workers need no coordination: worker w of n makes items w, w + n, w + 2n,
... What goes wrong in one ends the run with a sentence that names the sample: what is wrong with the data in the words
of who found it, the same from a worker as from here. A worker that is stuck does not keep a signal from ending the run,
since an item that is not here yet is lost work of nobody.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

from trivium.data.transfer import pack, receive, send, share
from trivium.data.worker import SLOT
from trivium.disk import cache_folder, make_folder
from trivium.errors import DataError
from trivium.types import TokenBatch

BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL = 0.1
"""Seconds between looks at workers and signals while an item is waited for."""
START = 300.0
"""Seconds a worker may take to start: imports, on a slow disk."""
PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from trivium.data.worker import main
main(*map(int, sys.argv[2:]))
"""


ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""A worker's libraries start no threads: there are as many workers as somebody wanted at work."""
PLACES = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE "
    "MASTER_ADDR MASTER_PORT".split()
)
"""Variables that tell a process its place in a group: a worker has none, and what it imports must not take it for the
process that started it."""


class Items(Protocol):
    """What makes items by their numbers. sample_id: the id of an item's first sample, for errors."""

    def __getitem__(self, number: int, /) -> Any: ...

    def sample_id(self, number: int, /) -> str: ...


class Interrupted(Exception):
    """A signal came while an item was waited for."""


class StepLoader:
    """Iterates over `items` of `steps`. Its length is known, so no item is lost at a resume.

    workers: processes that make items; 0 makes them in this one. prefetch: items each of them makes ahead. timeout:
    seconds to wait for one item. pin: put batches into page-locked memory, for a GPU to fetch beside computing.
    interrupted: asked while waiting for a worker; True ends the iteration. here: so many of the first items are made by
    this process, while the workers start.
    """

    def __init__(
        self,
        steps: Items,
        items: range,
        *,
        workers: int = 0,
        prefetch: int = 2,
        timeout: float = 300.0,
        pin: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
        here: int = 0,
    ) -> None:
        self.steps, self.items, self.workers, self.prefetch = steps, items, workers, prefetch
        self.timeout, self.pin, self.interrupted = timeout, pin, interrupted
        self.here = min(here, len(items))
        self._fleet: list[_Worker] = []

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        made = self._from_workers() if self.workers else self._made_here(self.items)
        return (_pinned(item) for item in made) if self.pin else made

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        while self._fleet:
            self._fleet.pop().end()

    def _made_here(self, items: range) -> Iterator[Any]:
        for item in items:
            try:
                made = self.steps[item]
            except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
                raise DataError(f"{self._named(item)} cannot be made: {type(error).__name__}: {error}") from error
            yield made

    def _from_workers(self) -> Iterator[Any]:
        self.close()
        folder, theirs = make_folder(cache_folder()), self.items[self.here :]
        try:
            with tempfile.TemporaryFile(dir=folder) as shared:
                shared.write(bytes(self.workers * SLOT))
                data = share(self.steps, shared)
                start = shared.seek(0, os.SEEK_END)
                shared.write(data)
                shared.flush()
                for number in range(self.workers):
                    items = theirs[number :: self.workers]
                    task = (number, items, self.prefetch, start, len(data))
                    self._fleet.append(_Worker(number, items, task, shared.fileno()))
                yield from self._made_here(self.items[: self.here])
                yield from self._received(shared, theirs)
        except Interrupted:
            return
        except OSError as error:
            raise DataError(f"the data cannot be shared with workers through {folder}: {error.strerror}") from error
        finally:
            self.close()

    def _received(self, shared: BinaryIO, items: range) -> Iterator[Any]:
        for position, item in enumerate(items):
            worker = self._fleet[position % self.workers]
            self._look(shared)
            if not worker.ready:
                self._next(worker, shared, item, START)
                worker.ready = True
            yield self._next(worker, shared, item, self.timeout)

    def _next(self, worker: _Worker, shared: BinaryIO, item: int, seconds: float) -> Any:
        deadline = time.monotonic() + seconds

        def idle() -> None:
            self._look(shared)
            if self.interrupted():
                raise Interrupted
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self._named(item)} was not there after {seconds:g} s (trainer.loader_timeout); data worker "
                    f"{worker.number} (process {worker.process.pid}) hangs; the same command continues"
                )

        try:
            kind, value = receive(worker.channel, idle)
        except EOFError:
            worker.process.wait()
            self._look(shared)
            raise
        if kind == "wrong":
            raise DataError(*value)
        if kind == "error":
            raise DataError(f"{self._named(worker.at(shared))} cannot be made by data worker {worker.number}: {value}")
        return value

    def _look(self, shared: BinaryIO) -> None:
        """Raise DataError if a worker has ended: none does before it is told to."""
        for worker in self._fleet:
            code = worker.process.poll()
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                memory = " (is there enough memory? each worker takes some)" if code == -signal.SIGKILL else ""
                raise DataError(
                    f"data worker {worker.number} (process {worker.process.pid}) {how}{memory} at "
                    f"{self._named(worker.at(shared))}; the same command continues"
                )

    def _named(self, item: int) -> str:
        try:
            return f"data item {item} (its first sample is {self.steps.sample_id(item)})"
        except Exception:  # the very table may be what is wrong
            return f"data item {item}"


class _Worker:
    """A worker's process, seen from training."""

    def __init__(self, number: int, items: range, task: tuple, shared: int) -> None:
        self.number, self.items, self.ready = number, items, False
        self.channel, theirs = socket.socketpair()
        gone, self._alive = os.pipe()  # theirs is readable once ours is closed, as it is when this process has ended
        handed = (theirs.fileno(), gone, shared)
        environment = {name: value for name, value in os.environ.items() if name not in PLACES}
        command = [sys.executable, "-P", "-c", PROGRAM, json.dumps(sys.path), *map(str, (*handed, os.getpid()))]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # a child inherits it, from its first instruction
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=handed, env={**environment, **ALONE}
            )
        except OSError as error:
            raise DataError(f"data worker {number} cannot be started: {error.strerror}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            os.close(gone)
        send(self.channel, pack(task))
        self.channel.settimeout(POLL)

    def at(self, shared: BinaryIO) -> int:
        """The item it is, or was last, at."""
        if not self.ready:
            return self.items[0]
        return struct.unpack("<q", os.pread(shared.fileno(), SLOT, self.number * SLOT))[0]

    def end(self) -> None:
        """No item of it is needed any more."""
        self.process.kill()
        self.process.wait()
        self.channel.close()
        os.close(self._alive)


def _pinned(item: Any) -> Any:
    return [part.pinned() if isinstance(part, TokenBatch) else part for part in item]
