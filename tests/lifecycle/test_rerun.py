"""What the same command does a second time, what another command on the same folder does, and what is kept."""

import csv
import hashlib
import json
import shutil

import pytest


def digests(run):
    """SHA-256 of everything that was learned or measured: checkpoints and metrics."""
    files = [*run.glob("checkpoints/**/*"), run / "metrics.jsonl", run / "metrics.csv"]
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


@pytest.fixture
def base(trained, tmp_path):
    """A copy of a finished run of 6 steps, at tmp_path / "base"."""
    shutil.copytree(trained, tmp_path / "base")
    return tmp_path / "base"


def steps_kept(run):
    return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*"))


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def one_line(text):
    """Text as one line: the console folds long ones."""
    return " ".join(text.split())


def test_rerun_of_a_finished_run_ends_at_once_and_changes_nothing(main, pretraining, tmp_path):
    overrides = pretraining(tmp_path, "a", "trainer.max_steps=9", "checkpoint.every_steps=4")
    assert main(*overrides).code == 0
    before, times = digests(tmp_path / "a"), {p: p.stat().st_mtime_ns for p in tmp_path.glob("a/checkpoints/*/*")}
    config = (tmp_path / "a/config.yaml").read_bytes()
    again = main(*overrides)
    assert again.code == 0 and not again.err
    assert "was done already: step 9" in one_line(again.out)
    assert digests(tmp_path / "a") == before
    assert (tmp_path / "a/config.yaml").read_bytes() == config
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("a/checkpoints/*/*")} == times
    facts = json.loads((tmp_path / "a/MANIFEST.json").read_text())
    assert (facts["status"], facts["steps"]) == ("done", 9)
    assert facts["results"]["train/loss"] == rows_of(tmp_path / "a")[-1]["train/loss"]


def test_metrics_hold_one_line_a_step_and_the_table_the_same_figures(trained):
    rows = rows_of(trained)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert all(r["train/loss"] > 0 for r in rows)
    with open(trained / "metrics.csv") as f:
        table = list(csv.DictReader(f))
    for name in ("step", "train/loss", "lr", "grad_norm", "tokens"):
        assert [float(t[name]) for t in table] == [r[name] for r in rows]
    assert [t["val/loss"] for t in table] == [""] * 6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("optim.lr=0.002", "optim.lr was 0.001, is 0.002"),
        ("seed=1", "seed was 0, is 1"),
        ("model.layers=1", "model.layers was 2, is 1"),
        ("batch.length=32", "batch.length was 64, is 32"),
        ("schedule=linear", "schedule.name was cosine, is linear"),
        ("data.path={other}", "data fingerprint was"),
        ("init_from={trained}", "parent was"),
    ],
)
def test_another_setting_under_one_name_is_refused(change, named, main, base, corpus, trained, pretraining, tmp_path):
    """Refused by name of the setting; weights, figures, settings and manifest of the run are as they were."""
    (tmp_path / "other.txt").write_text(corpus.read_text()[:60_000])
    names = ("config.yaml", "MANIFEST.json")
    before = digests(base) | {n: (base / n).read_text() for n in names}
    change = change.format(other=tmp_path / "other.txt", trained=trained)
    found = main(*pretraining(tmp_path, "base", change))
    assert found.code == 1, found.err
    assert named in found.err and "holds another run" in found.err and "Choose another name=" in found.err
    assert digests(base) | {n: (base / n).read_text() for n in names} == before


def test_settings_no_weight_depends_on_may_change(main, base, pretraining, tmp_path):
    before = digests(base)
    again = main(*pretraining(tmp_path, "base", "checkpoint.keep=5", "samples.max_tokens=3"))
    assert again.code == 0 and "was done already" in one_line(again.out)
    assert digests(base) == before


def test_more_steps_continue_a_finished_run_and_say_that_the_schedule_stretches(main, base, pretraining, tmp_path):
    first = [r["train/loss"] for r in rows_of(base)]
    longer = main(*pretraining(tmp_path, "base", "trainer.max_steps=8"))
    assert longer.code == 0, longer.err
    assert "trainer.max_steps was 6, is 8: the schedule stretches" in one_line(longer.out)
    losses = [r["train/loss"] for r in rows_of(base)]
    assert len(losses) == 8 and losses[:6] == first
    facts = json.loads((base / "MANIFEST.json").read_text())
    assert (facts["status"], facts["steps"]) == ("done", 8)


def test_failed_run_says_so_and_forgets_it_when_it_succeeds(main, corpus, pretraining, tmp_path):
    """A data file that comes late: MANIFEST.json has the failure, and then has it no more."""
    overrides = pretraining(tmp_path, "a", f"data.path={tmp_path / 'late.txt'}", "trainer.max_steps=1")
    assert main(*overrides).code == 1
    facts = json.loads((tmp_path / "a/MANIFEST.json").read_text())
    assert facts["status"] == "failed" and "late.txt does not exist" in facts["error"]
    (tmp_path / "late.txt").write_text(corpus.read_text())
    assert main(*overrides).code == 0
    facts = json.loads((tmp_path / "a/MANIFEST.json").read_text())
    assert facts["status"] == "done" and "error" not in facts


