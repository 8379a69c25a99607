"""Pairs and labelled answers from a user's files, and one folder that feeds every phase."""

import json

import datasets
import pytest

from trivium.data.config import FilesConfig
from trivium.data.files import Files
from trivium.data.source import Source, form_of, prompt_of
from trivium.errors import ConfigError, DataError
from trivium.testing.contracts import SourceContract


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def read(path, **settings):
    source = Files(FilesConfig(path=str(path), validation_share=0.0, **settings))
    return [{k: v for k, v in source[i].items() if k != "id"} for i in range(len(source))]


def user(content, **more):
    return {"role": "user", "content": content, **more}


def bot(content, **more):
    return {"role": "assistant", "content": content, **more}


ASK, YES, NO = user("2 + 2?"), bot("4"), bot("5")
WHOLE = {"chosen": [ASK, YES], "rejected": [ASK, NO]}
TEXT = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}


# ---- pairs


def test_pairs_of_text_stay_text(tmp_path):
    write(tmp_path / "a.jsonl", [{**TEXT, "source": "a book"}] * 2)
    assert read(tmp_path / "a.jsonl") == [TEXT, TEXT]


@pytest.mark.parametrize(
    "row",
    [
        WHOLE,
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        {"prompt": "2 + 2?", "chosen": [YES], "rejected": [NO]},
        {"prompt": "2 + 2?", **WHOLE},
        {"prompt": [ASK], **WHOLE},
        {"prompt": None, **WHOLE},
        {"chosen": [ASK, {**YES, "name": "x"}], "rejected": [ASK, NO]},
    ],
    ids=["whole", "messages before", "text before", "text repeated", "messages repeated", "null", "extra key"],
)
def test_pairs_of_conversations_become_whole_ones(tmp_path, row):
    """A prompt beside the answers is put in front of them, but not a second time where they begin with it."""
    write(tmp_path / "a.jsonl", [row])
    assert read(tmp_path / "a.jsonl") == [WHOLE]


def test_one_file_may_write_its_pairs_in_several_ways(tmp_path):
    """A column that is text in one row and a list in another, and a message with a key that others lack."""
    rows = [
        {"prompt": "2 + 2?", "chosen": [YES], "rejected": [NO]},
        {"prompt": [ASK], "chosen": [bot("4", name="x")], "rejected": [NO]},
        WHOLE,
    ]
    write(tmp_path / "a.jsonl", rows)
    assert read(tmp_path / "a.jsonl") == [WHOLE] * 3


