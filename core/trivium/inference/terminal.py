"""A person at a keyboard: lines with editing and history, lines that go on in the next, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

try:
    import readline  # importing it gives `input` its editing
except ImportError:  # not on every system
    readline = None

HISTORY = 1000
"""Lines remembered from one talk to the next."""


class Terminal:
    """Reads turns. history: the file that keeps what was typed, for the arrow keys; None of no terminal."""

    def __init__(self, history: Path | None = None) -> None:
        self.history = history
        self.interactive = sys.stdin.isatty()
        self._asked = self._reading = self._warned = False
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr] - a keyboard may send what is no UTF-8
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] - and may not show every character
        if readline is not None and self.interactive:
            readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question
            readline.set_history_length(HISTORY)
            if history is not None and history.is_file():
                readline.read_history_file(history)

    def read(self) -> str | None:
        """What is said next, a line or, after backslashes, several; None at the end. Twice Ctrl-C is the end, too."""
        lines: list[str] = []
        while True:
            try:
                line = self._line("...  " if lines else "you: ")
            except KeyboardInterrupt:
                if self._warned or not self.interactive:
                    return None
                self._warned, lines = True, []
                self.write("\n(Ctrl-C once more, Ctrl-D or /exit to leave)\n")
                continue
            self._warned = False
            if line is None:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _line(self, prompt: str) -> str | None:
        self._reading = True
        try:
            return input(prompt if self.interactive else "")
        except EOFError:
            return None
        finally:
            self._reading = False

    def write(self, piece: str) -> None:
        """Show a piece at once."""
        sys.stdout.write(piece)
        sys.stdout.flush()

    def stopped(self) -> bool:
        """Whether Ctrl-C was pressed since the last call."""
        asked, self._asked = self._asked, False
        return asked

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Ctrl-C asks an answer to end between two tokens, where the engine is whole; a second one does not wait."""
        if threading.current_thread() is not threading.main_thread():  # only there can signals be taken
            yield
            return
        before: Any = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            if readline is not None and self.interactive and self.history is not None:
                readline.write_history_file(self.history)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._reading or self._asked:
            self._asked = False
            raise KeyboardInterrupt
        self._asked = True
