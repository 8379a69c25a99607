"""Conversations with tools, from the file to the loss: calls are learnt, what came of them is read and not learnt."""

import json

import pytest

from trivium.data.chat import Chat
from trivium.data.config import BPEConfig, FilesConfig
from trivium.data.files import Files
from trivium.data.packing import pair_sides, tokenise
from trivium.data.tokenizer import CHATML, Tokenizer, train_bpe
from trivium.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def plain():
    return train_bpe(BPEConfig(vocab_size=300), ["a"])


@pytest.fixture(scope="module")
def tokenizer(plain):
    return plain.extended((), "chatml_tools")


def call(city):
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [call("Ulm"), call("Bonn")]},
    {"role": "tool", "content": '{"Ulm": "sun"}'},
    {"role": "assistant", "content": "No."},
]
WRITTEN = """<|im_start|>system
Be short.

Functions you may call, as JSON schemas:
<tools>
{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
</tools>
To call one, write its name and arguments as JSON between <tool_call> and </tool_call>.<|im_end|>
<|im_start|>user
Rain?<|im_end|>
<|im_start|>assistant
[[<tool_call>
{"name": "weather", "arguments": {"city": "Ulm"}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"city": "Bonn"}}
</tool_call><|im_end|>]]
<|im_start|>tool
<tool_response>
{"Ulm": "sun"}
</tool_response><|im_end|>
<|im_start|>assistant
[[No.<|im_end|>]]
"""
"""The whole conversation; what is trained stands between [[ and ]]."""


def shown(tokenizer, ids, trained):
    """Ids as text, with [[ and ]] around what is trained."""
    said, before = "", False
    for token, counts in zip(ids, map(bool, trained), strict=True):
        said += "[[" * (counts and not before) + "]]" * (before and not counts)
        said += tokenizer.decode([token], special=True)
        before = counts
    return said + "]]" * before


