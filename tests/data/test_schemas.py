"""Schemas in use, by their columns: what each row becomes, by hand; the same from JSON, Parquet and Arrow."""

import csv
import json
import re
import shlex
import subprocess
import sys

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from trivium.compose import compose, run_config
from trivium.data.config import FilesConfig
from trivium.data.files import Files
from trivium.data.schemas import ADAPTERS, COLUMNS, FORM_OF
from trivium.data.source import FORM_WORDS, READS, form_of
from trivium.errors import DataError
from trivium.testing.contracts import SourceContract


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with pa.ipc.new_stream(str(path), pa.Table.from_pylist(rows).schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows))
    return str(path)


def read(path, **settings):
    source = Files(FilesConfig(path=str(path), validation_share=0.0, **settings))
    return [{k: v for k, v in source[i].items() if k != "id"} for i in range(len(source))]


def user(content):
    return {"role": "user", "content": content}


def bot(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "Be short."}
FOUR = bot("4")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SAID = [
    user("Rain?"),
    bot("", tool_calls=[call("weather", city="Ulm")]),
    {"role": "tool", "content": "sun"},
    bot("No."),
]
CASES = {
    "alpaca": ({"instruction": "Add.", "input": "2 + 2", "output": "4"}, {"messages": [user("Add.\n\n2 + 2"), FOUR]}),
    "alpaca, no input": ({"instruction": "2 + 2?", "input": "", "output": "4"}, {"messages": [user("2 + 2?"), FOUR]}),
    "alpaca, null": ({"instruction": "2 + 2?", "input": None, "output": "4"}, {"messages": [user("2 + 2?"), FOUR]}),
    "alpaca with history": (
        {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "Be short."},
        {"messages": [SYSTEM, user("a"), bot("b"), user("c"), bot("d")]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "id": "x1"},
        {"messages": [user("hi"), bot("hello")]},
    ),
    "sharegpt, system in it": (
        {"conversations": [{"from": "system", "value": "Be short."}, {"from": "user", "value": "hi"},
                           {"from": "assistant", "value": "hello"}]},
        {"messages": [SYSTEM, user("hi"), bot("hello")]},
    ),
    "sharegpt, system beside it": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "system": "Be short."},
        {"messages": [SYSTEM, user("hi"), bot("yes")]},
    ),
    "sharegpt with tools": (
        {"conversations": [{"from": "human", "value": "Rain?"},
                           {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ulm"}}'},
                           {"from": "observation", "value": "sun"}, {"from": "gpt", "value": "No."}],
         "tools": '[{"name": "weather", "parameters": {"type": "object"}}]'},
        {"messages": SAID, "tools": [TOOL]},
    ),
    "sharegpt, tools empty": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "tools": "[]"},
        {"messages": [user("hi"), bot("yes")]},
    ),
    "messages with tools": (
        {"messages": [user("Rain?"),
                      {"role": "assistant", "content": None, "tool_calls": [
                          {"id": "c1", "type": "function",
                           "function": {"name": "weather", "arguments": '{"city": "Ulm", "unit": null}'}}]},
                      {"role": "tool", "content": "sun", "tool_call_id": "c1", "name": "weather"}, bot("No.")],
         "tools": [TOOL]},
        {"messages": [user("Rain?"), bot("", tool_calls=[{"id": "c1", **call("weather", city="Ulm")}]),
                      {"role": "tool", "content": "sun", "name": "weather", "tool_call_id": "c1"}, bot("No.")],
         "tools": [TOOL]},
    ),
    "messages, a call of the older kind": (
        {"messages": [user("Rain?"), {"role": "assistant", "content": None,
                                      "function_call": {"name": "weather", "arguments": '{"city": "Ulm"}'}},
                      {"role": "function", "name": "weather", "content": "sun"}]},
        {"messages": [user("Rain?"), bot("", tool_calls=[call("weather", city="Ulm")]),
                      {"role": "tool", "content": "sun", "name": "weather"}]},
    ),
    "messages in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                      bot([{"type": "text", "text": "c"}], reasoning_content="hm")]},
        {"messages": [user("ab"), bot("c", reasoning_content="hm")]},
    ),
    "prompt and completion of messages": (
        {"prompt": [user("hi")], "completion": [bot("yes")]}, {"messages": [user("hi"), bot("yes")]},
    ),
    "pairs of sharegpt": (
        {"conversations": [{"from": "human", "value": "4?"}], "chosen": {"from": "gpt", "value": "y"},
         "rejected": {"from": "gpt", "value": "n"}},
        {"chosen": [user("4?"), bot("y")], "rejected": [user("4?"), bot("n")]},
    ),
    "pairs of transcripts": (
        {"chosen": "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant: e",
         "rejected": "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant: f"},
        {"chosen": [user("a\n\nb"), bot("c"), user("d"), bot("e")],
         "rejected": [user("a\n\nb"), bot("c"), user("d"), bot("f")]},
    ),
    "pairs with tools": (
        {"prompt": [user("Rain?")], "chosen": [SAID[1]], "rejected": [bot("No idea.")], "tools": json.dumps([TOOL])},
        {"chosen": SAID[:2], "rejected": [user("Rain?"), bot("No idea.")], "tools": [TOOL]},
    ),
    "labels of messages": (
        {"prompt": [user("4?")], "completion": [bot("y")], "label": True},
        {"messages": [user("4?"), bot("y")], "label": True},
    ),
    "labels of sharegpt": (
        {"conversations": [{"from": "human", "value": "4?"}, {"from": "gpt", "value": "y"}], "label": False},
        {"messages": [user("4?"), bot("y")], "label": False},
    ),
    "steps": (
        {"prompt": "2 + 2 + 2?", "completions": ["2 + 2 = 4", "4 + 2 = 7"], "labels": [True, False]},
        {"prompt": "2 + 2 + 2?", "completions": ["2 + 2 = 4", "4 + 2 = 7"], "labels": [True, False]},
    ),
    "answers": (
        {"question": "2 + 2?", "answer": "so #### 4"},
        {"messages": [user("2 + 2?"), bot("so #### 4")], "answer": "so #### 4", "task": "a"},
    ),
    "answers, a number and a solution": (
        {"prompt": "2 + 2?", "answer": 4, "solution": "2 + 2 is 4", "task": "add"},
        {"messages": [user("2 + 2?"), bot("2 + 2 is 4")], "answer": "4", "task": "add"},
    ),
    "answers to messages": (
        {"messages": [SYSTEM, user("2 + 2?")], "answer": "4"},
        {"messages": [SYSTEM, user("2 + 2?"), bot("4")], "answer": "4", "task": "a"},
    ),
    "choices by number": (
        {"question": "Red?", "choices": ["sky", "blood"], "answer": 1, "subject": "art"},
        {"messages": [user("Red?\nA. sky\nB. blood"), bot("B")], "answer": "B", "task": "art"},
    ),
    "choices by letter": (
        {"question": "Red?", "choices": {"text": ["sky", "blood"], "label": ["1", "2"]}, "answerKey": "2"},
        {"messages": [user("Red?\nA. sky\nB. blood"), bot("B")], "answer": "B", "task": "a"},
    ),
    "choices in columns": (
        {"question": "Red?", "opa": "sky", "opb": "sea", "opc": "blood", "opd": "snow", "cop": 2,
         "subject_name": "Eye"},
        {"messages": [user("Red?\nA. sky\nB. sea\nC. blood\nD. snow"), bot("C")], "answer": "C", "task": "Eye"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("case", CASES)
def test_row_becomes_an_example(case, kind, tmp_path):
    row, example = CASES[case]
    path = write(tmp_path / f"a.{kind}", [row])
    assert read(path) == [example]
    assert "None" not in json.dumps(read(path))


def test_every_schema_has_columns_an_adapter_and_a_form():
    assert COLUMNS.keys() == ADAPTERS.keys() == FORM_OF.keys()
    assert set(FORM_OF.values()) == set(FORM_WORDS)


def test_keys_that_arrow_gives_to_all_are_left_out(tmp_path):
    """Two calls with other arguments, and a turn that has none: in a column of one type each has the keys of all."""
    rows = [
        {"messages": [user("a"), bot("", tool_calls=[call("f", x=1)]), {"role": "tool", "content": "b", "name": "f"}]},
        {"messages": [user("a"), bot("", tool_calls=[call("g", y="z")]), {"role": "tool", "content": "b"}, bot("c")]},
    ]
    for kind in ("parquet", "arrow"):
        assert read(write(tmp_path / f"a.{kind}", rows)) == rows
    raw = pq.read_table(tmp_path / "a.parquet").to_pylist()[0]["messages"]
    assert raw[0]["tool_calls"] is None and raw[1]["tool_calls"][0]["function"]["arguments"]["y"] is None


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"conversations": []}, "conversations must be a list of"),
        ({"conversations": [{"from": "martian", "value": "a"}]}, "a message from 'martian' .* one of human, user, gpt"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "from 'gpt' with value None"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "conversations has no turn of the assistant"),
        ({"conversations": [{"from": "function_call", "value": "weather"}]}, "a function_call is not JSON"),
        ({"conversations": [{"from": "function_call", "value": '{"name": 3}'}]}, "a call needs a name and arguments"),
        ({"messages": [user("a"), bot("", tool_calls=[call("")])]}, "a call needs a name and arguments, an object"),
        ({"messages": [bot("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])]}, "a call needs"),
        ({"messages": [user("a"), bot("b")], "tools": "{"}, "tools is not JSON"),
        ({"messages": [user("a"), bot("b")], "tools": [{"description": "x"}]}, "a function without a name"),
        ({"messages": [user("a"), bot("b")], "images": ["x.jpg"]}, "images holds what is not text"),
        ({"messages": [user([{"type": "image_url", "image_url": "x"}]), bot("b")]}, "models here read text only"),
        ({"instruction": "a", "output": ""}, "output is '', not text"),
        ({"instruction": "a", "output": "b", "input": 3}, "input is 3, not text"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "not a question and its answer"),
        ({"question": "a", "answer": None}, "answer is None, not text"),
        ({"question": "a", "answer": True}, "answer is True, not text"),
        ({"question": "a", "choices": ["x"], "answer": 0}, "2 to 26 texts are read"),
        ({"question": "a", "choices": ["x", "y"], "answer": 2}, "the right one of 2 options is 2"),
        ({"question": "a", "choices": ["x", "y"], "answer": -1}, "the right one of 2 options is -1"),
        ({"question": "a", "choices": ["x", "y"], "answer": "C"}, "the right one of 2 options is 'C'"),
        ({"prompt": "a", "completions": ["x", "y"], "labels": [True]}, "true or false for each of 2 completions"),
        ({"prompt": "a", "completions": ["x"], "labels": [2]}, "true or false for each of 1"),
        ({"prompt": "a", "completions": "x", "labels": [True]}, "completions is 'x', not a list of texts"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "first 0 messages"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_named(row, says, tmp_path):
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=says) as error:
        read(path)
    assert str(error.value).startswith(f"{path} row 1: ")


def test_the_most_specific_schema_is_read_and_another_can_be_named(tmp_path):
    row = {"prompt": "a", "completion": "b", "answer": "c", "text": "d"}
    path = write(tmp_path / "a.jsonl", [row])
    assert form_of(read(path)[0]) == "answers"
    assert read(path, schema="prompt_completion") == [{"prompt": "a", "completion": "b"}]
    assert read(path, schema="text") == [{"text": "d"}]
    with pytest.raises(DataError, match="has the columns prompt, completion, answer, text; known are alpaca: instruction, output"):  # fmt: skip # noqa: E501
        read(path, schema="alpaca")


# ---- what fits no schema


def refusal(path, **settings):
    with pytest.raises(DataError) as error:
        read(path, **settings)
    said = str(error.value)
    assert said.startswith(f"{path} has ") and "\n" not in said
    return said


def as_told(path, said, **stands_for):
    """The examples after setting what the error says, as a shell and the command line read it."""
    (told,) = re.findall(r"'data\.columns=\[.*?\]'", said)
    for word, meant in stands_for.items():
        told = told.replace(word, meant)
    config = run_config(compose(["phase=sft", "domain=files", f"data.path={path}", *shlex.split(told)]))
    return read(path, columns=config.data.config.columns)


ASKED = [user("a"), bot("b")]
NEAREST = {
    "alpaca (instruction, input, output)": (
        {"instruct": "a", "inputs": "c", "outputs": "b"}, {"messages": [user("a\n\nc"), bot("b")]}
    ),
    "alpaca (instruction, system, output)": (
        {"system_prompt": "Be short.", "question": "a", "response": "b"}, {"messages": [SYSTEM, *ASKED]}
    ),
    "alpaca (instruction, output)": ({"the query": "a", "Response": "b"}, {"messages": ASKED}),
    "answers (question, answer)": (
        {"Question": "a", "Answer": "b"}, {"messages": ASKED, "answer": "b", "task": "a"}
    ),
    "prompt_completion (prompt, completion)": (
        {"promt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}
    ),
    "messages (messages)": ({"dialog": ASKED}, {"messages": ASKED}),
    "sharegpt (conversations)": (
        {"conversation": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"messages": ASKED}
    ),
    "text (text)": ({"content": "a", "content_length": 1}, {"text": "a"}),
    "pairs (chosen, prompt, rejected)": (
        {"prompts": "q", "completion": "", "chosen_answer": "b", "rejected_answer": "a"},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
    ),
    "labels (prompt, completion, label)": (
        {"query": "a", "response": "b", "label": True}, {"prompt": "a", "completion": "b", "label": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("schema", NEAREST)
def test_the_nearest_schema_is_named_with_a_setting_that_works(schema, tmp_path):
    row, example = NEAREST[schema]
    path = write(tmp_path / "a.jsonl", [row])
    said = refusal(path)
    assert f"has the columns {', '.join(row)}; known are pairs: chosen, rejected; " in said
    assert f"; nearest: {schema}; set 'data.columns=" in said
    assert as_told(path, said) == [example]


def test_a_setting_for_names_that_a_shell_would_read_works(tmp_path):
    names = ["the 'query' $x", 'my "output", b]=c']
    path = write(tmp_path / "a.jsonl", [dict(zip(names, "ab", strict=True))])
    with pytest.raises(DataError) as error:
        read(path)
    told = shlex.split(str(error.value).partition("; set ")[2])
    config = run_config(compose(["phase=sft", "domain=files", f"data.path={path}", *told]))
    assert config.data.config.columns == [f"instruction={names[0]}", f"output={names[1]}"]
    assert read(path, columns=config.data.config.columns) == [{"messages": ASKED}]


def test_what_the_nearest_schema_lacks_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"chosen_text": [*ASKED], "other": [user("a"), bot("c")]}])
    said = refusal(path)
    assert "nearest: pairs (chosen, rejected), but there is no rejected: name what it is, as in" in said
    assert as_told(path, said, COLUMN="other") == [{"chosen": ASKED, "rejected": [user("a"), bot("c")]}]
    path = write(tmp_path / "b.jsonl", [{"instruction": "a"}])
    said = refusal(path)
    assert "nearest: alpaca (instruction, output), but there is no output: add what is missing, or data.text_column=" in said  # fmt: skip # noqa: E501
    assert read(path, text_column="instruction") == [{"text": "a"}]


def test_columns_that_are_like_none_get_the_general_way(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"x": "a", "y": "b"}])
    said = refusal(path)
    assert "nearest" not in said and "or data.text_column=COLUMN to read one column as text" in said
    assert as_told(path, said, KNOWN="text", FOUND="y") == [{"text": "b"}]
    assert read(path, text_column="y") == [{"text": "b"}]


def test_the_setting_keeps_what_is_set_and_mends_what_is_misspelt(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"frage": "a", "outputs": "b", "notiz": "Be short."}])
    said = refusal(path, columns=["instructions=frage", "system=notiz", "input=nothing"])
    assert """set 'data.columns=["instruction=frage","system=notiz","output=outputs"]'""" in said
    assert as_told(path, said) == [{"messages": [SYSTEM, *ASKED]}]


def test_a_schema_of_another_phase_is_said_to_be_one(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruct": "a", "output": "b"}])
    said = refusal(path, forms=["text"])
    assert "nearest: alpaca (instruction, output), which is read with phase=sft or distill; set" in said
    assert "which is read" not in refusal(path, forms=["chat"])


def test_a_named_schema_is_the_nearest(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "a", "response": "b", "content": "c"}])
    said = refusal(path, schema="prompt_completion")
    assert "known are prompt_completion: prompt, completion; nearest: prompt_completion (prompt, completion); " in said
    assert as_told(path, said) == [{"prompt": "a", "completion": "b"}]


