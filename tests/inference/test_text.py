"""Text as it is made: the same as decoding all at once, in windows that do not grow; stops however text is cut."""

import random

import pytest
from tokenizers import pre_tokenizers

from trivium.data.config import BPEConfig, UnigramConfig
from trivium.data.tokenizer import BYTES, train_bpe, train_unigram
from trivium.inference.text import StopStrings, TextStream, TokenTexts

TEXTS = ["hello there, the cat sat on the mat 😀 漢字", "and the dog, é, ran."] * 20


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    if request.param == "bpe":
        return train_bpe(BPEConfig(vocab_size=320), TEXTS)
    return train_unigram(UnigramConfig(vocab_size=400), TEXTS)


@pytest.mark.parametrize(
    "text", ["the cat 😀 sat", "  two  spaces\n\nlines ", "漢字漢字", "é" * 30, "👩‍👩‍👧 🇩🇪 x\ufffdy", "a\tb"]
)
def test_stream_is_the_text_of_all_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids) == text


def test_stream_of_random_tokens_is_the_text_of_all_ids():
    """Half of these tokens are single bytes, most of them no UTF-8; special ones are among them. Byte-level: unigram's
    decoder takes a whole run of bytes for broken when one is, which no stream can know in time."""
    tokenizer = train_bpe(BPEConfig(vocab_size=320), TEXTS)
    draw = random.Random(1)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randint(1, 12))]
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids), ids


class Counting:
    """A tokenizer that notes how much it decodes."""

    def __init__(self, inner):
        self.inner, self.special_ids, self.decoded = inner, inner.special_ids, []

    def decode(self, ids):
        self.decoded.append(len(ids))
        return self.inner.decode(ids)


@pytest.mark.parametrize("kind", ["words", "bytes that are no text", "special tokens"])
def test_a_long_answer_costs_no_more_a_token(tokenizer, kind):
    """2,000 tokens: never more than 32 are decoded at once (before: all so far, 2,001,000 in all)."""
    broken = tokenizer.encode("\U0001f525")[-1]
    ids = {
        "words": tokenizer.encode("the cat sat on " * 500)[:2000],
        "bytes that are no text": [broken] * 2000,
        "special tokens": [tokenizer.pad_id] * 2000,
    }[kind]
    counting = Counting(tokenizer)
    stream = TextStream(counting)
    text = "".join([*map(stream.push, ids), stream.finish()])
    assert max(counting.decoded, default=0) <= 32
    assert text == tokenizer.decode(ids) and len(ids) > 1000


def by_character(stops, text):
    """What StopStrings must say, from the definition: the first prefix that ends with a stop, less the longest such."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            stop = max(met, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_stop_is_found_however_the_text_is_cut():
    draw = random.Random(0)
    for _ in range(3000):
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        text = "".join(draw.choices("abc", k=draw.randint(0, 12)))
        told, met = by_character(stops, text)
        matcher, shown, left = StopStrings(stops), "", text
        while left:
            size = draw.randint(1, 3)
            shown += matcher.push(left[:size])
            left = left[size:]
            assert told.startswith(shown), (stops, text)
        assert (shown + matcher.finish(), matcher.met) == (told, met), (stops, text)


def test_stop_holds_back_no_more_than_it_must():
    stops = StopStrings(["\n\nUser:"])
    assert [stops.push(p) for p in ("Hi", "\n", "you\n\nUs", "e", "less")] == ["Hi", "", "\nyou", "", "\n\nUseless"]
    assert StopStrings(["112"]).push("11123") == "1"
    assert (StopStrings([]).push("abc"), StopStrings([""]).push("abc")) == ("abc", "abc")


def test_bytes_of_tokens():
    """GPT-2's spelling of bytes, by the library's own alphabet; and what tokens are called."""
    assert sorted(BYTES) == sorted(pre_tokenizers.ByteLevel.alphabet()) and sorted(BYTES.values()) == [*range(256)]
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["hello there, the cat sat on the mat"] * 3)
    ids = tokenizer.encode(" the😀")
    texts = TokenTexts(tokenizer)
    assert texts(ids[0]) == (" the", [32, 116, 104, 101])
    assert [texts(i) for i in ids[1:]] == [("\ufffd", [b]) for b in "😀".encode()]
    assert texts(tokenizer.eot_id) == ("<|end|>", list(b"<|end|>"))


def test_spaces_of_words_are_in_their_names(tokenizer):
    ids = tokenizer.encode("the cat sat")
    texts = TokenTexts(tokenizer)
    assert "".join(texts(i)[0] for i in ids) == "the cat sat"
