"""`phase=chat` as it is started: conversations that go on in the next run, and settings that cannot be."""

import json
import shutil

import pytest

from trivium.inference.feedback import FeedbackStore
from trivium.inference.sessions import SessionStore


@pytest.fixture
def chat(main, tuned, tmp_path):
    def chat(*changes, name="talk"):
        fixed = ("phase=chat", f"init_from={tuned}", f"runs={tmp_path}", f"name={name}", "domain=files")
        return main(*fixed, "inference.sampling.max_tokens=4", *changes)

    return chat


def test_a_named_conversation_goes_on_in_the_next_run(chat, tmp_path):
    """Two runs of another name share a file; the second's prompt begins with every id of the first."""
    file = tmp_path / "shared.sqlite"
    assert chat("prompts=[How many,Again]", f"sessions.path={file}", "sessions.open=count").code == 0
    first = SessionStore(file)
    before = [i for turn in first.path(first.find("count").head) for i in turn.ids]
    done = chat("prompts=[And now]", f"sessions.path={file}", "sessions.open=count", name="later")
    assert done.code == 0 and f"conversation 'count', {len(before)} tokens" in done.out
    path = first.path(first.find("count").head)
    assert [turn.text for turn in path][::2] == ["How many", "Again", "And now"]
    assert [i for turn in path for i in turn.ids][: len(before)] == before
    rows = [json.loads(line) for line in (tmp_path / "later/samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["And now"], "of a run, what was said in it"


def test_scripted_questions_leave_no_conversation(chat, tmp_path):
    assert chat("prompts=[How many]").code == 0
    assert not list(tmp_path.rglob("*.sqlite*"))


def test_another_model_is_refused_by_name(chat, main, tuned, tmp_path):
    assert chat("prompts=[a]", "sessions.open=count").code == 0
    shutil.copytree(tuned, tmp_path / "other")
    shutil.rmtree(tmp_path / "other/checkpoints/step-120")
    (tmp_path / "other/checkpoints/LATEST").write_text("step-100")
    done = main(
        "phase=chat", f"init_from={tmp_path / 'other/checkpoints/step-100'}", f"runs={tmp_path}", "name=foreign",
        "domain=files", "prompts=[b]", "sessions.open=count", f"sessions.path={tmp_path / 'talk/sessions.sqlite'}",
    )  # fmt: skip
    assert done.code == 1 and "conversation 'count' was held with another model" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (["sessions.full=forget"], "sessions.full='forget' is not one of error, drop_oldest, summarise"),
        (["sessions.keep=false", "sessions.open=a"], "sessions.keep=false keeps nothing"),
    ],
)
def test_settings_that_cannot_be(chat, changes, what):
    done = chat("prompts=[a]", *changes)
    assert done.code == 2 and what in done.err


def test_a_file_that_is_no_store_is_refused(chat, tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but notes " * 100)
    done = chat("prompts=[a]", "sessions.open=x", f"sessions.path={tmp_path / 'notes.txt'}")
    assert done.code == 1 and "notes.txt cannot be used (file is not a database)" in done.err
    assert (tmp_path / "notes.txt").read_text().startswith("not a database")


def test_thumbs_in_the_terminal_are_kept_where_feedback_is_on(chat, tmp_path):
    """An answer that was cut has an end that was not drawn, and the verdict is on the very ids."""
    done = chat("prompts=[How many,/good well said,Again,/bad]", "server.feedback=true")
    assert done.code == 0 and done.out.count("(kept)") == 2
    store = FeedbackStore(tmp_path / "talk/feedback.sqlite")
    records = list(store.records())
    assert [(e.value, e.comment, e.id) for e in store.standing()] == [
        ("up", "well said", records[0].id), ("down", "", records[1].id)]  # fmt: skip
    first, second = records
    assert second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids
    assert second.prompt_ids[len(first.prompt_ids) :][: len(first.completion_ids)] == first.completion_ids
    assert all(p < 0 for p, drawn in zip(first.logprobs, first.sampled, strict=True) if drawn) and any(first.sampled)
