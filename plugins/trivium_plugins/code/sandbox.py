"""Run a program that a model wrote, and say whether it came to its end.

The program runs in a process of its own (`inmate.py`), which gives up what it can before it reads a line of it: files
outside a temporary folder and the network (Linux: Landlock and a namespace, where the kernel grants them), memory,
processor time, the size of files, further processes. It is right only if it hands back a number that was drawn for this
run, after all tests: neither the exit status nor anything it prints counts.

This stops accidents and the tricks that training on rewards finds. It is no prison for somebody who means harm: run
models whose code you do not trust in a virtual machine.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trivium import DataError

INMATE = Path(__file__).with_name("inmate.py")
GRACE = 3.0
"""Wall-clock seconds beyond the processor time: a program that sleeps uses none."""
HEADER = 16
"""Bytes that say how long a part is."""


@dataclass(frozen=True)
class Limits:
    """seconds: of processor time. memory: bytes of address space."""

    seconds: float
    memory: int


def passes(program: str, tests: str, limits: Limits) -> bool:
    """Whether the program and then its tests, which see its names, come to their end within the limits."""
    return _run(program, tests, limits)[0]


def walls(limits: Limits) -> set[str]:
    """Which of "files" and "network" the kernel holds for us. Raises DataError where programs cannot be judged at all.

    A machine on which nothing runs would score every answer 0, and one on which anything passes every answer 1.
    """
    if sys.platform == "win32":
        raise DataError("data.run_code=true needs Linux or macOS: Windows has no limits for a process")
    right, held = _run("import math, re, typing, collections", "assert math.gcd(4, 6) == 2", limits)
    if not right or passes("import math", "assert math.gcd(4, 6) == 3", limits):
        raise DataError(
            f"data.run_code=true, and a test program does not run as it should under data.seconds={limits.seconds:g} "
            f"and data.memory_mb={limits.memory >> 20}; raise them, or leave the parts out that are judged"
        )
    return held


def _run(program: str, tests: str, limits: Limits) -> tuple[bool, set[str]]:
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="answer-") as folder:
        command = [sys.executable, "-I", "-S", "-B", str(INMATE), str(limits.seconds), str(limits.memory)]
        process = subprocess.Popen(
            command, cwd=folder, env={"PATH": "", "TMPDIR": folder, "LC_ALL": "C.UTF-8"}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):
                for part in (program, tests, secret):
                    content = part.encode("utf-8", "surrogatepass")
                    process.stdin.write(b"%*d" % (HEADER, len(content)) + content)
                process.stdin.close()
            said = _said(process, limits.seconds + GRACE)
        finally:
            _end(process)
    held, mark, handed = said.partition(b"\n")
    return bool(mark) and handed == secret.encode(), set(held.decode("ascii", "replace").split())


def _said(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """What came back, 200 bytes at most, until its end or until time is up."""
    assert process.stdout is not None
    said, until = b"", time.monotonic() + seconds
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while len(said) < 200 and waiting.select(max(0.0, until - time.monotonic())):
            piece = os.read(process.stdout.fileno(), 200)
            if not piece:
                break
            said += piece
    return said


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole group, in case there are others in it by now."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
