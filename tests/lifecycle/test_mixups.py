"""What is easily mixed up: another content under the same name, another phase's folder, another form of prompt."""

import json

import numpy as np
import pytest

from trivium.cli import as_typed
from trivium.compose import compose, run_config
from trivium.data.datamodule import validation_batches
from trivium.data.table import TokenTable
from trivium.disk import lock_folder, read_lines
from trivium.errors import ConfigError, DataError
from trivium.pipeline import plan_stages, with_checkpoint_model
from trivium.training.stop import StopController


def test_evaluation_of_changed_text_is_not_called_done(main, trained, tmp_path):
    """The settings are the same, the file is not: the old figure must not stand for the new text."""
    text = tmp_path / "held.txt"
    text.write_text("abc def ghi\n\n" * 40)
    command = ["phase=evaluate", "domain=files", f"data.validation_path={text}", f"init_from={trained}",
               f"runs={tmp_path}", "name=score"]  # fmt: skip
    results = []
    for content in ("abc def ghi\n\n" * 40, "xyz xyz 123\n\n" * 40):
        text.write_text(content)
        assert main(*command).code == 0
        results.append(json.loads((tmp_path / "score/MANIFEST.json").read_text())["results"]["bits_per_byte"]["value"])
    assert results[0] != results[1]
    assert "done already" in main(*command).out


def test_evaluation_on_the_training_path_with_another_cut_is_refused(main, trained, corpus, tmp_path):
    """Trained with data.validation_share=0.2; at 0.5 a part of what is scored would have been trained on."""
    done = main("phase=evaluate", "domain=files", f"data.path={corpus}", "data.validation_share=0.5",
                f"init_from={trained}", f"runs={tmp_path}")  # fmt: skip
    assert done.code == 2
    assert "data.validation_share=0.2" in done.err
    whole = main("phase=evaluate", "domain=files", f"data.validation_path={corpus}", f"init_from={trained}",
                 f"runs={tmp_path}")  # fmt: skip
    assert whole.code == 2 and "keeps trained text out of the score" in whole.err


def test_folder_of_another_phase_is_refused_and_left_alone(main, trained):
    before = (trained / "MANIFEST.json").read_bytes()
    done = main("phase=generate", f"init_from={trained}", f"runs={trained.parent}", "name=base", "prompt=a")
    assert done.code == 2 and "holds a run of phase=pretrain" in done.err
    assert (trained / "MANIFEST.json").read_bytes() == before


def test_model_tuned_on_pairs_is_asked_as_pairs(main, trained, tmp_path):
    """Prompt and completion are trained as plain text; the chat template's tokens were never seen."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"{i} is", "completion": " odd"}) + "\n" for i in range(60)))
    tuned = main("phase=sft", "domain=files", f"data.path={pairs}", f"init_from={trained}", f"runs={tmp_path}",
                 "name=pairs", "trainer.max_steps=2", "batch.size=2", "batch.micro_size=2",
                 "batch.length=32")  # fmt: skip
    assert tuned.code == 0, tuned.err
    state = json.loads(next((tmp_path / "pairs/checkpoints").glob("step-2/state.json")).read_text())
    assert state["form"] == "text"
    asked = main("phase=generate", f"init_from={tmp_path}/pairs", f"runs={tmp_path}", "prompt=7 is")
    as_text = main(
        "phase=generate", f"init_from={tmp_path}/pairs", f"runs={tmp_path}", "prompt=7 is", "prompt_format=text"
    )
    assert asked.code == 0 and "7 is ->" not in asked.out
    assert asked.out == as_text.out
    chatted = main("phase=chat", f"init_from={tmp_path}/pairs", f"runs={tmp_path}", "prompts=[hi]")
    assert "not tuned on conversations" in chatted.out


def test_pretraining_goes_on_from_a_model_of_any_size(main, trained, corpus, tmp_path):
    """phase=pretrain starts the primer's model; a checkpoint beside it brings its own, unless a model is named."""
    words = ["phase=pretrain", f"init_from={trained}"]
    assert with_checkpoint_model(words)[-1] == "~model"
    assert with_checkpoint_model([*words, "model=primer"]) == [*words, "model=primer"]
    done = main(*words, "domain=files", f"data.path={corpus}", f"runs={tmp_path}", "name=more", "trainer.max_steps=2",
                "batch.size=2", "batch.micro_size=2", "batch.length=32")  # fmt: skip
    assert done.code == 0, done.err


