"""How much memory there is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch


def free_bytes() -> int:
    """Bytes that can still be had: of the GPU, or of the system within this process's control group (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    found = []
    with suppress(OSError, ValueError):
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=4 << 30)
