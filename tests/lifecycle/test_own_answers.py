"""A user's own questions with answers: tuned on as conversations, sampled from and judged in rlhf, evaluated."""

import json
import random

import pytest

ROLLOUT = ("rollout.prompts=4", "rollout.samples=4", "rollout.updates=1", "inference.sampling.max_tokens=4")


@pytest.fixture
def questions(tmp_path):
    """80 lists of letters to count, the kind that `tuned` knows; the answer says how in words and ends in #### N."""
    draw, rows = random.Random(0), []
    for i in range(80):
        letters = draw.choices("abcdef", k=3 + i % 5)
        rows.append({"question": f"How many letters: {' '.join(letters)}", "answer": f"I count.\n#### {len(letters)}"})
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_rlhf_and_evaluate_judge_by_the_named_checker(questions, judging, tuned, main, tmp_path):
    """The answers are digits, the data's are sentences: only checker=number finds them equal, so a reward above 0
    shows that it is the judge."""
    given = (f"data.path={questions}", "data.checker=number")
    command = judging(tmp_path, "rl", "phase=rlhf", "objective=grpo", *given, *ROLLOUT, "trainer.max_steps=2")
    done = main(*command)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and max(r["rollout/reward"] for r in rows) > 0
    evaluate = ("phase=evaluate", "domain=files", *given, f"init_from={tuned}", f"runs={tmp_path}")
    more = ("data.validation_share=0.2", "inference.sampling.max_tokens=4", "evaluation.resamples=10")
    done = main(*evaluate, *more, "name=judged")
    assert done.code == 0, done.err
    judged = json.loads((tmp_path / "judged/MANIFEST.json").read_text())["results"]
    assert judged["accuracy/letters"]["value"] > 0
    done = main(*evaluate, *more, "name=exact", "data.checker=exact")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "exact/MANIFEST.json").read_text())["results"]["accuracy/letters"]["value"] == 0


def test_steps_are_refused_by_training_in_one_sentence(tuned, main, tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completions": ["b"], "labels": [True]}) + "\n")
    base = ("domain=files", f"data.path={path}", f"init_from={tuned}", f"runs={tmp_path}", "name=x")
    for more in ((), ("data.forms=[steps]",)):
        done = main("phase=sft", *base, *more, "data.validation_share=0")
        assert done.code == 1 and done.err.count("\n") == 1 and "Traceback" not in done.err
        assert "steps" in done.err


def test_held_out_conversations_are_measured_in_bits_of_their_answers(tuned, main, tmp_path):
    """Ten with answers of 1 byte, and one too long for the context, which is left out and said."""
    path = tmp_path / "talks.jsonl"
    asked = [("How many letters: a b c", "3") for _ in range(10)] + [("How many letters: " + "a " * 3000, "3000")]
    turns = [[{"role": "user", "content": f"{i}. {q}"}, {"role": "assistant", "content": a}] for i, (q, a) in
             enumerate(asked)]  # fmt: skip
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns))
    done = main("phase=evaluate", "domain=files", f"data.validation_path={path}", f"init_from={tuned}",
                f"runs={tmp_path}", "name=talked", "evaluation.resamples=10")  # fmt: skip
    assert done.code == 0, done.err
    assert "1 of 11 conversations are left out: they are longer than the context of" in done.out
    found = json.loads((tmp_path / "talked/MANIFEST.json").read_text())["results"]
    assert found.keys() == {"answer_bits_per_byte"} and found["answer_bits_per_byte"]["count"] == 10
    assert 0 < found["answer_bits_per_byte"]["low"] <= found["answer_bits_per_byte"]["value"] < 100
