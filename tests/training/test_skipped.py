"""A run whose steps the guard leaves out ends as any other, and everything that shows figures bears it."""

import json


def test_run_whose_last_step_was_skipped(main, pretraining, tmp_path):
    """A window of one step, no deviation allowed: each step with loss or norm above the last good one's is bad."""
    guard = ("guard.policy=skip", "guard.spike_sigma=1e-9", "guard.window=1", "guard.patience=100")
    run = main(*pretraining(tmp_path, "run", *guard, "trainer.max_steps=8", "logger=tensorboard"))
    assert run.code == 0, run.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/loss"] is None and rows[-1]["skipped"] == 1, "the fixture must end with a skipped step"
    assert any(row["train/loss"] is not None for row in rows)
    assert "done: step 8, the last step was skipped" in run.out
    assert "TensorBoard is left out" not in run.out
    assert (tmp_path / "run/report.html").is_file()
    shown = main("watch", tmp_path / "run", "--once")
    assert shown.code == 0 and "steps were skipped" in shown.out
