"""What `watch` shows, from files written by hand; real processes, on a terminal and without one."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from trivium.errors import ConfigError
from trivium.lineage.tail import Tail
from trivium.lineage.watch import View, sparkline, watch

ROOT = Path(__file__).parents[2]
MANIFEST = {
    "name": "base", "phase": "pretrain", "domain": "primer", "status": "running", "seconds": 1.0,
    "model": {"name": "llama", "parameters": 2_180_000}, "config": {"trainer": {"max_steps": 400}},
}  # fmt: skip


def row(step, **more):
    """A step of 2,048 tokens in 0.5 s: 10 % data, 40 % forward, 45 % backward, 4 % optimizer, 1 % other."""
    times = {"data": 0.05, "forward": 0.2, "backward": 0.225, "optimizer": 0.02, "other": 0.005}
    return {
        "step": step, "train/loss": 8.0 - step / 100, "lr": 1.25e-3, "grad_norm": 0.75, "tokens": 2048 * step,
        "step_seconds": 0.5, "tokens_per_second": 4096.0, "memory": 973_000_000, "grad_norm/attn": 0.6,
        "grad_norm/embed": 0.45, **{f"time/{k}": v for k, v in times.items()}, **more,
    }  # fmt: skip


def append(folder, *rows):
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)


def lines_of(folder, width=80, **console):
    """The frame as a person without colours sees it."""
    console = Console(width=width, file=open(os.devnull, "w", encoding=console.pop("encoding", "utf-8")), **console)
    with console.capture() as captured:
        console.print(View(folder).frame(console), no_wrap=True, overflow="ellipsis", crop=True)
    return captured.get().splitlines()


def line(lines, start):
    (found,) = [x for x in lines if x.startswith(start)]
    return found


@pytest.fixture
def run(tmp_path, put):
    """A run at step 300 of 400, with validation at 100, 200 and 300, two samples and two checkpoints."""
    folder = tmp_path / "base"
    rows = [row(s, **({"val/loss": 8.5 - s / 100} if s % 100 == 0 else {})) for s in range(1, 301)]
    said = [{"step": s, "prompt": f"It was {n}", "completion": f" said at {s}"} for s in (200, 300) for n in (1, 2)]
    put(folder, MANIFEST, rows, said)
    for name in ("step-200", "step-300", "step-400.tmp-7"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "CHECKPOINT.json").write_text("{}")
    (folder / "checkpoints" / "BEST").write_text("step-200")
    return folder


def test_frame_of_a_run_that_trains(run):
    lines = lines_of(run)
    assert lines[0] == "base  running  pretrain on primer 2.18M parameters"
    bar = line(lines, "step 300/400")
    assert bar.endswith(" 75%  50.0s left")  # 100 steps of 0.5 s
    assert bar.count("━") == (bar.count("━") + bar.count("─")) * 3 // 4
    assert line(lines, "loss").startswith("loss     5.000   █")
    assert line(lines, "loss").endswith("▁") and len(line(lines, "loss")) == 80
    assert line(lines, "val loss") == "val loss 5.500   █▅▁  lowest 5.500"
    assert line(lines, "tokens/s") == "tokens/s 4,096  memory 973 MB  lr 0.00125  tokens 614.4k"
    assert line(lines, "step 500 ms").split("  ") == [
        "step 500 ms", "data 10%", "forward 40%", "backward 45%", "optimizer 4%", "other 1%",
    ]  # fmt: skip
    assert line(lines, "gradient") == "gradient 0.75  attn 0.6  embed 0.45"
    assert line(lines, "checkpoints") == "checkpoints step-200 (best)  step-300"
    assert lines[-3:] == ["samples of step 300", "  'It was 1' -> ' said at 300'", "  'It was 2' -> ' said at 300'"]


def test_mfu_reward_and_sources_are_shown_where_they_are(run):
    append(run, row(301, mfu=0.4125, **{"rollout/reward": 0.5, "train/loss/books": 4.5, "train/loss/tasks": 0.25}))
    lines = lines_of(run)
    assert "MFU 41.2%" in line(lines, "tokens/s")
    assert line(lines, "reward").startswith("reward   0.500")
    assert line(lines, "by source") == "by source  books 4.500  tasks 0.250"


def test_skipped_steps_and_figures_that_are_no_numbers(run):
    bad = row(301, skipped=1) | {"train/loss": None, "grad_norm": None, "grad_norm/attn": float("nan")}
    append(run, bad, row(302) | {"train/loss": float("inf"), "tokens_per_second": "fast", "time/data": None})
    lines = lines_of(run)
    assert line(lines, "step 302/400")
    assert line(lines, "loss").startswith("loss     5.000")
    assert "1 step was skipped: loss or gradient not usable" in lines
    assert line(lines, "gradient") == "gradient 0.75  attn 0.6  embed 0.45"


def test_half_a_last_line_waits_for_its_end(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "text": "h\xc3')
    tail = Tail(path)
    assert tail.read() == ([{"step": 1}], False)
    assert tail.read() == ([], False)
    with path.open("ab") as file:
        file.write(b'\xa9"}\n[1]\nnonsense\n{"step": 3}\n')
    assert tail.read() == ([{"step": 2, "text": "hé"}, {"step": 3}], False)


def test_restart_that_cut_rows_back_is_seen(run):
    """Steps 251 to 300 are taken again: the file is another, shorter one, as FileLogger writes it."""
    view = View(run)
    assert (view.shown.step, len(view.shown.curves["train/loss"])) == (300, 300)
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:250]
    (run / "new").write_text("".join(kept))
    os.replace(run / "new", run / "metrics.jsonl")
    append(run, row(251, **{"train/loss": 1.0}))
    view.refresh()
    assert (view.shown.step, len(view.shown.curves["train/loss"])) == (251, 251)
    assert view.shown.curves["train/loss"][-1] == (251, 1.0)


def test_file_that_goes_away_and_comes_back(run):
    view = View(run)
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").unlink()
    view.refresh()
    assert not view.shown.recent
    (run / "metrics.jsonl").write_text(rows)
    view.refresh()
    assert view.shown.step == 300 and len(view.shown.curves["train/loss"]) == 300


@pytest.mark.parametrize("width", [60, 40])
def test_narrow_terminal_keeps_every_figure_whole(run, width):
    wide, narrow = lines_of(run), lines_of(run, width)
    assert max(map(len, narrow)) <= width
    for figure in ("4,096", "973 MB", "0.00125", "614.4k", "45%", "0.45", "50.0s left", "step-300"):
        assert any(figure in x for x in wide) and any(figure in x for x in narrow), figure


def test_terminal_without_unicode(run):
    text = "\n".join(lines_of(run, encoding="ascii"))
    assert text.isascii() and "step 300/400 ###" in text


def test_control_characters_of_a_sample_stay_out_of_the_terminal(run):
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 301, "prompt": "[red]a", "completion": "\x1b[2J\ud800"}) + "\n")
    assert lines_of(run)[-1] == r"  '[red]a' -> '\x1b[2J\ud800'"


def test_silence_is_said(run):
    old = time.time() - 95
    os.utime(run / "metrics.jsonl", (old, old))
    assert any(x.startswith("no step for 1m 3") for x in lines_of(run))


def test_pipeline_shows_the_stage_at_work(three_phases):
    """Stage 3 of the main job has just been evaluated; tuning is at work."""
    folder = three_phases(keep=5)
    manifest = json.loads((folder / "sft" / "MANIFEST.json").read_text())
    (folder / "sft" / "MANIFEST.json").write_text(json.dumps(manifest | {"status": "running"}))
    lines = lines_of(folder)
    assert lines[0].split("  ") == [
        "✓ tokenizer", "✓ pretrain", "✓ evaluate_pretrain", "✓ generate_pretrain", "▶ sft",
    ]  # fmt: skip
    assert lines[1].startswith("three_phases-primer/sft  running  sft on primer")
    assert line(lines, "step 620")


def test_finished_pipeline_shows_the_last_stage_that_trained(three_phases):
    assert any(x.startswith("three_phases-primer/distill  done") for x in lines_of(three_phases()))


def test_run_that_has_just_begun(tmp_path, put):
    put(tmp_path / "new", MANIFEST)
    assert lines_of(tmp_path / "new")[1] == "no step is done yet"


@pytest.mark.parametrize("what", ["empty", "foreign", "missing", "no json"])
def test_folder_without_a_run_is_one_sentence(what, tmp_path):
    folder = tmp_path / what
    if what != "missing":
        folder.mkdir()
    if what == "foreign":
        (folder / "notes.txt").write_text("x")
        (folder / "MANIFEST.json").write_text('["of something else"]')
    if what == "no json":
        (folder / "metrics.jsonl").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="there is no folder" if what == "missing" else "no run in") as raised:
        watch([str(folder)])
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)


@pytest.mark.parametrize("args", [[], ["a", "b"], ["a", "--twice"]])
def test_wrong_usage(args):
    with pytest.raises(ConfigError, match="write `watch FOLDER"):
        watch(args)


def test_sparkline_of_more_values_than_columns():
    assert sparkline([*[0.0] * 50, *[1.0] * 50], 4, "ab") == "aabb"
    assert sparkline([2.0, 2.0], 10, "ab") == "aa"


# ---- real processes


def test_without_a_terminal_it_prints_once_and_needs_no_torch(run):
    script = f"import sys; from trivium.cli import main; code = main(['watch', {str(run)!r}]); "
    script += "print(sorted({'torch', 'lightning', 'numpy', 'matplotlib'} & set(sys.modules)), code)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[0].startswith("base  running")
    assert done.stdout.splitlines()[-1] == "[] 0", done.stdout + done.stderr


def test_real_run_can_be_watched(main, trained):
    shown = main("watch", trained, "--once")
    assert shown.code == 0
    assert "step 6/6" in shown.out and "step-4  step-6" in shown.out and "tokens/s" in shown.out


def read_until(screen, wanted, seconds=30):
    """What came from the terminal up to `wanted`."""
    came, deadline = "", time.monotonic() + seconds
    while wanted not in came:
        assert time.monotonic() < deadline, came
        if select.select([screen], [], [], 0.2)[0]:
            came += os.read(screen, 65536).decode("utf-8", "replace")
    return came


@pytest.mark.parametrize("how", ["Ctrl-C", "the run ends"])
def test_on_a_terminal_it_follows_and_leaves_cleanly(how, run):
    screen, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "30", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        [sys.executable, "launch.py", "watch", str(run)],
        cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
    )  # fmt: skip
    try:
        read_until(screen, "step 300/400")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row(301)) + '\n{"step": 302, "tr')  # half a line is on its way
        read_until(screen, "step 301/400")
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            (run / "MANIFEST.json").write_text(json.dumps(MANIFEST | {"status": "done", "seconds": 151.0}))
        after = read_until(screen, "\x1b[?25h")  # the cursor is back
        assert how == "Ctrl-C" or "done after 2m 31s" in after
        assert process.wait(timeout=20) == 0
        assert "Traceback" not in after
    finally:
        process.kill()
        process.wait()
        os.close(screen)
        os.close(terminal)
