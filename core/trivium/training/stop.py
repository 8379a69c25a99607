"""When to stop: early stopping and signals. A signal ends the run after the step and a save, with exit code 143."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from types import FrameType

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


@dataclass
class SignalWatch:
    """Notes the first SIGTERM, SIGINT or SIGUSR1; the second ends the process at once."""

    received: int | None = None
    _before: dict = field(default_factory=dict)

    def __enter__(self) -> SignalWatch:
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, where Python allows no handlers
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(EXIT_CODE)
        self.received = number
