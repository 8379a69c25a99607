"""The doctor: every animal of the zoo is caught by its rule and by no other, and nothing good is taken for one."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.data import zoo
from tests.data.zoo import ZOO, bot, talk, user
from tests.helpers import Listed, smollm2

from trivium.build import build_objective, build_source
from trivium.compose import compose, run_config
from trivium.data.chat import Encoded
from trivium.data.collate import collate
from trivium.data.config import SourceConfig
from trivium.data.contamination import BATCH, find_overlap
from trivium.data.gguf_tokenizer import tokenizer_of
from trivium.data.lint import RULES, Finding, check_names, judged, verdict
from trivium.data.lint_examples import How, look, look_at_prompts, spans
from trivium.data.lint_sets import (
    check_batch,
    check_overlap,
    check_vocabulary,
    spread,
    survey,
)
from trivium.data.packing import table_of
from trivium.data.shown import Stretch, exchanges, plain, stretches, visible
from trivium.data.source import Source
from trivium.data.tokenizer import Tokenizer
from trivium.errors import ConfigError
from trivium.lineage.report import write_report
from trivium.phases.doctor import coloured
from trivium.phases.preflight import examine
from trivium.schema import TRAINING_PHASES
from trivium.training.parallel import ALONE
from trivium.types import IGNORE, Score

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.plain()


def found_in(animal, tokenizer):
    how = How(
        animal.tokenizer(tokenizer) if animal.tokenizer else tokenizer, animal.form, animal.train_on, animal.length
    )
    source = Listed(animal.examples)
    held = check_overlap("held.jsonl", find_overlap(source, Listed(animal.held), 13), 0.0, fails=animal.fails)
    return judged([*survey(source, len(source))[1], *look(animal.examples, how)[1], *held], [])


@pytest.mark.parametrize("name", ZOO)
def test_zoo_is_caught_by_its_rule_and_no_other(name, tokenizer):
    animal = ZOO[name]
    findings = found_in(animal, tokenizer)
    assert {f.rule for f in findings} == {animal.rule, *animal.more}, findings
    assert any(f.fatal for f in findings if f.rule == animal.rule) == animal.fatal
    assert all(f.message and f.message[-1] not in ".:;" for f in findings), "a clause that a sentence can go on from"


def test_zoo_has_the_promised_animals():
    assert len(ZOO) >= 75


GOOD = {
    "chat": talk(
        {"role": "system", "content": "be brief"}, user("hello"), bot(" fine\n\n"), user("and you?"), bot("no.")
    ),
    "completion": zoo.completion("what is 2 + 2?\n", "it is 4."),
    "none": talk(user("is None a value? Nonetheless, banan"), bot("None")),
    "html": talk(user("what is <s>this</s> here?"), bot("<s>struck</s> out.")),
    "spaces": zoo.completion("hello  there\n\n", "\tno  \n and é 漢 😀"),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("train_on", ["assistant", "last_turn", "all"])
def test_good_conversations_raise_no_alarm(name, train_on, tokenizer):
    assert look(GOOD[name], How(tokenizer, "chat", train_on, 128))[1] == []


def test_good_generation_blocks_and_special_ends_raise_no_alarm(tokenizer):
    """A block that holds the answer and its end; and a text tokenizer whose beginning is its end (GPT-2)."""
    whole = "<|{{ message.role }}|>{% if message.role == 'assistant' %}" + zoo.MARKED
    marked = zoo.with_template(zoo.turns(whole + "{% else %}{{ message.content }}<|end|>{% endif %}"))(tokenizer)
    assert look(GOOD["chat"], How(marked, "chat", "assistant", 128))[1] == []
    like_gpt2 = zoo.with_template(zoo.TEMPLATE, bos_token="<|eos|>", unk_token="<|eos|>")(tokenizer)
    assert look(zoo.text("hello there"), How(like_gpt2, "text", "all", 128))[1] == []


HONEST = {
    "a call and its result, which the answer repeats": (
        talk(zoo.ASK, zoo.called("add_up", id="c1"), zoo.result(tool_call_id="c1"), zoo.ANSWER, tools=zoo.ADDS),
        zoo.TOOLS,
    ),
    "two calls at once and their results": (
        talk(zoo.ASK, bot("", tool_calls=zoo.called("add_up")["tool_calls"] * 2), zoo.result(), zoo.result("no"),
             bot("no"), tools=zoo.ADDS), zoo.TOOLS,
    ),
    "a turn and then a call": (
        talk(zoo.ASK, bot("hello"), zoo.called("add_up"), zoo.result(), zoo.ANSWER, tools=zoo.ADDS), zoo.TOOLS
    ),
    "a call written as text": (
        talk(zoo.ASK, bot('{"name": "add_up"}'), zoo.result("no", tool_call_id="c1"), bot("no")), zoo.TOOLS
    ),
    "calls where no tools are given": (talk(zoo.ASK, zoo.called("divide"), zoo.result("no"), bot("no")), zoo.TOOLS),
    "an environment that speaks first": (
        talk({"role": "environment", "content": "no"}, zoo.ASK, zoo.ANSWER),
        zoo.turns(zoo.LETTERS, prompt="[assistant]"),
    ),
    "a prompt without a mark of its own": (  # Mistral's: an answer follows the end of the instruction
        zoo.GOOD, zoo.turns("{% if message.role == 'user' %}<|user|>{{ message.content }}<|assistant|>"
                            "{% else %}{{ message.content }}<|end|>{% endif %}", prompt=""),
    ),
    "a mark that the model writes itself": (  # as thoughts begin with
        zoo.GOOD, zoo.turns("<|{{ message.role }}|>{% if message.role == 'assistant' %}[no]{% endif %}"
                            "{{ message.content }}<|end|>"),
    ),
    "a template whose system message is short": (
        zoo.GOOD, zoo.turns("{% if message.role == 'system' %}S: {{ message.content }} {% elif message.role == "
                            "'user' %}the question: {{ message.content }}{% else %}<|assistant|>{{ message.content }}"
                            "<|end|>{% endif %}", before=""),
    ),
    "a system message where the template has one": (
        talk({"role": "system", "content": "be brief"}, zoo.ASK, zoo.ANSWER), zoo.POLITE
    ),
    "an empty system message": (talk({"role": "system", "content": ""}, zoo.ASK, zoo.ANSWER), zoo.TEMPLATE),
    "None to who asks for it": (talk(user("is it None, or nan?"), bot("None"), user("?"), bot("nan")), zoo.TEMPLATE),
    "None among words": (talk(zoo.ASK, bot("None of them"), zoo.ASK, bot("none")), zoo.TEMPLATE),
    "a lost letter that a user asks about": (talk(user("what is \ufffd?"), bot("a letter")), zoo.TEMPLATE),
    "one example in ten again": ([*zoo.numbered(9), {**zoo.numbered(1)[0], "id": "again"}], zoo.TEMPLATE),
    "the same answer to all": (zoo.numbered(20, "no."), zoo.TEMPLATE),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_neighbours_of_broken_data_raise_no_alarm(name, tokenizer):
    examples, template = HONEST[name]
    assert look(examples, How(zoo.with_template(template)(tokenizer), "chat", "assistant", 500))[1] == []


def test_a_bad_answer_may_call_what_there_is_not(tokenizer):
    """The rejected one of a pair, and a turn that is labelled undesirable; the same as a good one may not."""
    tools, made_up = zoo.with_template(zoo.TOOLS)(tokenizer), [zoo.ASK, zoo.called("divide")]
    one = {"id": "a", "tools": zoo.ADDS}
    for good, bad in ((zoo.ANSWER, made_up[1]), (made_up[1], zoo.ANSWER)):
        pair = {**one, "chosen": [zoo.ASK, good], "rejected": [zoo.ASK, bad]}
        found = look([pair], How(tools, "pairs", "last_turn", 400))[1]
        assert [f.rule for f in found] == ["unknown_tool"] * (good is made_up[1])
        label = {**one, "messages": made_up, "label": good is made_up[1]}
        found = look([label], How(tools, "labels", "last_turn", 400))[1]
        assert [f.rule for f in found] == ["unknown_tool"] * (good is made_up[1])


def test_answers_that_are_checked_may_be_none_and_copies(tokenizer):
    """What a function returns may well be None, and small tasks are drawn again: warnings, to sft and to rlhf."""
    rows = [{"id": str(i), "task": "t", "messages": [user("what does it give?"), bot("None")], "answer": "none"}
            for i in range(4)]  # fmt: skip
    how = How(tokenizer, "answers", "all", 64, room=40)
    found = look_at_prompts(rows, Scored(rows), how)[1]
    assert {(f.rule, f.fatal) for f in found} == {("repeated", False), ("none_text", False)}
    found = look(rows[:1], How(tokenizer, "chat", "assistant", 64))[1]
    assert [(f.rule, f.fatal) for f in found] == [("none_text", False)]


def test_short_marks_are_html_but_where_they_end_a_text(tokenizer):
    how = How(tokenizer.add_tokens(["<s>", "</s>"]), "chat", "assistant", 128)
    assert look(talk(user("what is <s>this</s> here?"), bot("is <s>struck</s> out.")), how)[1] == []
    (finding,) = look(talk(user("what?"), bot("it is 4.</s>")), how)[1]
    assert (finding.rule, finding.fatal) == ("special_spelling", True)


def test_all_findings_are_told_at_once_with_their_examples(tokenizer):
    """A run stops at the first; the doctor goes on, past those that cannot be encoded."""
    bad = [
        {**ZOO[name].examples[0], "id": name}
        for name in ("no assistant turn", "an empty answer", "the assistant first")
    ]
    seen, findings = look([*bad[:2], *talk(user("hello"), bot("no.")), bad[2]], How(tokenizer, "chat", "assistant", 64))
    assert [(f.rule, f.example_id) for f in findings] == [
        ("no_answer", "no assistant turn"), ("empty_turn", "an empty answer"),
        ("assistant_first", "the assistant first"),
    ]  # fmt: skip
    assert [one.example["id"] for one in seen] == ["a", "the assistant first"]


def test_cut_conversations_are_fatal_above_one_in_ten(tokenizer):
    """1 of 11 is a warning; 1 of 9 is more than one in ten."""
    long = {"id": "long", "messages": [zoo.ASK, bot("no" * 100)]}
    for others, fatal in ((10, False), (8, True)):
        short = zoo.numbered(others)
        (finding,) = look([*short, long], How(tokenizer, "chat", "assistant", 30))[1]
        assert (finding.rule, finding.fatal, finding.example_id) == ("cut_end", fatal, "long")
        assert "to the first 30" in finding.message and "right" in finding.message


# ---- answers that are scored


class Scored(Listed):
    """Right is what is the answer, in lower case: so an answer with a capital can never win."""

    def score(self, example, completion):
        right = completion.lower() == example["answer"]
        return Score(float(right), right)


def test_prompts_without_room_and_answers_that_cannot_win_are_found(tokenizer):
    """A prompt of `hello` is bos, user, hello, end, assistant: 5 tokens or more."""
    rows = [
        {"id": str(i), "task": "t", "messages": [user(ask), bot(say)], "answer": answer}
        for i, (ask, say, answer) in enumerate([("no", "no", "no"), ("no", "No", "No"), (zoo.LONG, "no", "no")])
    ]
    how = How(tokenizer, "answers", "all", 64, room=40)
    seen, findings = look_at_prompts(rows, Scored(rows), how)
    assert [(f.rule, f.example_id) for f in findings] == [("answer_scores", "1"), ("prompt_room", "2")]
    assert not any(any(d.trained) for one in seen for d in one.documents)


# ---- batches


@pytest.fixture
def batch(tokenizer):
    """Two documents in a row of 8 and one in a second: 3 + 4 tokens and 5; pad and end are one id here."""
    pad = tokenizer.eos_id
    documents = [Encoded([9, 10, pad], [False, True, True]), Encoded([9, 11, 12, pad], [False, False, True, True]),
                 Encoded([9, 9, 9, 9, pad], [True] * 5)]  # fmt: skip
    table = table_of(documents, ["a", "b", "c"])
    rows = [[0, 1], [2]]
    return collate(table, rows, 8, pad), table, rows


def test_batch_of_the_collator_passes(batch):
    assert list(check_batch(*batch, 320)) == []


def test_pad_masked_by_id_is_found(batch):
    """The classic: pad is the end of text and a collator ignores every pad id, so no end is learnt: 1 a document."""
    made, table, rows = batch
    made.labels[made.tokens == made.tokens[0, 2]] = IGNORE
    assert [(f.rule, f.example_id) for f in check_batch(made, table, rows, 320)] == [
        ("pad_by_mask", "a"), ("pad_by_mask", "b"), ("pad_by_mask", "c"),
    ]  # fmt: skip


def test_a_row_whose_last_token_is_cut_is_found(batch):
    """The first row has 7 tokens in 8 places, the second 5: of 6 places one is missing, of 4 one in the second, too."""
    made, table, rows = batch
    for width, wanted in ((7, []), (6, ["b"]), (4, ["b", "c"])):
        tensors = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
        cut = {n: t[:, :width] for n, t in tensors.items() if isinstance(t, torch.Tensor) and t.dim() == 2}
        found = list(check_batch(dataclasses.replace(made, **cut), table, rows, 320))
        assert [(f.rule, f.example_id) for f in found] == [("pad_by_mask", name) for name in wanted]
    assert found[0].message == "its end is cut off: 7 tokens in a row of 4"


def broken(batch, field, place, value):
    made, table, rows = batch
    getattr(made, field)[place] = value
    return [(f.rule, f.example_id) for f in check_batch(made, table, rows, 320)]


def test_a_first_token_as_target_is_found(batch):
    assert broken(batch, "labels", (0, 3), int(batch[0].tokens[0, 3])) == [("first_label", "b")]


def test_labels_that_are_shifted_already_are_found(batch):
    assert broken(batch, "labels", (0, 1), int(batch[0].tokens[0, 2])) == [("label_place", "")]


def test_labels_outside_the_vocabulary_are_found(batch):
    assert broken(batch, "labels", (1, 2), 320) == [("label_vocabulary", ""), ("label_place", "")]


def test_positions_that_do_not_restart_are_found(batch):
    assert broken(batch, "positions", (0, slice(3, 7)), torch.arange(3, 7)) == [("segments", "b")]


def test_documents_of_one_segment_are_found(batch):
    assert broken(batch, "segments", (0, slice(3, 7)), 1) == [("segments", "b")]


def test_padding_that_belongs_to_a_document_is_found(batch):
    assert broken(batch, "segments", (1, slice(5, 8)), 1) == [("segments", "")]


def test_a_tokenizer_larger_than_its_model_is_found(tokenizer):
    assert list(check_vocabulary(tokenizer, tokenizer.vocab_size)) == []
    (finding,) = check_vocabulary(tokenizer, tokenizer.vocab_size - 1)
    assert finding.rule == "vocabulary" and finding.fatal


def test_a_tokenizer_much_smaller_than_its_model_is_told(tokenizer):
    """Rows that pad the vocabulary are nobody's mistake: a twentieth of it and 512."""
    most = int(1.05 * tokenizer.vocab_size + 512)
    assert list(check_vocabulary(tokenizer, most)) == []
    (finding,) = check_vocabulary(tokenizer, most + 1)
    assert finding.rule == "vocabulary" and not finding.fatal
    assert f"so {most + 1 - tokenizer.vocab_size} rows are none" in finding.message


