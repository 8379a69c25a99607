"""One bit flipped in a file of a checkpoint, or of the cache: noticed before use, by the file's name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from trivium.errors import CheckpointError
from trivium.registry import load
from trivium.selftest.crashes import SETTINGS
from trivium.selftest.harness import Bench, Row, digest, ensure, ensure_equal, one_sentence, tally


def flip(path: Path, draw: random.Random) -> None:
    """Flip one random bit of a file."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def notice(bench: Bench, count: int, processes: int, seed: int) -> Row:
    """`count` flips, over all files of a checkpoint in turn, read by the reader that every phase uses.

    The first `processes` of them also meet a process that would continue the run.
    """
    whole, draw = bench.unbroken("pretrain", *SETTINGS), random.Random(seed)
    verify = load("trivium.training.checkpoint:verify")
    longer = (*SETTINGS, "trainer.max_steps=14")
    names = sorted(p.relative_to(whole).as_posix() for p in (whole / "checkpoints/step-12").rglob("*") if p.is_file())
    run = bench.place("flips")
    shutil.copytree(whole, run)

    def check(number: int) -> str:
        path = run / names[number % len(names)]
        before = path.read_bytes()
        flip(path, draw)
        try:
            if number < processes:
                said = one_sentence(bench.fork(*bench.command("pretrain", run, *longer)).done())
                ensure(str(path) in said, f"names another file than {path}: {said}")
            try:
                verify(run / "checkpoints/step-12")
            except CheckpointError as error:
                ensure(str(path) in str(error), f"names another file than {path}: {error}")
            else:
                ensure(False, f"a flipped bit in {path} was not noticed")
        finally:
            path.write_bytes(before)
        return path.name

    found = []
    for number in range(count):
        found += bench.each(check, [number])
    ensure(digest(run / "checkpoints/step-12") == digest(whole / "checkpoints/step-12"), "a refused start wrote")
    return tally("bit flips in a checkpoint", found, lambda good: f"{len(names)} files, each named")


def make_anew(bench: Bench, count: int, seed: int) -> Row:
    """Flips in what the cache holds of the data: tokens and tokenizer. Noticed, and made anew or refused by name."""
    whole, draw = bench.unbroken("pretrain", *SETTINGS), random.Random(seed)
    cache = bench.folder / "flipped-cache"
    shutil.copytree(bench.cache, cache)
    files = sorted(p for p in cache.rglob("*") if p.is_file() and p.suffix in (".bin", ".json"))
    used = [p for p in files if p.suffix == ".bin"]

    def check(_: int) -> str:
        for path in used:  # all of them: which ones a run reads is the cache's own affair
            flip(path, draw)
        run = bench.place("flips")
        bench.fork(*bench.command("pretrain", run, *SETTINGS), environment={"TRIVIUM_CACHE": str(cache)}).done()
        ensure_equal(run, whole)
        return "made anew"

    found = []
    for number in range(count):
        found += bench.each(check, [number])
    return tally("bit flips in cached tokens", found, lambda _: "made anew; 0 steps differ")
