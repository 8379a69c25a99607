"""The packs on the samples that they ship: what every source promises, splits apart, answers scored, counts."""

import json

import pytest

from trivium.data.config import SPLITS, BPEConfig
from trivium.data.datamodule import StepDataset
from trivium.data.packing import tokenise
from trivium.data.tokenizer import train_bpe
from trivium.errors import ConfigError, DataError
from trivium.testing import SourceContract
from trivium_plugins.books.config import BooksConfig
from trivium_plugins.books.source import NOVELS, Books, read
from trivium_plugins.chat.config import ChatConfig
from trivium_plugins.chat.source import EMAIL, Chat, paired
from trivium_plugins.preferences.config import PreferencesConfig
from trivium_plugins.preferences.source import Preferences
from trivium_plugins.preferences.source import paired as paired_words

PACKS = [
    (Books, BooksConfig, ["holmes", "war_and_peace"]),
    (Chat, ChatConfig, ["conversations", "replies"]),
    (Preferences, PreferencesConfig, ["words", "senses"]),
]
BY_NAME = pytest.mark.parametrize("pack", PACKS, ids=lambda pack: pack[0].__name__)


def sample(pack, split="train"):
    source, config, parts = pack
    return source(config(parts=parts, sample=True, split=split))


class TestBooks(SourceContract):
    def make(self):
        return sample(PACKS[0])


class TestChat(SourceContract):
    def make(self):
        return sample(PACKS[1])


class TestPreferences(SourceContract):
    def make(self):
        return sample(PACKS[2])


@BY_NAME
def test_splits_share_nothing(pack):
    seen = [{e["id"] for e in (s[i] for i in range(len(s)))} for s in (sample(pack, "train"), sample(pack, "test"))]
    assert seen[0] and seen[1] and not seen[0] & seen[1]
    texts = [
        {json.dumps({k: v for k, v in e.items() if k != "id"}) for e in sample(pack, n).examples}
        for n in ("train", "test")
    ]
    assert not texts[0] & texts[1]


@BY_NAME
def test_unknown_and_repeated_parts_are_refused(pack):
    for parts in ([], ["novels"], [pack[2][0]] * 2):
        with pytest.raises(ConfigError, match=r"data\.parts=.* must name some of"):
            pack[1](parts=parts)


def test_a_sample_without_the_part_says_so():
    with pytest.raises(DataError, match=r"\['history'\] has nothing in data\.split=train of the sample; set data\.sam"):
        Books(BooksConfig(parts=["history"], sample=True))


def test_emails_are_masked():
    assert EMAIL.sub("me@example.org", "write to jo.b+1@mail.co.uk, please") == "write to me@example.org, please"


def test_rows_of_real_conversations_are_full():
    """Every eighth of 2,754, which are of 30 to over 8,000 tokens, in rows of two lengths: 95 % of a row's tokens are a
    conversation's at least. One a row, padded to the longest, it would be less than nine tenths."""
    try:
        source = Chat(ChatConfig(parts=["conversations"]))
    except DataError as error:
        pytest.skip(f"NOT TESTED ON REAL CONVERSATIONS: {error}")
    assert len(source) == 2754
    some = source.examples[::8]
    tokenizer = train_bpe(BPEConfig(vocab_size=1000), [m["content"] for e in some for m in e["messages"]])
    for length in (512, 2048):
        table = tokenise(some, tokenizer, length, form="chat")
        steps = StepDataset(table, size=8, micro_size=8, length=length, pad_id=tokenizer.pad_id, seed=0)
        assert 0.95 <= steps.utilisation <= 1
        assert table.lengths.sum() == steps.utilisation * len(steps.rows) * length
        alone = table.lengths.sum() / (len(table.ids) * table.lengths.max())
        print(f"{length}: {steps.utilisation:.4f} full, {alone:.2f} alone, {table.truncated} cut")
        assert 0.1 < alone < 0.9 and table.lost_ends == table.truncated > 0


def talk(name, reply):
    return {"id": name, "turns": [f"{name}?", "hm", "so?", reply, "ok"]}