def test_calls_are_trained_and_results_are_not(tokenizer, tmp_path):
    """From a row as people write it: tools as JSON text, arguments as JSON text."""
    said = [{**TALK[2], "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        for city in ("Ulm", "Bonn")]}]  # fmt: skip
    row = {"messages": [*TALK[:2], *said, *TALK[3:]], "tools": json.dumps([TOOL])}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    source = Files(FilesConfig(path=str(tmp_path / "a.jsonl"), validation_share=0.0))
    table = tokenise(source, tokenizer, 1024, form="chat")
    assert shown(tokenizer, *table.document(0)) == WRITTEN
    prompt = Chat(tokenizer).prompt_ids(source[0]["messages"][:4], tools=source[0]["tools"])
    assert tokenizer.decode(prompt, special=True) == WRITTEN.split("[[No.")[0].replace("[[", "").replace("]]", "")


def test_chatml_with_tools_is_chatml_where_there_are_none(tokenizer, plain):
    talks = [TALK[1:2] + TALK[4:], [TALK[0], TALK[1], TALK[4], TALK[1], TALK[4]]]
    for talk in talks:
        ours, theirs = (Chat(plain.extended((), name)).encode([{"id": "e", "messages": talk}])[0]
                        for name in ("chatml_tools", "chatml"))  # fmt: skip
        assert ours == theirs


@pytest.mark.parametrize("template", ["own", "chatml"])
def test_template_that_passes_over_tools_is_refused(template, plain):
    """It would teach the model that an answer which calls a function is empty."""
    tokenizer = plain if template == "own" else plain.extended((), "chatml")
    asks = [TALK[1], {**TALK[2], "content": "I look."}, TALK[4]]
    with pytest.raises(DataError, match=r"example e: the chat template does not write tool_calls \(weather\); set tok"):
        Chat(tokenizer).encode([{"id": "e", "messages": asks}])
    with pytest.raises(DataError, match=r"does not write tools \(weather\)"):
        Chat(tokenizer).encode([{"id": "e", "messages": [TALK[1], TALK[4]], "tools": [TOOL]}])
    with pytest.raises(DataError, match=r"does not write tools \(weather\)"):
        Chat(tokenizer).prompt_ids([TALK[1]], tools=[TOOL])


def test_pairs_and_verdicts_keep_their_tools(tokenizer, tmp_path):
    """Both sides of a pair, and a judged answer and its mismatched one, are told of the tools."""
    pair = {"chosen": TALK[:3], "rejected": [*TALK[:2], TALK[4]], "tools": [TOOL]}
    other = [{"role": "user", "content": "Snow?"}, TALK[4]]
    labels = [{"messages": m, "tools": [TOOL], "label": m is not other} for m in (TALK[:3], other)]
    for name, rows, form in (("pairs", [pair], "pairs"), ("labels", labels, "labels")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        table = tokenise(Files(FilesConfig(path=str(path), validation_share=0.0)), tokenizer, 4096, form=form)
        texts = [shown(tokenizer, *table.document(d)) for d in range(len(table.ids))]
        assert len(texts) == 2 * len(rows) and all("<tools>" in text for text in texts)
        calls = [text.count("[[<tool_call>") for text in texts]
        assert calls == ([1, 0] if form == "pairs" else [1, 0, 0, 1])
    assert all(side["tools"] == [TOOL] for side in pair_sides({"id": "e", **pair}))


def test_template_of_ones_own_may_write_a_call_in_its_own_way(plain):
    """Anything that holds the function's name will do."""
    tokenizer = plain.extended((), "chatml")
    template = CHATML.replace("message.content +", "(message.tool_calls or '')|string + message.content +")
    chat = Chat(Tokenizer(tokenizer._core, {**tokenizer.config, "chat_template": template}))
    assert any(chat.encode([{"id": "e", "messages": TALK[1:]}])[0].trained)


# ---- rows of a real project


@pytest.fixture(scope="module")
def llamafactory(package):
    """The demonstration rows of llamafactory 0.9.5: formats are tested on them, nothing is shipped."""
    (folder,) = package("pypi", "llamafactory==0.9.5").glob("*/data")
    return folder


@pytest.mark.parametrize(
    ("name", "form", "count"),
    [
        ("alpaca_en_demo.json", "chat", 999),
        ("dpo_en_demo.json", "pairs", 300),
        ("kto_en_demo.json", "labels", 300),
        ("glaive_toolcall_en_demo.json", "chat", 300),
    ],
)
def test_rows_of_a_real_project_become_tokens(name, form, count, llamafactory, tokenizer):
    """Every row is read and trained on; the figures beside it are counted from the raw JSON."""
    raw = json.loads((llamafactory / name).read_text())
    assert len(raw) == count
    source = Files(FilesConfig(path=str(llamafactory / name), validation_share=0.0))
    examples = [source[i] for i in range(len(source))]
    assert len(examples) == count and "None" not in json.dumps([e for e in examples if "None" not in json.dumps(raw)])
    table = tokenise(source, tokenizer, 1 << 20, form=form)
    assert len(table.ids) == count * table.group and table.truncated == 0
    ends = int((table.tokens[table.trained] == tokenizer.eot_id).sum())
    said = tokenizer.decode(table.tokens[table.trained].tolist(), special=True)
    if "toolcall" in name:
        turns = [m["from"] for row in raw for m in row["conversations"]]
        assert turns.count("function_call") == turns.count("observation") == 211
        assert ends == turns.count("gpt") + 211 and said.count("<tool_call>") == 211
        assert said.count("<tool_response>") == 0
        assert sum("tools" in e for e in examples) == sum(row["tools"] != "[]" for row in raw) == 191
    elif form == "chat":
        assert said == "".join(row["output"] + "<|im_end|>" for row in raw)
    elif form == "pairs":
        assert said == "".join(row[side]["value"] + "<|im_end|>" for row in raw for side in ("chosen", "rejected"))
    else:
        assert [e["label"] for e in examples] == [row["label"] for row in raw] and sum(
            e["label"] for e in examples
        ) == 150
        assert ends == 2 * count