def test_text_that_reads_as_json_stays_text(tmp_path):
    """In a column of mixed types the reading library takes "5" for a number and "true" for a verdict."""
    rows = [{"prompt": "5", "chosen": [YES], "rejected": [NO]}, {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "b.json"):
        assert [pair["chosen"][0] for pair in read(tmp_path / name)] == [user("5"), ASK]


def test_answers_of_several_turns_and_a_system_prompt(tmp_path):
    system = {"role": "system", "content": "Be short."}
    ahead = [system, user("hi"), bot("hello")]
    row = {
        "chosen": [*ahead, user("4?"), bot("a"), user("b"), bot("c")],
        "rejected": [*ahead, user("4?"), bot("d")],
        "prompt": "4?",
    }
    write(tmp_path / "a.jsonl", [row])
    (pair,) = read(tmp_path / "a.jsonl")
    assert pair == {"chosen": row["chosen"], "rejected": row["rejected"]}
    assert prompt_of(pair) == [*ahead, user("4?")]


def test_answers_that_look_like_dates_stay_text(tmp_path):
    """Arrow reads "2024-01-05" as a point in time, inside messages too."""
    write(tmp_path / "a.jsonl", [{"prompt": "day?", "chosen": [bot("2024-01-05")], "rejected": [bot("2024-01-06")]}])
    assert read(tmp_path / "a.jsonl")[0]["chosen"] == [user("day?"), bot("2024-01-05")]


def test_csv_and_parquet_pairs_are_those_of_jsonl(tmp_path):
    rows = [{"prompt": f"{i} + 1 =", "chosen": str(i + 1), "rejected": str(i)} for i in range(5)]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list([WHOLE]).to_parquet(tmp_path / "b.parquet")
    assert read(tmp_path / "a.csv") == read(tmp_path / "a.parquet") == rows
    assert read(tmp_path / "b.parquet") == [WHOLE]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": "4", "rejected": "5"}, "are text and need the prompt they answer, in a column prompt"),
        ({**TEXT, "prompt": None}, "need the prompt"),
        ({**TEXT, "prompt": [ASK]}, "prompt is .*, not text"),
        ({**TEXT, "chosen": ""}, "chosen is '', not text"),
        ({**TEXT, "rejected": " 4"}, "chosen and rejected are the same"),
        ({**TEXT, "rejected": None}, "chosen must be a list of {role, content}, not ' 4'"),
        ({**TEXT, "rejected": 5}, "chosen must be a list"),
        ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, "chosen and rejected are the same"),
        ({"chosen": [ASK, YES], "rejected": None}, "rejected must be a list of {role, content}, not None"),
        ({"chosen": [ASK, YES], "rejected": "5"}, "rejected must be a list of {role, content}, not '5'"),
        ({"chosen": [ASK, YES], "rejected": []}, "rejected must be a list"),
        ({"chosen": [ASK, YES], "rejected": [ASK, None]}, "rejected must be a list"),
        ({"chosen": ASK, "rejected": NO}, "chosen must be a list"),
        ({"chosen": [ASK, bot(None)], "rejected": [ASK, NO]}, "chosen has a message with role 'assistant' and content"),
        ({"chosen": [ASK, {"content": "4"}], "rejected": [ASK, NO]}, "chosen has a message with role None"),
        ({"chosen": [YES], "rejected": [NO]}, "begin with the same prompt.*; the first 0 messages are the same"),
        ({"chosen": [ASK, YES], "rejected": [user("3?"), NO]}, "the first 0 messages are the same"),
        ({"chosen": [ASK, YES], "rejected": [ASK, YES, user("?"), NO]}, "the first 2 messages are the same"),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO, user("?")]}, "end in one"),
        ({"chosen": [ASK, user("!"), YES], "rejected": [ASK, user("?"), NO]}, "go on with an assistant turn"),
        ({"chosen": [ASK, YES], "rejected": [ASK]}, "the first 1 messages are the same"),
        ({"prompt": "3?", **WHOLE}, "must both begin with an assistant turn, or both with the prompt"),
        ({"prompt": "2 + 2?", "chosen": [ASK, YES], "rejected": [NO]}, "must both begin with an assistant turn, or"),
        ({"prompt": "", "chosen": [YES], "rejected": [NO]}, "prompt is '', not text"),
        ({"prompt": [bot(None)], "chosen": [YES], "rejected": [NO]}, "prompt has a message with role"),
    ],
)
def test_bad_pairs_are_named(tmp_path, row, says):
    good = TEXT if "prompt" in row and isinstance(row["chosen"], str) else WHOLE
    path = write(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(DataError, match=says) as error:
        read(path)
    assert str(error.value).startswith(f"{path} row 2: ")


# ---- labels


def test_labels_are_read_with_messages_and_with_text(tmp_path):
    write(tmp_path / "a.jsonl", [{"messages": [ASK, YES], "label": True}, {"messages": [ASK, NO], "label": False}])
    write(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a", "label": i} for i in (0, 1)])
    assert read(tmp_path / "a.jsonl") == [
        {"messages": [ASK, YES], "label": True},
        {"messages": [ASK, NO], "label": False},
    ]
    labels = [example["label"] for example in read(tmp_path / "b.jsonl")]
    assert labels == [False, True] and all(type(label) is bool for label in labels)


def test_labels_in_csv_are_words_or_digits(tmp_path):
    said = ["true", "False", "1", "0", "TRUE"]
    (tmp_path / "a.csv").write_text("prompt,completion,label\n" + "".join(f"q,a,{label}\n" for label in said))
    assert [example["label"] for example in read(tmp_path / "a.csv")] == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"label": "true"}, "label is 'true'; it must be true .desirable. or false"),
        ({"label": None}, "label is None"),
        ({"label": 2}, "label is 2"),
        ({"label": -1}, "label is -1"),
        ({"label": 1.0}, "label is 1.0"),
        ({"label": "good"}, "label is 'good'"),
        ({"messages": [YES]}, "must be a prompt and, last, the assistant turn that label judges"),
        ({"messages": [ASK, YES, ASK]}, "must be a prompt and, last, the assistant turn"),
        ({"messages": None}, "messages must be a list"),
    ],
)
def test_bad_labels_are_named(tmp_path, row, says):
    good = {"messages": [ASK, YES], "label": True}
    path = write(tmp_path / "a.jsonl", [good, {**good, **row}])
    with pytest.raises(DataError, match=says) as error:
        read(path)
    assert str(error.value).startswith(f"{path} row 2: ")


