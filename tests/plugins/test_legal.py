"""Licence texts: what is read, that near twins stand on one side, and how answers are judged."""

import random
import re
from collections import Counter

import pytest

from trivium.errors import ConfigError, DataError
from trivium.testing import SourceContract
from trivium_plugins.legal.config import LegalConfig
from trivium_plugins.legal.questions import CATEGORIES, asked, kind_of, runs
from trivium_plugins.legal.source import Legal
from trivium_plugins.legal.texts import SPLITS, Licence, families, licences, parse, sides


class TestSample(SourceContract):
    def make(self):
        return Legal(LegalConfig(sample=True))


@pytest.fixture(scope="module")
def fetched():
    try:
        return licences(False)
    except DataError as error:
        pytest.skip(f"NOT TESTED ON THE REAL LICENCES: {error}")


def test_the_sample_has_every_split():
    found = {split: [one.key for one in texts] for split, texts in sides(licences(True)).items()}
    assert found["test"] == ["boost-1.0", "psf-2.0", "wtfpl-2.0", "zlib"]
    assert found["validation"] == ["beerware", "x11-lucent-variant"]
    assert len(found["train"]) == 6


def test_a_shared_paragraph_makes_a_family():
    """a and b share a long paragraph, b and c another; d shares only a short one with a."""
    first, second = "one " * 60, "two " * 60
    texts = [
        Licence(key, "CLA", "x", text)
        for key, text in (("a", f"{first}\n\nend"), ("b", f"{first}.\n\n{second}"), ("c", second), ("d", "end"))
    ]
    assert families(texts) == {"a": "a", "b": "a", "c": "a", "d": "d"}


def test_the_category_of_mit_is_asked_and_judged():
    source = Legal(LegalConfig(sample=True, parts=["categories"], excerpt=40))
    (mit,) = (e for e in (source[i] for i in range(len(source))) if e["id"] == "category/mit")
    assert mit["messages"][0]["content"].startswith("Permission is hereby granted, free of ch\n\nWhich category")
    assert mit["messages"][1]["content"] == mit["answer"] == "Permissive"
    judged = {said: source.score(mit, said).value for said in ("permissive.", "Copyleft", "Permissive, or Copyleft")}
    assert judged == {"permissive.": 1.0, "Copyleft": 0.0, "Permissive, or Copyleft": 0.0}


def test_a_clause_about_two_things_is_no_question():
    assert kind_of("Your rights terminate.") == "termination"
    assert kind_of("Your rights terminate if you litigate a patent.") is None
    assert kind_of("Have fun.") is None


@pytest.mark.parametrize("line", ["is_deprecated: yes", "language: de"])
def test_deprecated_and_foreign_texts_are_left_out(line):
    head = "---\nkey: x\ncategory: CLA\n"
    assert parse(f"{head}---\n\n{'word ' * 30}", "x") is not None
    assert parse(f"{head}{line}\n---\n\n{'word ' * 30}", "x") is None


def test_mistakes_are_one_sentence():
    with pytest.raises(ConfigError, match="data.parts=\\['text'\\] must name at least one of texts, categories"):
        LegalConfig(parts=["text"])
    with pytest.raises(DataError, match="has no head with key and category"):
        parse("Permission is granted", "x.LICENSE")
    texts = Legal(LegalConfig(sample=True, parts=["texts"]))
    with pytest.raises(DataError, match="has no answer to score against"):
        texts.score(texts[0], "CLA")


def test_the_real_licences(fetched):
    """2,615 files less 145 deprecated, 41 in other languages, and those that hold no text, with overlaps."""
    assert len(fetched) == 2400
    assert {one.category for one in fetched} == set(CATEGORIES)
    splits = sides(fetched)
    assert {split: len(texts) for split, texts in splits.items()} == {"train": 1937, "validation": 238, "test": 225}
    owners = Counter(one.category for one in splits["test"])
    assert owners["Permissive"] == 77 and owners["Proprietary Free"] == 83


def shared(words, others, length):
    """Whether `length` of these words in a row stand in one of the others."""
    told = [f" {' '.join(other)} " for other in others]
    return any(
        f" {' '.join(words[i : i + length])} " in one for i in range(max(1, len(words) - length + 1)) for one in told
    )


def test_no_held_out_clause_shares_thirteen_words_with_one_that_is_trained_on(fetched):
    """Half of 507 did, 21 of them in every word: families share no long paragraph, but short ones and parts."""
    found = {split: Legal(LegalConfig(parts=["clauses"], split=split)) for split in SPLITS}
    assert {split: len(source) for split, source in found.items()} == {"train": 3787, "validation": 297, "test": 256}
    words = {
        split: [re.findall(r"\w+", e["messages"][0]["content"].rsplit("\n\n", 1)[0].lower()) for e in source]
        for split, source in found.items()
    }
    rng = random.Random(0)
    for split, before in (("validation", ("train",)), ("test", ("train", "validation"))):
        others = [w for side in before for w in words[side]]
        for clause in rng.sample(words[split], 60):
            assert not shared(clause, others, 13)


def test_a_clause_that_training_asks_about_is_passed_over_for_the_next():
    """Fourteen words, of which thirteen in a row stand in the seen clause; then one of another wording."""
    near = "No warranty is given for this work by any of its many authors anywhere."
    other = "The work comes as is, and whoever uses it in whatever way bears every risk of that alone, come what may."
    one = Licence("x", "CLA", "me", f"{near} At all times.\n\n{other}")
    assert asked(one) == {"warranty": f"{near} At all times."}
    assert asked(one, runs(near)) == {"warranty": other}
    assert asked(one, runs(near) | runs(other)) == {}