# ---- data sets


def test_held_out_examples_that_are_trained_on_are_found():
    """By content, whatever their ids: the same text, the same talk; another answer to one prompt is a warning."""
    train = [*zoo.text("hello"), {"id": "b", **talk(zoo.ASK, zoo.ANSWER)[0] | {"id": "b"}}]
    held = [{"id": "x", "text": "hello"}, {"id": "y", "text": "hello "}, {"id": "z", "messages": [zoo.ASK, zoo.ANSWER]},
            {"id": "w", "messages": [zoo.ASK, bot("it is 5.")]}]  # fmt: skip
    found = check_overlap("held", find_overlap(Listed(train), Listed(held), 13), 1.0, fails=True)
    assert [(f.rule, f.fatal, f.example_id) for f in found] == [
        ("held_out_seen", True, "x"), ("held_out_seen", True, "z"), ("same_prompt", False, "w"),
    ]  # fmt: skip


def test_all_that_is_held_out_is_compared_and_ten_are_told():
    """5,000 examples; 12 of them, of which no sample of 1,000 has one, are held out."""
    train = [{"id": f"t{i}", "text": f"text {i}"} for i in range(5000)]
    held = [{"id": f"h{i}", "text": f"text {405 * i + 1}"} for i in range(12)] + [{"id": "new", "text": "new"}]
    assert not {405 * i + 1 for i in range(12)} & set(spread(5000, 1000))
    found = list(check_overlap("held", find_overlap(Listed(train), Listed(held), 0), 0.0, fails=True))
    assert [f.example_id for f in found] == [*(f"h{i}" for i in range(10)), ""] and {f.rule for f in found} == {
        "held_out_seen"
    }
    assert found[3].message.endswith("trained on as example t1216; take it out of one of the two")
    assert found[10].message == "2 more are such (held)"