def test_bad_label_in_csv_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,label\nq,a,yes\n")
    with pytest.raises(DataError, match="a.csv row 1: label is 'yes'"):
        read(tmp_path / "a.csv")


def test_a_bad_answer_is_never_one_to_imitate(tmp_path):
    """messages beside label or beside chosen and rejected: the more specific form wins, unless the schema is named."""
    write(tmp_path / "a.jsonl", [{"messages": [ASK, NO], "label": False}])
    write(tmp_path / "b.jsonl", [{"messages": [ASK, YES], **WHOLE}])
    assert [form_of(read(tmp_path / name)[0]) for name in ("a.jsonl", "b.jsonl")] == ["labels", "pairs"]
    with pytest.raises(DataError, match=r"a.jsonl holds labels .*, or set data.schema=messages to ignore the other"):
        read(tmp_path / "a.jsonl", forms=["chat"])
    assert read(tmp_path / "a.jsonl", forms=["chat"], schema="messages") == [{"messages": [ASK, NO]}]


def test_bad_rows_of_chats_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [ASK, YES]}, {"messages": [ASK, {"role": "assistant"}]}])
    with pytest.raises(
        DataError, match=r"a.jsonl row 2: messages has a message with role 'assistant' and content None"
    ):
        read(path)


# ---- held out by prompt


def test_answers_to_one_prompt_stay_on_one_side(tmp_path):
    """Four pairs for each of 100 prompts, in other words each: 100 x 0.2 = 20 prompts, five deviations are 20."""
    rows = [
        {"chosen": [user(f"q{i}"), bot(f"good {k}")], "rejected": [user(f"q{i}"), bot(f"bad {k}")]}
        for k in range(4)
        for i in range(100)
    ]
    labels = [{"prompt": f"q{i}", "completion": f"a{k}", "label": k < 2} for k in range(4) for i in range(100)]
    for name, many in (("pairs", rows), ("labels", labels)):
        path = write(tmp_path / f"{name}.jsonl", many)
        sides = [Files(FilesConfig(path=path, validation_share=0.2, split=s)) for s in ("train", "validation")]
        said = [{json.dumps(prompt_of(side[i])) for i in range(len(side))} for side in sides]
        assert said[0].isdisjoint(said[1]) and len(said[0]) + len(said[1]) == 100
        assert [len(side) for side in sides] == [4 * len(prompts) for prompts in said]
        assert 0 < len(said[1]) <= 40


# ---- one folder for every phase


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "my.txt").write_text("Herons wait.")
    write(place / "chats.jsonl", [{"messages": [ASK, YES]}])
    write(place / "more.jsonl", [{"prompt": "a", "completion": "b"}])
    write(place / "pairs.jsonl", [WHOLE])
    return place


