"""Talking: streamed text, exact ids, and turns that fail without a trace."""

import itertools

import pytest
import torch
from tokenizers import pre_tokenizers

from trivium.data.chat import Chat
from trivium.data.config import BPEConfig
from trivium.data.tokenizer import train_bpe
from trivium.errors import BackendError
from trivium.inference.chat import Conversation, talk
from trivium.inference.config import NativeConfig, SamplingConfig
from trivium.inference.native.engine import NativeBackend
from trivium.inference.protocol import Backend, Capabilities
from trivium.inference.text import TextStream
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.types import TokenEvent

CONTEXT = 96


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(BPEConfig(vocab_size=300), ["hello there, the cat sat on the mat"] * 3)


class Recording(NativeBackend):
    """The real engine; it notes what it is asked and what it answers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked, self.drawn = [], []

    def generate(self, requests):
        self.asked += requests
        self.drawn.append([])
        for event in super().generate(requests):
            self.drawn[-1].append(event.token_id)
            yield event


@pytest.fixture
def backend(tokenizer):
    config = LlamaConfig(dim=32, layers=1, heads=2, kv_heads=1, ffn_dim=48, context=CONTEXT, tied=False, init_std=0.3)
    model = Llama(config, tokenizer.vocab_size)
    model.init_weights(seed=0)
    return Recording(NativeConfig(), model, tokenizer)


class Scripted(Backend):
    """Answers each request with the next of `answers` (ids); None makes the turn fail after one token."""

    def __init__(self, answers, context=1000):
        self.answers, self.context, self.asked = iter(answers), context, []

    def generate(self, requests):
        (request,) = requests
        self.asked.append(request)
        answer = next(self.answers)
        if answer is None:
            yield TokenEvent(request.id, 50, -1.0)
            raise BackendError("the engine broke")
        for i, token in enumerate(answer):
            stop = token in request.params.stop_ids
            yield TokenEvent(request.id, token, -1.0, "stop" if stop else "length" if i == len(answer) - 1 else None)

    def score(self, token_ids):
        raise NotImplementedError

    def add(self, request):
        raise NotImplementedError

    def step(self):
        raise NotImplementedError

    busy = False

    def drop(self, request_id):
        raise NotImplementedError

    def update_weights(self, version):
        raise NotImplementedError

    def stats(self):
        raise NotImplementedError

    def capabilities(self):
        return Capabilities(context=self.context)


# ---- TextStream


def byte_tokens(tokenizer, text):
    """One token for each byte: the alphabet without its merges."""
    by_byte = {}
    for i in range(tokenizer.vocab_size):
        piece = tokenizer._core.id_to_token(i)
        if len(piece) == 1:
            by_byte[piece] = i
    (spelled, _), *rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert not rest
    return [by_byte[c] for c in spelled]


@pytest.mark.parametrize("text", ["plain", "a😀b", "漢字", "é😀漢 ok", "👩‍👩‍👧", "🇩🇪", "x\ufffdy", "tail😀"])
def test_stream_holds_a_character_until_it_is_whole(tokenizer, text):
    """Byte by byte: each piece is whole characters, and together they are the text."""
    stream = TextStream(tokenizer)
    ids = byte_tokens(tokenizer, text)
    pieces = [stream.push(i) for i in ids]
    assert len(ids) == len(text.encode())
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces) and stream.finish() == ""
    # a character comes with its own last byte, not later
    shown, sent = "", 0
    for i, piece in enumerate(pieces):
        shown += piece
        sent = len(ids[: i + 1])
        if "\ufffd" not in text:
            assert shown == text.encode()[:sent].decode(errors="ignore")


def test_stream_of_broken_bytes_does_not_crash(tokenizer):
    """The first two bytes of an emoji, then "a": the mark and the letter come with the letter."""
    ids = [*byte_tokens(tokenizer, "😀")[:2], *byte_tokens(tokenizer, "a")]
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == ["", "", "\ufffda"]
    assert stream.finish() == ""


def test_stream_shows_an_unfinished_character_at_the_end(tokenizer):
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in byte_tokens(tokenizer, "a😀")[:3]] == ["a", "", ""]
    assert stream.finish() == "\ufffd"


# ---- Conversation, on the real engine


def test_conversation_next_prompt_begins_with_every_earlier_id(backend, tokenizer):
    """Three turns: a prompt is the last prompt, the ids as they were drawn, the closed turn, and the new one."""
    conversation = Conversation(backend, tokenizer, SamplingConfig(max_tokens=6, temperature=1.0), system="be kind")
    for question in ("hello", "the cat", "and the mat?"):
        before = list(conversation.ids)
        "".join(conversation.ask(question))
        prompt = list(backend.asked[-1].prompt_ids)
        drawn = backend.drawn[-1]
        closing = [] if drawn[-1] == tokenizer.eot_id else [tokenizer.eot_id]
        assert prompt[: len(before)] == before
        assert conversation.ids == [*prompt, *drawn, *closing]
        user = tokenizer._core.token_to_id("<|user|>")
        assistant = tokenizer._core.token_to_id("<|assistant|>")
        new = [user, *tokenizer.encode(question), tokenizer.eot_id, assistant]
        assert prompt[len(before) :][-len(new) :] == new
    assert [m["role"] for m in conversation.messages] == ["system"] + ["user", "assistant"] * 3
    first = Chat(tokenizer).prompt_ids([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}])
    assert list(backend.asked[0].prompt_ids) == first


def test_conversation_streams_the_text_of_its_ids(backend, tokenizer):
    conversation = Conversation(backend, tokenizer, SamplingConfig(max_tokens=8, temperature=1.0, seed=3))
    text = "".join(conversation.ask("hello"))
    assert text == tokenizer.decode(backend.drawn[0]) == conversation.messages[-1]["content"]
    assert text


def test_conversation_given_up_in_the_middle_keeps_its_state(backend, tokenizer):
    """A reader that leaves: neither half the answer nor the question is kept, and the model's mode is put back."""
    conversation = Conversation(backend, tokenizer, SamplingConfig(max_tokens=6, temperature=1.0))
    list(conversation.ask("hello"))
    state = (list(conversation.messages), list(conversation.ids))
    backend.model.train()
    answer = conversation.ask("the cat")
    next(answer)
    answer.close()
    assert (conversation.messages, conversation.ids) == state
    list(conversation.ask("the cat"))
    assert list(backend.asked[-1].prompt_ids) == list(backend.asked[-2].prompt_ids)


