"""Starts the processes of one training run on this machine, and ends them together.

Settings are composed once, here; each process reads them from its standard input, so nothing that could be a secret
is written anywhere, and the end of that input is how a process learns that its launcher is gone. The processes meet
through a file in a private folder and talk over the loopback interface: no port is open to a network.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

RENDEZVOUS = "TRIVIUM_RENDEZVOUS"
"""Names the file through which the processes meet."""

WORKER = "trivium.worker"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED, PEER_LOST = 143, 75
GRACE = 5.0
"""Seconds that the others have to notice the end of one by themselves, and to write down why."""


def run_processes(order: Mapping[str, Any], count: int, threads: int) -> int:
    """Run `count` workers on `order` to their end; returns the exit code of the run: 0, 1, 2 or 143.

    threads: CPU threads of each; 0 shares the cores among them. The first worker to fail ends the others.
    """
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        workers = [_start(rank, count, Path(folder), threads) for rank in range(count)]
        received: list[int] = []

        def forward(number: int, _frame: FrameType | None) -> None:
            received.append(number)
            for worker in workers:
                with suppress(ProcessLookupError):
                    worker.send_signal(number)

        before = _handle(forward)
        try:
            for worker in workers:
                _tell(worker, order)
            ended = _wait(workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        return _verdict(ended, received, Path(folder))


def _start(rank: int, count: int, folder: Path, threads: int) -> subprocess.Popen[bytes]:
    share = max(1, (os.cpu_count() or 1) // count)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    environment = {
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        **os.environ,
        **{name: str(value) for name, value in place.items()},
        RENDEZVOUS: str(folder / "meet"),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),  # a bare clone has no other way to be found
    }
    if threads or "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(threads or share)
    said = None if rank == 0 else open(folder / f"rank-{rank}", "wb")
    try:
        return subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment,
            process_group=0,  # a terminal's Ctrl-C comes through `forward`, once
        )  # fmt: skip
    finally:
        if said:
            said.close()


def _handle(forward: Any) -> dict[int, Any]:
    before = {}
    with suppress(ValueError):  # not in the main thread, where Python allows no handlers
        for number in FORWARDED:
            before[number] = signal.signal(number, forward)
    return before


def _tell(worker: subprocess.Popen[bytes], order: Mapping[str, Any]) -> None:
    assert worker.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already, which `_wait` sees
        worker.stdin.write(json.dumps(order).encode() + b"\n")
        worker.stdin.flush()


def _wait(workers: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Exit codes by rank, in the order in which they ended; those that outlive a failure for too long are killed."""
    ended: dict[int, int] = {}
    deadline = None
    while len(ended) < len(workers):
        for rank, worker in enumerate(workers):
            if rank not in ended and (code := worker.poll()) is not None:
                ended[rank] = code
                if code not in (0, STOPPED) and deadline is None:
                    deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for rank, worker in enumerate(workers):
                if rank not in ended:
                    worker.kill()
                    worker.wait()
                    ended[rank] = PEER_LOST
        time.sleep(0.02)
    return ended


def _verdict(ended: dict[int, int], received: list[int], folder: Path) -> int:
    failed = {rank: code for rank, code in ended.items() if code not in (0, STOPPED, PEER_LOST)}
    if not failed and PEER_LOST not in ended.values():
        return ended[0]
    if received and all(code == -received[0] for code in failed.values()):  # before they knew what to save
        return STOPPED
    if failed.get(0, -1) > 0:
        return failed[0]  # it has said why
    rank, code = next(iter(failed.items()), (0, PEER_LOST))
    said = (folder / f"rank-{rank}").read_text(errors="replace").strip() if rank else ""
    if code < 0:
        with suppress(ValueError):
            name = signal.Signals(-code).name
            said = f"error: process {rank} of {len(ended)} was killed by {name}; the same command continues the run"
    print(said or f"error: process {rank} of {len(ended)} ended with exit code {code}", file=sys.stderr)
    return code if code > 0 and code != PEER_LOST else 1


def orders(stream: IO[bytes]) -> dict[str, Any]:
    """What the launcher told this worker. From now on the process ends when its launcher does."""
    order = json.loads(stream.readline())

    def watch() -> None:
        stream.read()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return order
