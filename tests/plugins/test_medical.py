"""Codes, findings and surgery: what is read, how codes are asked for, and that splits keep categories whole."""

import pytest

from trivium.errors import ConfigError, DataError
from trivium.testing import SourceContract
from trivium_plugins.medical import source
from trivium_plugins.medical.codes import Codes, is_right
from trivium_plugins.medical.config import MedicalConfig
from trivium_plugins.medical.source import Medical
from trivium_plugins.medical.texts import Code, Finding, codes, manual, pages, split_of_code

SPLITS = ("train", "validation", "test")


class TestSample(SourceContract):
    def make(self):
        return Medical(MedicalConfig(sample=True, parts=["surgery", "codes"]))


def fetched(make):
    try:
        return make()
    except DataError as error:
        pytest.skip(f"NOT TESTED ON THE REAL FILES: {error}")


class TestWhole(SourceContract):
    def make(self):
        return fetched(lambda: Medical(MedicalConfig(split="validation", num_codes=100)))


def test_the_right_answer_is_shown_once_among_other_categories():
    for index in range(20):
        example = Medical(MedicalConfig(sample=True, parts=["codes"]))[index]
        asked, *shown = example["messages"][0]["content"].split("\n- ")
        assert len(shown) == len(set(shown)) == 4 and shown.count(example["answer"]) == 1, asked
        if example["task"] == "code":
            assert len({option[:3] for option in shown}) == 4


def test_without_options_the_code_must_be_known():
    asked = Codes([Code("A00", "Cholera")], 5, 0, 0)
    assert len(asked) == 1
    assert asked[0]["messages"][0]["content"] == "Which ICD-10-CM code stands for: Cholera?"
    assert asked[0]["answer"] == "A00"


def test_the_place_of_the_right_answer_says_nothing():
    """Of 20 questions with 4 options, each place holds the right answer between 1 and 10 times."""
    of = Medical(MedicalConfig(sample=True, parts=["codes"]))
    places = [e["messages"][0]["content"].split("\n- ")[1:].index(e["answer"]) for e in (of[i] for i in range(20))]
    assert all(1 <= places.count(place) <= 10 for place in range(4))


@pytest.mark.parametrize(
    ("said", "right"),
    [("a01.02", True), ("- A01.02.", True), ("A01.0", False), ("A0102", False), ("A01.02 or B20", False), ("", False)],
)
def test_a_code_is_judged_whole(said, right):
    assert is_right("code", "A01.02", said) is right


def test_splits_keep_a_category_whole():
    assert split_of_code("A01") == split_of_code("A01.02")
    found = {split: [one.code for one in codes(True) if split_of_code(one.code) == split] for split in SPLITS}
    assert {split: len(of) for split, of in found.items()} == {"train": 20, "validation": 6, "test": 8}


def test_the_manual_is_cut_between_its_marks():
    books = (
        "x\n*** START OF THIS PROJECT GUTENBERG EBOOK MANUAL OF SURGERY ***\nCONTENTS\nCHAPTER I\n\nREPAIR\n\nHeal.\n"
    )
    end = "\nINDEX\nWounds, 1\nEnd of the Project Gutenberg EBook of Manual of Surgery\nCHAPTER I\nWar\nINDEX\n"
    assert manual(books + end).split() == ["REPAIR", "Heal."]
    with pytest.raises(DataError, match="has no Manual of Surgery"):
        manual("War and Peace")


def test_what_is_held_out_is_not_in_training(monkeypatch):
    """Definitions of every split; those that share thirteen words with training are not held out, but trained on."""
    shared = "the presence of many small round spots on the skin of one or both"
    found = [Finding(f"HP:{i}", f"finding {i}", f"{shared} {i}." if i % 2 else f"Spots {i}.") for i in range(400)]
    monkeypatch.setattr(source, "definitions", lambda: tuple(found))
    of = {split: Medical(MedicalConfig(split=split, parts=["definitions"])) for split in SPLITS}
    said = {split: [of[split][i]["messages"][-1]["content"] for i in range(len(of[split]))] for split in SPLITS}
    assert any(shared in one for one in said["train"])
    assert len(set().union(*said.values())) == sum(map(len, said.values()))
    assert not any(shared in one for split in SPLITS[1:] for one in said[split])
    assert all(len(of[split]) >= 5 for split in SPLITS[1:]), {split: len(of[split]) for split in SPLITS}


def test_mistakes_are_one_sentence():
    with pytest.raises(ConfigError, match="data.options=1 must be 0 or between 2 and 8"):
        MedicalConfig(options=1)
    with pytest.raises(ConfigError, match="data.sample=true has no definitions"):
        MedicalConfig(sample=True)
    with pytest.raises(DataError, match="data.options=8 needs as many categories of codes, and this split has 6"):
        Medical(MedicalConfig(sample=True, split="validation", parts=["codes"], options=8))
    texts = Medical(MedicalConfig(sample=True, parts=["surgery"]))
    with pytest.raises(DataError, match="has no answer to score against"):
        texts.score(texts[0], "A00")


def test_the_real_codes_and_pages():
    found = fetched(lambda: codes(False))
    assert len(found) == 45_418 and Code("A00.1", "Cholera due to Vibrio cholerae 01, biovar eltor") in found
    sides = {split: {one.code[:3] for one in found if split_of_code(one.code) == split} for split in SPLITS}
    assert sum(map(len, sides.values())) == 1918
    manual_of_surgery = fetched(lambda: pages(False))
    assert len(manual_of_surgery) == 346 and manual_of_surgery[0].startswith(
        "REPAIR\n\nIntroduction--Process of repair"
    )
    assert "Gutenberg" not in "".join(manual_of_surgery)


def test_the_real_definitions():
    of = {s: fetched(lambda s=s: Medical(MedicalConfig(split=s, parts=["definitions"]))) for s in SPLITS}
    assert {split: len(found) for split, found in of.items()} == {"train": 15_284, "validation": 281, "test": 695}
