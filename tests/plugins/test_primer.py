"""The bundled plugin `primer`: what it holds, that its splits never meet, and that its verdicts are right."""

import hashlib
import json
import lzma
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from trivium.data.source import Source, fingerprint_of
from trivium.errors import ConfigError, DataError
from trivium.plugin import Plugin
from trivium.registry import load
from trivium.testing.contracts import SourceContract
from trivium.types import Score
from trivium_plugins.primer import plugin, texts
from trivium_plugins.primer.chats import TOPICS, values_of
from trivium_plugins.primer.config import DEFAULT_PARTS, PARTS, TASKS, PrimerConfig
from trivium_plugins.primer.pairs import MISTAKES, wrong_answers
from trivium_plugins.primer.source import Primer
from trivium_plugins.primer.tasks import Problem, is_right

SPLITS = ("train", "validation", "test")


def primer(*parts, **settings):
    return Primer(PrimerConfig(**({"parts": list(parts)} if parts else {}), **settings))


def asked(example):
    return example["messages"][0]["content"]


# ---- the plugin and its sizes


def test_plugin_names_a_source_that_loads():
    assert isinstance(plugin, Plugin)
    entry = plugin.sources["primer"]
    assert load(entry.target) is Primer and issubclass(Primer, Source)
    assert load(entry.config) is PrimerConfig
    assert Primer.phases == {
        "tokenizer", "pretrain", "sft", "preference", "reward", "rlhf", "distill", "evaluate",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("part", "sizes"),
    [
        ("books", (2721, 40, 80)),
        ("definitions", (3590, 181, 229)),
        ("tasks", (12_000,) * 3),
        ("pairs", (6_000,) * 3),
    ],
)
def test_sizes_of_parts(part, sizes):
    """2,721 + 40 + 80 = 2,841 documents, 3,590 + 181 + 229 = 4,000 words; tasks and pairs are as many as asked for."""
    assert tuple(len(primer(part, split=s)) for s in SPLITS) == sizes


def test_default_config_is_all_parts_but_pairs_in_order():
    """The tokenizer learns from the default: a part more would change every model made from it."""
    source = primer()
    assert len(source) == 2721 + 3590 + 12_000 + 3_000
    starts = [source[i]["id"].split("/")[0] for i in (0, 2720, 2721, 6310, 6311, 18_310, 18_311, len(source) - 1)]
    assert starts == [part for part in DEFAULT_PARTS for _ in range(2)]
    assert set(PARTS) - set(DEFAULT_PARTS) == {"pairs"}


def test_parts_follow_the_order_of_the_config():
    source = primer("chats", "books", num_chats=3)
    assert [source[i]["id"] for i in range(3)] == ["chats/0", "chats/1", "chats/2"]
    assert source[3]["id"].startswith("books/")


def test_index_out_of_range_ends_iteration():
    """Python's own `for` over a map-style source stops at IndexError."""
    source = primer("tasks", num_tasks=7)
    assert len(list(source)) == 7
    for index in (7, -1):
        with pytest.raises(IndexError):
            source[index]


def test_data_is_small_and_has_its_licences():
    assert sum(f.stat().st_size for f in texts.DATA.iterdir()) <= 3_000_000
    licences = (texts.DATA / "LICENSES.md").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licences and "public domain" in licences


# ---- every example


