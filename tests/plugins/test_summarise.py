"""The bundled plugin `summarise`: documentation becomes sections with titles, functions lose their docstrings."""

import pytest

from trivium.errors import DataError
from trivium.testing.contracts import SourceContract
from trivium_plugins.code.library import modules
from trivium_plugins.summarise.config import SummariseConfig
from trivium_plugins.summarise.functions import _functions
from trivium_plugins.summarise.sections import SAMPLE, few, manual, sections, titled, topics
from trivium_plugins.summarise.source import Summarise

pytest.importorskip("rouge_score", reason="NOT TESTED: pip install 'trivium-llm[text]'")

RST = """
.. _here:

*************
Reading files
*************

Files are read with :func:`open`, which gives a
*file object* (see :ref:`there <elsewhere>`)::

   open("x")

.. note:: not this

* nor this

It has ``read()``.

Closing them
============

A ``with`` statement does it.
"""


@pytest.fixture(scope="module", autouse=True)
def few_modules():
    """Every eighth module: to parse them all takes seconds a split."""
    some = modules()[::8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trivium_plugins.summarise.functions.modules", lambda: some)
        yield


def summarise(**settings):
    return Summarise(SummariseConfig(**settings))


class TestTopics(SourceContract):
    def make(self):
        return summarise(parts=["topics"])


def test_sections_are_running_text_under_a_title():
    assert list(sections(RST)) == [
        ("Reading files", "Files are read with open, which gives a file object (see there): It has read()."),
        ("Closing them", "A with statement does it."),
    ]


def test_short_sections_and_titles_that_say_nothing_are_left_out():
    body = "Words enough to be a section of its own, and so on. " * 4
    documents = {"a": f"Notes\n=====\n\n{body}\n\nTwo words\n=========\n\n{body}\n\nFew words\n=========\n\nShort.\n"}
    assert list(titled(documents, 10)) == [("a", "Two words", "Words enough to be a section of its own, and")]


def test_functions_lose_their_docstring_and_methods_their_indent():
    text = '''
class A:
    def area(self, r):
        """Return the area of a circle. It is approximate.

        More.
        """
        r2 = r * r
        return 3.14 * r2

    def no(self):
        """lower case does not begin a sentence."""
        return 1
'''
    assert list(_functions(text, 500)) == [
        ("def area(self, r):\n    r2 = r * r\n    return 3.14 * r2", "Return the area of a circle.")
    ]
    assert list(_functions(text, 20)) == []


def test_score_is_rouge_l():
    """Of "The with statement" "with statement" has P = 1, R = 2/3: F = 0.8."""
    source = summarise(parts=["topics"])
    example = next(e for e in source if e["answer"] == 'The "with" statement') if any(
        e["answer"] == 'The "with" statement' for e in source) else {"answer": 'The "with" statement'}  # fmt: skip
    verdict = source.score(example, "with statement")
    assert verdict.value == pytest.approx(0.8) and not verdict.correct and verdict.measure == "rougeL"
    assert source.score(example, 'The "with" statement').correct
    assert source.score(example, " ").value == 0


def test_splits_share_no_text():
    asked = {s: {e["messages"][0]["content"] for e in summarise(split=s)} for s in ("train", "validation", "test")}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]
    assert len(asked["train"]) > 300 and len(asked["test"]) > 15


def test_the_sample_needs_no_network_and_has_every_split(monkeypatch):
    """Of its 46 sections, as the hash of their text says: 39 to train, 2 to validate, 5 to test."""
    monkeypatch.setattr("trivium_plugins.summarise.sections.fetch", None)  # whoever calls it fails
    sizes = {s: len(summarise(parts=["manual"], sample=True, split=s)) for s in ("train", "validation", "test")}
    assert sizes == {"train": 39, "validation": 2, "test": 5}
    licence = (SAMPLE.parent / "LICENSES.md").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence and "Copyright (c) 2001" in licence


def test_pythons_help_topics_are_there():
    assert len(topics()) > 70 and "with" in topics()


@pytest.mark.slow
def test_pythons_manual_has_sections():
    try:
        documents = manual()
    except DataError as error:
        pytest.skip(f"NOT TESTED ON THE MANUAL: {error}")
    assert len(documents) == 497
    assert len(few()) == 5 and few().items() <= documents.items()
    assert len(list(titled(documents, 60))) > 1500
