"""`profiler=torch`: a trace that a browser opens, of the steps that were asked for, and the same losses."""

import json


def test_trace_holds_the_operations_of_the_steps_asked_for(main, pretraining, tmp_path):
    """Steps 3 to 6 of 8: four steps, each with products of the forward and of the backward pass."""
    steps = "trainer.max_steps=8"
    run = main(*pretraining(tmp_path, "run", "profiler=torch", steps))
    assert run.code == 0, run.err
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert len({n for n in names if n.startswith("ProfilerStep#")}) == 4
    assert "aten::mm" in names and "aten::silu" in names
    assert any(n.startswith("autograd::engine::evaluate_function") for n in names)
    assert any("Adam" in n for n in names)
    table = (tmp_path / "run/profile/top.txt").read_text()
    assert "Self CPU" in table and "aten::" in table and "profile of 4 steps" in run.out
    plain = main(*pretraining(tmp_path, "plain", steps))
    assert plain.code == 0, plain.err
    losses = [
        [json.loads(line)["train/loss"].hex() for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "plain")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_run_that_is_too_short_says_so(main, pretraining, tmp_path):
    run = main(*pretraining(tmp_path, "run", "profiler=torch", "trainer.max_steps=2"))
    assert run.code == 0, run.err
    assert "nothing was profiled: the run ended before its step 3" in run.out
    assert not (tmp_path / "run/profile").exists()


def test_run_that_ends_amid_the_profile_keeps_what_there_is(main, pretraining, tmp_path):
    run = main(*pretraining(tmp_path, "run", "profiler=torch", "trainer.max_steps=4"))
    assert run.code == 0, run.err
    assert "profile of 2 steps" in run.out and (tmp_path / "run/profile/trace.json").is_file()


def test_first_step_leaves_room_for_a_warm_up(main, pretraining, tmp_path):
    run = main(*pretraining(tmp_path, "run", "profiler=torch", "profiler.first_step=1"))
    assert run.code == 2 and "profiler.first_step=1 must be at least 2" in run.err