def test_ids_are_unique_and_examples_have_the_contract_form():
    source = primer()
    seen = set()
    for example in source:
        seen.add(example["id"])
        if "text" in example:
            assert set(example) == {"id", "text"} and example["text"].strip() == example["text"] != ""
        else:
            roles = [m["role"] for m in example["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and 2 <= len(roles) <= 6
            assert all(m["content"].strip() == m["content"] != "" for m in example["messages"])
    assert len(seen) == len(source)


def test_examples_are_the_same_at_every_call_and_in_any_order():
    first, second = primer(num_tasks=60, num_chats=20), primer(num_tasks=60, num_chats=20)
    backwards = [second[i] for i in reversed(range(len(second)))][::-1]
    assert [first[i] for i in range(len(first))] == backwards
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(first.__getitem__, range(len(first)))) == backwards


def test_what_the_code_makes_is_pinned():
    """If this fails on purpose, raise `source.VERSION`: old fingerprints must not match new content."""
    made = fingerprint_of(primer("tasks", "chats", num_tasks=120, num_chats=60))
    assert made[:16] == "2672101d47d27098"
    assert fingerprint_of(primer("pairs", num_pairs=120))[:16] == "8b710925a8fc2a35"


# ---- splits never meet


def test_books_of_two_splits_share_no_document_and_no_long_paragraph():
    sides = [list(primer("books", split=s)) for s in SPLITS]
    for unit in (lambda t: [t], lambda t: [p for p in t.split("\n\n") if len(p) > 200]):
        found = [{piece for e in side for piece in unit(e["text"])} for side in sides]
        assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    sizes = [sum(len(e["text"].encode()) for e in side) for side in sides]
    assert sum(sizes) + 2840 == len(texts.read(texts.BOOKS).encode())  # all of it, but for the page breaks
    assert 0.01 < sizes[1] / sum(sizes) < 0.03 and 0.02 < sizes[2] / sum(sizes) < 0.04


def test_books_are_clean_text():
    whole = texts.read(texts.BOOKS)
    assert "It is a truth universally acknowledged, that a single man in possession of a good fortune" in whole
    for rubbish in ("Gutenberg", "CHAPTER", "\r", "\t", "  ", "\n\n\n", "_", "*"):
        assert rubbish not in whole
    lengths = sorted(map(len, whole.split(texts.PAGE)))
    assert lengths[0] >= 800
    assert sum(1_500 <= n <= 4_000 for n in lengths) / len(lengths) > 0.97


def test_definitions_of_two_splits_share_no_word_and_no_meaning():
    sides = [list(primer("definitions", split=s)) for s in SPLITS]
    for value in (lambda e: e["id"], lambda e: e["messages"][1]["content"]):
        counts = Counter(value(e) for side in sides for e in side)
        assert max(counts.values()) == 1 and len(counts) == 4_000


def test_definition_of_stone():
    example = next(e for e in primer("definitions") if e["id"] == "definitions/stone")
    assert "stone" in asked(example)
    assert example["messages"][1]["content"] == "a lump or mass of hard consolidated mineral matter"


def test_tasks_of_two_splits_share_no_problem_whatever_the_seed():
    """Pairs of numbers count without their order: 23 + 45 must not be trained on if 45 + 23 is held out."""

    def problems(split, seed):
        for example in primer("tasks", split=split, seed=seed, num_tasks=1_800):
            words = asked(example).rstrip("?").replace(",", "").split()
            numbers = sorted(int(w) for w in words if w.isdigit())
            content = numbers or asked(example).split(": ")[1]
            yield example["task"], str(content)

    sides = [{p for seed in (0, 1, 12345) for p in problems(split, seed)} for split in SPLITS]
    assert all(len(side) > 1_000 for side in sides)
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_chats_of_two_splits_share_no_fact():
    values = [{v.lower() for topic in TOPICS for v in values_of(topic, s)} for s in SPLITS]
    assert not (values[0] & values[1] or values[0] & values[2] or values[1] & values[2])
    assert all(len(values_of(topic, s)) >= 2 for topic in TOPICS for s in SPLITS)
    chats = [{json.dumps(e["messages"]) for e in primer("chats", split=s, seed=n)} for s in SPLITS for n in (0, 9)]
    assert not (chats[0] | chats[1]) & (chats[2] | chats[3] | chats[4] | chats[5])


# ---- tasks and chats are right


def answer_again(task, question):
    """The answer, worked out from the question's text alone and not as the plugin does."""
    if task in ("copy", "reverse", "count"):
        letters = question.split(": ")[1].split(" ")
        assert all(len(c) == 1 and "a" <= c <= "z" for c in letters) and 3 <= len(letters) <= 8
        return {"copy": " ".join(letters), "reverse": " ".join(letters[::-1]), "count": str(len(letters))}[task]
    if task == "compare":
        words = question.rstrip("?").replace(",", "").split()
        return str({"larger": max, "smaller": min}[words[2]](int(words[3]), int(words[5])))
    return str(eval(question.removeprefix("What is ").rstrip("?")))  # noqa: S307 - our own two numbers


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_task_answers_agree_with_an_independent_computation(task, split):
    source = primer("tasks", tasks=[task], num_tasks=500, split=split, seed=3)
    for example in source:
        assert example["answer"] == example["messages"][-1]["content"] == answer_again(task, asked(example))
        assert source.score(example, example["answer"]) == Score(1.0, True)


def test_tasks_take_turns_and_cover_signs_and_lengths():
    examples = list(primer("tasks", num_tasks=6_000))
    assert Counter(e["task"] for e in examples) == dict.fromkeys(TASKS, 1_000)
    differences = [int(e["answer"]) for e in examples if e["task"] == "subtract"]
    assert 400 < sum(d < 0 for d in differences) < 600 and 0 in differences
    assert {e["answer"] for e in examples if e["task"] == "count"} == set("345678")
    assert {asked(e).split()[2] for e in examples if e["task"] == "compare"} == {"larger,", "smaller,"}


def test_other_seed_makes_other_tasks_and_chats():
    for part in ("tasks", "chats"):
        first, second = ([e["messages"] for e in primer(part, seed=s, num_tasks=60, num_chats=60)] for s in (0, 1))
        assert sum(a == b for a, b in zip(first, second, strict=True)) <= 2


def test_chats_answer_with_a_fact_told_in_the_same_chat():
    """Whoever asks "What is my name?" has said it: the value in an answer stands in an earlier user turn."""
    answers = {t: topic.answer.split("{}")[0] for t, topic in TOPICS.items()}
    found = Counter()
    for example in primer("chats", num_chats=1_000):
        told = ""
        for message in example["messages"]:
            if message["role"] == "user":
                told += " " + message["content"]
                continue
            for topic, start in answers.items():
                if message["content"].startswith(start):
                    value = message["content"][len(start) : -1]
                    assert value in TOPICS[topic].values and value in told
                    found[topic] += 1
    assert set(found) == set(TOPICS) and min(found.values()) > 80


# ---- pairs


def sides(pair):
    return pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]


