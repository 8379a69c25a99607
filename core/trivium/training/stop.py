"""When to stop: early stopping and signals. A signal ends the run after the step and a save, with exit code 143.

143 means that every step that was done is in a checkpoint. A second signal ends the process at once, and a run that
has not ended `stop.deadline` seconds after the first (its data never comes, its step takes longer) is ended too: with
143 if the last whole step could still be saved, else with 1.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from trivium.errors import TriviumError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 143


@dataclass
class StopController:
    """Best validation loss so far and how many validations ago. Its fields are saved with each checkpoint."""

    patience: int = 0
    min_delta: float = 0.0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    reference: float | None = None  # what patience compares with: it moves by min_delta at least, `best` by anything

    def update(self, loss: float, step: int) -> bool:
        """Tell it a validation loss; True if it is the lowest so far."""
        if self.reference is None or loss < self.reference - self.min_delta:
            self.reference, self.waited = loss, 0
        else:
            self.waited += 1
        lowest = self.best is None or loss < self.best
        if lowest:
            self.best, self.best_step = loss, step
        return lowest

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return bool(self.patience) and self.waited >= self.patience

    def state(self) -> dict[str, float | int | None]:
        """What a checkpoint keeps."""
        fields = ("best", "best_step", "waited", "reference")
        return {name: getattr(self, name) for name in fields}

    def restore(self, state: dict) -> None:
        """Take up a checkpoint's state."""
        for name in self.state():
            setattr(self, name, state[name])


class SignalWatch:
    """Notes the first SIGTERM, SIGINT or SIGUSR1. The second ends the process at once, and so does a deadline.

    A thread of its own reads them (from the descriptor to which Python writes a signal's number as it comes), so that
    both hold while the main thread waits for data or computes outside Python.
    """

    def __init__(
        self,
        deadline: float,
        *,
        at_once: str = "the newest checkpoint counts",
        late: str = "every step that was done is saved; the same command continues",
    ) -> None:
        """at_once, late: what is said of the work, when a second signal ends it and when the deadline does."""
        self.deadline, self.at_once, self.late = deadline, at_once, late
        self.received: int | None = None
        self.overdue: Callable[[], None] = lambda: None
        """Called by the thread when `deadline` seconds have passed and the run has not ended: its last chance to save.

        Raises TriviumError if it cannot; then the exit code is 1.
        """
        self._before: dict = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():  # the only one for which Python allows handlers
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self._pipe, end = os.pipe()
            os.set_blocking(end, False)
            self._wakeup = (end, signal.set_wakeup_fd(end, warn_on_full_buffer=False))
            self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._thread.start()
            _active.add(self)
            self.listen()
        return self

    def listen(self) -> None:
        """Take the signals over, from now on or again after someone else did."""
        if self._thread is not None:
            for number in SIGNALS:
                signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        end, before = self._wakeup
        signal.set_wakeup_fd(before)
        _active.discard(self)
        os.write(end, b"\0")
        self._thread.join()
        self._thread = None
        os.close(end)
        os.close(self._pipe)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number

    def _watch(self) -> None:
        first, due = None, None
        while True:
            left = None if due is None else max(0.0, due - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                self._leave_late(first or 0)
            number = os.read(self._pipe, 1)[0]
            if not number:
                return
            if number not in SIGNALS:  # of someone else's handler
                continue
            if first is not None:
                _leave(f"error: stopped at once by a second signal, {number}; {self.at_once}", 1)
            first, due = number, time.monotonic() + self.deadline
            self.received = self.received or number

    def _leave_late(self, number: int) -> None:
        waited = f"signal {number} and {self.deadline:g} s (stop.deadline)"
        try:
            self.overdue()
        except TriviumError as error:
            _leave(f"error: stopped by {waited}: {error}", 1)
        except BaseException as error:
            _leave(f"error: stopped by {waited}, not saved: {type(error).__name__}: {error}", 1)
        _leave(f"stopped by {waited}; {self.late}", EXIT_CODE)


_active: set[SignalWatch] = set()


def _alone() -> None:
    """In a forked child, such as a loader's worker: its signals are not the parent's."""
    if _active:
        _active.clear()
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_alone)


def _leave(text: str, code: int) -> None:
    """End the process from any thread, whatever the others do."""
    with suppress(Exception):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(1 if code == EXIT_CODE else 2, f"{text}\n".encode())
    os._exit(code)