class Made(Source):
    """Examples that are made when they are asked for, each of 2.4 kB."""

    fingerprint = "made"

    def __init__(self, count):
        super().__init__(SourceConfig())
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"id": f"example number {index} of many", "text": f"is odd {index} yes no " * 120}


def test_memory_of_a_look_does_not_follow_the_data():
    """All of 12 MB are read, 200 examples of them kept, and compared with ten that are held out: the most that is held
    meanwhile grows by less than 200 bytes for each example of 2.4 kB."""
    peaks = []
    for count in (BATCH, 5000 + BATCH):
        tracemalloc.start()
        try:
            chosen, findings = survey(Made(count), 200)
            found = find_overlap(Made(count), Made(10), 13)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert (len(chosen), findings, found.contaminated, found.same.count) == (200, [], 10, 10)
    assert peaks[1] - peaks[0] < 5000 * 200, peaks


def test_sample_has_the_first_the_longest_and_an_even_spread():
    rows = [{"id": str(i), "text": "a" * (100 if i == 77 else 1)} for i in range(100)]
    chosen, _ = survey(Listed(rows), 9)
    assert [e["id"] for e in chosen] == ["0", "12", "24", "37", "49", "61", "74", "77", "87"]
    read = []
    survey(Listed(rows), 3, 4, lambda example: read.append(example["id"]) or ())
    assert read == ["0", "25", "50", "75"]
    assert spread(3, 3) == [0, 1, 2]