def mistake_of(task, question, right, wrong):
    """The mistakes that a wrong answer can come from, worked out from the texts alone and not as the plugin does."""
    if task in ("add", "subtract"):
        a, b = (int(w) for w in question.rstrip("?").split() if w.isdigit())
        n, given = int(right), int(wrong)
        other = {"subtracted": a - b} if task == "add" else {"added": a + b, "sign dropped": abs(n)}
        digits = str(abs(n))
        if len(digits) > 1:
            other["digits swapped"] = int(digits[:-2] + digits[-1] + digits[-2]) * (1 if n > 0 else -1)
        near = {"off by one": {n - 1, n + 1}, "off by ten": {n - 10, n + 10}}
        found = {name for name, values in near.items() if given in values}
        return found | {name for name, value in other.items() if given == value}
    if task == "count":
        return {{1: "off by one", 2: "off by two"}[abs(int(wrong) - int(right))]}
    if task == "compare":
        numbers = re.findall(r"\d+", question)
        if wrong in numbers:
            return {"other number"}
        (a, b), (c, d) = numbers
        return {"digits mixed"} if wrong in (a + d, c + b) else set()
    found = {"not turned round"} if task == "reverse" and wrong == question.split(": ")[1] else set()
    old, new = right.split(" "), wrong.split(" ")
    if len(new) == len(old) - 1:
        return found | {"letter left out" for i in range(len(old)) if old[:i] + old[i + 1 :] == new}
    places = [i for i, (x, y) in enumerate(zip(old, new, strict=True)) if x != y]
    if len(places) == 1:
        found.add("letter replaced")
    if len(places) == 2 and places[1] == places[0] + 1 and sorted(old) == sorted(new):
        found.add("letters swapped")
    return found


def test_wrong_answers_are_one_mistake_away_and_never_right():
    """18,000 pairs of two seeds and all splits, every kind of mistake among them and none that is rare."""
    found = Counter()
    for seed, split in ((0, "train"), (1, "train"), (0, "test"), (0, "validation")):
        for pair in primer("pairs", num_pairs=4_500, seed=seed, split=split):
            (right, wrong), task, question = sides(pair), pair["task"], pair["chosen"][0]["content"]
            assert pair["chosen"][:-1] == pair["rejected"][:-1] and len(pair["chosen"]) == 2
            assert right == answer_again(task, question)
            assert is_right(task, right, right) and not is_right(task, right, wrong), pair
            mistakes = mistake_of(task, question, right, wrong)
            assert mistakes and mistakes <= set(MISTAKES[task]), (pair, mistakes)
            found.update((task, mistake) for mistake in mistakes)
    assert set(found) == {(task, mistake) for task in TASKS for mistake in MISTAKES[task]}
    assert min(found.values()) > 300  # of 3,000 a kind: the rarest needs a negative difference


def test_wrong_answers_are_written_as_right_ones():
    forms = {"copy": r"[a-z]( [a-z]){1,7}", "reverse": r"[a-z]( [a-z]){1,7}", "count": "[1-9][0-9]?"}
    for pair in primer("pairs", num_pairs=6_000, seed=3):
        for answer in sides(pair):
            assert re.fullmatch(forms.get(pair["task"], "-?[1-9][0-9]*|0"), answer), pair
        assert {m["role"] for m in pair["chosen"]} == {"user", "assistant"}
        assert set(pair) == {"id", "task", "chosen", "rejected"}


