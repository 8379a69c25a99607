"""Bits per byte and the sliding window: every token once, with the context that the definition gives it."""

import math

import pytest
import torch

from trivium.data.chat import Chat
from trivium.data.config import BPEConfig
from trivium.data.tokenizer import train_bpe
from trivium.errors import ConfigError
from trivium.evaluation.perplexity import ROWS, answer_bits_per_byte, bits_per_byte, document_nats, whole
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama

VOCAB, CONTEXT = 41, 16
CONFIG = LlamaConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24, context=CONTEXT, tied=False, init_std=0.3)
LENGTHS = [2, 15, 16, 17, 23, 24, 25, 32, 33, 50, 1, 0]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    model = Llama(CONFIG, VOCAB)
    model.init_weights(seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def uniform(vocab_size):
    """A real model that knows nothing: its last norm has weight 0, so every logit is 0."""
    model = Llama(CONFIG, vocab_size)
    model.init_weights(seed=0)
    torch.nn.init.zeros_(model.norm.weight)
    return model


@torch.no_grad()
def naive_nats(model, ids, stride):
    """Token by token: the window of token t starts at the first multiple of the stride that brings t within reach."""
    total = 0.0
    for t in range(1, len(ids)):
        start = 0
        while start + CONTEXT <= t:
            start += stride
        tokens = torch.tensor([ids[start:t]])
        logits = model.head(model(tokens, torch.arange(t - start)[None]))[0, -1]
        total -= logits.double().log_softmax(-1)[ids[t]].item()
    return total


@pytest.mark.parametrize("stride", [0, 1, 5, 8, 15])
def test_document_nats_equal_a_naive_loop(model, documents, stride):
    """Documents shorter than, as long as, and longer than the window of 16, in one call; 0 means a stride of 8.
    1e-4: fp32 log-probabilities, up to 49 of about 5 nats each."""
    assert len(documents) < ROWS < 2 * len(documents)  # more windows than one batch of rows holds
    found = document_nats(model, documents, stride)
    assert found == pytest.approx([naive_nats(model, d, stride or 8) for d in documents], abs=1e-4)


@pytest.mark.parametrize("stride", [0, 1, 7, 15])
def test_document_nats_score_every_token_once(documents, stride):
    """A uniform model: (n - 1) ln 41 for n tokens, so a token that is missed or counted twice is 3.7 nats off."""
    wanted = [max(0, n - 1) * math.log(VOCAB) for n in LENGTHS]
    assert document_nats(uniform(VOCAB), documents, stride) == pytest.approx(wanted, abs=1e-4)


def test_document_nats_of_a_fitting_text_are_one_window(model, documents):
    """Up to 16 tokens the stride is irrelevant, and the sum is torch's cross-entropy of one pass."""
    for ids in documents[:3]:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = model.head(model(tokens, torch.arange(len(ids))[None]))
        wanted = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum").item()
        for stride in (0, 3, 15):
            assert document_nats(model, [ids], stride) == pytest.approx([wanted], abs=1e-4)


def test_document_nats_do_not_depend_on_company(model, documents):
    together = document_nats(model, documents)
    assert [document_nats(model, [d])[0] for d in documents] == pytest.approx(together, abs=1e-4)
    assert document_nats(model, documents[::-1])[::-1] == pytest.approx(together, abs=1e-4)


@pytest.mark.parametrize("stride", [-1, CONTEXT, CONTEXT + 3])
def test_stride_that_would_skip_tokens_is_refused(model, documents, stride):
    """A window's first token is not scored, so with a stride of the whole window one token a window would be lost."""
    with pytest.raises(ConfigError, match=f"evaluation.stride={stride} must be .* less than the context of 16"):
        document_nats(model, documents, stride)


def test_bits_per_byte_of_a_uniform_model_by_hand():
    """No merges, so one token a byte: "abcd" and "é" are 4 and 2 bytes and as many tokens after the bos. Each costs
    log2 V bits: bits per byte is log2 V, for each text and for both, so the interval has no width."""
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["x"])
    assert tokenizer.vocab_size == 263
    found = bits_per_byte(uniform(263), tokenizer, ["abcd", "é"], stride=0, resamples=50, confidence=0.95)
    # fp32 nats: 1e-6 relative
    assert (found.value, found.low, found.high) == pytest.approx((math.log2(263),) * 3, rel=1e-6)
    assert found.count == 2