# ---- findings


def test_ignored_rules_are_warnings_and_unknown_ones_are_refused():
    fatal = Finding("border", True, "a", "x"), Finding("form", True, "b", "y")
    assert [(f.rule, f.fatal) for f in judged(fatal, ["border"])] == [("form", True), ("border", False)]
    assert verdict(judged(fatal, ["border", "form"])) == ""
    assert verdict(judged(fatal, [])).startswith("example b: y [form] (1 more finding);")
    with pytest.raises(ConfigError, match="bordr.*border"):
        check_names(["bordr"])


def test_every_rule_has_an_animal_or_a_test_here():
    """A rule that nothing was seen to break is a promise."""
    here = {"held_out_seen", "same_prompt", "vocabulary", "label_vocabulary", "label_place", "pad_by_mask", "segments",
            "first_label", "answer_scores", "prompt_room"}  # fmt: skip
    assert {a.rule for a in ZOO.values()} | here == set(RULES)


def test_the_page_has_a_line_for_every_rule():
    page = (ROOT / "docs/doctor.md").read_text()
    assert [n for n, r in RULES.items() if f"| `{n}`{'' if r.fatal else ' *warns*'} | {r.holds} |" not in page] == []


# ---- what is shown


def test_stretches_show_trained_text_and_special_tokens(tokenizer):
    ids = [1, *tokenizer.encode("no"), 6, *tokenizer.encode("hi"), 6]
    shown = stretches(Encoded(ids, [i > ids.index(6) for i in range(len(ids))]), tokenizer)
    assert shown == [
        Stretch("<|bos|>", False, True), Stretch("no", False, False), Stretch("<|end|>", False, True),
        Stretch("hi", True, False), Stretch("<|end|>", True, True),
    ]  # fmt: skip
    assert plain(shown) == "<|bos|>no<|end|>[hi<|end|>]"
    assert visible("a\n  b \n") == "a⏎\n··b·⏎\n"


