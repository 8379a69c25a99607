"""Cleaning and contamination as a person meets them: what a run says, records and refuses."""

import json

import pytest

from trivium.build import build_source, evaluation_data
from trivium.compose import Component, compose, run_config
from trivium.data.cleaning import Cleaned
from trivium_plugins.finance.config import FinanceConfig


@pytest.fixture
def letters(tmp_path):
    """40 letters, each with an address of its own, and the first 5 again."""
    said = "Letter {0}: the heron of river {0} stood on stone {0} and ate fish {0} while frog {0} sang. "
    said += "Write to a{0}@example.org"
    rows = [{"text": said.format(i)} for i in range(40)]
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:5]]))
    return path


def manifest(folder):
    return json.loads((folder / "MANIFEST.json").read_text())


def one_line(text):
    return " ".join(text.split())


def test_a_cleaned_run_says_and_records_what_was_done(main, pretraining, letters, tmp_path):
    how = (f"data.path={letters}", "data.validation_share=0.0", "data.clean=[pii,exact]", "trainer.max_steps=2")
    done = main(*pretraining(tmp_path, "a", *how))
    assert done.code == 0, done.err
    told = (
        "data (train): cleaned: 45 examples, 40 kept, 45 pii seen, 45 pii changed, 45 pii (email), 45 exact seen, "
        "5 exact removed"
    )
    assert told in one_line(done.out)
    assert manifest(tmp_path / "a")["read"] == {
        "train": {
            "rows": 45, "examples": 45, "kept": 40, "pii seen": 45, "pii changed": 45, "pii removed": 0,
            "pii (email)": 45, "exact seen": 45, "exact removed": 5,
        }
    }  # fmt: skip
    plain = main(*pretraining(tmp_path, "b", *how[:2], "trainer.max_steps=2"))
    assert (
        plain.code == 0 and "cleaned:" not in plain.out and manifest(tmp_path / "b")["read"] == {"train": {"rows": 45}}
    )
    sources = [manifest(tmp_path / name)["source"] for name in "ab"]
    assert sources[0] != sources[1]


def test_a_leak_is_warned_of_refused_or_not_looked_for(main, pretraining, letters, tmp_path):
    """The held-out file has one of the letters in capitals (24 words, so 12 n-grams) and one that is nowhere."""
    held = tmp_path / "held.jsonl"
    other = "A wholly different letter about the weather in the north, the south, the east and the west of here."
    row = json.loads(letters.read_text().splitlines()[7])
    held.write_text("".join(json.dumps({"text": text}) + "\n" for text in (other, row["text"].upper())))
    how = (f"data.path={letters}", "data.validation_share=0.0", "trainer.max_steps=2", f"data.held_out=[{held}]")
    said = f"1 of 2 held-out examples ({held}) are in the training data, such as {held}:2 in {letters}:8 (12 of its 12"

    done = main(*pretraining(tmp_path, "warned", *how, "data.contamination=warn"))
    assert done.code == 0, done.err
    assert f"warning: {said}" in one_line(done.out)
    assert manifest(tmp_path / "warned")["contamination"] == {
        str(held): {
            "examples": 2, "contaminated": 1, "share": 0.5,
            "worst": [{"held_out": f"{held}:2", "train": f"{letters}:8", "shared": 12, "of": 12}],
            "touched": 1, "same": 0, "same_prompt": 0,
        }
    }  # fmt: skip

    failed = main(*pretraining(tmp_path, "failed", *how))
    assert failed.code == 1 and failed.err.startswith(f"error: {said}") and failed.err.count("\n") == 1
    assert not list(tmp_path.glob("failed/checkpoints/step-*"))
    for allowed in ("data.contamination_share=0.5", "data.contamination=off"):
        done = main(*pretraining(tmp_path, allowed[-3:], *how[:3], how[3], allowed))
        assert done.code == 0 and "held-out" not in done.out


