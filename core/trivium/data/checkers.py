"""Whether a completion says the right answer: how it is found in what was said, and when two are the same.

The answer of the data is read the same way as the model's, so "72" and a solution that ends in "#### 72" are one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])(?:(?<![)\]}])-)?"  # in "5-3" and "(x)-3" the sign takes away, in "=-3" it is the number's
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+(?![.\d]))?(?:[eE][-+]?\d{1,3}(?!\w))?"
)
FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
SAID = re.compile(r"(?i:\banswer)(?i:\s+is)?\s*[:=]?")
LETTER = re.compile(r"(?i:\b(?:answer|option|choice))(?i:\s+is)?\s*[:=]?[\s(\[*\"'`]*([A-Z])(?![\w'’])")
FIRST = re.compile(r"[\s(\[*\"'`]*([A-Z])(?:[)\].:,*\"'`]|\s*$|\s*\n)")
Found = str | Fraction | None


def exact_answer(text: str, pattern: str = "") -> Found:
    """The text itself, whatever its blanks.

    >>> exact_answer(" the  heron\\n")
    'the heron'
    """
    return " ".join(text.split()) or None


def number_answer(text: str, pattern: str = "") -> Found:
    r"""The number in the last \boxed{}, behind the last ####, behind "the answer is", or else the last one.

    >>> number_answer("so 1,234 of 2"), number_answer("5-3 = -2."), number_answer(r"\boxed{\frac{-3}{4}} of 9")
    (Fraction(2, 1), Fraction(-2, 1), Fraction(-3, 4))
    """
    text = re.sub(r"\\[,!$%]|\{,\}|[$%]", lambda m: "," if m[0] == "{,}" else "", text.replace("−", "-"))
    text = FRACTION.sub(lambda m: f"{m[1]}/{m[2]}", text)
    boxed = _boxed(text)
    if boxed is not None:
        return _number(NUMBER.findall(boxed)[-1:])
    if "####" in text:
        return _number(NUMBER.findall(text.rpartition("####")[2])[:1])
    for told in reversed(list(SAID.finditer(text))):
        if found := NUMBER.findall(text[told.end() :].partition("\n")[0]):
            return _number(found[:1])
    return _number(NUMBER.findall(text)[-1:])


def _number(found: list[str]) -> Fraction | None:
    try:
        over, _, under = found[0].replace(",", "").partition("/")
        return Fraction(over) / Fraction(under or "1")
    except (IndexError, ValueError, ZeroDivisionError):
        return None


def _boxed(text: str) -> str | None:
    """What the last \\boxed{} holds, braces inside it included."""
    _, found, rest = text.rpartition("\\boxed{")
    if not found:
        return None
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return rest[:i]
    return rest


def choice_answer(text: str, pattern: str = "") -> Found:
    r"""The letter of an option: in \boxed{}, behind "answer", or what the text begins with.

    >>> [choice_answer(t) for t in ("B", "(B) Paris", "A dog barks, so the answer is **B**.", "Beyond")]
    ['B', 'B', 'B', None]
    """
    boxed = _boxed(text)
    if boxed is not None:
        text = re.sub(r"\\text\w*\{|\}", "", boxed)
    bare = text.strip(" \n.()*\"'")
    if len(bare) == 1 and bare.isascii() and bare.isalpha():
        return bare.upper()
    found = LETTER.findall(text)
    first = FIRST.match(text)
    return found[-1] if found else first.group(1) if first else None


def regex_answer(text: str, pattern: str = "") -> Found:
    """What the first group of data.pattern holds where it matches last; a text that it matches nowhere is all answer.

    >>> regex_answer("Risk: low. Risk: high.", r"Risk: (\\w+)"), regex_answer("high", r"Risk: (\\w+)")
    ('high', 'high')
    """
    found = [match.group(1) or "" for match in re.finditer(pattern, text)]
    return exact_answer(found[-1] if found else text)


READERS: dict[str, Callable[[str, str], Found]] = {
    "exact": exact_answer,
    "number": number_answer,
    "choice": choice_answer,
    "regex": regex_answer,
}


def is_right(checker: str, answer: str, completion: str, pattern: str = "") -> bool:
    """Whether a completion gives the answer, as this checker reads both."""
    read = READERS[checker]
    said = read(completion, pattern)
    return said is not None and said == read(answer, pattern)
