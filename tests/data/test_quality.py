"""Every rule of Gopher at its edge: the last text that passes and the first that does not."""

import math

import pytest

from trivium.data.config import CleaningConfig
from trivium.data.quality import (
    DUPLICATE_NGRAMS,
    TOP_NGRAM,
    broken_quality,
    broken_repetition,
    broken_rules,
    repeated_ngrams,
    repeated_pieces,
)


def words(count, letters=6):
    """Different words of so many letters, none a stop word."""
    return ["".join(chr(97 + i // 26**k % 26) for k in range(letters)) for i in range(count)]


def plain(count=50):
    """A text that breaks no rule."""
    first, *rest = words(count - 2)
    return [first, "the", "and", *rest]


def lines(marked, other, of=10):
    """`of` lines of five words, the first `marked` of them with a mark before and one behind."""
    each = [plain()[i : i + 5] for i in range(0, 5 * of, 5)]
    return "\n".join(f"{other[0]}{' '.join(w)}{other[1]}" if i < marked else " ".join(w) for i, w in enumerate(each))


CASES = {
    "too few words": (plain(50), plain(49)),
    "too many words": (plain(60), plain(61)),
    "mean word length": (words(50, 10), [*words(49, 10), "elevenchars"]),
    "hash signs": ([*plain(45), *["a#bcd"] * 5], [*plain(44), *["a#bcd"] * 6]),
    "ellipses": (["x…yz"] * 5 + plain(45), ["x...y", *["x…yz"] * 5, *plain(44)]),
    "bullet lines": (lines(9, ("-", "")), lines(10, ("-", ""))),
    "ellipsis lines": (lines(3, ("", "...")), lines(4, ("", "..."))),
    "words without letters": ([*plain(40), *["1234"] * 10], [*plain(39), *["1234"] * 11]),
    "stop words": (["The", '"have,"', *words(48)], ["the", "The", *words(48)]),
}


@pytest.mark.parametrize("rule", CASES)
def test_quality_rule_at_its_edge(rule):
    settings = CleaningConfig(max_words=60, stop_words=2 if rule != "mean word length" else 0)
    good, bad = (text if isinstance(text, str) else " ".join(text) for text in CASES[rule])
    assert broken_quality(good, good.split(), settings) == []
    assert broken_quality(bad, bad.split(), settings) == [rule]


def test_short_words_break_the_mean_too():
    """Fifty words of three letters have a mean of 3; one of two letters among them makes 149 / 50."""
    settings = CleaningConfig(stop_words=0)
    good = words(50, 3)
    assert broken_quality(" ".join(good), good, settings) == []
    assert broken_quality(" ".join(good), [*good[:-1], "ab"], settings) == ["mean word length"]


def test_repeated_pieces_by_hand():
    """Of 10 lines 3 come again (0.3 is allowed); they are 6 of 76 characters."""
    pieces = [*(f"different{i}" for i in range(7)), "ab", "ab", "ab", "ab"]
    assert repeated_pieces(pieces) == (3 / 11, 6 / (70 + 8))


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_duplicate_lines_and_paragraphs_at_their_edge(unit):
    """3 of 10 pieces again is allowed and 4 of 11 is not; 20 of 100 characters again is allowed and 20 of 99 is not."""
    between = {"line": "\n", "paragraph": "\n\n"}[unit]
    long = [chr(0x4E00 + i) * 40 for i in range(7)]

    def named(pieces):
        return [r for r in broken_repetition(between.join(pieces), ["a"]) if unit in r]

    assert named([*long[:6], "ab", "ab", "ab", "ab"]) == []
    assert named([*long[:6], "ab", "ab", "ab", "ab", "ab"]) == [f"duplicate {unit}s"]
    assert named(["x" * 20, "x" * 20, "y" * 60, "z"][:3]) == [f"duplicate {unit}s"]
    rest = ["y" * 20, "z" * 20]
    assert named(["x" * 20, "x" * 20, *rest, "v" * 20]) == []
    assert named(["x" * 20, "x" * 20, *rest, "v" * 19]) == [f"duplicate {unit} characters"]


def test_ngram_shares_by_hand():
    """a b c d e x a b c d e: 11 characters. The 5-gram comes twice and covers 10; the top 2-gram, one of four, 4."""
    shares = dict(zip(range(2, 11), repeated_ngrams("a b c d e x a b c d e".split()), strict=True))
    assert shares == {2: 4 / 11, 3: 6 / 11, 4: 8 / 11, 5: 10 / 11, **dict.fromkeys(range(6, 11), 0.0)}


def test_overlapping_ngrams_count_their_characters_once():
    """`a a` stands twice in `a a a`, and covers 3 of 4 characters, not 4."""
    assert repeated_ngrams(["a", "a", "a", "b"])[0] == 3 / 4


def test_of_ngrams_as_frequent_the_longer_counts():
    """ab twice and cccc-dd twice: 2 x 6 of 4 + 12 + 2 characters."""
    assert repeated_ngrams("a b x cccc dd y a b z cccc dd".split())[0] == 12 / (4 + 12 + 3)


@pytest.mark.parametrize("n", [*TOP_NGRAM, *DUPLICATE_NGRAMS])
def test_ngram_rule_at_its_edge(n):
    """An n-gram of one-letter words stands twice, 2n characters, in as few characters as its threshold allows."""
    threshold = {**TOP_NGRAM, **DUPLICATE_NGRAMS}[n]
    rule = f"top {n}-gram" if n in TOP_NGRAM else f"duplicate {n}-grams"
    least = math.ceil(2 * n / threshold - 1e-9)
    for total, broken in ((least, []), (least - 1, [rule])):
        letters = [chr(0x4E00 + i) for i in range(total - n)]
        text = [*letters[:n], letters[n], *letters[:n], *letters[n + 1 :]]
        assert len(text) == total
        assert broken_repetition(" ".join(text), text) == broken


def test_prose_breaks_no_rule_and_nothing_breaks_several():
    assert broken_rules(" ".join(plain(200)), CleaningConfig()) == []
    assert broken_rules("", CleaningConfig()) == ["too few words", "mean word length", "words without letters",
                                                  "stop words"]  # fmt: skip
