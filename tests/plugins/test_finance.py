"""Economies: what is read of the Factbook, how questions are made, and which figures are one figure."""

import pytest

from trivium.errors import ConfigError, DataError
from trivium.testing import SourceContract
from trivium_plugins.finance.config import FinanceConfig
from trivium_plugins.finance.economies import Economy, economies, lines, of_split, text_of
from trivium_plugins.finance.figures import figures, is_right
from trivium_plugins.finance.source import Finance


class TestSample(SourceContract):
    def make(self):
        return Finance(FinanceConfig(sample=True))


class TestWhole(SourceContract):
    def make(self):
        try:
            return Finance(FinanceConfig(split="validation"))
        except DataError as error:
            pytest.skip(f"NOT TESTED ON THE REAL FACTBOOK: {error}")


def plain(text):
    return [(float(figure.value), figure.unit) for figure in figures(text)]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("1,234", [(1234, "")]),
        ("1.2 trillion", [(1.2e12, "")]),
        ("3.4%", [(3.4, "%")]),
        ("-3.4 percent", [(-3.4, "%")]),
        ("\u22123.4%", [(-3.4, "%")]),
        ("-$41.3 billion", [(-41.3e9, "$")]),
        ("$-41.3 billion", [(-41.3e9, "$")]),
        ("US$45,900.", [(45900, "$")]),
        ("from 5% to 6%", [(5, "%"), (6, "%")]),
        ("12,34 and 1.2e9 and $1.2bn and A4", []),  # no figure rather than a part of one
    ],
)
def test_figures_are_read_with_sign_factor_and_unit(text, read):
    assert plain(text) == read


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("-0.5%", "-0.5%", True),
        ("-0.5%", "0.5%", False),
        ("0.5%", "-0.5%", False),
        ("3.4%", "3.4", False),
        ("$3.86 trillion", "$3,860 billion", True),
        ("$3.86 trillion", "$3.86 billion", False),
        ("$3.86 trillion", "3.86 trillion", False),
        ("1.6%", "In 2014, it was 1.60 percent.", True),
        ("1.6%", "1.6% or 1.7%", False),
        ("1.6%", "1.6% in 2013", False),
        ("2,014", "2014", True),
        ("0%", "", False),
    ],
)
def test_a_sign_a_unit_or_a_factor_makes_another_figure(answer, said, right):
    assert is_right(answer, said, "2014") is right


def test_lines_have_one_figure_and_one_year():
    section = {
        "Public debt": {"text": "74.7% of GDP (2014 est.) ++ 76.9% of GDP (2013 est.)"},
        "Inflation rate (consumer prices)": {"text": "0.8%"},
        "Unemployment rate": {"text": "between 5% and 6% (2014)"},
        "Central bank discount rate": {"text": "0.75% (31 December 2013)"},
    }
    assert [tuple(line) for line in lines(Economy("x", "X", section))] == [
        ("public debt as a share of GDP", "2014", "74.7%"),
        ("public debt as a share of GDP", "2013", "76.9%"),
        ("central bank discount rate", "2013", "0.75%"),
    ]


def test_a_question_shows_the_right_line_among_others():
    source = Finance(FinanceConfig(sample=True, parts=["figures"], shown=3))
    for example in (source[i] for i in range(len(source))):
        *shown, empty, asked = example["messages"][0]["content"].split("\n")
        assert len(shown) == 3 and not empty and asked.endswith(f"in {example['year']}?")
        assert sum(line.endswith(f"{example['year']}: {example['answer']}") for line in shown) >= 1
    bare = Finance(FinanceConfig(sample=True, parts=["figures"], shown=0))
    assert "\n" not in bare[0]["messages"][0]["content"] and len(bare) == len(source) == 68


def test_text_has_every_heading():
    section = {
        "Fiscal year": {"text": "calendar year"},
        "Budget": {"revenues": {"text": "$1"}, "costs": {"text": "$2"}},
    }
    said = "The economy of X\n\nFiscal year: calendar year\n\nBudget: revenues: $1; costs: $2"
    assert text_of(Economy("x", "X", section)) == said


def test_mistakes_are_one_sentence():
    with pytest.raises(ConfigError, match="data.shown=11 must be between 0 and 10"):
        FinanceConfig(shown=11)
    with pytest.raises(ConfigError, match="must name at least one of economies, figures"):
        FinanceConfig(parts=["figure"])
    texts = Finance(FinanceConfig(sample=True, parts=["economies"]))
    with pytest.raises(DataError, match="has no answer to score against"):
        texts.score(texts[0], "1%")


def test_the_real_factbook():
    """A country is in one split with all that is said of it."""
    try:
        found = economies(False)
    except DataError as error:
        pytest.skip(f"NOT TESTED ON THE REAL FACTBOOK: {error}")
    assert len(found) == 252
    splits = {split: {one.country for one in of_split(found, split)} for split in ("train", "validation", "test")}
    assert {split: len(names) for split, names in splits.items()} == {"train": 203, "validation": 22, "test": 27}
    (germany,) = (one for one in found if one.country == "Germany")
    assert ("real GDP growth rate", "2014", "1.6%") in [tuple(line) for line in lines(germany)]
