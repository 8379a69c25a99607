"""Rows a second and peak memory of reading each kind of file, once and ten times as much, here and with `datasets`.

    python benchmarks/reading.py [--rows 20000] [--kind jsonl]

Each figure is of a process of its own with an empty cache, which finds the rows and then reads every one in order. Here
that includes checking each row against its schema and hashing it; `datasets` makes Arrow of the file first (its text
reader takes each line for a row). Rows are those that were written, of about 1 kB. Memory is the peak of the process
less what it had after its imports; `of it own` is that without pages of mapped files, which the system takes back when
it needs them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

KINDS = ("txt", "jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz", "jsonl.zst")
BUILDERS = {"txt": "text", "jsonl": "json", "json": "json"}


def write(path: Path, rows: int) -> None:
    """A file of `rows` texts of about 1 kB."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(5000)]
    texts = (" ".join(draw.choices(words, k=150)) for _ in range(rows))
    kind = path.name.partition(".")[2]
    if kind in ("parquet", "arrow"):
        schema = pa.schema({"text": pa.string()})
        with (pq.ParquetWriter if kind == "parquet" else pa.ipc.new_stream)(str(path), schema) as writer:
            for _ in range(0, rows, 1000):
                writer.write_table(pa.table({"text": [t for t, _ in zip(texts, range(1000), strict=False)]}, schema))
        return
    opened = {"gz": gzip.open, "zst": zstandard.open}.get(kind.rpartition(".")[2], open)
    with opened(path, "wt") as file:
        file.write({"json": "[", "csv": "text\n"}.get(kind, ""))
        for i, text in enumerate(texts):
            line = json.dumps({"text": text})
            file.write(
                {"txt": f"{text}\n\n", "csv": f"{text}\n", "json": f"{', ' if i else ''}{line}"}.get(kind, f"{line}\n")
            )
        file.write("]" if kind == "json" else "")


def memory() -> tuple[int, int]:
    """Peak and anonymous kB of this process."""
    said = Path("/proc/self/status").read_text()
    return tuple(int(re.search(rf"{key}:\s+(\d+)", said)[1]) for key in ("VmHWM", "RssAnon"))  # type: ignore[index]


def trivium(path: Path):
    from trivium.data.config import FilesConfig
    from trivium.data.files import Files

    def read() -> int:
        source = Files(FilesConfig(path=str(path), validation_share=0.0))
        return sum(len(source[i]["text"]) for i in range(len(source)))

    return read


def bare(path: Path):
    import datasets

    datasets.disable_progress_bars()
    kind = path.name.split(".")[1]

    def read() -> int:
        place = os.environ["TRIVIUM_CACHE"]
        rows = datasets.load_dataset(BUILDERS.get(kind, kind), data_files=str(path), split="train", cache_dir=place)
        return sum(len(row["text"]) for row in rows)

    return read


WAYS = {"trivium": trivium, "datasets": bare}


def measure(way: str, path: Path) -> dict[str, float]:
    read = WAYS[way](path)
    peak, own = memory()
    most, done = own, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, memory()[1])

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    characters = read()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    assert characters > 0
    return {"seconds": seconds, "peak": (memory()[0] - peak) / 1000, "own": (most - own) / 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.way:
        print(json.dumps(measure(a.way[0], Path(a.way[1]))))
        return
    print(f"{'kind':<10} {'rows':>9} {'way':<9} {'rows/s':>9} {'peak MB':>8} {'of it own':>10}")
    for kind in KINDS if a.kind is None else (a.kind,):
        with tempfile.TemporaryDirectory() as place:
            for rows in (a.rows, 10 * a.rows):
                path = Path(place) / f"{rows}.{kind}"
                write(path, rows)
                for way in WAYS:
                    with tempfile.TemporaryDirectory() as cache:
                        command = [sys.executable, __file__, "--way", way, str(path)]
                        env = {**os.environ, "TRIVIUM_CACHE": cache}
                        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
                        m = json.loads(done.stdout.splitlines()[-1])
                    rate = f"{rows / m['seconds']:>9,.0f}"
                    print(f"{kind:<10} {rows:>9,} {way:<9} {rate} {m['peak']:>8,.0f} {m['own']:>10,.0f}", flush=True)
                path.unlink()


if __name__ == "__main__":
    main()