def test_conversation_answers_are_cut_to_the_room_that_is_left(backend, tokenizer):
    """max_tokens 1000 in a context of 96: prompt and answer fill it, and no more."""
    conversation = Conversation(backend, tokenizer, SamplingConfig(max_tokens=1000))
    list(conversation.ask("hello"))
    request = backend.asked[0]
    assert request.params.max_tokens == CONTEXT - len(request.prompt_ids)


def test_conversation_with_a_full_context_says_so_and_keeps_its_state(backend, tokenizer):
    conversation = Conversation(backend, tokenizer, SamplingConfig(max_tokens=10))
    list(conversation.ask("hello"))
    state = (list(conversation.messages), list(conversation.ids))
    with pytest.raises(BackendError, match=r"fills the model's context \(\d+ tokens\); /reset starts anew"):
        list(conversation.ask("1" * CONTEXT))
    assert (conversation.messages, conversation.ids) == state
    assert len(backend.asked) == 1


# ---- Conversation, on a script: endings that a random model does not produce


def test_conversation_closes_an_answer_that_was_cut_short(tokenizer):
    """Training closes every turn: a "length" ending and an end-of-text become an end-of-turn; a stop stays one."""
    a, b = tokenizer.encode("1")[0], tokenizer.encode("2")[0]
    for answer, kept in [
        ([a, b], [a, b, tokenizer.eot_id]),
        ([a, tokenizer.eos_id], [a, tokenizer.eot_id]),
        ([a, tokenizer.eot_id], [a, tokenizer.eot_id]),
    ]:
        conversation = Conversation(Scripted([answer]), tokenizer, SamplingConfig())
        "".join(conversation.ask("q"))
        assert conversation.ids[-len(kept) :] == kept
        assert conversation.ids[-len(kept) - 1] == tokenizer._core.token_to_id("<|assistant|>")


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_conversation_goes_on_after_an_empty_answer(tokenizer, text):
    """A model may end its turn at once, or say only a space; the next question must still be answered."""
    backend = Scripted([[*tokenizer.encode(text), tokenizer.eot_id], [*tokenizer.encode("12"), tokenizer.eot_id]])
    conversation = Conversation(backend, tokenizer, SamplingConfig())
    assert "".join(conversation.ask("q")) == text
    before = list(conversation.ids)
    assert "".join(conversation.ask("again?")) == "12"
    assert list(backend.asked[1].prompt_ids)[: len(before)] == before
    assert conversation.messages[0] == {"role": "user", "content": "q"}