ROWS = [["prompt", "completion"], ["a, b", "c"], ['two\nlines; "quoted"', "d\te"]]
READ = [{"prompt": p, "completion": c} for p, c in ROWS[1:]]


def table(path, delimiter, rows=ROWS):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def test_tabs_are_read_in_tsv_and_pointed_out_in_csv(tmp_path):
    assert read(table(tmp_path / "a.tsv", "\t")) == READ
    said = refusal(path := table(tmp_path / "b.csv", "\t"))
    assert r"has one column, 'prompt\tcompletion': it is separated by tabs, and read as separated by commas" in said
    assert said.endswith("; name it .tsv")
    assert read(path.rename(path.with_suffix(".tsv"))) == READ
    said = refusal(path := table(tmp_path / "c.tsv", ","))
    assert "is separated by commas, and read as separated by tabs; name it .csv" in said
    assert read(path.rename(path.with_suffix(".csv"))) == READ


@pytest.mark.parametrize("mark, name", [(";", "semicolons"), ("|", "bars")])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_other_separators_are_pointed_out_with_a_command_that_works(mark, name, kind, tmp_path):
    """Rows with commas would otherwise be told to have too many cells."""
    said = refusal(path := table(tmp_path / f"a.{kind}", mark))
    assert f"it is separated by {name}, and read as separated by {'commas' if kind == 'csv' else 'tabs'}; " in said
    command = said.rpartition("; write it anew: python ")[2].replace("OLD.csv", str(path))
    new = tmp_path / "new.csv"
    subprocess.run(f"{sys.executable} {command.replace('NEW.csv', str(new))}", shell=True, check=True)
    assert read(new) == READ