def test_the_validation_split_is_compared_and_files_that_are_not_there_are_named(main, pretraining, tmp_path):
    done = main(*pretraining(tmp_path, "a", "validation.every_steps=2", "trainer.max_steps=2"))
    assert done.code == 0, done.err
    found = manifest(tmp_path / "a")["contamination"]["validation"]
    assert found["examples"] > 0 and found["contaminated"] == 0
    missing = main(*pretraining(tmp_path, "b", "data.held_out=[nowhere.jsonl]"))
    assert missing.code == 1 and "data.held_out=nowhere.jsonl" in missing.err and missing.err.count("\n") == 1


def test_what_phase_evaluate_reads_is_compared_without_being_asked(main, pretraining, tmp_path):
    """Row 1,500 of 2,000 is the evaluation's, too: no sample of 1,000 (every second) has it, and nothing validates."""
    rows = [{"text": f"heron {i} stood on stone {i} and ate fish {i}"} for i in range(2001)]
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held.write_text("".join(json.dumps(row) + "\n" for row in ({"text": "another"}, rows[1501])))
    how = (f"data.path={train}", f"data.validation_path={held}", "trainer.max_steps=2", "data.contamination=off")
    done = main(*pretraining(tmp_path, "a", *how, "validation.every_steps=0"))
    twin = f"error: example {held}:2: it is held out (evaluate), and trained on as example {train}:1502; take it out"
    assert done.code == 1 and done.err.startswith(twin) and "doctor.ignore=[held_out_seen]" in done.err
    done = main(*pretraining(tmp_path, "b", *how, "validation.every_steps=0", "doctor.ignore=[held_out_seen]"))
    assert done.code == 0 and f"warning: {twin[7:]}" in one_line(done.out)
    found = manifest(tmp_path / "b")["contamination"]
    assert {name: (f["examples"], f["same"]) for name, f in found.items()} == {"evaluate": (2, 1)}
    done = main(*pretraining(tmp_path, "c", *how, "validation.every_steps=2"))
    assert done.code == 1 and "it is held out (validation), and" in done.err, "the same data is read once"


def test_a_pack_s_own_evaluation_is_compared_with_the_settings_of_the_run(main, tmp_path):
    """finance: 19 held-out questions of the sample validate, 37 texts and questions of it are evaluated on."""
    small = (
        "phase=sft",
        "model=primer",
        "domain=finance",
        "data.sample=true",
        "batch.length=256",
        "validation.every_steps=2",
    )
    tiny = ("model.dim=32", "model.layers=1", "model.heads=2", "model.kv_heads=1", "tokenizer.vocab_size=300")
    tiny += ("batch.size=2", "batch.micro_size=2", "trainer.max_steps=2", f"runs={tmp_path}", "name=a")
    done = main(*small, *tiny)
    assert done.code == 0, done.err
    found = manifest(tmp_path / "a")["contamination"]
    assert {name: f["examples"] for name, f in found.items()} == {"validation": 19, "evaluate": 37}
    data = evaluation_data(run_config(compose([*small, "data.seed=5", "data.parts=[economies]", "data.shown=2"])))
    assert data == Component("finance", FinanceConfig(split="test", seed=20261731, sample=True, shown=2))
    assert evaluation_data(run_config(compose(["phase=sft", "data=chat"]))) is None, "its source is not the domain's"


def test_an_evaluation_that_cannot_be_read_is_told(main, pretraining, letters, tmp_path):
    how = (f"data.path={letters}", "data.validation_share=0.0", "trainer.max_steps=2", "validation.every_steps=0")
    done = main(*pretraining(tmp_path, "a", *how))
    assert done.code == 0 and "nothing was compared with what phase=evaluate reads of files: " in one_line(done.out)


def test_wrong_step_is_refused_before_anything(main, pretraining, tmp_path):
    refused = main(*pretraining(tmp_path, "a", "data.clean=[nea]"))
    assert refused.code == 2 and "Did you mean near?" in refused.err and not (tmp_path / "a").exists()


def test_every_source_can_be_cleaned_and_only_where_asked(cache, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(cache))
    asked = run_config(compose(["phase=sft", "data.clean=[exact]", "data.num_tasks=300", "data.num_chats=10"]))
    cleaned = build_source(asked.data, "sft", "validation")
    assert isinstance(cleaned, Cleaned) and cleaned.config.split == "validation"
    plain = run_config(compose(["phase=sft"]))
    assert not isinstance(build_source(plain.data, "sft"), Cleaned)
