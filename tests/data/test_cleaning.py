"""A cleaned source: which examples stay, what is counted, and that it is the same however it is asked."""

import random
import sys
from dataclasses import replace

import pytest
from helpers import Listed

from trivium.data import cleaning
from trivium.data.cleaning import Cleaned
from trivium.data.config import CleaningConfig, SourceConfig
from trivium.data.duplicates import HASHES, MISSED, bands_for, parts_of, shingles, similarity
from trivium.errors import ConfigError, DataError
from trivium.testing import SourceContract
from trivium.types import Score
from trivium_plugins.primer.config import PrimerConfig
from trivium_plugins.primer.source import Primer

ENGLISH = "The heron stood in the shallow river and waited for a fish to come near the bank."
GERMAN = "Der Reiher stand im flachen Fluss und wartete, bis ein Fisch an das Ufer kam."


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))


def of(examples, *steps, **settings):
    """A cleaned source of texts, or of examples, which get numbers as ids."""
    made = [{"id": str(i), **({"text": e} if isinstance(e, str) else e)} for i, e in enumerate(examples)]
    listed = Listed(made)
    listed.config = replace(listed.config, clean=list(steps), cleaning=CleaningConfig(**settings))
    return Cleaned(listed)


def ids(source):
    return " ".join(source[i]["id"] for i in range(len(source)))


def some(notes):
    return {k: v for k, v in notes.items() if v and not k.endswith("seen")}


