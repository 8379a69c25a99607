"""How near a text comes to a reference: ROUGE-L and chrF, by the libraries that others report with (extra: text).

Both are of one text, 0 to 1; a mean over texts is a mean of these, not a figure of the corpus as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from trivium.errors import DataError


def rouge_l(reference: str, text: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, https://aclanthology.org/W04-1013), without stemming.

    The library reads words as runs of a to z and digits, in small letters: it suits English only.
    """
    return float(_rouge().score(reference, text)["rougeL"].fmeasure)


def chrf(reference: str, text: str) -> float:
    """chrF2: n-grams of 1 to 6 characters, recall counts twice (Popovic 2015, https://aclanthology.org/W15-3049)."""
    return float(_chrf().sentence_score(text, [reference]).score) / 100


MEASURES: dict[str, Callable[[str, str], float]] = {"rougeL": rouge_l, "chrF": chrf}
"""By the name under which an evaluation reports them; (reference, text) -> 0 to 1."""


@lru_cache(maxsize=1)
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise DataError(f"rougeL needs the package rouge-score ({error}); pip install 'trivium-llm[text]'") from error
    return RougeScorer(["rougeL"], use_stemmer=False)


@lru_cache(maxsize=1)
def _chrf() -> Any:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise DataError(f"chrF needs the package sacrebleu ({error}); pip install 'trivium-llm[text]'") from error
    return CHRF()