def test_two_conversations_have_each_others_reply_for_the_wrong_one():
    """Words of the fourth turns: a 4, b 5, c 5, d 6, e 7; f says three different words and g is alone, with 40.

    Sorted: a, then b and c by SHA-256 of their names (3e23... and 2e7d..., so c before b), d, e, g. So a goes with c
    (5 words are more than 1.2 x 4 = 4.8: no pair), b with d (6 = 1.2 x 5: a pair), e with g (no pair).
    """
    said = {
        "a": "we go home now",
        "b": "what do you think then",
        "c": "it was a long day",
        "d": "I like the cat and dog",
    }
    said |= {"e": "that is seven words as you see", "f": "yes Yes yes no so", "g": " ".join(map(str, range(40)))}
    found = list(paired(talk(*item) for item in reversed(said.items())))
    assert [(r["id"], r["wrong"]) for r in found] == [("b", said["d"]), ("d", said["b"])]
    assert found[0]["turns"][3] == said["b"]
    assert not list(paired([talk("a", "we go home now"), talk("b", "We go home NOW")]))  # the same reply is not wrong


def test_who_does_not_read_the_conversation_is_right_in_half_of_the_pairs():
    """Each reply is once right and once wrong, so any score of the reply alone, here its hash, wins exactly half."""
    source = Chat(ChatConfig(parts=["replies"], sample=True))
    last = [(hash(e["chosen"][-1]["content"]), hash(e["rejected"][-1]["content"])) for e in source.examples]
    assert len(last) == 18 and sum(chosen > rejected for chosen, rejected in last) == 9
    for e in source.examples:
        assert len(e["chosen"]) == 4 and e["chosen"][:3] == e["rejected"][:3]
        assert [m["role"] for m in e["rejected"]] == ["user", "assistant"] * 2


def test_two_words_of_a_class_have_each_others_gloss_for_the_wrong_one():
    """Of four nouns of three words, sorted by SHA-256 of their names (d 18ac..., c 2e7d..., b 3e23..., a ca97...), d
    and c are neighbours, then b and a. A gloss of d is a sense of c too, so neither is asked of. The verb is alone."""
    said = {"a": "a small dog", "b": "a big cat", "c": "a hot day", "d": "a cold night"}
    nouns = [{"id": n, "word": n, "kind": "noun", "true": gloss, "wrong": "nothing"} for n, gloss in said.items()]
    nouns[2]["wrong"] = said["d"]
    found = list(paired_words([*nouns, {**nouns[0], "kind": "verb"}]))
    assert {(r["id"], r["true"], r["wrong"]) for r in found} == {
        ("a", said["a"], said["b"]),
        ("b", said["b"], said["a"]),
    }


def test_who_does_not_read_the_word_is_right_in_half_of_the_pairs():
    """As above: 38 couples of words in the sample."""
    source = Preferences(PreferencesConfig(parts=["words"], sample=True))
    glosses = [(hash(e["chosen"][1]["content"]), hash(e["rejected"][1]["content"])) for e in source.examples]
    assert len(glosses) == 76 and sum(chosen > rejected for chosen, rejected in glosses) == 38
    assert all(e["chosen"][0] == e["rejected"][0] for e in source.examples)


def test_six_novels_come_out_of_the_file_of_r():
    """Their lengths are those of the package's own texts with lines of a paragraph joined; no word of R is left."""
    pytest.importorskip("rdata", reason="NOT TESTED ON AUSTEN: pip install rdata")
    try:
        records = list(read("austen"))
    except DataError as error:
        pytest.skip(f"NOT TESTED ON AUSTEN: {error}")
    books = {novel: "\n\n".join(r["text"] for r in records if r["id"].startswith(f"{novel}/")) for novel in NOVELS}
    firsts = {novel: text.partition("\n")[0] for novel, text in books.items()}
    assert [firsts[n] for n in ("sensesensibility", "emma", "persuasion")] == [
        "SENSE AND SENSIBILITY", "EMMA", "Persuasion",
    ]  # fmt: skip
    assert "It is a truth universally acknowledged, that a single man in possession" in books["prideprejudice"]
    assert [books[n].split()[-1] for n in ("sensesensibility", "mansfieldpark", "emma")] == ["END", "END", "FINIS"]
    assert len(records) == 1275 and sum(len(r["text"]) for r in records) == 4_014_847
    assert all(len(r["text"]) >= 2_700 for r in records if r["id"] not in _lasts(records))
    assert {s: len(Books(BooksConfig(parts=["austen"], split=s))) for s in SPLITS} == {
        "train": 1068,
        "validation": 71,
        "test": 136,
    }


def _lasts(records):
    """The last document of each novel may be short."""
    return {r["id"].partition("/")[0]: r["id"] for r in records}.values()