ANY_LETTER = object()


@pytest.mark.parametrize(
    ("task", "question", "answer", "wrong"),
    [
        ("add", "What is 0 + 0?", "0", {"off by one": {"1"}, "off by ten": {"10"}}),
        ("add", "What is 1 + 9?", "10", {"off by one": {"9", "11"}, "off by ten": {"0", "20"}, "subtracted": {"-8"}}),
        (
            "subtract",
            "What is 0 - 67?",
            "-67",
            {
                "off by one": {"-66", "-68"},
                "off by ten": {"-57", "-77"},
                "digits swapped": {"-76"},
                "added": {"67"},
                "sign dropped": {"67"},
            },
        ),
        ("subtract", "What is 5 - 0?", "5", {"off by one": {"4", "6"}, "off by ten": {"-5", "15"}}),
        ("count", "How many letters: a", "1", {"off by one": {"2"}, "off by two": {"3"}}),
        ("compare", "Which is larger, 5 or 55?", "55", {"other number": {"5"}}),
        ("compare", "Which is larger, 37 or 52?", "52", {"other number": {"37"}, "digits mixed": {"32", "57"}}),
        ("compare", "Which is larger, 30 or 50?", "50", {"other number": {"30"}}),
        (
            "copy",
            "Copy: a a b",
            "a a b",
            {"letters swapped": {"a b a"}, "letter left out": {"a b", "a a"}, "letter replaced": ANY_LETTER},
        ),
        ("reverse", "Reverse: a a a", "a a a", {"letter left out": {"a a"}, "letter replaced": ANY_LETTER}),
    ],
)
def test_wrong_answers_by_hand(task, question, answer, wrong):
    """Only what can be made: 10 with its digits swapped is no number, and 0 + 0 has nothing below it.

    All of it is found in 200 draws; for a replaced letter, which has 75 outcomes, more than half.
    """
    made = [wrong_answers(task, Problem("", question, answer), number) for number in range(200)]
    assert all(set(m) == set(wrong) for m in made)
    for name, expected in wrong.items():
        found = {m[name] for m in made}
        assert 38 < len(found) <= 75 if expected is ANY_LETTER else found == expected, name


def test_pairs_share_no_problem_with_another_split_and_are_not_the_tasks():
    """A model tuned on pairs of `train` is measured on tasks and on pairs of `test`: no problem may be in both."""

    def problems(part, split, seed):
        for example in primer(part, split=split, seed=seed, num_tasks=1_800, num_pairs=1_800):
            question = (example.get("chosen") or example["messages"])[0]["content"]
            numbers = sorted(int(w) for w in question.rstrip("?").replace(",", "").split() if w.isdigit())
            yield example["task"], str(numbers or question.split(": ")[1])

    train = {p for seed in (0, 1, 12345) for p in problems("pairs", "train", seed)}
    for part in ("tasks", "pairs"):
        held = {p for split in ("test", "validation") for seed in (0, 20261731) for p in problems(part, split, seed)}
        assert len(held) > 1_000 and not train & held
    drawn = [list(problems(part, "train", 0)) for part in ("tasks", "pairs")]
    assert sum(a == b for a, b in zip(*drawn, strict=True)) < 20


def test_pairs_are_the_same_at_every_call_and_follow_the_seed():
    first, second = primer("pairs", num_pairs=300), primer("pairs", num_pairs=300)
    backwards = [second[i] for i in reversed(range(300))][::-1]
    assert [first[i] for i in range(300)] == backwards
    other = list(primer("pairs", num_pairs=300, seed=1))
    assert sum(a == b for a, b in zip(other, backwards, strict=True)) <= 3
    changes = (
        {},
        {"seed": 1},
        {"num_pairs": 301},
        {"split": "test"},
        {"tasks": ["add"]},
        {"pair_tasks": ["add", "copy"]},
    )
    marks = [primer("pairs", **{"num_pairs": 300, **change}).fingerprint for change in changes]
    assert len(set(marks)) == len(marks) and second.fingerprint == marks[0]


class TestPairs(SourceContract):
    def make(self):
        return primer("pairs", num_pairs=120)


# ---- scores


