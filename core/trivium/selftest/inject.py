"""Faults inside a process: the n-th call on a file kills it as kill -9 would, or gets an error from the disk.

Nothing in the program knows of this: `install` wraps the functions through which Python reaches the file system. A call
is named by its function, the file's path in the watched folder (the number of a `.tmp-` name left away) and how often
it was made, so a plan means the same call whatever thread makes it.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trivium.registry import load

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
"""Functions of os whose first argument is a path or a descriptor."""


class Plan:
    """What happens at which call. point: [function, path, number, "before" | "half" | "after", "kill" or an errno]."""

    def __init__(self, root: str, point: list[Any] | None, record: str | None) -> None:
        self.root, self.point, self.made = os.path.realpath(root), point, Counter()
        self.lock = threading.Lock()
        self.record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if record else None

    def name(self, path: Any, folder: int | None = None) -> str | None:
        """The path inside the watched folder; None for one outside."""
        if isinstance(path, int):
            whole = _opened(path)
        elif folder is not None:
            whole = os.path.join(_opened(folder), os.fsdecode(path))
        else:
            whole = os.path.abspath(os.fsdecode(path))
        parent = os.path.realpath(os.path.dirname(whole))
        whole = os.path.join(parent, os.path.basename(whole))
        if not whole.startswith(self.root + os.sep):
            return None
        return re.sub(r"\.tmp-[^/]*", ".tmp", whole[len(self.root) + 1 :])

    def call(
        self, function: str, path: str | None, real: Callable[[], Any], half: Callable[[], Any] | None = None
    ) -> Any:
        """Make a call, unless or until it is the planned one."""
        if path is None:
            return real()
        with self.lock:
            self.made[function, path] += 1
            number = self.made[function, path]
            if self.record is not None:
                os.write(self.record, (json.dumps([function, path, number]) + "\n").encode())
        if self.point is None or self.point[:3] != [function, path, number]:
            return real()
        when, what = self.point[3:]
        if when == "half" and half is not None:
            half()
        if when == "after":
            with suppress(OSError):  # such as of a file that is not there to be removed
                real()
        if what != "kill":
            number = getattr(errno, what)
            raise OSError(number, os.strerror(number))
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()  # never reached by a thread that the kill has not ended yet


class WatchedFile:
    """A file open for writing, each `write` of which is a call."""

    def __init__(self, file: Any, path: str, plan: Plan) -> None:
        self._file, self._path, self._plan = file, path, plan

    def write(self, data: Any) -> Any:
        def half() -> None:
            whole = data if isinstance(data, str) else memoryview(data).cast("B")
            self._file.write(whole[: len(whole) // 2])
            self._file.flush()

        def whole() -> Any:
            written = self._file.write(data)
            if self._plan.point and self._plan.point[3] == "after":
                self._file.flush()
            return written

        return self._plan.call("write", self._path, whole, half)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *what: Any) -> Any:
        return self._file.__exit__(*what)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def install(
    root: str,
    point: list[Any] | None = None,
    record: str | None = None,
    stall: tuple[str, int] | None = None,
    marks: dict[str, str] | None = None,
) -> None:
    """Watch what happens to files under `root`. record: a file that gets every call.

    stall: ("data" | "step", number), what never ends. marks: files that are there while a method of the module is at
    work, by its name.
    """
    for method, path in (marks or {}).items():
        _mark(method, Path(path))
    if stall is not None:
        _stall(*stall)
    plan = Plan(root, point, record)
    real_open, real_os_open = builtins.open, os.open

    def opened(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        path = None if isinstance(file, int) else plan.name(file)
        writes = any(letter in mode for letter in "wax+")
        found = plan.call("open" if writes else "read", path, lambda: real_open(file, mode, *args, **more))
        return WatchedFile(found, path, plan) if writes and path else found

    def os_opened(path: Any, flags: int, *args: Any, dir_fd: int | None = None, **more: Any) -> int:
        with_folder = {} if dir_fd is None else {"dir_fd": dir_fd}
        return plan.call(
            "os.open", plan.name(path, dir_fd), lambda: real_os_open(path, flags, *args, **with_folder, **more)
        )

    builtins.open = io.open = opened
    os.open = os_opened
    for function in CALLS:
        setattr(os, function, _watched(plan, function, getattr(os, function)))


def _watched(plan: Plan, function: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *args: Any, **more: Any) -> Any:
        with_folder = more.get("dir_fd", more.get("src_dir_fd"))
        return plan.call(function, plan.name(path, with_folder), lambda: real(path, *args, **more))

    return call


def _opened(descriptor: int) -> str:
    """The path of an open file."""
    with suppress(OSError):
        return os.readlink(f"/proc/self/fd/{descriptor}")
    found = load("fcntl:fcntl")(descriptor, 50, bytes(1024))  # F_GETPATH of macOS
    return os.fsdecode(found.rstrip(b"\0"))


def _stall(what: str, number: int) -> None:
    """The data of step `number` (counted from 0) is never read, or that step never computed."""

    def forever() -> None:
        Path(os.environ["STALLED"]).touch()
        while True:
            time.sleep(3600)

    if what == "data":
        dataset = load("trivium.data.datamodule:StepDataset")
        read = dataset.__getitem__
        dataset.__getitem__ = lambda self, index: forever() if index == number else read(self, index)
    else:
        module = load("trivium.training.objective_module:ObjectiveModule")
        seed = module.seed_step
        module.seed_step = lambda self: forever() if self.step == number else seed(self)


def _mark(method: str, path: Path) -> None:
    module = load("trivium.training.objective_module:ObjectiveModule")
    real = getattr(module, method)

    def marked(*args: Any, **more: Any) -> Any:
        path.touch()
        try:
            return real(*args, **more)
        finally:
            path.unlink()

    setattr(module, method, marked)