@pytest.mark.parametrize(
    ("forms", "files"),
    [
        ([], ["chats", "more", "my", "pairs"]),
        (["text"], ["my"]),
        (["chat"], ["chats", "more"]),
        (["pairs", "labels"], ["pairs"]),
        (["chat", "text"], ["chats", "more", "my"]),
    ],
)
def test_folder_gives_the_files_of_the_wanted_forms(folder, forms, files):
    for path in (folder, folder / "*"):
        source = Files(FilesConfig(path=str(path), validation_share=0.0, forms=forms))
        assert [source[i]["id"].split("/")[-1].split(".")[0] for i in range(len(source))] == files


def test_folder_without_a_wanted_form_says_what_was_found(folder):
    (folder / "pairs.jsonl").unlink()
    says = (
        r"mine holds chat \(messages, or prompt and completion\) and text \(text\); data.forms=\[pairs\] reads "
        r"chosen and rejected: name a file of that kind, or choose phase=pretrain, or choose phase=sft, or choose "
        r"phase=distill"
    )
    with pytest.raises(DataError, match=says):
        read(folder, forms=["pairs"])


@pytest.mark.parametrize(
    ("name", "form", "phase"), [("my.txt", "text", "pretrain"), ("pairs.jsonl", "pairs", "reward")]
)
def test_named_file_of_another_form_is_refused(folder, name, form, phase):
    with pytest.raises(DataError, match=rf"{name} holds {form} .*data.forms=\[chat\] .*choose phase={phase}"):
        read(folder / name, forms=["chat"])


def test_unknown_columns_and_settings_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"choosen": "a", "rejected": "b"}])
    nearest = r"nearest: pairs \(chosen, rejected\); set .data.columns=\[\"chosen=choosen\"\]."
    with pytest.raises(DataError, match=rf"known are pairs: chosen, rejected; labels: messages, label; .*{nearest}"):
        read(path)
    with pytest.raises(ConfigError, match=r"data.forms=\['pair'\] has 'pair', .* Did you mean pairs"):
        FilesConfig(forms=["pair"])
    with pytest.raises(ConfigError, match="schema='pair' is not one of"):
        FilesConfig(schema="pair")


# ---- what a phase reads


class Fixed(Source):
    def __init__(self, example):
        self.example = {"id": "7", **example}

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.example


EXAMPLES = {
    "text": {"text": "x"},
    "chat": {"messages": [ASK, YES]},
    "answers": {"messages": [ASK, YES], "answer": "4", "task": "add"},
    "pairs": WHOLE,
    "labels": {"prompt": "a", "completion": "b", "label": False},
}
TAKEN = {
    "tokenizer": set(EXAMPLES),
    "evaluate": set(EXAMPLES),
    "pretrain": {"text"},
    "sft": {"chat", "answers"},
    "preference": {"pairs", "labels"},
    "reward": {"pairs"},
    "rlhf": {"answers"},
    "distill": {"chat", "answers", "text"},
}


@pytest.mark.parametrize("phase", TAKEN)
@pytest.mark.parametrize("form", EXAMPLES)
def test_phase_takes_the_forms_it_reads(phase, form):
    source = Fixed(EXAMPLES[form])
    assert form_of(source[0]) == form
    if form in TAKEN[phase]:
        source.expect(phase)
        return
    with pytest.raises(DataError, match=f"example 7 has {next(iter(EXAMPLES[form]))}.*; phase={phase} needs "):
        source.expect(phase)


def test_refusal_says_what_the_phase_needs():
    with pytest.raises(DataError) as error:
        Fixed(EXAMPLES["chat"]).expect("preference")
    assert str(error.value) == (
        "example 7 has messages; phase=preference needs chosen and rejected, or a completion with a label"
    )


class TestFilesOfEveryForm(SourceContract):
    @pytest.fixture(autouse=True)
    def files(self, folder):
        write(folder / "text_pairs.jsonl", [TEXT])
        write(folder / "labels.jsonl", [{"messages": [ASK, NO], "label": False}])
        self.folder = folder

    def make(self):
        return Files(FilesConfig(path=str(self.folder), validation_share=0.0))