def asked(question, said, /, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
    return {"messages": turns, **more}


def pair(question, chosen, rejected):
    return {s: asked(question, a)["messages"] for s, a in (("chosen", chosen), ("rejected", rejected))}


def test_steps_run_in_their_order_and_each_is_counted():
    """Lines ends make 1 the same as 0 only once they are changed, whatever `exact` itself looks through."""
    texts = ["a@example.org", "b@example.org", "c\r\nd", "c\nd", "e"]
    both = of(texts, "pii", "exact")
    assert ids(both) == "0 2 4"
    assert both[0]["text"] == "<EMAIL>"
    assert some(both.notes) == {
        "examples": 5, "kept": 3, "pii changed": 2, "pii (email)": 2, "exact removed": 2,
    }  # fmt: skip
    assert (both.notes["pii seen"], both.notes["exact seen"]) == (5, 5)
    other = of(texts, "exact", "pii")
    assert ids(other) == "0 1 2 4"
    assert (other.notes["exact seen"], other.notes["pii seen"]) == (5, 4)


def test_every_text_of_an_example_is_changed_and_nothing_else():
    mail, tag = "a@example.org", "<EMAIL>"
    given = [
        asked(mail, f"to {mail}", answer=f"to {mail}", task=mail),
        {"prompt": mail, "completion": f"{mail}!"},
        pair(mail, "x", mail),
        {"prompt": "p", "chosen": mail, "rejected": "y"},
        asked("q", mail, label=True),
    ]
    cleaned = of(given, "pii")
    assert [cleaned[i] for i in range(5)] == [
        {"id": "0", **asked(tag, f"to {tag}", answer=f"to {tag}", task=mail)},
        {"id": "1", "prompt": tag, "completion": f"{tag}!"},
        {"id": "2", **pair(tag, "x", tag)},
        {"id": "3", "prompt": "p", "chosen": tag, "rejected": "y"},
        {"id": "4", **asked("q", tag, label=True)},
    ]
    assert (
        cleaned.notes["pii changed"] == 5 and cleaned.notes["pii (email)"] == 3 + 2 + 3 + 1 + 1
    )  # as often as they are written


def test_pairs_whose_sides_become_equal_and_texts_that_become_empty_are_removed():
    """Of the third pair one side becomes the beginning of the other: there is nothing to prefer it to."""
    turns = pair("q", "a\x00", "a")["chosen"]
    longer = {"chosen": [*turns, *asked("more?", "yes")["messages"]], "rejected": asked("q", "a")["messages"]}
    given = [pair("q", "a\x00", "a"), pair("q", "a", "b"), longer, {"prompt": "p", "chosen": "a", "rejected": "a\x01"},
             {"text": "\x02"}, asked("q", "\x03"), {"text": "fine"}]  # fmt: skip
    cleaned = of(given, "unicode", mojibake=False)
    assert ids(cleaned) == "1 6"
    assert some(cleaned.notes) == {
        "examples": 7, "kept": 2, "unicode changed": 5, "unicode removed": 5,
        "unicode (control characters)": 5, "unicode (sides became equal)": 3, "unicode (became empty)": 2,
    }  # fmt: skip


def test_length_at_its_edges():
    """2 to 4 characters; of a conversation all turns count."""
    cleaned = of(
        ["a", "ab", "abcd", "abcde", asked("ab", "cd"), asked("ab", "cde")], "length", min_chars=2, max_chars=4
    )
    assert ids(cleaned) == "1 2 4"
    assert cleaned.notes["length (too short)"] == 1 and cleaned.notes["length (too long)"] == 2


def test_language_keeps_what_is_asked_for_and_what_is_too_short_to_tell():
    cleaned = of([ENGLISH, GERMAN, "Guten Tag", asked(GERMAN, GERMAN)], "language")
    assert ids(cleaned) == "0 2"
    assert some(cleaned.notes) == {
        "examples": 4, "kept": 2, "language removed": 2, "language (de)": 2, "language (undecided, short)": 1,
    }  # fmt: skip
    assert ids(of([ENGLISH, GERMAN], "language", languages=["de", "fr"])) == "1"


def test_language_that_is_not_sure_keeps():
    """Nothing is surer than 0.999999 of so few words."""
    unsure = of([GERMAN], "language", language_confidence=0.999999)
    assert ids(unsure) == "0" and unsure.notes["language (undecided, unsure)"] == 1


def test_quality_counts_every_rule_that_a_text_breaks():
    good = " ".join(f"{chr(97 + i % 26)}{chr(97 + i // 26)}word" for i in range(60))
    cleaned = of(["only # five short words here", " ".join([ENGLISH] * 10), f"the {good} and"], "quality")
    assert ids(cleaned) == "2"
    assert cleaned.notes["quality removed"] == 2
    assert cleaned.notes["quality (too few words)"] == 1 and cleaned.notes["quality (duplicate 10-grams)"] == 1


def test_exact_looks_through_line_ends_and_unicode_forms_only():
    texts = ["Café\nb", "Cafe\u0301 \r\nb\n", "café\nb", "Café\n b", "Café, b"]
    assert ids(of(texts, "exact")) == "0 2 3 4"


@pytest.mark.parametrize("step", ["exact", "near"])
def test_a_duplicate_has_the_same_prompt_answers_and_verdict(step):
    """The same but for one part is no duplicate; the whole again is, and the first is kept."""
    long = f"{ENGLISH} {GERMAN}"
    given = [
        asked(long, "yes"), asked(long, "no"), asked(GERMAN, "yes", answer="yes"), asked(GERMAN, "yes"),
        pair(long, "yes", "no"), pair(long, "no", "yes"), pair(long, "yes", "nay"),
        asked(long, "yes", label=True), asked(long, "yes", label=False),
        {"prompt": long, "completion": "yes"}, {"prompt": long, "chosen": "yes", "rejected": "no"},
    ]  # fmt: skip
    cleaned = of([*given, *given], step)
    assert ids(cleaned) == " ".join(map(str, range(11)))
    assert cleaned.notes[f"{step} removed"] == 11


def test_jaccard_of_two_sentences_at_the_threshold():
    """Four of five words are shared: 0.8. Removed at 0.8, kept just above."""
    texts = ["the cat sat down", "the cat sat down quickly"]
    assert similarity(*((frozenset(t.split()),) for t in texts)) == 4 / 5
    assert ids(of(texts, "near", near_words=1, near_threshold=0.8)) == "0"
    assert ids(of(texts, "near", near_words=1, near_threshold=0.81)) == "0 1"


def test_shingles_of_short_texts_and_of_scripts_without_blanks():
    assert shingles("Only Four words, here", 5) == {"only four words, here"}
    assert shingles("鷺は川に立つ", 5) == {"鷺 は 川 に 立", "は 川 に 立 つ"}


def test_bands_miss_no_more_than_promised():
    for threshold in (0.51, 0.6, 0.7, 0.8, 0.9, 1.0):
        rows = HASHES // bands_for(threshold)
        assert (1 - threshold**rows) ** bands_for(threshold) <= MISSED


def test_planted_near_duplicates_are_all_found_and_unrelated_texts_all_stay():
    """200 texts of books, and 20 of them again with 1 to 4 words changed: Jaccard 0.80 or more by construction.

    k words that stand apart change 5k of S shingles: (S - 5k) / (S + 5k); 400 words have S = 396, so 0.90 or more.
    """
    books = Primer(PrimerConfig(parts=["books"]))
    texts = [" ".join(books[i]["text"].split()[:400]) for i in range(200)]
    draw = random.Random(0)
    planted = []
    for number in range(20):
        words = texts[number * 7].split()
        for k in range(1 + number % 4):
            words[40 + 90 * k + draw.randrange(20)] = "changed"
        planted.append(" ".join(words))
    cleaned = of([*texts, *planted], "near")
    assert cleaned.notes["near removed"] == 20
    assert ids(cleaned) == " ".join(map(str, range(200)))


def test_near_removes_no_task_of_the_primer_that_exact_keeps():
    """What is made from templates differs in few words, and in what is right."""
    tasks = PrimerConfig(parts=["definitions", "tasks", "pairs"], num_tasks=1200, num_pairs=300)
    counts = [Cleaned(Primer(replace(tasks, clean=[step]))).notes for step in ("exact", "near")]
    assert counts[0]["exact removed"] == counts[1]["near removed"] > 0


def test_cache_is_used_where_everything_is_the_same(monkeypatch):
    passes = []
    monkeypatch.setattr(Cleaned, "_pass", lambda self, do=Cleaned._pass: passes.append(1) or do(self))
    first = of(["a", "a", "b"], "exact")
    again = of(["a", "a", "b"], "exact")
    assert (ids(first), ids(again), first.notes, len(passes)) == ("0 2", "0 2", again.notes, 1)
    assert of(["a", "a", "b"], "exact", near_threshold=0.9).fingerprint == first.fingerprint  # not read by exact
    others = [of(["a", "a", "c"], "exact"), of(["a", "a", "b"], "whitespace", "exact"),
              of(["a", "a", "b"], "near", near_threshold=0.9), of(["a", "a", "b"], "near")]  # fmt: skip
    assert [ids(o) for o in others] == ["0 2"] * 4 and len(passes) == 5
    monkeypatch.setattr(cleaning, "VERSION", cleaning.VERSION + 1)
    fingerprints = {o.fingerprint for o in (first, *others, of(["a", "a", "b"], "exact"))}
    assert len(fingerprints) == 6


def test_a_damaged_cache_is_made_anew(tmp_path):
    assert ids(of(["a", "a", "b"], "exact")) == "0 2"
    (file,) = tmp_path.glob("cleaned/*.bin")
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert ids(of(["a", "a", "b"], "exact")) == "0 2"


def test_examples_are_the_same_in_any_order_of_asking():
    texts = [f"{ENGLISH} a{i % 7}@example.org" for i in range(20)]
    steps = ("pii", "whitespace", "exact")
    forwards, backwards = of(texts, *steps), of(texts[:], *steps)
    assert [backwards[i] for i in reversed(range(len(backwards)))][::-1] == [forwards[i] for i in range(len(forwards))]
    with pytest.raises(IndexError):
        forwards[len(forwards)]


def test_nothing_left_is_said_in_one_sentence():
    with pytest.raises(
        DataError, match=r"data\.clean=\[length\] leaves nothing of split=train \(examples 2, kept 0.*too short"
    ):
        len(of(["a", "b"], "length", min_chars=5))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clean": ["pi"]}, r"data\.clean=\['pi'\] has 'pi', which is not one of unicode.*Did you mean pii\?"),
        ({"clean": ["exact", "exact"]}, "names a step twice"),
        ({"contamination": "maybe"}, "contamination='maybe' is not one of warn, fail, off"),
        ({"contamination_share": 1.0}, "must be at least 0 and less than 1"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        SourceConfig(**settings)


@pytest.mark.parametrize("settings", [{"near_threshold": 0.5}, {"min_chars": 3, "max_chars": 2}, {"languages": []},
                                      {"min_words": 0}, {"stop_words": 9}, {"language_confidence": 1.0}])  # fmt: skip
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ConfigError, match=r"data\.cleaning\."):
        CleaningConfig(**settings)


@pytest.mark.parametrize(("step", "package"), [("unicode", "ftfy"), ("language", "py3langid"), ("near", "rensa")])
def test_a_missing_package_is_named_before_anything_is_read(step, package, monkeypatch):
    for module in (package, f"{package}.langid"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(cleaning, "_identifier", cleaning._identifier.__wrapped__)
    with pytest.raises(ConfigError, match=rf"\[{step}\].* needs {package}, which is not installed: pip install"):
        of(["a"], step)


class Scored(Listed):
    def origin(self, example):
        return f"from {example['id']}"

    def score(self, example, completion):
        return Score(1.0 if completion == example["answer"] else 0.0, completion == example["answer"])


class TestCleaned(SourceContract):
    """A cleaned source is a source."""

    def make(self):
        said = [f"to number {i}" for i in range(5)]
        listed = Scored([{"id": str(i), **asked(f"where?\r\n{i}", s, answer=s)} for i, s in enumerate(said)])
        listed.phases = frozenset({"sft"})
        listed.config = replace(listed.config, clean=["whitespace", "length"])
        return Cleaned(listed)

    def test_origin_and_score_are_those_of_the_source(self):
        source = self.make()
        assert source.origin(source[2]) == "from 2" and source.phases == {"sft"}


def test_parts_tell_forms_apart():
    """A text that reads like a conversation is no duplicate of it."""
    assert len({parts_of(e)[0] for e in ({"id": "", "text": "a"}, asked("a", "b"), asked("a", "b", label=True))}) == 3
