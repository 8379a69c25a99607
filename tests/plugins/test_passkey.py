"""The bundled plugin `passkey`: the key stands where it should, and nothing else passes for it."""

import re

import pytest

from trivium.errors import ConfigError
from trivium.testing.contracts import SourceContract
from trivium_plugins.passkey.config import PasskeyConfig
from trivium_plugins.passkey.source import Passkey


def passkey(**settings):
    return Passkey(PasskeyConfig(**settings))


class TestGrid(SourceContract):
    def make(self):
        return passkey(num_examples=45)


class TestAnywhere(SourceContract):
    def make(self):
        return passkey(num_examples=30, any_depth=True, split="test")


def test_lengths_and_depths_are_what_the_task_says():
    """Of 64 words 17 are not filler: 12 that hide the key, 5 that ask; of 47, 24 come before half."""
    source = passkey(lengths=[64], depths=[0, 0.5, 1], num_examples=3)
    for i, (depth, before) in enumerate([("0", 0), ("0.5", 24), ("1", 47)]):
        words = source[i]["messages"][0]["content"].split()
        assert len(words) == 64 and words.index("pass") == before + 1
        assert source[i]["task"] == f"passkey/64@{depth}"
        assert words[-5:] == "What is the pass key?".split()
        assert set(re.findall(r"\d+", " ".join(words))) == {source[i]["answer"]}


def test_keys_of_splits_never_meet_and_leading_zeros_are_kept():
    keys = {s: {passkey(split=s, num_examples=600)[i]["answer"] for i in range(600)} for s in ("train", "test")}
    assert not keys["train"] & keys["test"]
    assert all(len(k) == 5 for k in keys["train"] | keys["test"]) and any(k[0] == "0" for k in keys["train"])


def test_only_the_key_is_right():
    source = passkey(num_examples=1)
    key = source[0]["answer"]
    assert source.score(source[0], f" {key}.\n").correct
    for wrong in ("", key[:4], key + "0", key[::-1] if key != key[::-1] else "12345", f"It is {key}"):
        assert not source.score(source[0], wrong).correct, wrong


@pytest.mark.parametrize(
    "settings",
    [{"lengths": [16]}, {"lengths": []}, {"lengths": [64, 64]}, {"depths": [1.5]}, {"depths": []}],
    ids=str,
)
def test_a_grid_that_cannot_be_is_refused(settings):
    with pytest.raises(ConfigError, match="must be different"):
        PasskeyConfig(**settings)