def test_bits_per_byte_divides_by_bytes_not_tokens():
    """Merges: "the cat the cat" has fewer tokens than its 15 bytes; log2 V * tokens / bytes, summed before dividing.
    With a text of 4 digits (4 tokens, 4 bytes) the ratio of sums is not the mean of ratios."""
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["the cat the cat"] * 5)
    texts = ["the cat the cat", "1234"]
    tokens = [len(tokenizer.encode(t)) for t in texts]
    assert tokens[0] < 8 and tokens[1] == 4
    found = bits_per_byte(uniform(tokenizer.vocab_size), tokenizer, texts, stride=0, resamples=200, confidence=0.95)
    bits = math.log2(tokenizer.vocab_size)
    assert found.value == pytest.approx(bits * sum(tokens) / 19, rel=1e-6)
    # resampling two texts can only give the one, the other or both
    assert (found.low, found.high) == pytest.approx((bits * tokens[0] / 15, bits), rel=1e-6)


def test_bits_per_byte_of_a_long_text_counts_every_byte():
    """60 digits in windows of 16 tokens: still log2 V a byte."""
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["x"])
    found = bits_per_byte(uniform(263), tokenizer, ["0123456789" * 6], stride=5, resamples=10, confidence=0.9)
    assert found.value == pytest.approx(math.log2(263), rel=1e-6)


def talk(name, *said):
    roles = ("user", "assistant")
    return {"id": name, "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]}


def test_answer_bits_per_byte_of_a_uniform_model_by_hand():
    """One token a byte. Of a: 4 bytes in 4 tokens and the end of the turn, 5 log2 V bits; of b: "é" has 2 bytes, so 3;
    of c, a completion: 1 byte and the end of the text, 2. So 10 / 7 log2 V, and a alone 5 / 4, the least, c alone 2."""
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["x"])
    chats = [talk("a", "x", "abcd"), talk("b", "xyz", "é"), {"id": "c", "prompt": "123", "completion": "4"}]
    found = answer_bits_per_byte(uniform(263), tokenizer, chats, resamples=500, confidence=0.999)
    bits = math.log2(263)
    assert (found.value, found.low, found.high) == pytest.approx((bits * 10 / 7, bits * 5 / 4, bits * 2), rel=1e-6)
    assert found.count == 3


def test_answer_bits_are_those_of_the_answer_given_its_prompt(model):
    """A real model, against one document's tokens one by one: the prompt's cost nothing, two turns are added up."""
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["x"])
    own = Llama(CONFIG, 263)
    own.init_weights(seed=1)
    chat = talk("a", "x", "ab", "y", "c")
    encoded = Chat(tokenizer).encode([chat])[0]
    assert len(encoded.ids) <= CONTEXT and sum(encoded.trained) == 5  # ab and c, each with the end of its turn
    ids = torch.tensor([encoded.ids])
    with torch.no_grad():
        logits = own.head(own(ids, torch.arange(len(encoded.ids))[None]))[0].double().log_softmax(-1)
    nats = -sum(logits[t - 1, i].item() for t, i in enumerate(encoded.ids) if encoded.trained[t])
    other = talk("b", "zzz", "d")  # shares the packed row
    found = answer_bits_per_byte(own, tokenizer, [chat, chat | {"id": "c"}], resamples=10, confidence=0.9)
    assert found.value == pytest.approx(nats / math.log(2) / 3, rel=1e-5)
    both = answer_bits_per_byte(own, tokenizer, [other, chat], resamples=1000, confidence=0.999)
    assert found.value in (pytest.approx(both.low, rel=1e-5), pytest.approx(both.high, rel=1e-5))


def test_conversations_that_would_be_cut_or_call_tools_are_not_whole():
    """A context of 16 tokens: the longest that fits has exactly so many."""
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["x"])
    length = len(Chat(tokenizer).encode([talk("a", "x", "y")])[0].ids)
    fits, too_long = talk("fits", "x", "y" * (17 - length)), talk("long", "x", "y" * (18 - length))
    calls = talk("calls", "x", "y")
    calls["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
    assert [e["id"] for e in whole([fits, too_long, calls], tokenizer, CONTEXT)] == ["fits"]
    assert whole([], tokenizer, CONTEXT) == []