def test_each_exchange_is_shown_on_a_line_of_its_own_unless_the_template_breaks_lines(tokenizer):
    ask, say, end = Stretch("hi", False, False), Stretch("no", True, False), Stretch("<|end|>", True, True)
    broken = Stretch("\n<|user|>", False, False)
    assert exchanges([ask, say, end, ask, say, end]) == [[ask, say, end], [ask, say, end]]
    assert exchanges([ask, say, end, broken, say]) == [[ask, say, end, broken, say]] and exchanges([]) == [[]]


def test_trained_text_is_green_and_special_tokens_are_bold():
    parts = [Stretch("<|user|>", False, True), Stretch("hi\n", False, False), Stretch("no[/]", True, False)]
    text = coloured([*parts, Stretch("<|end|>", True, True)])
    assert text.plain == "<|user|>hi⏎\nno[/]<|end|>", "what looks like markup stays text"
    assert [str(span.style) for span in text.spans] == ["bold dim", "dim", "green", "bold green"]


def test_spans_are_the_trained_stretches():
    assert spans(Encoded([1] * 6, [True, False, True, True, False, True])) == [(0, 1), (2, 4), (5, 6)]


# ---- the verb and the preflight


@pytest.fixture
def rows(tmp_path):
    """rows([...]) -> a file of them."""

    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return path

    return write


CHATS = [{"messages": [user(f"what is {i} + 1?"), bot(f"it is {i + 1}.")]} for i in range(60)]
EMPTY = {"messages": [user("what is it?"), bot(" ")]}


def settings(path, *more):
    tiny = (
        "model=primer",
        "model.dim=32",
        "model.layers=1",
        "model.heads=2",
        "model.kv_heads=1",
        "model.ffn_dim=32",
        "tokenizer.vocab_size=320",
        "batch.length=64",
        "batch.size=2",
        "batch.micro_size=2",
        "trainer.max_steps=1",
        "samples.every_steps=0",
        "validation.max_rows=4",
        "data.validation_share=0.2",
        "trainer.accelerator=cpu",
    )
    return ("phase=sft", "domain=files", f"data.path={path}", *tiny, *more)


def test_doctor_shows_examples_and_passes_good_data(main, rows):
    said = main("doctor", "--show", "2", "--equivalence", *settings(rows(CHATS)))
    assert said.code == 0, said.out + said.err
    assert "<|user|>what is 0 + 1?<|end|><|assistant|>[it is 1.<|end|>]" in said.out
    assert said.out.count("✓") == 2 and "clean" in said.out and "found" not in said.out
    assert "GB of disk" in said.out