@pytest.mark.parametrize("keep", [2, 3])
def test_checkpoint_keep_keeps_exactly_that_many(keep, main, pretraining, tmp_path):
    """Saved at 2, 4, 6, 8 and at the end, 9; the newest `keep` stay."""
    settings = ("trainer.max_steps=9", "checkpoint.every_steps=2", f"checkpoint.keep={keep}")
    assert main(*pretraining(tmp_path, "a", *settings)).code == 0
    assert steps_kept(tmp_path / "a") == [2, 4, 6, 8, 9][-keep:]
    assert (tmp_path / "a/checkpoints/LATEST").read_text() == "step-9"
    assert sorted(p.name for p in (tmp_path / "a/checkpoints").iterdir() if p.is_file()) == ["LATEST"]


def test_keep_best_keeps_the_best_besides_and_init_from_takes_it(main, pretraining, tmp_path):
    """A learning rate that is far too high: the loss falls first and rises then, so the best is not the newest."""
    settings = ("optim.lr=0.5", "schedule=constant", "schedule.warmup=0.9", "trainer.max_steps=20")
    settings += ("validation.every_steps=2", "checkpoint.keep_best=val/loss", "checkpoint.every_steps=5")
    assert main(*pretraining(tmp_path, "a", *settings)).code == 0
    held_out = {r["step"]: r["val/loss"] for r in rows_of(tmp_path / "a") if "val/loss" in r}
    assert list(held_out) == list(range(2, 21, 2))
    best = min(held_out, key=held_out.__getitem__)
    assert best != 20, "the fixture must have a best that is not the newest"
    assert (tmp_path / "a/checkpoints/BEST").read_text() == f"step-{best}"
    assert steps_kept(tmp_path / "a") == sorted({best, 15, 20})
    tuned = main(*pretraining(tmp_path, "b", "trainer.max_steps=1", f"init_from={tmp_path / 'a'}"))
    assert tuned.code == 0, tuned.err
    assert f"starts from {tmp_path / 'a'}/checkpoints/step-{best} " in one_line(tuned.out)


def test_held_out_loss_is_of_the_weights_of_its_own_step(main, pretraining, tmp_path):
    """Figures are read one step late, the held-out loss is not: measured again on the checkpoints, it is the row's.

    Measured by a run of one step that changes nothing, at a rate of 1e-30. A neighbour's is 100 times as far away.
    """
    settings = ("optim.lr=0.5", "schedule=constant", "schedule.warmup=0.9", "trainer.max_steps=20")
    settings += ("validation.every_steps=1", "checkpoint.keep_best=val/loss", "checkpoint.every_steps=20")
    assert main(*pretraining(tmp_path, "a", *settings, "checkpoint.keep=2")).code == 0
    rows = {r["step"]: r["val/loss"] for r in rows_of(tmp_path / "a")}
    best = min(rows, key=rows.__getitem__)
    assert {best, 20} <= set(steps_kept(tmp_path / "a"))
    for step in sorted({best, 20}):
        name, start = f"again-{step}", f"init_from={tmp_path / 'a'}/checkpoints/step-{step}"
        still = ("trainer.max_steps=1", "optim.lr=1e-30", "validation.every_steps=1", start)
        assert main(*pretraining(tmp_path, name, *still)).code == 0
        (again,) = (r["val/loss"] for r in rows_of(tmp_path / name))
        assert again == pytest.approx(rows[step], rel=1e-6)
        neighbours = [rows[n] for n in (step - 1, step + 1) if n in rows]
        assert all(abs(again - other) > 1e-4 * again for other in neighbours)


def test_early_stopping_counts_from_the_step_of_the_lowest_loss(main, pretraining, tmp_path):
    """Patience 3, a validation each step: the run ends three steps after the lowest held-out loss of its rows."""
    settings = ("optim.lr=0.5", "schedule=constant", "schedule.warmup=0.9", "trainer.max_steps=40")
    run = main(*pretraining(tmp_path, "a", *settings, "validation.every_steps=1", "stop.patience=3"))
    assert run.code == 0, run.err
    rows = {r["step"]: r["val/loss"] for r in rows_of(tmp_path / "a")}
    assert max(rows) == min(rows, key=rows.__getitem__) + 3 < 40
    assert steps_kept(tmp_path / "a")[-1] == max(rows)


def test_early_stopping_stops_and_a_rerun_says_it_is_done(main, pretraining, tmp_path):
    """No fall is large enough: the first validation (step 3) is the best, the second (step 6) ends the run."""
    settings = ("trainer.max_steps=50", "validation.every_steps=3", "stop.patience=1", "stop.min_delta=1000")
    stopped = main(*pretraining(tmp_path, "a", *settings))
    assert stopped.code == 0, stopped.err
    assert "done: step 6 (early: the validation loss no longer falls)" in one_line(stopped.out)
    assert [r["step"] for r in rows_of(tmp_path / "a")] == [1, 2, 3, 4, 5, 6]
    assert steps_kept(tmp_path / "a") == [6]
    before = digests(tmp_path / "a")
    again = main(*pretraining(tmp_path, "a", *settings))
    assert again.code == 0
    assert "was done already: step 6 (early: the validation loss no longer falls)" in one_line(again.out)
    assert digests(tmp_path / "a") == before


@pytest.mark.parametrize("setting", ["stop.patience=1", "checkpoint.keep_best=val/loss"])
def test_what_needs_validation_is_refused_without_it(setting, main, pretraining, tmp_path):
    found = main(*pretraining(tmp_path, "a", setting))
    assert found.code == 2
    assert f"{setting.partition('=')[0]} needs validation.every_steps greater than 0" in found.err
