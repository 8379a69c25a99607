"""Cleaning: MB/s of each step on the primer's books, and of the check for contamination.

    python benchmarks/cleaning.py

One pass of each step over the books of the training split, in one thread; the fastest of three.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "core"), str(ROOT / "plugins")]

from trivium.data.cleaning import Cleaned  # noqa: E402
from trivium.data.config import CLEANING_STEPS  # noqa: E402
from trivium.data.contamination import find_overlap  # noqa: E402
from trivium_plugins.primer.config import PrimerConfig  # noqa: E402
from trivium_plugins.primer.source import Primer  # noqa: E402


def fastest(work) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    books = PrimerConfig(parts=["books"])
    source = Primer(books)
    size = sum(len(source[i]["text"].encode()) for i in range(len(source)))
    print(f"{len(source):,} documents, {size / 1e6:.2f} MB")
    for step in CLEANING_STEPS:
        cleaned = Cleaned(Primer(replace(books, clean=[step])))
        seconds = fastest(cleaned._pass)
        kept = len(cleaned._pass()[0])
        print(f"{step:<14} {size / seconds / 1e6:8.1f} MB/s   kept {kept:,}")
    held = Primer(replace(books, split="validation"))
    seconds = fastest(lambda: find_overlap(source, held, 13))
    print(f"{'contamination':<14} {size / seconds / 1e6:8.1f} MB/s")


if __name__ == "__main__":
    main()
