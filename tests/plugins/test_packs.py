"""The packs on the samples that they ship: what every source promises, splits apart, answers scored, counts."""

import json

import pytest

from trivium.errors import ConfigError, DataError
from trivium.testing import SourceContract
from trivium_plugins.books.config import BooksConfig
from trivium_plugins.books.source import Books
from trivium_plugins.chat.config import ChatConfig
from trivium_plugins.chat.source import EMAIL, Chat
from trivium_plugins.preferences.config import PreferencesConfig
from trivium_plugins.preferences.source import Preferences

PACKS = [
    (Books, BooksConfig, ["holmes", "war_and_peace"]),
    (Chat, ChatConfig, ["conversations", "replies"]),
    (Preferences, PreferencesConfig, ["senses"]),
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
