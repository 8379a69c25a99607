"""A disk that refuses: full, read-only, over quota, broken. One sentence, the old checkpoint intact, and it goes on."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from trivium.selftest.crashes import SETTINGS
from trivium.selftest.harness import Bench, Broken, Row, checkpoints, ensure, ensure_equal, one_sentence, sound, tally

TEMPORARY = "checkpoints/step-9.tmp"
FAULTS = (
    *(("ENOSPC", "write", f"{TEMPORARY}/{file}", 1, "half") for file in (
        "model.safetensors", "optimizer.safetensors", "state.json", "model.json", "tokenizer/tokenizer.json.tmp",
        "tokenizer/tokenizer_config.json.tmp", "CHECKPOINT.json",
    )),
    ("ENOSPC", "write", "checkpoints/LATEST.tmp", 3, "before"),
    ("ENOSPC", "write", "metrics.jsonl", 7, "half"),
    ("ENOSPC", "write", "metrics.csv", 7, "half"),
    ("ENOSPC", "write", "MANIFEST.json.tmp", 2, "before"),
    ("ENOSPC", "write", "log.txt", 2, "before"),
    ("EDQUOT", "write", f"{TEMPORARY}/model.safetensors", 1, "before"),
    ("EDQUOT", "fsync", f"{TEMPORARY}/optimizer.safetensors", 1, "before"),
    ("EIO", "write", f"{TEMPORARY}/optimizer.safetensors", 1, "half"),
    ("EIO", "fsync", f"{TEMPORARY}/model.safetensors", 1, "before"),
    ("EIO", "fsync", f"{TEMPORARY}/CHECKPOINT.json", 1, "before"),
    ("EIO", "fsync", TEMPORARY, 1, "before"),
    ("EIO", "fsync", "checkpoints", 3, "before"),
    ("EIO", "rename", TEMPORARY, 1, "before"),
    ("EIO", "replace", "checkpoints/LATEST.tmp", 3, "before"),
    ("EIO", "write", "metrics.jsonl", 7, "before"),
    ("EROFS", "mkdir", TEMPORARY, 1, "before"),
    ("EROFS", "open", f"{TEMPORARY}/model.safetensors", 1, "before"),
    ("EROFS", "open", "config.yaml.tmp", 1, "before"),
    ("EACCES", "open", f"{TEMPORARY}/optimizer.safetensors", 1, "before"),
    ("EACCES", "mkdir", f"{TEMPORARY}/tokenizer", 1, "before"),
    ("EACCES", "open", "report.html.tmp", 1, "before"),
    ("EMFILE", "open", f"{TEMPORARY}/state.json", 1, "before"),
    ("EMFILE", "open", "checkpoints/LATEST.tmp", 3, "before"),
)  # fmt: skip
"""Error, function, file, its how-manieth call, and whether half of a write still lands."""


def survive(bench: Bench, chosen: Callable[[list], list] = list) -> Row:
    """Refuse one call of a run's second save, or of what it writes beside its checkpoints."""
    whole = bench.unbroken("pretrain", *SETTINGS)

    def refuse(fault: tuple) -> str:
        error, function, path, number, when = fault
        run = bench.place("disk")
        command = bench.command("pretrain", run, *SETTINGS)
        faults = {"root": str(run), "point": [function, path, number, when, error]}
        process = bench.fork(*command, faults=faults).done()
        name = f"{error} at {function} of {path}"
        try:
            said = one_sentence(process)
            target = re.sub(r"\.tmp$", "", path.replace("step-9.tmp", "step-9"))
            ensure(names(said, run, target), f"names neither file nor folder: {said}")
            ensure(os.strerror(_number(error)) in said, f"does not say what the disk said: {said}")
            ensure(function != "write" or re.search(r"\([\d,]+ bytes\)", said), f"says no bytes: {said}")
            for checkpoint in checkpoints(run):
                sound(checkpoint)
            if "checkpoints" in path:
                ensure(checkpoints(run), "the old checkpoint is gone")
            bench.finish(command)
            ensure_equal(run, whole)
        except Broken as broken:
            raise Broken(f"{name}: {broken}") from broken
        return name

    found = bench.each(refuse, chosen([*FAULTS]))
    real = [r for r in (_full(bench), _read_only(bench)) if r is not None]
    return tally("disk faults", [*found, *real], lambda _: "one sentence each; 0 steps differ")


def names(said: str, run: Path, path: str) -> bool:
    """Whether a sentence names the file, whatever temporary name it had, or the checkpoint it belongs to."""
    plain = re.sub(r"\.tmp-[^/\s]*", "", said)
    return f"{run}/{path}" in plain or (f"{run}/checkpoints/step-9" in plain and "step-9" in path)


def _number(error: str) -> int:
    import errno

    return getattr(errno, error)


def _full(bench: Bench) -> str | Exception | None:
    """A real file system of 1 MB, where mounting is allowed: some saves fit, one does not."""
    small = ["-t", "tmpfs", "-o", "size=600k", "none"]
    return _mounted(bench, "full", small, ["-o", "remount,size=60m"], "No space left")


def _read_only(bench: Bench) -> str | Exception | None:
    """A folder in which nothing may be written: by its mode, or for root by a mount."""
    place = bench.place("read-only")
    run = place / "r"
    place.mkdir(parents=True)
    command = bench.command("pretrain", run, *SETTINGS)
    if os.geteuid():
        place.chmod(0o500)
        opened: Callable[[], object] = lambda: place.chmod(0o700)  # noqa: E731
    elif _mount("--bind", str(place), str(place)) and _mount("-o", "remount,bind,ro", str(place)):
        opened = lambda: subprocess.run(["umount", "-l", str(place)], check=True)  # noqa: E731
    else:
        return None
    try:
        said = one_sentence(bench.fork(*command).done())
        ensure(str(run) in said, said)
    except Broken as broken:
        return broken
    finally:
        opened()
    try:
        bench.finish(command)
        ensure_equal(run, bench.unbroken("pretrain", *SETTINGS))
    except Broken as broken:
        return broken
    return "a real read-only folder"


def _mounted(bench: Bench, name: str, how: list[str], room: list[str], words: str) -> str | Exception | None:
    place = bench.place(name)
    place.mkdir(parents=True)
    run, settings = place / "r", (*SETTINGS, "checkpoint.keep=9", "checkpoint.every_steps=1")
    whole = bench.unbroken("pretrain", *settings)
    if not _mount(*how, str(place)):
        return None
    try:
        command = bench.command("pretrain", run, *settings)
        said = one_sentence(bench.fork(*command).done())
        ensure(words in said and str(run) in said and "bytes)" in said, said)
        ensure(checkpoints(run), "nothing was saved before the disk was full")
        for checkpoint in checkpoints(run):
            sound(checkpoint)
        ensure(_mount(*room, str(place)), "no room could be made")
        bench.finish(command)
        ensure_equal(run, whole)
    except Broken as broken:
        return broken
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    return "a real full disk"


def _mount(*how: str) -> bool:
    try:
        return subprocess.run(["mount", *how], capture_output=True).returncode == 0
    except OSError:
        return False
