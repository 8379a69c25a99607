"""Start real training processes, wait for a moment, kill them, run them again, compare with a run nobody disturbed."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.plugin import local_plugins
from trivium.selftest.recipes import RECIPES, SIZES, TUNED, overridden, write_text, write_verdicts

PLUGINS = {"faults": "trivium.selftest.plugin:PLUGIN"}
FIGURES = ("train/loss", "val/loss", "grad_norm", "rollout/reward", "rollout/length", "reward/margin", "skipped")
ALONE = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); from trivium.selftest.child import alone; alone()"
"""What launch.py does, for one order."""
PATIENCE = 300.0
"""Seconds that anything here may take before it counts as hanging."""


class Broken(AssertionError):
    """A promise that was not kept, or a fault that did not hit what it was meant to hit."""


def ensure(condition: object, *what: object) -> None:
    """An assertion that python -O keeps."""
    if not condition:
        raise Broken(" ".join(map(str, what)))


class Process:
    """A running command line; `out` and `err` are what it has said so far."""

    def __init__(self, pid: int, place: Path, started: subprocess.Popen | None = None) -> None:
        self.pid, self.place, self.started = pid, place, started
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code once it has ended; -N if signal N ended it."""
        if self.returncode is None:
            code = self.place.with_suffix(".code")
            if self.started is not None:
                self.returncode = self.started.poll()
            elif code.is_file():
                self.returncode = int(code.read_text())
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit code; killed, and an error, when it takes longer."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} still runs after {timeout:g} s: {self.out}{self.err}")
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def done(self, timeout: float = PATIENCE) -> Process:
        """Wait for it to end; returns it."""
        self.wait(timeout)
        return self

    def freeze(self) -> bool:
        """Stop it where it stands; whether it is alive."""
        self.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while self.poll() is None:
            if state_of(self.pid) in "Tt":  # a stop takes effect at the kernel's leisure
                return True
            ensure(time.monotonic() < deadline, "a stop signal had no effect")
        return False

    def thaw(self) -> None:
        """Let it go on."""
        self.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9, which must hit it alive."""
        ensure(self.poll() is None, f"ended with {self.returncode} before it was killed: {self.err}")
        os.kill(self.pid, signal.SIGKILL)
        ensure(self.wait(30) == -signal.SIGKILL, f"ended with {self.returncode}, not by the kill")

    @property
    def out(self) -> str:
        return self._said("out")

    @property
    def err(self) -> str:
        return self._said("err")

    def _said(self, kind: str) -> str:
        path = self.place.with_suffix(f".{kind}")
        return path.read_text(errors="replace") if path.is_file() else ""


class Forker:
    """A process with everything imported, which forks one for each command line."""

    def __init__(
        self, folder: Path, cache: Path, plugins: dict[str, str] | None = None, home: Path | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.folder, self.plugins = folder, {**local_plugins(), **(plugins or {})}
        paths = os.pathsep.join(p for p in sys.path if p)
        self.environment = {
            **os.environ, "PYTHONPATH": paths, "TRIVIUM_CACHE": str(cache), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self._lock, self._count = threading.Lock(), 0
        self._forker: subprocess.Popen | None = None

    def _place(self) -> Path:
        self._count += 1
        return self.folder / f"p{self._count}"

    def fork(self, *args: object, **more: Any) -> Process:
        """Start a command line, at once. more: `environment`, `faults`, `input` (a file) and `home` (a folder)."""
        with self._lock:
            if self._forker is None:
                code = "from trivium.selftest.child import serve; serve()"
                self._forker = subprocess.Popen(
                    [sys.executable, "-c", code, json.dumps(self.plugins)], env=self.environment, cwd=self.home,
                    text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                )  # fmt: skip
            assert self._forker.stdin and self._forker.stdout
            place = self._place()
            self._forker.stdin.write(json.dumps({"place": str(place), "args": [str(a) for a in args], **more}) + "\n")
            pid = self._forker.stdout.readline()
            ensure(pid, "the process that forks has died")
            return Process(int(pid), place)

    def spawn(self, *args: object, **more: Any) -> Process:
        """Start a command line in an interpreter of its own, imports and all."""
        with self._lock:
            place = self._place()
        order = json.dumps({"place": str(place), "args": [str(a) for a in args], "plugins": self.plugins, **more})
        with open(f"{place}.out", "w") as out, open(f"{place}.err", "w") as err:
            started = subprocess.Popen(
                [sys.executable, "-c", ALONE, order], env=self.environment, cwd=self.home,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
        process = Process(started.pid, place, started)
        while not place.with_suffix(".begun").is_file():  # Python itself starts before it can be told what to do
            ensure(process.poll() is None, process.err)
            time.sleep(0.005)
        return process

    def close(self) -> None:
        """End the forker and what it forked."""
        if self._forker is not None:
            assert self._forker.stdin and self._forker.stdout
            self._forker.stdin.close()
            self._forker.wait(timeout=30)
            self._forker.stdout.close()


class Bench:
    """A folder with data, a cache and runs; undisturbed runs are made once and compared with again and again."""

    def __init__(self, folder: Path, workers: int = 2) -> None:
        self.folder, self.workers, self.cache = folder.resolve(), workers, folder.resolve() / "cache"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.forker = Forker(self.folder / "processes", self.cache, PLUGINS)
        self.fork, self.spawn = self.forker.fork, self.forker.spawn
        self._made: dict[str, Path] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock, self._count = threading.Lock(), 0

    def close(self) -> None:
        """End every process that was started here."""
        self.forker.close()

    def place(self, kind: str) -> Path:
        """A new folder for a run, `runs`/NAME; not made yet."""
        with self._lock:
            self._count += 1
            return self.folder / kind / f"r{self._count}"

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """The path that `make` fills, made when it is first asked for."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._made:
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                make(path)
                self._made[name] = path
        return self._made[name]

    def command(self, recipe: str, run: Path, *changes: str) -> list[str]:
        """The overrides of a recipe that put its run into `run`."""
        settings = RECIPES[recipe].settings
        files = {}
        makers = {"text": write_text, "verdicts.jsonl": write_verdicts, "tuned": self._tune}
        for name, make in makers.items():
            key = name.partition(".")[0]
            if any(f"{{{key}}}" in s for s in settings):
                files[key] = str(self.once(f"made/{name}", make))
        settings = [s.format(**files) if "{" in s else s for s in settings]
        return overridden(SIZES, settings, (f"runs={run.parent}", f"name={run.name}"), changes)

    def _tune(self, path: Path) -> None:
        steps = ("trainer.max_steps=120", "checkpoint.every_steps=100", f"runs={path.parent}", f"name={path.name}")
        done = self.fork(*overridden(SIZES, TUNED, steps)).done()
        ensure(done.returncode == 0, done.err)

    def unbroken(self, recipe: str, *changes: str) -> Path:
        """The run of a recipe that nobody disturbs."""

        def make(path: Path) -> None:
            done = self.fork(*self.command(recipe, path, *changes)).done()
            ensure(done.returncode == 0, f"the undisturbed run of {recipe} ended with {done.returncode}:", done.err)

        key = hashlib.sha256(json.dumps(changes).encode()).hexdigest()[:8]
        return self.once(f"unbroken/{recipe}-{key}", make)

    def finish(self, command: list[str]) -> Process:
        """The same command line again, which must end well."""
        done = self.fork(*command).done()
        ensure(done.returncode == 0, f"the same command ended with {done.returncode}: {done.err}")
        return done

    def each(self, task: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """`task` of each item, some at a time; what it found, or the Broken or TimeoutError it ended with."""

        def guarded(item: Any) -> Any:
            try:
                return task(item)
            except (Broken, TimeoutError) as error:
                return error

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(guarded, items))


