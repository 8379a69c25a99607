"""Figures with their units: how they are read and compared.

A sign, a unit or a factor that differs is another figure.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple

FACTORS = {"": 1, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
FIGURE = re.compile(
    r"(?<![\w.,])(?P<minus>[-\u2212]\s?)?(?P<dollar>(?:US)?\$\s?)?(?P<inner>[-\u2212])?"
    r"(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(?![\d,.]*\w)"
    r"(?:\s?(?P<percent>%|percent\b|per cent\b))?(?:\s(?P<factor>thousand|million|billion|trillion)\b)?",
    re.I,
)


class Figure(NamedTuple):
    """A value in ones, and its unit: "$", "%" or ""."""

    value: Decimal
    unit: str


def figures(text: str) -> list[Figure]:
    """Every figure of a text, in its order.

    >>> [(str(f.value), f.unit) for f in figures("from -3.4% to $1.2 trillion, and 1,234")]
    [('-3.4', '%'), ('1200000000000.0', '$'), ('1234', '')]
    """
    read = []
    for found in FIGURE.finditer(text):
        value = Decimal(found["number"].replace(",", "")) * FACTORS[(found["factor"] or "").lower()]
        unit = "%" if found["percent"] else "$" if found["dollar"] else ""
        read.append(Figure(-value if found["minus"] or found["inner"] else value, unit))
    return read


def is_right(answer: str, completion: str, year: str) -> bool:
    """Whether a completion holds one figure, the answer's; the year that was asked about may stand beside it.

    >>> is_right("-3.4%", "In 2009 it was -3.4 percent.", "2009"), is_right("-3.4%", "3.4%", "2009")
    (True, False)
    >>> is_right("$1.2 trillion", "$1,200 billion", "2014"), is_right("3.4%", "3.4% or 3.5%", "2014")
    (True, False)
    """
    right, given = figures(answer), figures(completion)
    if len(right) == 1 and given != right:
        given = [one for one in given if one != Figure(Decimal(year), "")]
    return len(right) == 1 and given == right
