"""The bundled plugin `translate`: roff becomes text, paragraphs find their translations, and nothing else passes."""

import pytest

from trivium.data.config import SPLITS
from trivium.errors import ConfigError, DataError
from trivium.testing.contracts import SourceContract
from trivium_plugins.translate.config import TranslateConfig
from trivium_plugins.translate.manual import agree, aligned, blocks, pairs
from trivium_plugins.translate.source import Translate

ENGLISH = r""".\" a comment
.TH ls 1
.SH NAME
ls \- list files
.SH DESCRIPTION
Show what is in a
.BR folder (7),
.\" not this
.I sorted
by name.
.PP
With \fB\-\-all\fP nothing is hidden.
.TP
.B \-a
The same in 1 letter.
.nf
code stays out
.fi
.SH BUGS
None are known to us.
"""
GERMAN = r""".TH ls 1
.SH BEZEICHNUNG
ls \- Dateien auflisten
.SH BESCHREIBUNG
Zeigt, was in einem \fBfolder\fP(7) ist, nach Namen \fIsortiert\fP.
.PP
Mit \fB\-\-all\fP bleibt nichts verborgen.
.TP
\fB\-a\fP
Dasselbe mit 1 Buchstaben.
.nf
Code bleibt aus
.fi
.SH FEHLER
Uns sind keine bekannt.
.SH ÜBERSETZUNG
Von jemandem.
"""


def test_a_page_becomes_its_paragraphs():
    assert [b for b in blocks(ENGLISH) if b.text] == [
        ("SH", "NAME"),
        ("", "ls - list files"),
        ("SH", "DESCRIPTION"),
        ("", "Show what is in a folder(7), sorted by name."),
        ("PP", "With --all nothing is hidden."),
        ("TP", "-a"),
        ("TP body", "The same in 1 letter."),
        ("SH", "BUGS"),
        ("", "None are known to us."),
    ]


def test_paragraphs_find_their_translations():
    assert list(aligned(ENGLISH, GERMAN)) == [
        ("NAME", "BEZEICHNUNG"),
        ("ls - list files", "ls - Dateien auflisten"),
        ("DESCRIPTION", "BESCHREIBUNG"),
        ("Show what is in a folder(7), sorted by name.", "Zeigt, was in einem folder(7) ist, nach Namen sortiert."),
        ("With --all nothing is hidden.", "Mit --all bleibt nichts verborgen."),
        ("The same in 1 letter.", "Dasselbe mit 1 Buchstaben."),
        ("BUGS", "FEHLER"),
        ("None are known to us.", "Uns sind keine bekannt."),
    ]


def test_a_section_with_a_paragraph_more_is_left_out():
    """And only that one: a translation of an older page must not shift everything after it."""
    older = GERMAN.replace(".PP\nMit", ".PP\nEin Absatz mehr.\n.PP\nMit")
    assert [e for e, _ in aligned(ENGLISH, older)] == ["NAME", "ls - list files", "BUGS", "None are known to us."]
    assert list(aligned(ENGLISH, GERMAN.replace(".SH FEHLER\n", ""))) == []


@pytest.mark.parametrize(
    ("english", "other", "same"),
    [
        ("Use 8 bytes of it.", "Nutzt 8 Byte davon.", True),
        ("Use 8 bytes of it.", "Nutzt 4 Byte davon.", False),
        ("Use 8 or 8 bytes.", "Nutzt 8 Byte davon.", False),
        ("See open(2) first.", "Siehe zuerst open(3).", False),
        ("Set --color to it.", "Setzt --colour darauf.", False),
        ("Needs CAP_SYS_ADMIN here.", "Braucht hier CAP_SYS_BOOT.", False),
        ("Read /etc/passwd once.", "Liest /etc/group einmal.", False),
        ("Well-known ways to do it.", "Bekannte Wege dazu.", True),
        ("Same text", "Same text", False),
        ("Short one.", "Ein Absatz, der sehr viel länger ist, als er es als Übersetzung sein dürfte.", False),
    ],
)
def test_what_must_agree(english, other, same):
    assert agree(english, other) is same


def test_a_paragraph_that_comes_again_is_kept_once():
    page = {"man1/a.1": ENGLISH, "man1/b.1": ENGLISH, "man1/c.1": ENGLISH}
    found = pairs(page, {"man1/a.1": GERMAN, "man1/b.1": GERMAN})
    assert len(found) == 8 and {page for page, _, _ in found} == {"man1/a.1"}


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="not one of de, fr"):
        TranslateConfig(language="it")
    with pytest.raises(ConfigError, match="is more than"):
        TranslateConfig(min_words=9, max_words=4)


# ---- the sentences that come with the pack


class TestSample(SourceContract):
    def make(self):
        return Translate(TranslateConfig(sample=True))


@pytest.mark.parametrize("language", ["de", "fr"])
def test_the_sample_has_all_splits_and_passes_the_checks_of_real_pairs(language):
    """Of 32 sentences the hash of the English holds out 3 and 2."""
    found = {s: Translate(TranslateConfig(sample=True, language=language, split=s)) for s in SPLITS}
    assert {s: len(x) for s, x in found.items()} == {"train": 27, "validation": 2, "test": 3}
    for example in (e for source in found.values() for e in source):
        _, _, english = example["messages"][0]["content"].partition(": ")
        assert agree(english, example["answer"])
    first = next(e for e in found["test"] if "columns" in e["messages"][0]["content"])
    assert first["answer"] == {"de": "Die Tabelle hat 3 Spalten.", "fr": "Le tableau comporte 3 colonnes."}[language]


# ---- the real pages


def translate(**settings):
    try:
        return Translate(TranslateConfig(**settings))
    except DataError as error:
        pytest.skip(f"NOT TESTED ON REAL PAGES: {error}")


@pytest.fixture(scope="module", autouse=True)
def cached(tmp_path_factory):
    pytest.importorskip("sacrebleu", reason="NOT TESTED: pip install 'trivium-llm[text]'")


class TestFrench(SourceContract):
    def make(self):
        return translate(language="fr", split="validation")


def test_sizes_and_splits_of_the_real_pages():
    sources = {s: translate(language="fr", split=s) for s in ("train", "validation", "test")}
    assert {s: len(x) for s, x in sources.items()} == {"train": 2672, "validation": 142, "test": 332}
    asked = {s: {e["messages"][0]["content"] for e in x} for s, x in sources.items()}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]


def test_a_near_translation_is_worth_more_than_another_sentence():
    source = translate(language="fr", split="validation")
    first, other = source[0], source[1]
    whole = source.score(first, first["answer"])
    half = source.score(first, first["answer"][: len(first["answer"]) // 2])
    wrong = source.score(first, other["answer"])
    assert (whole.value, whole.correct, whole.measure) == (pytest.approx(1.0), True, "chrF")
    assert 1 > half.value > wrong.value > 0 and not half.correct
    assert source.score(first, "  ").value == 0
