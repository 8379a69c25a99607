"""The flywheel: feedback to rows, rows to a model, and a model in the incumbent's place or not, by real runs."""

import json
import random
import shutil

import pytest
from tests.conftest import TINY_RUN
from tests.lifecycle.test_pipeline import manifest, told
from tests.simulated import Answering, fill_store, mean_badness, sampled

from trivium.build import load_artifact
from trivium.errors import CheckpointError
from trivium.evaluation.intervals import ratio_interval
from trivium.inference.feedback import FeedbackStore, Limits, Record, template_hash
from trivium.lineage.pointer import read_pointer

SHORT = (
    *(o for o in TINY_RUN if not o.startswith(("trainer.max_steps", "validation", "samples"))),
    *("batch.length=128", "trainer.max_steps=60", "optim.lr=3e-4", "data.parts=[tasks]", "data.tasks=[count]"),
    *("evaluation.max_tasks=120", "evaluation.resamples=200", "inference.sampling.max_tokens=4"),
)


def counted(tuned, path, right, thumbs=False, users=40):
    """A store of right and wrong counts of letters, five tasks a user; right: whether people prefer the right ones.

    Of every two tasks one answer is edited (1 response) and one is preferred to another (2); or all get thumbs.
    """
    asking = Answering(tuned, "train", ("count",))
    chat, draw, store = asking.chat, random.Random(0), FeedbackStore(path, Limits(per_minute=10**9))
    tasks = {e["messages"][0]["content"]: e["messages"] for e in (asking.source[i] for i in range(2000))}
    assert len(tasks) >= 5 * users

    def response(asked, answer, user):
        drawn = [*asking.tokenizer.encode(answer), asking.tokenizer.eot_id]
        facts = [True] * len(drawn), [-1.0] * len(drawn), asking.artifact.sha256, template_hash(asking.tokenizer)
        record = Record(asked, answer, chat.prompt_ids(asked), drawn, *facts, user=user)
        store.add(record)
        return record.id

    for n, (*asked, answer) in enumerate(list(tasks.values())[: 5 * users]):
        answers = [answer["content"], str(draw.choice([n for n in range(3, 9) if n != int(answer["content"])]))]
        better, worse = answers if right else answers[::-1]
        user, bad = f"u{n // 5}", response(asked, worse, f"u{n // 5}")
        if thumbs:
            store.give(bad, "thumb", "down")
            store.give(response(asked, better, user), "thumb", "up")
        elif n % 2:
            store.give(bad, "edit", better)
        else:
            store.give(response(asked, better, user), "preference", bad)
    store.close()


def turn(main, tuned, runs, name, *changes):
    """One turn of the wheel."""
    return main("pipeline=flywheel", f"init_from={tuned}", f"runs={runs}", f"name={name}", *SHORT, *changes)


