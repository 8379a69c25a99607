"""Tokenising a text file beside a bare loop on as many processes; then how long a start on the kept result takes.

    python benchmarks/tokenising.py [MEGABYTES]

The text is the primer's novels, again and again with other words in front, as one .txt file. The bare loop: one process
a core, each with the same tokenizer and no threads of its own, takes 256 documents at a time and keeps the ids of each
as an array in memory. Ours reads the same documents from the file, cuts them to rows, writes, syncs and hashes
them; its processes are started within the time. Rounds alternate, each in a process of its own and, for ours, with an
empty cache; the ratio is that of the medians. Seconds of CPU, of the process and of those that it started, say more
than the clock where a machine is shared.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEGABYTES, ROUNDS, LENGTH = 50.0, 3, 256
PROCESSES = len(os.sched_getaffinity(0))


def write_text(path: Path, megabytes: float) -> None:
    from trivium_plugins.primer.texts import BOOKS, PAGE, read

    books, size, number = read(BOOKS).split(PAGE), 0, 0
    with open(path, "w") as file:
        while size < megabytes * 1e6:
            text = f"Reading {number}.\n\n{books[number % len(books)]}\n\n"
            number, size = number + 1, size + len(text.encode())
            file.write(text)


def source_of(folder: Path):
    from trivium.build import build_source
    from trivium.compose import component
    from trivium.plugin import discover

    discover()
    chosen = component("data", {"name": "files", "path": str(folder / "text.txt"), "validation_share": 0.0})
    return build_source(chosen, "pretrain")


def tokenizer_of(folder: Path):
    from trivium.data.config import BPEConfig
    from trivium.data.tokenizer import Tokenizer, train_bpe

    if not (folder / "tokenizer/tokenizer.json").is_file():
        texts = (e["text"] for e in map(source_of(folder).__getitem__, range(500)))
        train_bpe(BPEConfig(), texts).save(folder / "tokenizer")
    return Tokenizer.load(folder / "tokenizer")


def begin(state: str) -> None:
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global core
    core = tokenizers.Tokenizer.from_str(state)


def encode(some: list[str]) -> list:
    import numpy as np

    return [np.array(e.ids, np.int32) for e in core.encode_batch_fast(some, add_special_tokens=False)]


def cpu() -> float:
    """Seconds of CPU so far, of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def bare(folder: Path) -> dict[str, float]:
    source, state = source_of(folder), (folder / "tokenizer/tokenizer.json").read_text()
    texts = [source[i]["text"] for i in range(len(source))]
    began, worked = time.perf_counter(), cpu()
    with multiprocessing.get_context("spawn").Pool(PROCESSES, begin, (state,)) as pool:
        chunks = [texts[i : i + 256] for i in range(0, len(texts), 256)]
        count = sum(len(ids) for part in pool.imap(encode, chunks) for ids in part)
    return {"seconds": time.perf_counter() - began, "cpu": cpu() - worked, "tokens": count}


def ours(folder: Path) -> dict[str, float]:
    from trivium.data.cache import cached_plan, cached_table

    tokenizer, how = tokenizer_of(folder), {"form": "text", "train_on": "all"}
    began = time.perf_counter()
    source = source_of(folder)
    looked, worked = time.perf_counter(), cpu()
    table = cached_table(source, tokenizer, LENGTH, **how)
    done, worked = time.perf_counter(), cpu() - worked
    rows = cached_plan(table, LENGTH, seed=0)
    planned = time.perf_counter()
    again = source_of(folder)
    cached_plan(cached_table(again, tokenizer, LENGTH, **how), LENGTH, seed=0)
    started = time.perf_counter()
    return {
        "looking": looked - began, "seconds": done - looked, "plan": planned - done, "start": started - planned,
        "cpu": worked, "tokens": int(table.offsets[-1]), "rows": len(rows),
    }  # fmt: skip


def measure(way: str, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = {**os.environ, "TRIVIUM_CACHE": cache}
        done = subprocess.run(
            [sys.executable, __file__, way, str(folder)], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(megabytes: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.txt", megabytes)
        tokenizer_of(folder)
        found = {"bare": [], "ours": []}
        for _ in range(ROUNDS):
            for way, rounds in found.items():
                rounds.append(measure(way, folder))
        middle = {way: statistics.median(r["seconds"] for r in rounds) for way, rounds in found.items()}
        last = found["ours"][-1]
        print(f"{megabytes:.0f} MB, {last['tokens']:,} tokens, {PROCESSES} processes, medians of {ROUNDS} rounds")
        for way, seconds in middle.items():
            every = ", ".join(f"{r['seconds']:.1f}" for r in found[way])
            work = statistics.median(r["cpu"] for r in found[way])
            print(f"  {way:<5} {seconds:6.1f} s  {megabytes / seconds:5.2f} MB/s   ({every}), {work:.1f} s of CPU")
        worked = [statistics.median(r["cpu"] for r in found[way]) for way in ("bare", "ours")]
        print(f"  ours is {middle['bare'] / middle['ours']:.2f} times as fast as the bare loop, by CPU ", end="")
        print(f"{worked[0] / worked[1]:.2f} times")
        told = {key: statistics.median(r[key] for r in found["ours"]) for key in ("looking", "plan", "start")}
        print(f"  besides: looking at every row {told['looking']:.2f} s, packing {told['plan']:.2f} s")
        print(f"  a start on what is kept: {told['start']:.2f} s until rows can be asked for")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("bare", "ours"):
        print(json.dumps({"bare": bare, "ours": ours}[sys.argv[1]](Path(sys.argv[2]))))
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else MEGABYTES)
