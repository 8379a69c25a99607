"""Is it right? Signs, thousands, boxes, hashes, letters: each by hand, and each with its wrong neighbour."""

import json
from fractions import Fraction

import pytest

from trivium.data.checkers import choice_answer, is_right, number_answer
from trivium.data.config import FilesConfig
from trivium.data.files import Files
from trivium.errors import DataError
from trivium.types import Score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("-42", -42),
        ("\u221242", -42),  # a minus sign
        ("x = -5", -5),
        ("=-5", -5),
        ("5-3", 3),
        ("10 - 5", 5),
        ("(a)-3", 3),
        ("1,234", 1234),
        ("-1,234,567.5", Fraction("-1234567.5")),
        ("1,23", 23),
        ("$1,234.50", Fraction("1234.5")),
        ("-$5", -5),
        (r"\$18", 18),
        ("50%", 50),
        (".5", Fraction(1, 2)),
        ("0.50", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("3/0", None),
        ("1e3", 1000),
        ("2.5e-1", Fraction(1, 4)),
        ("There are 42.", 42),
        ("first 7, then 8 apples", 8),
        (r"\boxed{7} of 9", 7),
        (r"\boxed{-1{,}234}", -1234),
        (r"\boxed{\frac{3}{4}} of 9", Fraction(3, 4)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        (r"\boxed{\text{7 apples}} 9", 7),
        (r"\boxed{none} 9", None),
        ("3 and 4\n#### 1,200\n5", 1200),
        ("#### -7", -7),
        ("The answer is 5 (of 10).", 5),
        ("the answer: -5\nCheck: 5 + 5 = 10", -5),
        ("no number", None),
        ("v2", None),
        ("", None),
    ],
)
def test_number_of_a_text(text, number):
    assert number_answer(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. Paris", "B"),
        ("**B**", "B"),
        ("B\nbecause", "B"),
        ("The answer is B.", "B"),
        ("Answer: (C)", "C"),
        ("The answer is A? No, the answer is D", "D"),
        (r"\boxed{\text{C}}", "C"),
        ("A dog barks", None),
        ("I think so", None),
        ("Because", None),
        ("", None),
    ],
)
def test_letter_of_a_text(text, letter):
    assert choice_answer(text) == letter


@pytest.mark.parametrize(
    ("checker", "answer", "right", "wrong"),
    [
        ("exact", "a heron", " a  heron\n", "A heron"),
        ("number", "so 5 + 67 = 72\n#### 72", "It is 72.0", "It is -72"),
        ("number", "-3", "-3", "3"),
        ("choice", "B", "B) blue", "C) B"),
    ],
)
def test_right_and_wrong(checker, answer, right, wrong):
    assert is_right(checker, answer, right) and not is_right(checker, answer, wrong)
    assert not is_right(checker, answer, "")


def test_pattern_takes_the_answer_out_of_both():
    pattern = r"Risk:\s*(\w+)"
    assert is_right("regex", "Risk: high", "Risk: low? Risk: high.", pattern)
    assert is_right("regex", "high", "Risk: high.", pattern)
    assert not is_right("regex", "high", "Risk: low", pattern)
    assert not is_right("regex", "high", "", pattern)


def source(tmp_path, rows, **settings):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Files(FilesConfig(path=str(path), validation_share=0.0, **settings))


def test_files_judge_by_the_named_checker(tmp_path):
    found = source(tmp_path, [{"question": "40 + 32?", "answer": "#### 72"}], checker="number")
    assert found.score(found[0], "I get 72") == Score(1.0, True)
    assert found.score(found[0], "I get 27") == Score(0.0, False)
    assert found[0]["task"] == "sums" and "rlhf" in found.phases


def test_an_answer_that_the_checker_cannot_read_is_named(tmp_path):
    with pytest.raises(DataError, match="sums.jsonl row 1: data.checker=number finds no answer in 'a heron'"):
        source(tmp_path, [{"question": "What?", "answer": "a heron"}], checker="number")


def test_what_has_no_answer_has_no_score(tmp_path):
    found = source(tmp_path, [{"text": "a"}])
    with pytest.raises(DataError, match="has no answer to score against; a column answer gives one"):
        found.score(found[0], "a")