def test_pipeline_gives_model_settings_to_the_stage_that_starts_a_model():
    """To pretraining, that is; everything after takes its start's, students some of its layers."""
    overrides = ["pipeline=three_phases", "pipeline.after=[]", "pipeline.skip=[preference,reward,rlhf]", "model.dim=96"]
    stages = plan_stages(overrides, run_config(compose(overrides)), "x").stages
    models = {s.entry["name"]: s.config.model for s in stages}
    assert models["pretrain"].config.dim == 96
    assert models["sft"] is models["student_alone"] is models["distill"] is None


def test_pipeline_refuses_what_a_later_stage_cannot_use_before_the_first_starts(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{i} some words here\n\n" for i in range(50_000)))
    overrides = ["pipeline=three_phases", "domain=files", f"data.path={text}"]
    with pytest.raises(DataError, match=r"data.forms=\[chat, answers\] reads messages, or prompt and completion"):
        plan_stages(overrides, run_config(compose(overrides)), "x")
    overrides = ["pipeline=three_phases", "init_from=runs/x"]
    with pytest.raises(ConfigError, match="leave init_from= away"):
        plan_stages(overrides, run_config(compose(overrides)), "x")


def test_validation_rows_are_a_sample_of_all_documents():
    """200 documents of 8 tokens (ids 1) and 200 of 2 (ids 2), rows of 8: packing puts the long ones first."""
    lengths = [8] * 200 + [2] * 200
    tokens = np.concatenate([np.full(n, 1 if n == 8 else 2, np.int32) for n in lengths])
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    table = TokenTable(tokens, np.ones(len(tokens), bool), offsets, [str(i) for i in range(400)])
    batches = validation_batches(table, max_rows=50, micro_size=10, length=8, pad_id=0)
    short = sum(int((b.tokens[:, 0] == 2).sum()) for b in batches)
    assert sum(len(b.tokens) for b in batches) == 50
    assert 3 <= short <= 17  # 50 rows in 250 are short: 10 expected, standard deviation 2.5


def test_lowest_loss_is_best_whatever_patience_asks():
    """min_delta 0.1: 2.95 and 2.92 do not reset patience, but they are the lowest so far."""
    stop = StopController(patience=2, min_delta=0.1)
    assert [stop.update(loss, step) for step, loss in enumerate((3.0, 2.95, 2.92), 1)] == [True, True, True]
    assert (stop.best, stop.best_step, stop.exhausted) == (2.92, 3, True)
    again = StopController(patience=2, min_delta=0.1)
    again.restore(json.loads(json.dumps(stop.state())))
    assert again == stop


def test_lines_end_at_line_feeds_and_a_half_character_ends_the_reading(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"a": "one\u2028two"}, {"a": "\x85"}, {"a": "three"}]
    path.write_bytes("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode() + b'{"a": "caf\xc3')
    assert read_lines(path) == rows


def test_folder_is_one_process_at_a_time(tmp_path):
    held = lock_folder(tmp_path)
    assert held is not None and lock_folder(tmp_path) is None
    held.close()
    assert lock_folder(tmp_path) is not None


def test_names_are_kept_as_typed():
    assert run_config(compose(["phase=chat", as_typed("name=2024_01_05")])).name == "2024_01_05"
    assert run_config(compose(["phase=chat", as_typed("name=1e5")])).name == "1e5"
    assert as_typed("optim.lr=1e-5") == "optim.lr=1e-5"


def test_trained_text_is_not_scored_as_held_out_through_a_mixture(main, pretraining, tmp_path):
    """Cut another way in evaluation than in training: files and mixtures, after either."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"the heron {i} stood in the river"}) + "\n" for i in range(200)))
    plain = [o for o in pretraining(tmp_path, "x") if not o.startswith(("data", "domain", "name"))]
    part = "domain: files, path: %s, validation_share: %s"
    mixed = "data.parts={a: {%s}}"
    files = ("domain=files", f"data.path={file}")
    for name, how in (
        ("mixed", ("domain=mixture", mixed % (part % (file, 0.1)))),
        ("plain", (*files, "data.validation_share=0.1")),
    ):
        done = main(*plain, f"name={name}", *how, "trainer.max_steps=1")
        assert done.code == 0, done.err
        start = ("phase=evaluate", f"init_from={tmp_path}/{name}", f"runs={tmp_path}", f"name=of-{name}",
                 "evaluation.max_texts=2", "evaluation.resamples=10")  # fmt: skip
        sentence = f"was trained on {file} with data.validation_share=0.1"
        done = main(*start, *files, "data.validation_share=0.5")
        assert done.code == 2 and sentence in done.err, done.err
        done = main(*start, "domain=mixture", mixed % (part % (file, 0.5)))
        assert done.code == 2 and sentence in done.err, done.err
        done = main(*start, "domain=mixture", mixed % (part % (file, 0.1)))
        assert done.code == 0, done.err
