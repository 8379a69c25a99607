"""Figures reach every logger that was asked for, and a resume leaves neither doubled nor half lines."""

import csv
import json
import re
import socket
import struct
import threading
import time

import pytest

from trivium.errors import CheckpointError, ConfigError
from trivium.schema import LoggerConfig
from trivium.training import loggers as module
from trivium.training.loggers import FileLogger, SideLogger, build_loggers

KEY = "0123456789abcdef" * 2 + "01234567"
"""Looks like wandb's keys and is nobody's."""


def test_file_logger_drops_what_lies_behind_the_resumed_step(tmp_path):
    """Steps 1-4 were written, 4 only by half; the checkpoint is of step 2, so 3 is trained again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "train/loss": s / 4}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "tr')
    logger = FileLogger(tmp_path, first_step=2)
    logger.log_metrics({"step": 3, "train/loss": 9.5, "val/loss": 2.0})
    logger.finalize("success")
    assert [json.loads(line)["train/loss"] for line in path.read_text().splitlines()] == [0.25, 0.5, 9.5]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(r["step"], r["train/loss"], r["val/loss"]) for r in rows] == [
        ("1", "0.25", ""), ("2", "0.5", ""), ("3", "9.5", "2.0"),
    ]  # fmt: skip


def test_tensorboard_and_wandb_get_the_same_losses(launch, pretraining, tmp_path):
    """wandb works offline, without an account; TensorBoard's events hold what metrics.jsonl holds."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = launch(*pretraining(tmp_path, "logged", "logger=wandb", "logger.tensorboard=true"), timeout=400)
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "logged"
    losses = [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_missing_logger_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("trivium.training.loggers.TensorBoardLogger", _absent)
    with pytest.raises(ConfigError, match=r"pip install 'trivium-llm\[tensorboard\]'"):
        build_loggers(LoggerConfig(tensorboard=True), tmp_path, "name", 0)


def _absent(*_args, **_kwargs):
    raise ModuleNotFoundError("No module named 'tensorboard'")


# ---- loggers never stop training


def losses_of(folder):
    """Every step's loss, exactly."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"].hex() for line in lines]


@pytest.fixture(scope="module")
def plain(launch, pretraining, tmp_path_factory):
    """The losses of a run with the file logger alone."""
    runs = tmp_path_factory.mktemp("plain")
    run = launch(*pretraining(runs, "plain"))
    assert run.returncode == 0, run.stderr
    return losses_of(runs / "plain")


@pytest.fixture
def silent():
    """The address of a server that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        held = []

        def accept():
            try:
                while True:
                    held.append(server.accept()[0])
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", held
        for connection in held:
            connection.close()


@pytest.fixture
def closed():
    """The address of a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    return address


def trained_with_wandb(spawn, pretraining, home, **environment):
    """A run with wandb: (its folder, console, seconds from FileLogger's empty file to the first step's row, exit)."""
    args = pretraining(home, "run", "logger=wandb", f"logger.wandb_mode={environment.pop('mode', 'online')}")
    process = spawn(*args, HOME=str(home), NETRC=str(home / "none"), **environment)
    path, began = home / "run" / "metrics.jsonl", None
    while process.poll() is None:
        if path.is_file():
            began = began or time.monotonic()
            if path.stat().st_size:
                break
        time.sleep(0.02)
    started = time.monotonic() - (began or 0)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return home / "run", out + err, started, time.monotonic() - (began or 0)


@pytest.mark.parametrize(
    "case", ["offline", "silent", *(pytest.param(c, marks=pytest.mark.slow) for c in ("no key", "dead"))]
)
def test_wandb_that_does_not_answer_delays_by_less_than_ten_seconds(
    case, spawn, pretraining, tmp_path, plain, silent, closed
):
    """Training starts, its losses are those of a run without wandb, and all of them are kept for later.

    The run's end waits ten seconds at most; on a busy machine wandb's process may need longer than that.
    """
    environments = {
        "offline": {"mode": "offline"},
        "no key": {"WANDB_API_KEY": "", "WANDB_BASE_URL": closed},
        "dead": {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": closed},
        "silent": {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": silent[0]},
    }
    folder, said, started, ended = trained_with_wandb(spawn, pretraining, tmp_path, **environments[case])
    print(f"wandb {case}: first step after {started:.1f} s, end after {ended:.1f} s")
    assert losses_of(folder) == plain
    assert started < 10
    assert ended < 30
    assert case == "offline" or "warning: wandb" in said, said
    assert case != "no key" or "No API key configured" in said, said
    assert wandb_losses(folder) == plain
    assert bool(silent[1]) == (case == "silent"), "the silent server was asked"


def wandb_records(path):
    """What is in a .wandb file: LevelDB's log format after 7 bytes (4 of checksum, 2 of length, 1 that says whether the
    record is whole or its first, middle or last part; blocks of 32,768 bytes)."""
    from wandb.proto import wandb_internal_pb2

    data, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def wandb_losses(folder):
    """The losses that `wandb sync` would send, once the process that writes them is done."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found, ended = [], False
        for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
            for record in wandb_records(path):
                ended |= record.WhichOneof("record_type") == "exit"
                row = {(item.key or item.nested_key[0]): item.value_json for item in record.history.item}
                found += [json.loads(row["train/loss"]).hex()] if "train/loss" in row else []
        if ended:
            return found
        time.sleep(0.2)
    raise TimeoutError(f"wandb's process is not done: {list(folder.glob('wandb/*'))}")