@pytest.fixture(scope="module")
def stores(tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    for name, right in (("good", True), ("poisoned", False)):
        counted(tuned, folder / f"{name}.sqlite", right)
    return folder


def test_wheel_promotes_what_is_better_and_rolls_back_what_poison_made(main, tuned, stores, tmp_path):
    """Right counts preferred: the model that learned it is the incumbent after it. Then, from that one and through the
    pointer, wrong counts preferred by everybody: the held-out users agree, and the evaluation does not."""
    pointer = tmp_path / "incumbent.json"
    done = turn(main, tuned, tmp_path, "good", f"feedback.path={stores / 'good.sqlite'}")
    assert done.code == 0, done.err
    verdict = manifest(tmp_path / "good/promote")["verdict"]
    assert verdict == {"promoted": True, "why_not": [], "pointer": str(pointer)}, done.out
    new = load_artifact(str(tmp_path / "good/preference"))
    named = read_pointer(pointer)
    assert (named.path.resolve(), named.sha256) == (new.checkpoint.resolve(), new.sha256)
    assert load_artifact(str(pointer)).sha256 == new.sha256
    assert [s["name"] for s in manifest(tmp_path / "good")["stages"]] == [
        "feedback", "incumbent", "sft", "preference", "candidate", "promote",
    ]  # fmt: skip
    assert manifest(tmp_path / "good/feedback")["feedback"]["tokens"] == {"equal": 300}
    wins = manifest(tmp_path / "good/promote")["results"]["win_rate"]
    assert wins["low"] > 0.5 and wins["count"] >= 20

    before = pointer.read_bytes()
    done = turn(main, pointer, tmp_path, "bad", f"feedback.path={stores / 'poisoned.sqlite'}")
    assert done.code == 0, done.err
    verdict = manifest(tmp_path / "bad/promote")["verdict"]
    assert not verdict["promoted"] and any("clearly for the worse" in why for why in verdict["why_not"]), done.out
    assert manifest(tmp_path / "bad/promote")["results"]["win_rate"]["low"] > 0.5  # they agree among themselves
    assert pointer.read_bytes() == before
    assert "rolled back: accuracy" in done.out and f"{pointer} is as it was" in done.out
    with pytest.raises(
        CheckpointError, match="bad made a model that was rolled back .*; name the incumbent, or a stage"
    ):
        load_artifact(str(tmp_path / "bad"))
    assert load_artifact(str(tmp_path / "good")).sha256 == new.sha256
    again = turn(main, pointer, tmp_path, "bad", f"feedback.path={stores / 'poisoned.sqlite'}")
    assert again.code == 0 and "done already" in again.out and pointer.read_bytes() == before


def test_model_from_poisoned_users_loses_on_honest_ones(main, tuned, stores, tmp_path):
    """Trained on what poisoners said, and judged by honest users alone, without any evaluation."""
    for name in ("good", "poisoned"):
        path = stores / f"{name}.sqlite"
        assert main("phase=feedback", f"feedback.path={path}", f"runs={tmp_path}", f"name={name}").code == 0
    rows = tmp_path / "poisoned/data/train/pairs.jsonl"
    fixed = ("phase=preference", "domain=files", f"data.path={rows}", "data.validation_share=0", f"init_from={tuned}")
    mine = [o for o in SHORT if not o.startswith("data.")]
    done = main(*fixed, *mine, f"runs={tmp_path}", "name=model")
    assert done.code == 0, done.err
    judged = ("phase=promote", f"init_from={tmp_path}/model", f"reference.init_from={tuned}", f"runs={tmp_path}")
    done = main(*judged, f"promote.feedback={tmp_path}/good", "name=judged")
    assert done.code == 0, done.err
    verdict = manifest(tmp_path / "judged")["verdict"]
    assert not verdict["promoted"] and "which is not surely more than half" in verdict["why_not"][0]
    assert manifest(tmp_path / "judged")["results"]["win_rate"]["high"] < 0.5
    assert not (tmp_path / "incumbent.json").exists()


def test_verdicts_alone_are_learnt_from_by_kto(main, tuned, tmp_path):
    """No pairs, so the preference stage takes verdicts, and the held-out ones judge."""
    counted(tuned, tmp_path / "f.sqlite", True, thumbs=True)
    done = turn(main, tuned, tmp_path, "kto", f"feedback.path={tmp_path / 'f.sqlite'}", "trainer.max_steps=20")
    assert done.code == 0, done.err
    config = manifest(tmp_path / "kto/preference")["config"]
    assert [(s["name"], s["why"]) for s in manifest(tmp_path / "kto")["left_out"]] == [
        ("sft", "feedback has 0 edits to learn from, and feedback.min_rows=20")
    ]
    assert config["objective"]["name"] == "kto" and config["data"]["path"].endswith("train/verdicts.jsonl")
    results = manifest(tmp_path / "kto/promote")["results"]
    assert set(results) == {"win_rate"} and results["win_rate"]["count"] > 40


def test_feedback_phase_tells_what_became_of_everything(main, tuned, stores, tmp_path):
    """Twice from one store: the same files. The card has the counts, the manifest the hash of each file."""
    for name in ("a", "b"):
        done = main("phase=feedback", f"feedback.path={stores / 'good.sqlite'}", f"init_from={tuned}",
                    f"runs={tmp_path}", f"name={name}", "feedback.per_user=3")  # fmt: skip
        assert done.code == 0, done.err
    facts = [manifest(tmp_path / name)["feedback"] for name in ("a", "b")]
    assert facts[0] == facts[1] and facts[0]["responses"] == 300
    counts = {split: rows["pairs"] for split, rows in facts[0]["rows"].items()}
    edits = {split: rows["edits"] for split, rows in facts[0]["rows"].items()}
    assert sum(edits.values()) == 100
    assert sum(counts.values()) == 40 * 3 and facts[0]["dropped"] == {"pairs: beyond the cap of a user": 80}
    assert counts == {split: 3 * users for split, users in facts[0]["users"].items()}
    card = (tmp_path / "a/data/README.md").read_text()
    assert f"| train | {edits['train']} | {counts['train']} | 0 | 0 | {facts[0]['users']['train']} |" in card
    assert "| pairs: beyond the cap of a user | 80 |" in card and "u1" not in card
    assert all(digest in card for digest in facts[0]["files"].values())


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        ("phase=feedback", 2, "phase=feedback needs feedback.path="),
        ("phase=feedback feedback.path={tmp}/none", 2, "server.feedback=true"),
        ("phase=feedback feedback.path={tmp}/empty.sqlite", 1, "has 0 responses and 0 entries of feedback"),
        ("phase=feedback feedback.path={tmp}/text", 1, "cannot be opened as a feedback store"),
        ("phase=feedback feedback.path=x feedback.clean=[near]", 2, "'near', which is not one of unicode, whitespace"),
        ("phase=feedback feedback.path=x feedback.test_share=1", 2, "leave nobody to learn from"),
        ("phase=promote", 2, "phase=promote needs a trained model"),
        ("phase=promote init_from={tuned}", 2, "needs the incumbent to compare with: set reference.init_from="),
        ("phase=promote init_from={tuned} reference.init_from={tuned}", 2, "is no run of phase=feedback"),
        ("phase=promote promote.evaluations=[a]", 2, "must be two runs"),
        ("pipeline=flywheel feedback.path=x", 2, "name the incumbent in init_from="),
        ("pipeline=flywheel init_from={tmp}/text.json", 1, "names no model"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(main, tuned, tmp_path, command, code, sentence):
    FeedbackStore(tmp_path / "empty.sqlite").close()
    for name in ("text", "text.json"):
        (tmp_path / name).write_text("no store and no pointer, but text of some length " * 3)
    words = command.format(tmp=tmp_path, tuned=tuned).split()
    told(main(*words, f"runs={tmp_path}", "name=x"), code, sentence)


def test_pointer_to_weights_that_have_changed_is_refused(main, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "mine")
    pointer = tmp_path / "incumbent.json"
    pointer.write_text(json.dumps({"path": "mine", "sha256": "0" * 64, "before": ""}))
    with pytest.raises(CheckpointError, match="as it was then .0000000000., and other weights are there now"):
        load_artifact(str(pointer))
    fixed = ("phase=promote", f"init_from={tuned}", f"reference.init_from={tuned}", f"runs={tmp_path}", "name=x")
    told(main(*fixed), 2, "names another incumbent than reference.init_from=")


@pytest.mark.slow
def test_simulated_users_turn_the_wheel_of_the_primer(launch, tmp_path):
    """A primer tuned from nothing, and sixty users who like short answers that end. What is promoted is better by their
    rule on questions nobody was asked; what everybody inverted made is rolled back, since it answers worse."""
    how = {"timeout": 3000}
    done = launch("phase=sft", "model=primer", f"runs={tmp_path}", "name=base", **how)
    assert done.returncode == 0, done.stderr
    base = tmp_path / "base"
    answers = sampled(base, 60, 12)
    for name, poisoned in (("good", False), ("bad", True)):
        fill_store(tmp_path / f"{name}.sqlite", answers, poisoned=lambda user, p=poisoned: p)
        done = launch(
            "pipeline=flywheel", f"init_from={base}", f"feedback.path={tmp_path / name}.sqlite", f"runs={tmp_path}",
            f"name={name}", f"promote.pointer={tmp_path / name}.json", "data.parts=[tasks]", **how,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        verdict = manifest(tmp_path / name / "promote")["verdict"]
        assert verdict["promoted"] != poisoned, (verdict, done.stdout)
        assert (tmp_path / f"{name}.json").exists() != poisoned
    before, after = (mean_badness(run, 200) for run in (base, tmp_path / "good.json"))
    fall = ratio_interval([b - a for b, a in zip(before, after, strict=True)], [1.0] * 200, resamples=1000,
                          confidence=0.95)  # fmt: skip
    print(f"tokens until the end: {sum(before) / 200:.2f} -> {sum(after) / 200:.2f}, less by {fall}")
    assert fall.low > 0