def test_a_column_that_is_called_so_can_be_read(tmp_path):
    path = table(tmp_path / "a.csv", ",", [["a;b"], ["c"]])
    assert read(path, text_column="a;b") == read(path, columns=["text=a;b"]) == [{"text": "c"}]
    assert read(table(tmp_path / "b.csv", ",", [["text"], ["a;b"]])) == [{"text": "a;b"}]


@pytest.mark.parametrize("phase", READS)
def test_steps_are_refused_by_every_phase_in_one_sentence(phase, tmp_path):
    path = write(tmp_path / "a.jsonl", [CASES["steps"][0]])
    with pytest.raises(DataError, match="has verdicts on steps .*, which no objective reads yet"):
        Files(FilesConfig(path=path, validation_share=0.0)).expect(phase)


class TestFilesOfEverySchema(SourceContract):
    @pytest.fixture(autouse=True)
    def files(self, tmp_path):
        for i, (row, _) in enumerate(CASES.values()):
            write(tmp_path / f"mine/{i}.jsonl", [row])
        self.folder = tmp_path / "mine"

    def make(self):
        return Files(FilesConfig(path=str(self.folder), validation_share=0.0))

    def test_the_right_answer_scores_and_nonsense_does_not(self):
        """With checker=exact the worked solution of one example is no right answer; its answer is."""
        source = self.make()
        verifiable = [e for e in (source[i] for i in range(len(source))) if "answer" in e]
        assert len(verifiable) == 6
        for example in verifiable:
            assert source.score(example, f" {example['answer']}\n").correct, example
            assert not source.score(example, "").correct, example