class Moody:
    """A logger that raises from its third row on."""

    def __init__(self):
        self.rows, self.asked = [], 0

    def log_metrics(self, metrics, step):
        self.asked += 1
        if self.asked > 2:
            raise ConnectionError("the server at https://me:hunter2@example.org went away\nand more")
        self.rows.append((step, metrics))

    def finalize(self, status):
        raise AssertionError("it was dropped")


def test_logger_that_raises_is_warned_of_once_and_dropped():
    inner, said = Moody(), []
    logger = SideLogger("moody", lambda: inner, said.append)
    for step in range(1, 6):
        logger.log_metrics({"train/loss": None if step == 1 else 0.5, "skipped": 1}, step)
    logger.finalize("success")
    assert inner.rows == [(1, {"skipped": 1}), (2, {"train/loss": 0.5, "skipped": 1})] and inner.asked == 3
    assert said == [
        "moody is left out from here on, training goes on: ConnectionError: the server at https://***@example.org "
        "went away"
    ]


def test_tensorboard_on_a_file_is_warned_of_and_training_goes_on(launch, pretraining, tmp_path, plain):
    """Where its folder should be lies a file: TensorBoard cannot write, the run does not care."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    run = launch(*pretraining(tmp_path, "run", "logger=tensorboard"))
    assert run.returncode == 0, run.stderr
    assert losses_of(tmp_path / "run") == plain
    assert run.stdout.count("TensorBoard is left out") == 1


def test_tensorboard_that_fails_in_the_middle_is_dropped(main, pretraining, tmp_path, plain, monkeypatch):
    """Its real writer, made to fail at step 3 as a full disk would: steps 1 and 2 are in its file, 6 in ours."""
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    add = writer.EventFileWriter.add_event

    def full(self, event):
        if event.step == 3:
            raise OSError(28, "No space left on device")
        add(self, event)

    monkeypatch.setattr(writer.EventFileWriter, "add_event", full)
    run = main(*pretraining(tmp_path, "run", "logger=tensorboard"))
    assert run.code == 0, run.err
    assert losses_of(tmp_path / "run") == plain
    assert run.out.count("TensorBoard is left out") == 1
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2]


def test_file_logger_that_fails_stops_the_run(main, pretraining, tmp_path, monkeypatch):
    """A run whose figures are lost is worth nothing: metrics.jsonl is the exception."""

    class Full:
        def write(self, _text):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    class OnFullDisk(FileLogger):
        def __init__(self, *args):
            super().__init__(*args)
            self._json.close()
            self._json = Full()

    monkeypatch.setattr(module, "FileLogger", OnFullDisk)
    run = main(*pretraining(tmp_path, "run"))
    assert run.code == CheckpointError.exit_code
    assert re.search(r"metrics.jsonl \(\d+ bytes\) cannot be written: No space left on device", run.err)


# ---- secrets


def test_planted_secrets_are_in_no_file(launch, pretraining, tmp_path, closed):
    """In the environment, in the command line, in a URL: after a run with every logger on, no byte has them."""
    argument, password = "s3cr3t-of-the-command-line", "hunter2-in-the-url"
    url = closed.replace("http://", f"http://me:{password}@")
    secrets = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "HOME": str(tmp_path / "home")}
    said = f"samples.prompts=['https://me:{argument}@example.org']"
    loggers = ("logger=wandb", "logger.wandb_mode=online", "logger.tensorboard=true")
    run = launch(*pretraining(tmp_path / "runs", "run", said, *loggers), timeout=400, **secrets)
    assert run.returncode == 0, run.stderr
    assert len(wandb_losses(tmp_path / "runs" / "run")) == 6  # its process is done, and has written all it will
    files = [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert {"MANIFEST.json", "config.yaml", "metrics.jsonl", "state.json", "report.html"} <= {p.name for p in files}
    assert [p for p in files if p.suffix == ".wandb"]
    for secret in (KEY, argument, password):
        assert [str(p) for p in files if secret.encode() in p.read_bytes()] == [], secret
        assert secret not in run.stdout + run.stderr
    assert "https://***@example.org" in (tmp_path / "runs/run/config.yaml").read_text()  # it was there to be found


def test_what_a_resume_compares_has_no_secret(main, pretraining, corpus, tmp_path):
    """Every checkpoint holds the settings that must not change; a password in a path (odd, but a path) is masked."""
    odd = tmp_path / "https:" / "me:hunter2@host"
    odd.mkdir(parents=True)
    (odd / "text.txt").write_bytes(corpus.read_bytes())
    run = main(*pretraining(tmp_path, "run", f"data.path='{tmp_path}/https://me:hunter2@host/text.txt'"))
    assert run.code == 0, run.err
    state = json.loads((tmp_path / "run/checkpoints/step-6/state.json").read_text())
    assert state["guard"]["data.path"] == f"{tmp_path}/https://***@host/text.txt"
    again = main(*pretraining(tmp_path, "run", f"data.path='{tmp_path}/https://me:hunter2@host/text.txt'"))
    assert again.code == 0 and "was done already" in again.out, again.err