def test_doctor_tells_all_that_is_wrong(main, rows):
    said = main("doctor", *settings(rows([*CHATS, EMPTY, {"messages": [user("None"), bot("no")]}])))
    assert said.code == 1
    assert "[empty_turn]" in said.out and "[none_text]" in said.out and "2 fatal" in said.out
    assert "Traceback" not in said.out + said.err


def test_copies_stop_a_run_until_they_are_cleaned_away(main, rows):
    """60 chats, and 20 times the first of them: a fourth are copies."""
    asked = settings(rows([*CHATS, *CHATS[:1] * 20]), "data.validation_share=0.0", "validation.every_steps=0")
    said = main("doctor", *asked)
    assert said.code == 1 and "✗ [repeated] 20 of the 80 examples looked at are copies of others, such as " in said.out
    assert "data.clean=[exact] leaves them out" in said.out
    said = main("doctor", *asked, "data.clean=[exact]")
    assert said.code == 0 and "60 of 60 examples" in said.out and "repeated" not in said.out


def test_preflight_stops_a_run_and_says_how_to_go_on(main, rows, tmp_path):
    """A completion of white space was trained on without a word before there was a doctor."""
    path = rows([{"prompt": f"what is {i}? ", "completion": f"{i}."} for i in range(60)] +
                [{"prompt": "who? ", "completion": "  "}])  # fmt: skip
    asked = settings(path, f"runs={tmp_path}", "name=r", "trainer.threads=1")
    said = main(*asked)
    assert said.code == 1 and "[empty_turn]" in said.err and said.err.count("\n") == 1
    said = main(*asked, "doctor.ignore=[empty_turn]", "data.validation_share=0.0", "validation.every_steps=0")
    assert said.code == 0 and "only white space" in said.out, "a warning now"
    told = json.loads((tmp_path / "r" / "MANIFEST.json").read_text())["doctor"]
    assert told["counts"] == {"empty_turn": 1}
    assert told["ignored"] == ["empty_turn"] and told["examples"] == told["of"] == 61


def test_a_run_that_nobody_looks_at_says_so(main, rows, tmp_path):
    said = main(*settings(rows(CHATS), f"runs={tmp_path}", "name=r", "doctor.preflight=false"))
    assert said.code == 0 and "doctor.preflight=false" in said.out
    assert json.loads((tmp_path / "r" / "MANIFEST.json").read_text())["doctor"] is None


@pytest.mark.parametrize(
    "args, said",
    [
        (["--shw", "2"], "there is no --shw"),
        (["--show", "all"], "--show=all is not a number"),
        (["data"], "'data' is no setting"),
        (["phase=chat"], "phase=chat trains nothing"),
        (["doctor.ignore=[bordr]"], "no rule. Did you mean border"),
    ],
)
def test_doctor_refuses_what_it_does_not_know(main, args, said):
    done = main("doctor", *args)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1


def test_doctor_leaves_no_run_behind(main, rows, tmp_path):
    assert main("doctor", *settings(rows(CHATS), f"runs={tmp_path / 'runs'}")).code == 0
    assert not (tmp_path / "runs").exists()


def test_doctor_reads_the_tokenizer_of_a_checkpoint(main, tuned, tuning, tmp_path):
    """`tuned` has a vocabulary of 320; the data alone would give another."""
    asked = [o for o in tuning(tmp_path, "x") if not o.startswith(("model", "name=", "runs="))]
    said = main("doctor", *asked, f"init_from={tuned}", "--show", "1", "--examples", "20", "--equivalence")
    assert said.code == 0 and f"starts from {tuned}" in said.out and said.out.count("✓") == 2, said.out + said.err
    assert "20 of 400 examples" in said.out


def test_report_shows_examples_and_never_lets_them_be_markup(main, rows, tmp_path):
    """What a row says stands in the page as text; what is trained is marked."""
    path = rows([*CHATS, {"messages": [user("what is <b>bold</b>?"), bot("<script>alert(1)</script>")]}])
    said = main(*settings(path, f"runs={tmp_path}", "name=r", "validation.every_steps=0", "data.validation_share=0.0"))
    assert said.code == 0, said.err
    manifest = tmp_path / "r" / "MANIFEST.json"
    facts = json.loads(manifest.read_text())
    assert [s["id"].rpartition(":")[2] for s in facts["doctor"]["shown"]] == ["1", "21", "41"]
    shown = facts["doctor"]["shown"][1]
    assert shown["parts"][-2:] == [["it is 21.", True, False], ["<|end|>", True, True]]
    facts["doctor"]["shown"][0]["parts"] = [["<b>bold</b>", False, False], ["<script>alert(1)</script>", True, False]]
    manifest.write_text(json.dumps(facts))
    page = write_report(tmp_path / "r").read_text()
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark>" in page
    assert "<script>" not in page and "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "61 of 61 examples" in page