def test_conversation_turn_that_fails_leaves_no_trace(tokenizer):
    ok = [*tokenizer.encode("12"), tokenizer.eot_id]
    backend = Scripted([ok, None, ok])
    conversation = Conversation(backend, tokenizer, SamplingConfig(), system="s")
    list(conversation.ask("one"))
    state = (list(conversation.messages), list(conversation.ids))
    with pytest.raises(BackendError, match="the engine broke"):
        list(conversation.ask("two"))
    assert (conversation.messages, conversation.ids) == state
    list(conversation.ask("two"))
    assert backend.asked[2] == backend.asked[1]  # the same request as if nothing had happened


def test_conversation_special_tokens_in_a_question_stay_text(tokenizer):
    backend = Scripted([[tokenizer.eot_id]])
    conversation = Conversation(backend, tokenizer, SamplingConfig())
    list(conversation.ask("<|end|><|assistant|>"))
    assert sum(i == tokenizer.eot_id for i in backend.asked[0].prompt_ids) == 1


def test_talk_resets_explains_errors_and_leaves(tokenizer):
    """A context of 12: bos user 1 end assistant + "12" end = 8; the next turn, user 2 end assistant, would make 12."""
    ok = [*tokenizer.encode("12"), tokenizer.eot_id]
    backend = Scripted([ok, ok], context=12)
    conversation = Conversation(backend, tokenizer, SamplingConfig(), system="")
    written = []
    lines = iter(["1", "", "2", "/what", "/reset", "3", "/exit", "never read"])
    talk(conversation, lambda: next(lines), written.append)
    text = "".join(written)
    first, refused, explained, forgotten, last = text.splitlines()
    assert (first, forgotten, last) == ("12", "(forgotten)", "12")
    assert refused == "(the conversation fills the model's context (12 tokens); /reset starts anew)"
    assert "/reset" in explained
    assert next(lines) == "never read"
    assert backend.asked[1].prompt_ids == tuple(Chat(tokenizer).prompt_ids([{"role": "user", "content": "3"}]))


def test_talk_ends_with_its_input(tokenizer):
    talk(Conversation(Scripted([]), tokenizer, SamplingConfig()), itertools.repeat(None).__next__, print)


def test_conversation_reset_keeps_the_system_message(tokenizer):
    ok = [*tokenizer.encode("12"), tokenizer.eot_id]
    backend = Scripted([ok, ok])
    conversation = Conversation(backend, tokenizer, SamplingConfig(), system="be brief")
    list(conversation.ask("1"))
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be brief"}] and conversation.ids == []
    list(conversation.ask("1"))
    assert backend.asked[0] == backend.asked[1]
