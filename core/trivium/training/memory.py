"""The most memory a stretch of work held: the device's where there is one, else the process's; and what is left."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Start counting anew, where the system can (CUDA, Linux)."""
    if torch.cuda.is_initialized():  # else nothing is held there, and nothing will be by a run on the processor
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        RESET.write_text("5")  # proc(5): resets the peak resident set size


def peak_bytes() -> int:
    """Bytes held at most since `reset_peak`; since the process began where the system cannot start anew."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed() -> None:
    """Let the C library keep freed memory for the next allocation instead of handing it back to the system (glibc).

    On a CPU every large tensor would otherwise come from the system again, a page fault for each 4 KB: 5 % of a step
    (LOG.md). At most what the process held at its peak is kept.
    """
    _mallopt(mmap=1 << 30, trim=(1 << 31) - 1)


def hand_back_freed() -> None:
    """The opposite, and at once: from here on what is held is what is in use, as a measurement needs it."""
    _mallopt(mmap=1 << 17, trim=1 << 17)  # what they are by default
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(mmap: int, trim: int) -> None:
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    with suppress(AttributeError):  # another C library has none
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, mmap)
        mallopt(M_TRIM_THRESHOLD, trim)