@dataclass
class Row:
    """What a set of faults showed. worst: its worst figure, in words; faults: what went wrong, one line each.

    skipped: this machine cannot show it, which `worst` says.
    """

    name: str
    tried: int
    survived: int
    worst: str
    faults: list[str]
    skipped: bool = False

    @property
    def ok(self) -> bool:
        """Whether all was survived, and something was tried."""
        return self.skipped or (self.tried > 0 and self.survived == self.tried and not self.faults)

    def __str__(self) -> str:
        return f"{self.name}: {self.tried} tried, {self.survived} survived, worst: {self.worst}"


def tally(name: str, found: Iterable[Any], worst: Callable[[list[Any]], str]) -> Row:
    """A row from what `Bench.each` found, an exception being a fault that was not survived."""
    found = list(found)
    good = [f for f in found if not isinstance(f, Exception)]
    faults = [" ".join(str(f).split())[:600] for f in found if isinstance(f, Exception)]
    return Row(name, len(found), len(good), worst(good) if good else "-", faults)


# ---- what a run left


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl; a line that is still being written is left out."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def step_of(run: Path) -> int:
    """The last step whose figures are on disk; read from the file's end: this is asked hundreds of times a second."""
    try:
        with open(run / "metrics.jsonl", "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - 8192))
            found = re.findall(rb'^{"step": (\d+),.*}$', f.read().rpartition(b"\n")[0], flags=re.M)
    except FileNotFoundError:
        return 0
    return int(found[-1]) if found else 0


def curve(run: Path) -> list[tuple]:
    """Each step with its figures as hex floats: equal means equal in every bit."""
    return [(r["step"], *(float(r.get(name) or 0.0).hex() for name in FIGURES)) for r in rows_of(run)]


def digest(checkpoint: Path) -> str:
    """One SHA-256 over weights and optimizer state."""
    files = [checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def checkpoints(run: Path) -> list[Path]:
    """What is named as a checkpoint, oldest first, complete or not."""
    found = [p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def leftovers(run: Path) -> list[str]:
    """Names of half-written things."""
    return sorted(str(p.relative_to(run)) for p in run.rglob("*.tmp*"))


def sound(checkpoint: Path) -> None:
    """Every byte is what CHECKPOINT.json says; read here with hashlib alone, not with the code under test."""
    record = checkpoint / "CHECKPOINT.json"
    ensure(record.is_file(), f"{checkpoint} is taken for a checkpoint and is not complete")
    said = json.loads(record.read_text())["files"]
    there = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()} - {record.name}
    ensure(there == set(said), f"{checkpoint} holds {sorted(there)}, its record names {sorted(said)}")
    for name, expected in said.items():
        data = (checkpoint / name).read_bytes()
        ensure(len(data) == expected["bytes"], f"{checkpoint / name} has {len(data)} bytes, not {expected['bytes']}")
        ensure(hashlib.sha256(data).hexdigest() == expected["sha256"], f"{checkpoint / name} is damaged")


def ensure_equal(run: Path, whole: Path) -> int:
    """All steps and figures, the table, weights and optimizer of `run` are bit for bit those of `whole`.

    Returns the number of steps. What an interruption left has been swept.
    """
    ours, theirs = curve(run), curve(whole)
    ensure([s[0] for s in ours] == list(range(1, len(theirs) + 1)), f"steps {[s[0] for s in ours]}")
    differ = [a[0] for a, b in zip(ours, theirs, strict=True) if a != b]
    ensure(not differ, f"{len(differ)} of {len(theirs)} steps differ, first {differ[:3]}")
    last = checkpoints(whole)[-1].name
    ensure(checkpoints(run)[-1].name == last, f"ended at {checkpoints(run)[-1].name}, not {last}")
    ensure(digest(run / "checkpoints" / last) == digest(whole / "checkpoints" / last), "final weights or state differ")
    for folder in (run, whole):
        with open(folder / "metrics.csv") as f:
            table = [(int(r["step"]), float(r["train/loss"] or 0.0).hex()) for r in csv.DictReader(f)]
        ensure(table == [step[:2] for step in curve(folder)], "metrics.csv and metrics.jsonl differ")
    for checkpoint in checkpoints(run):
        sound(checkpoint)
    ensure(not leftovers(run), f"left behind: {leftovers(run)}")
    return len(theirs)


def continued_from(process: Process) -> int:
    """The step a run was continued from; 0 if it began anew."""
    found = re.search(r"continues from \S*step-(\d+)", process.out.replace("\n", ""))
    return int(found[1]) if found else 0


def one_sentence(process: Process, code: int = 1) -> str:
    """What a failed run said on standard error: one line, no stack trace, no talk of a fault of the program."""
    said = process.err
    ensure(process.returncode == code, f"exit code {process.returncode}, not {code}: {said or process.out[-300:]}")
    ensure("Traceback" not in said + process.out, f"a stack trace: {said}")
    ensure(said.startswith("error: ") and said.count("\n") == 1, f"not one sentence: {said!r}")
    ensure("fault of the program" not in said, said)
    return said


def state_of(pid: int) -> str:
    """The state letter of a process."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        done = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True)
        return done.stdout.strip()[:1] or "Z"


def stop_when(process: Process, until: Callable[[], bool], what: str) -> None:
    """Leave a live process frozen at a moment when `until` is true."""
    deadline = time.monotonic() + PATIENCE
    while True:
        while not until():
            if process.poll() is not None:
                raise Broken(f"ended with {process.returncode} before {what}: {process.err}")
            ensure(time.monotonic() < deadline, what, "never came")
            time.sleep(0.002)
        ensure(process.freeze(), f"ended with {process.returncode} before {what} could be stopped")
        if until():
            return
        process.thaw()
