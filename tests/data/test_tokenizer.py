"""Text to ids and back: every string survives, and nothing a person writes becomes a special token."""

import json
import os
import random
import signal

import pytest

from trivium.data.config import BPEConfig
from trivium.data.tokenizer import END, SPECIAL, Tokenizer, train_bpe
from trivium.errors import DataError

TEXTS = [
    "the cat sat on the mat. the dog sat on the log.",
    "It costs 1234 of 56789 coins!",
    "Hello, hello world\n\nBye",
] * 4

NASTY = [
    "",
    " ",
    "  two  spaces  and a trailing one ",
    "tabs\tand\r\nline\n\n\nbreaks\r",
    "emoji 😀 with joiners 👩‍👩‍👧‍👦 and flags 🇩🇪 and skin 👍🏽",
    "漢字とかな, 한국어, עברית, العربية, ไทย",
    "combining e\u0301 and zalgo Z\u0351\u036b\u0343",
    "controls \x00\x01\x1b[31m\x7f\x85\u2028\u2029\u200b\ufeff",
    "noncharacters \uffff \U0010ffff, private \ue000\ue001, replacement \ufffd",
    "<|end|> <|bos|><|pad|> <|assistant|>",
    "<|end",
    "½ ² ٣ Ⅷ 0xFF 1e-5 -3.14",
    "\u00a0nbsp\u3000ideographic space",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(BPEConfig(vocab_size=300), TEXTS)


@pytest.mark.parametrize("text", NASTY)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "other"])[0] == ids
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.eot_id} & set(ids)


def test_tokenizer_round_trip_of_random_unicode(tokenizer):
    """300 strings of code points from the whole range (surrogates are not text)."""
    generator = random.Random(0)
    points = [p for p in range(0x110000) if not 0xD800 <= p < 0xE000]
    texts = ["".join(map(chr, generator.choices(points, k=generator.randrange(1, 30)))) for _ in range(300)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


def test_tokenizer_reads_no_special_token_in_plain_text(tokenizer):
    """All seven specials, as a person may type them: only ordinary ids, and the text comes back."""
    special_ids = set(range(len(SPECIAL)))
    for special in SPECIAL:
        ids = tokenizer.encode(special)
        assert not special_ids & set(ids) and len(ids) > 1
        assert tokenizer.decode(ids) == special
        # in a rendered template the same spelling is the token
        assert tokenizer.encode_batch([special], special=True) == [[SPECIAL.index(special)]]


def test_tokenizer_special_ids_are_known_and_apart(tokenizer):
    """SPECIAL is in order pad, bos, eos, system, user, assistant, end: ids 0 to 6. pad is none of the others."""
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id) == (0, 1, 2, 6)


def test_tokenizer_gives_each_digit_a_token(tokenizer):
    digits = {c: tokenizer.encode(c) for c in "0123456789"}
    assert all(len(ids) == 1 for ids in digits.values())
    assert tokenizer.encode("1234567890") == [digits[c][0] for c in "1234567890"]
    # a space before a number is a token of its own, so a number reads the same wherever it stands
    assert tokenizer.encode(" 12")[1:] == tokenizer.encode("12")


def test_tokenizer_can_keep_numbers_whole():
    texts = ["year 1234 " * 50]
    split, whole = (train_bpe(BPEConfig(vocab_size=300, split_digits=s), texts) for s in (True, False))
    assert len(split.encode(" 1234")) == 5
    assert len(whole.encode(" 1234")) == 1


def test_tokenizer_words_carry_their_leading_space(tokenizer):
    """ " the" is one token and "the" another; a word after a line break is the word without a space."""
    spaced, bare = tokenizer.encode(" the"), tokenizer.encode("the")
    assert len(spaced) == 1 and spaced != bare
    assert tokenizer.encode("the the")[-1:] == spaced
    assert tokenizer.encode("\nthe") == [*tokenizer.encode("\n"), *bare]


def test_tokenizer_decode_hides_special_tokens_unless_asked(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("the cat"), tokenizer.eot_id]
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.decode(ids, special=True) == "<|bos|>the cat<|end|>"


def test_tokenizer_decodes_half_a_character_to_the_replacement_mark(tokenizer):
    """U+1F600 is four bytes and untrained: four tokens; three of them are no character."""
    ids = tokenizer.encode("😀")
    assert len(ids) == 4
    assert tokenizer.decode(ids[:3]) == "\ufffd"


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    again = Tokenizer.load(tmp_path / "t")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size == tokenizer.vocab_size == 300
    assert again.config == tokenizer.config
    for text in NASTY:
        assert again.encode(text) == tokenizer.encode(text)


def test_tokenizer_training_is_deterministic(tokenizer):
    assert train_bpe(BPEConfig(vocab_size=300), list(TEXTS)).fingerprint == tokenizer.fingerprint


def test_tokenizer_fingerprint_covers_vocabulary_and_template(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] += " "
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    other_template = Tokenizer.load(tmp_path)
    other_vocabulary = train_bpe(BPEConfig(vocab_size=300), [*TEXTS, "zzzz " * 50])
    assert len({t.fingerprint for t in (tokenizer, other_template, other_vocabulary)}) == 3


def test_tokenizer_vocabulary_of_a_small_text_is_all_bytes():
    """256 bytes and 7 special tokens are always there, so text of any script has ids; nothing to merge in "a"."""
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["a"])
    assert tokenizer.vocab_size == 263
    assert tokenizer.decode(tokenizer.encode("Ω😀")) == "Ω😀"


def test_tokenizer_reads_at_most_max_bytes():
    """The second text is past the limit: its words are no merges."""
    texts = ["aaaa " * 20, "zzzz " * 200]
    short = train_bpe(BPEConfig(vocab_size=300, max_bytes=100), texts)
    both = train_bpe(BPEConfig(vocab_size=300, max_bytes=10_000), texts)
    assert len(short.encode(" zzzz")) == 5 and len(both.encode(" zzzz")) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json in"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "cannot be read"),
        (
            lambda f: (f / "tokenizer_config.json").write_text(
                (f / "tokenizer_config.json").read_text().replace('"<|bos|>"', '"<|start|>"')
            ),
            "bos_token '<|start|>' is not in its vocabulary".replace("|", r"\|"),
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|bos|>"}}'),
            "has no eos_token, so no text would end",
        ),
    ],
)
def test_tokenizer_load_names_what_is_damaged(tokenizer, tmp_path, damage, message):
    tokenizer.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


def test_end_of_turn_is_not_the_pad(tokenizer):
    """pad == eos is how end tokens come to be masked elsewhere; here they are three tokens."""
    assert len({tokenizer.pad_id, tokenizer.eos_id, tokenizer.eot_id}) == 3
    assert tokenizer.config["eot_token"] == END


def test_a_child_encodes_whatever_its_parent_was_doing():
    """A thread may hold the lock while another forks; the child has no such thread, and must not wait for it."""
    made = train_bpe(BPEConfig(vocab_size=300), ["the heron waits"] * 9)
    with made._reading(special=True):
        child = os.fork()
        if not child:
            signal.alarm(5)
            os._exit(0 if made.encode("the heron<|end|>") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert made.decode(made.encode("the heron<|end|>")) == "the heron<|end|>"