@pytest.mark.parametrize("phase", TRAINING_PHASES)
def test_the_shipped_pack_raises_no_alarm(phase, monkeypatch, cache, tokenizer):
    """Every phase of the primer, with its objective and recipe; not one warning in 200 of its examples and all ids."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(cache))
    config = run_config(compose([f"phase={phase}"]))
    objective = build_objective(config.objective, phase)
    this = SimpleNamespace(config=config, source=lambda split: build_source(config.data, phase, split), world=ALONE)
    seen = examine(this, objective, build_source(config.data, phase), tokenizer, None, count=200)
    assert seen.findings == [] and seen.looked > 190
    assert all(any(d.trained) for one in seen.seen for d in one.documents) == (phase != "rlhf")


def test_the_real_template_raises_no_alarm():
    """SmolLM2's own tokenizer and ChatML template, pad == eos: primer chats, with and without a system message."""
    tokenizer = Tokenizer(*tokenizer_of(smollm2().tokenizer))
    assert tokenizer.pad_id == tokenizer.eot_id
    examples = [*(GOOD["chat"]), *GOOD["none"], *GOOD["spaces"]]
    examples = [{**e, "id": str(i)} for i, e in enumerate(examples)]
    config = run_config(compose(["phase=sft"]))
    source = build_source(config.data, "sft")
    examples += survey(source, 50, among=500)[0]
    seen, findings = look(examples, How(tokenizer, "chat", "assistant", 256))
    named = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert [(f.rule, f.fatal, named in f.message) for f in findings] == [("system_added", False, True)]
    assert len(seen) == len(examples)
    given = talk({"role": "system", "content": "be brief"}, user("hi"), bot("no<|im_end|>"))
    (finding,) = look(given, How(tokenizer, "chat", "assistant", 256))[1]
    assert finding.rule == "special_spelling" and finding.fatal


LETTER = "one heron stood in the cold river and looked at the two of us for a very long time"


def test_the_doctor_and_the_run_find_a_planted_leak(main, rows, tmp_path):
    """A question of a held-out file, with a greeting before it, and half of another: one is a copy, one is not.

    The verb warns or fails by data.contamination as the run does, and the run's manifest has the worst of it.
    """
    ask, other = f"what is this: {LETTER}?", f"who said that {LETTER[::-1]}?"
    talk_of = lambda a, b: {"messages": [user(a), bot(b)]}  # noqa: E731
    path = rows([*CHATS, talk_of(f"Hello! {ask}", f"a heron, {LETTER}"), talk_of(other[:40], "no.")])
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps(row) for row in (talk_of(other, "yes."), talk_of(ask, f"a heron, {LETTER}"))))
    base = ("validation.every_steps=0", "data.validation_share=0.0")
    asked = settings(path, *base, f"data.held_out=[{held}]")
    one_of_two = f"1 of 2 held-out examples ({held}) are in the training data, such as {held}:2 in {path}:61"
    said = main("doctor", *asked, "data.contamination=warn")
    assert said.code == 0 and f"! [leak] {one_of_two}" in said.out and "1 warned" in said.out
    said = main("doctor", *asked)
    assert said.code == 1 and f"✗ [leak] {one_of_two}" in said.out and "1 fatal" in said.out
    said = main("doctor", *asked, "doctor.ignore=[leak]")
    assert said.code == 0 and "1 warned (ignored)" in said.out
    for off in (("data.contamination=off",), ("data.contamination_share=0.5",)):
        assert "held-out examples" not in main("doctor", *asked, *off).out
    run = (*asked, f"runs={tmp_path}", "name=r")
    for more in ((), ("doctor.preflight=false",)):
        said = main(*run, *more)
        assert said.code == 1 and one_of_two in said.err and said.err.count("\n") == 1
    said = main(*run, "data.contamination=warn")
    facts = json.loads((tmp_path / "r" / "MANIFEST.json").read_text())
    assert said.code == 0 and facts["doctor"]["counts"] == {"leak": 1}
    assert facts["contamination"][str(held)]["contaminated"] == 1


