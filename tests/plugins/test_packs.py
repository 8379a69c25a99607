"""The packs on the samples that they ship: what every source promises, splits apart, answers scored, counts."""

import json

import pytest

from trivium.errors import ConfigError, DataError
from trivium.testing import SourceContract
from trivium_plugins.books.config import BooksConfig
from trivium_plugins.books.source import Books
from trivium_plugins.chat.config import ChatConfig
from trivium_plugins.chat.source import EMAIL, Chat
from trivium_plugins.finance.config import FinanceConfig
from trivium_plugins.finance.source import Finance, figures
from trivium_plugins.legal.config import LegalConfig
from trivium_plugins.legal.source import Legal
from trivium_plugins.medical.config import MedicalConfig
from trivium_plugins.medical.source import Medical
from trivium_plugins.preferences.config import PreferencesConfig
from trivium_plugins.preferences.source import Preferences

PACKS = [
    (Books, BooksConfig, ["holmes", "war_and_peace"]),
    (Chat, ChatConfig, ["conversations", "replies"]),
    (Preferences, PreferencesConfig, ["senses"]),
    (Medical, MedicalConfig, ["chapter", "code", "describe", "surgery"]),
    (Legal, LegalConfig, ["texts", "category", "spdx"]),
    (Finance, FinanceConfig, ["economies", "figures"]),
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


class TestMedical(SourceContract):
    def make(self):
        return sample(PACKS[3])


class TestLegal(SourceContract):
    def make(self):
        return sample(PACKS[4])


class TestFinance(SourceContract):
    def make(self):
        return sample(PACKS[5])


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


def test_figures_are_the_newest_and_one_value_each():
    fields = {"Growth": "5.3% (2014 est.) ++ 5.7% (2013 est.)", "Debt": "58.9% of GDP (2014)",
              "Year": "1 July - 30 June",
              "Balance": "-$5.01 billion (2014 est.)"}  # fmt: skip
    assert figures({"fields": fields}) == {"Growth": "5.3%", "Debt": "58.9%", "Balance": "-$5.01 billion"}


@pytest.mark.parametrize(
    ("said", "right"), [("Permissive", True), (" permissive.\n", True), ("Permissive licence", False), ("", False)]
)
def test_an_answer_is_right_alone(said, right):
    source = sample(PACKS[4])
    assert source.score({"id": "1", "answer": "Permissive"}, said).correct == right
