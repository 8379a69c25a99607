"""ROUGE-L and chrF against numbers worked out by hand, and how an evaluation reports them."""

import pytest

from trivium.errors import DataError
from trivium.evaluation import measures
from trivium.evaluation.measures import MEASURES, chrf, rouge_l
from trivium.evaluation.probes import Answer, accuracy, measured
from trivium.types import Score


def test_rouge_l_is_f1_of_the_longest_common_subsequence():
    """Lin (2004), section 3: of 4 words 3 in order are 3/4 both ways; "gunman the" keeps one of four.

    Then not symmetric: "the gunman" has P = 2/2, R = 2/4, F = 2 x 1 x 0.5 / 1.5 = 2/3.
    """
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(3 / 4)
    assert rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(2 / 4)
    assert rouge_l("police killed the gunman", "The gunman!") == pytest.approx(2 / 3)
    assert rouge_l("police killed the gunman", "") == 0


def test_rouge_l_of_subsets_differs_by_side_in_precision_only_through_length():
    """LCS of "a b c d e" and "a c e x" is a c e: P = 3/4, R = 3/5, F = 2 x 0.45 / 1.35 = 2/3."""
    assert rouge_l("a b c d e", "a c e x") == pytest.approx(2 / 3)


def test_chrf_counts_recall_twice():
    """Reference abc, text ab. 1-grams: P 2/2, R 2/3; 2-grams: P 1/1, R 1/2; no 3-grams in the text.

    P = 1, R = (2/3 + 1/2) / 2 = 7/12; F2 = 5 P R / (4 P + R) = (35/12) / (55/12) = 7/11. The other way round P = 7/12
    and R = 1: F2 = (35/12) / (28/12 + 1) = 35/40 = 7/8.
    """
    assert chrf("abc", "ab") == pytest.approx(7 / 11)
    assert chrf("ab", "abc") == pytest.approx(7 / 8)
    assert chrf("Größe", "Größe") == 1 and chrf("abc", "xyz") == 0 == chrf("abc", "")


def answer(task, value, correct=False, measure=""):
    return Answer({"task": task}, "", Score(value, correct, measure))


HOW = {"resamples": 50, "confidence": 0.95}


def test_measured_is_the_mean_over_tasks_under_the_measures_name():
    """de: (0.2 + 0.4) / 2 = 0.3; fr: 0.6; both weigh the same: 0.45."""
    found = measured([answer("de", 0.2, measure="chrF"), answer("de", 0.4, measure="chrF"),
                      answer("fr", 0.6, measure="chrF")], **HOW)  # fmt: skip
    assert {k: e.value for k, e in found.items()} == pytest.approx({"chrF": 0.45, "chrF/de": 0.3, "chrF/fr": 0.6})
    assert found["chrF/de"].count == 2 and found["chrF"].count == 3
    assert found["chrF/de"].low >= 0.2 and found["chrF/de"].high <= 0.4


def test_verdicts_are_not_reported_twice():
    answers = [answer("sum", 1.0, True), answer("sum", 0.0)]
    assert measured(answers, **HOW) == {}
    assert accuracy(answers, **HOW)["accuracy"].value == 0.5


def test_partial_credit_without_a_name_is_the_score():
    found = measured([answer("sum", 1.0, True), answer("sum", 0.5), answer("text", 0.25, measure="rougeL")], **HOW)
    assert {k: e.value for k, e in found.items()} == {
        "rougeL": 0.25, "rougeL/text": 0.25, "score": 0.75, "score/sum": 0.75,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "module"), [("rougeL", "rouge_score.rouge_scorer"), ("chrF", "sacrebleu.metrics.chrf")]
)
def test_a_missing_library_is_one_sentence(name, module, monkeypatch):
    import sys

    measures._rouge.cache_clear()
    measures._chrf.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pip install 'trivium-llm\[text\]'"):
        MEASURES[name]("a", "b")