def test_forks_are_named_and_counted(main, rows, tmp_path):
    """60 chats of one turn, and 3 of two turns whose first answer thinks: of 63 conversations 3 are 6 documents."""
    template = tmp_path / "thoughtless.jinja"
    template.write_text(zoo.turns(zoo.THOUGHTLESS))
    thinks = [
        {"messages": [user(f"is {i}?"), bot("<think>so</think>yes."), user("why?"), bot("no.")]} for i in range(3)
    ]
    asked = settings(rows([*CHATS, *thinks]), f"tokenizer.chat_template={template}", "data.validation_share=0.0")
    asked = (*asked, "validation.every_steps=0")
    words = "3 conversations, whose earlier turns the template rewrites, are 6 documents (objective.turns=fork)"
    said = main("doctor", *asked, "--show", "63")
    assert said.code == 0 and f"turns     {words}" in said.out and "66 documents" in said.out
    assert said.out.count("<think>so</think>yes.<|end|>]") == 3 and said.out.count("<|assistant|>yes.<|end|>") == 3
    said = main(*asked, f"runs={tmp_path}", "name=r")
    assert said.code == 0 and words in " ".join(said.out.split())
    said = main(*asked, f"runs={tmp_path}", "name=s", "objective.turns=refuse")
    assert said.code == 1 and "[rewrites_history]" in said.err and "objective.turns=fork" in said.err


@pytest.mark.parametrize(
    "more, trained, kept",
    [
        # weights and two moments of 4 bytes
        (("optim=adamw",), 12, 2),
        # one checkpoint, of the last step; the average beside the weights
        (("optim=adamw", "checkpoint.every_steps=9", "trainer.average=0.9"), 16, 1),
        (("optim=adamw", "validation.every_steps=2", "checkpoint.keep_best=val/loss", "trainer.max_steps=7"), 12, 3),
    ],
)
def test_estimates_are_what_a_run_takes(main, rows, tmp_path, more, trained, kept):
    """Steps and tokens exactly; disk of `trained` bytes a weight, and the tokenizer."""
    asked = (*settings(rows(CHATS)), "trainer.max_steps=5", "checkpoint.every_steps=2", "batch.size=4", *more)
    said = " ".join(main("doctor", *asked).out.split())
    read = re.search(r"parameters, ([\d,]+) steps of (\d+) rows, ([\d,]+) tokens", said).groups()
    steps, size, tokens = (int(number.replace(",", "")) for number in read)
    disk, count = re.search(r"([\d.e-]+) GB of disk for (\d+) checkpoint", said).groups()
    done = main(*asked, f"runs={tmp_path}", "name=r")
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "r" / "MANIFEST.json").read_text())
    assert (steps, tokens, size, int(count)) == (told["steps"], told["tokens_seen"], 4, kept)
    folders = [path for path in (tmp_path / "r/checkpoints").glob("step-*")]
    assert len(folders) <= kept  # the best may be one of the newest
    taken = sum(path.stat().st_size for path in folders[0].rglob("*") if path.is_file())
    tokenizer = sum(path.stat().st_size for path in (folders[0] / "tokenizer").iterdir())
    assert float(disk) * 1e9 / kept == pytest.approx(told["model"]["parameters"] * trained + tokenizer, rel=0.02)
    assert float(disk) * 1e9 / kept == pytest.approx(taken, rel=0.15)  # JSON of some kB beside half a megabyte


def test_an_adapter_takes_what_is_trained(main, tuned, tuning, tmp_path):
    """On disk only the adapter and its moments, and the tokenizer; the same tokens as every weight."""
    asked = [o for o in tuning(tmp_path, "r") if not o.startswith("model")]
    asked += [f"init_from={tuned}", "adapter=lora", "trainer.max_steps=4", "checkpoint.every_steps=2"]
    said = " ".join(main("doctor", *(o for o in asked if not o.startswith(("name=", "runs=")))).out.split())
    tokens = int(re.search(r"rows, ([\d,]+) tokens", said)[1].replace(",", ""))
    disk, count = re.search(r"([\d.e-]+) GB of disk for (\d+) checkpoint", said).groups()
    done = main(*asked)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "r" / "MANIFEST.json").read_text())["tokens_seen"] == tokens
    taken = sum(p.stat().st_size for p in (tmp_path / "r/checkpoints").rglob("step-*/**/*") if p.is_file())
    assert int(count) == 2 and float(disk) * 1e9 == pytest.approx(taken, rel=0.25)


MEMORY = """
import resource, sys
from trivium.cli import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def test_memory_is_what_a_run_takes(rows, tmp_path):
    """A process of its own: its peak, within a third, of a model whose weights and activations both count (56 M)."""
    shape = ("model.dim=512", "model.layers=12", "model.heads=8", "model.kv_heads=8", "model.ffn_dim=2048")
    asked = (*settings(rows(CHATS)), *shape, "batch.length=128", "trainer.threads=1", "samples.every_steps=0",
             "validation.every_steps=0", f"runs={tmp_path}", "name=r", "trainer.max_steps=2")  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", MEMORY, *asked], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    told, peak = re.search(r"about ([\d.]+) GB", done.stdout)[1], int(re.search(r"peak (\d+)", done.stdout)[1])
    assert 0.75 < float(told) * 1e9 / peak < 1.33, (told, peak)
