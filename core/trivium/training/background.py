"""One job at a time beside training, in a thread of its own; what it raises is raised here, never lost."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread


class Background:
    """At most one job is in flight. The thread is waited for when Python exits, whatever becomes of the caller."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Begin a job; waits for the one before, and raises what that raised."""
        self.wait()
        self._thread = Thread(target=self._run, args=(job,), name="trivium-background")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the job is over and has raised something, which `wait` will raise."""
        return self._error is not None and (self._thread is None or not self._thread.is_alive())

    def join(self) -> None:
        """Wait for the job; what it raised is kept for `wait`. Signals are still handled meanwhile."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait for the job and raise what it raised, once."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error