@pytest.mark.parametrize(
    ("task", "answer", "completion", "right"),
    [
        ("add", "68", "68", True),
        ("add", "68", " 68.\n", True),
        ("add", "68", "68 .", True),
        ("add", "68", "68..", False),
        ("add", "68", "68 and more", False),
        ("add", "68", "The answer is 68", False),
        ("add", "68", "6 8", False),
        ("add", "68", "068", False),
        ("add", "68", "", False),
        ("add", "68", ".", False),
        ("subtract", "-7", "-7", True),
        ("subtract", "-7", "7", False),
        ("subtract", "7", "-7", False),
        ("subtract", "-7", "- 7", False),
        ("subtract", "0", "0", True),
        ("subtract", "0", "-0", False),
        ("subtract", "0", "", False),
        ("reverse", "e n o t s", "e n o t s", True),
        ("reverse", "e n o t s", "enots.", True),
        ("reverse", "e n o t s", "E N  O T S", True),
        ("reverse", "e n o t s", "s t o n e", False),
        ("reverse", "e n o t s", "e n o t s s", False),
        ("copy", "s t o n e", "Stone", True),
        ("copy", "s t o n e", "s\nt o n e", False),
        ("count", "5", "5", True),
        ("count", "5", "five", False),
        ("compare", "45", "45", True),
        ("compare", "45", "23", False),
    ],
)
def test_score_by_hand(task, answer, completion, right):
    example = {"id": "x", "task": task, "answer": answer, "messages": []}
    assert primer("tasks").score(example, completion) == Score(1.0 if right else 0.0, right)


def test_score_refuses_an_example_without_an_answer():
    source = primer("chats")
    for example in (source[0], {"id": "x", "task": "add", "answer": None}, {"id": "x", "task": "add", "answer": ""}):
        with pytest.raises(DataError, match="has no answer"):
            source.score(example, "0")


# ---- fingerprints


def test_fingerprint_follows_content_and_nothing_else():
    base = {"num_tasks": 600, "num_chats": 100}
    marks = [
        primer(**base, **change).fingerprint
        for change in ({}, {"seed": 1}, {"split": "test"}, {"split": "validation"}, {"num_definitions": 100})
    ]
    marks += [primer("books", "tasks", **base).fingerprint, primer("tasks", "books", **base).fingerprint]
    marks += [primer(num_tasks=601, num_chats=100).fingerprint, primer(**base, tasks=["add"]).fingerprint]
    assert len(set(marks)) == len(marks)
    assert marks[0] == primer(**base).fingerprint
    assert all(len(m) == 64 and int(m, 16) >= 0 for m in marks)


def test_fingerprint_ignores_settings_that_change_no_example():
    assert primer("books").fingerprint == primer("books", seed=5, num_tasks=7, tasks=["add"]).fingerprint
    assert primer("definitions").fingerprint == primer("definitions", num_definitions=9_999, seed=2).fingerprint


# ---- bad settings and damaged data


@pytest.mark.parametrize(
    "settings",
    [
        {"split": "tran"},
        {"parts": ["books", "poems"]},
        {"parts": []},
        {"parts": ["books", "books"]},
        {"tasks": ["divide"]},
        {"tasks": []},
        {"num_tasks": 0},
        {"num_chats": -1},
        {"num_definitions": 0},
        {"num_pairs": 0},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        PrimerConfig(**settings)


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"not compressed",
        lambda data: lzma.compress(b"\xff\xfe\xff"),
        lambda data: lzma.compress(b""),
        None,
    ],
    ids=["flipped", "cut", "empty", "plain", "not utf-8", "nothing inside", "missing"],
)
@pytest.mark.parametrize(
    ("part", "name"),
    [("books", texts.BOOKS), ("definitions", texts.DEFINITIONS), ("tasks", texts.WORDS), ("pairs", texts.WORDS)],
)
def test_damaged_data_is_named(part, name, damage, tmp_path, monkeypatch):
    shutil.copytree(texts.DATA, tmp_path / "data")
    path = tmp_path / "data" / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    monkeypatch.setattr(texts, "DATA", path.parent)
    with pytest.raises(DataError, match=name):
        primer(part)


def test_malformed_rows_are_named(tmp_path, monkeypatch):
    (tmp_path / texts.DEFINITIONS).write_bytes(lzma.compress(b"stone\ta hard thing\nriver\n"))
    monkeypatch.setattr(texts, "DATA", tmp_path)
    with pytest.raises(DataError, match="definitions.*line 2"):
        primer("definitions")


def test_changed_text_changes_the_fingerprint(tmp_path, monkeypatch):
    before = primer("books").fingerprint
    (tmp_path / texts.BOOKS).write_bytes(lzma.compress((texts.read(texts.BOOKS) + "!").encode(), preset=0))
    monkeypatch.setattr(texts, "DATA", tmp_path)
    assert primer("books").fingerprint != before
    assert hashlib.sha256(texts.read(texts.BOOKS).encode()).hexdigest() == texts.digest(texts.BOOKS)
