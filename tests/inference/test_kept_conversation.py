"""A conversation in a store: it goes on after a restart or a kill with the very ids it had."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from trivium.data.chat import Chat
from trivium.data.config import BPEConfig
from trivium.data.tokenizer import train_bpe
from trivium.errors import BackendError, ConfigError, SessionError
from trivium.inference.chat import talk
from trivium.inference.config import NativeConfig, SamplingConfig
from trivium.inference.conversation import Conversation
from trivium.inference.exchange import context_of
from trivium.inference.native.engine import NativeBackend
from trivium.inference.sessions import SessionStore
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama

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


def engine(tokenizer, context=CONTEXT):
    """The real engine on a random model; it notes what it is asked."""
    config = LlamaConfig(dim=32, layers=1, heads=2, kv_heads=1, ffn_dim=48, context=context, tied=False, init_std=0.3)
    model = Llama(config, tokenizer.vocab_size)
    model.init_weights(seed=0)
    backend = NativeBackend(NativeConfig(), model, tokenizer)
    backend.asked, generate = [], backend.generate

    def noting(requests):
        backend.asked += requests
        return generate(requests)

    backend.generate = noting
    return backend


@pytest.fixture
def backend(tokenizer):
    return engine(tokenizer)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "sessions.sqlite"


@pytest.fixture
def opened(backend, tokenizer, file):
    """opened(...) -> a conversation as a fresh process would make it, of the file's store."""
    made = []

    def opened(**how):
        sampling = how.pop("sampling", SamplingConfig(max_tokens=6, temperature=1.0))
        how = {"model": "m", "store": SessionStore(file), **how}
        made.append(Conversation(how.pop("backend", backend), how.pop("tokenizer", tokenizer), sampling, **how))
        return made[-1]

    yield opened
    for conversation in made:
        conversation.close()


def say(conversation, text):
    return "".join(conversation.ask(text))


def test_a_conversation_goes_on_after_a_restart_with_the_ids_it_had(opened, backend):
    first = opened(system="be kind")
    say(first, "hello")
    say(first, "the cat")
    ids, messages, name = first.ids, first.messages, first.session.id
    first.close()
    second = opened()
    second.open(name)
    assert (second.ids, second.messages, second.system) == (ids, messages, "be kind")
    say(second, "and?")
    assert list(backend.asked[-1].prompt_ids)[: len(ids)] == ids
    assert second.path[-1].ids == tuple(second.ids[len(backend.asked[-1].prompt_ids) :])


def test_nothing_said_is_nothing_kept(opened):
    conversation = opened()
    answer = conversation.ask("hello")
    next(answer)
    answer.close()
    assert conversation.store.sessions() == []
    say(conversation, "hello")
    assert [s.title for s in conversation.store.sessions()] == ["hello"]


def test_regenerate_answers_the_same_prompt_with_other_random_numbers(opened, backend):
    conversation = opened()
    say(conversation, "hello")
    first = conversation.path[-1]
    "".join(conversation.regenerate())
    second = conversation.path[-1]
    one, two = backend.asked
    assert one.prompt_ids == two.prompt_ids and one.params == two.params and one.id != two.id
    assert (first.parent, first.ids) != (second.parent, second.ids) and first.parent == second.parent
    assert len(conversation.path) == 2 and len(conversation.store.turns(conversation.session.id)) == 3
    "".join(conversation.regenerate())
    assert len({request.id for request in backend.asked}) == 3
    say(conversation, "on")
    assert conversation.ids[: len(two.prompt_ids)] == list(two.prompt_ids)


def test_edit_asks_in_place_of_the_last_question(opened, backend):
    """The prompt is what it would be had the first question never been asked."""
    conversation = opened()
    say(conversation, "hello")
    before = conversation.ids
    say(conversation, "the cat")
    "".join(conversation.edit("the mat"))
    assert [m["content"] for m in conversation.messages][::2] == ["hello", "the mat"]
    assert list(backend.asked[-1].prompt_ids)[: len(before)] == before
    texts = [turn.text for turn in conversation.store.turns(conversation.session.id)]
    assert texts[::2][:2] == ["hello", "the cat"] and "the mat" in texts


def test_an_edit_that_is_stopped_leaves_the_branch_that_was_there(opened):
    conversation = opened()
    say(conversation, "hello")
    state = (conversation.ids, conversation.store.turns(conversation.session.id))
    answer = conversation.edit("the mat")
    next(answer)
    answer.close()
    assert (conversation.ids, conversation.store.turns(conversation.session.id)) == state
    assert conversation.store.get(conversation.session.id).head == conversation.path[-1].id


def test_nothing_to_regenerate_or_edit_is_told(opened):
    for act in (lambda c: c.regenerate(), lambda c: c.edit("x")):
        with pytest.raises(BackendError, match="nothing was asked yet"):
            act(opened())


# ---- a full context


def test_drop_oldest_leaves_out_whole_turns_and_keeps_the_system_message(opened, backend, tokenizer):
    """The prompt after a drop is that of a conversation that began at the first turn that is kept, with the own
    ids of the answers; and the next prompt begins with this one."""
    conversation = opened(system="be kind", full="drop_oldest", sampling=SamplingConfig(max_tokens=12, temperature=1.0))
    chat, dropped = Chat(tokenizer), False
    for number in range(14):
        before = conversation.ids
        say(conversation, f"{number}: the cat sat")
        prompt = list(backend.asked[-1].prompt_ids)
        assert conversation.ids[: len(prompt)] == prompt and len(conversation.ids) <= CONTEXT + 1  # the end is added
        assert CONTEXT - len(prompt) >= 12 == backend.asked[-1].params.max_tokens, "room for a whole answer"
        if prompt[: len(before)] == before:
            continue
        dropped = True
        kept = context_of(conversation.path).turns
        assert kept[0].role == "user" and kept[-1].role == "assistant"
        begins = [{"role": "system", "content": "be kind"}, {"role": "user", "content": kept[0].text}]
        rest = [i for turn in kept[1:-1] for i in turn.ids]
        assert prompt == [*chat.prompt_ids(begins), *rest]
    assert dropped
    said = [m["content"] for m in conversation.messages if m["role"] == "user"]
    assert said == [f"{n}: the cat sat" for n in range(14)], "all of it is still there to read"


def test_a_dropped_context_is_the_same_after_a_restart(opened, backend):
    first = opened(full="drop_oldest", sampling=SamplingConfig(max_tokens=12, temperature=1.0))
    for number in range(8):
        say(first, f"{number}: the cat sat")
    ids = first.ids
    assert any(turn.role == "context" for turn in first.path)
    first.close()
    second = opened(full="drop_oldest")
    second.open(first.session.id)
    assert second.ids == ids
    "".join(second.regenerate())
    assert backend.asked[-1].prompt_ids == backend.asked[-2].prompt_ids
    turns = second.store.turns(second.session.id)
    assert len([t for t in turns if t.text == "7: the cat sat"]) == 1, "one question with two answers"


def test_a_question_that_never_fits_is_told_and_nothing_changes(opened):
    conversation = opened(full="drop_oldest")
    say(conversation, "hello")
    state = (conversation.ids, conversation.messages)
    with pytest.raises(SessionError, match=f"more than the model's context of {CONTEXT}; ask a shorter one") as told:
        say(conversation, "1" * CONTEXT)
    assert told.value.reason == "full"
    assert (conversation.ids, conversation.messages) == state


def test_summarise_puts_a_text_in_place_of_what_leaves(opened, tokenizer):
    """The hook gets the turns that leave, and the summary of those that left before."""
    given = []

    def hook(turns, earlier):
        given.append(([t.text for t in turns if t.role == "user"], earlier))
        return f"cat {len(given)}"

    sampling, backend = SamplingConfig(max_tokens=40, temperature=1.0), engine(tokenizer, 400)
    conversation = opened(system="s", full="summarise", summarise=hook, sampling=sampling, backend=backend)
    for number in range(16):
        say(conversation, f"{number}: hello")
    assert len(given) > 1 and given[0][1] == "" and given[1][1] == "cat 1"
    assert [earlier for _, earlier in given] == ["", *(f"cat {n}" for n in range(1, len(given)))]
    gone = [text for texts, _ in given for text in texts]
    assert gone == [f"{n}: hello" for n in range(len(gone))], "each question leaves once, in order"
    read = tokenizer.decode(backend.asked[-1].prompt_ids)
    assert read.startswith(f"sEarlier in this conversation: cat {len(given)}".replace("sE", "s\n\nE"))
    assert f"{len(gone)}: hello" in read and f"{len(gone) - 1}: hello" not in read


def test_the_model_itself_summarises_where_no_hook_is_given(opened, backend):
    conversation = opened(full="summarise", sampling=SamplingConfig(max_tokens=12, temperature=1.0))
    for number in range(8):
        say(conversation, f"{number}: hello")
    asked = [r for r in backend.asked if r.id == "summary"]
    assert asked and all(r.params.max_tokens == CONTEXT // 8 and len(r.prompt_ids) < CONTEXT for r in asked)


# ---- another model


def test_a_conversation_of_another_model_is_refused_or_copied(opened, tokenizer):
    first = opened()
    say(first, "hello")
    say(first, "the cat")
    ids, turns = first.ids, first.store.turns(first.session.id)
    first.name("trip")
    first.close()
    other = opened(model="n")
    with pytest.raises(SessionError, match="'trip' was held with another model, so its tokens"):
        other.open("trip")
    other.open("trip", copy=True)
    assert other.session.id != first.session.id and other.ids == ids, "the template is the same, so every id is"
    assert other.store.turns(first.session.id) == turns


def test_a_copy_for_another_template_is_what_training_on_that_text_would_read(opened, tokenizer):
    first = opened(system="be kind")
    say(first, "hello")
    say(first, "the cat")
    messages = first.messages
    first.close()
    chatml = tokenizer.extended([], "chatml")
    other = opened(tokenizer=chatml, backend=engine(chatml))
    with pytest.raises(SessionError, match="another template"):
        other.open(first.session.id)
    other.open(first.session.id, copy=True)
    assert other.messages == messages
    whole = Chat(chatml).encode([{"id": "x", "messages": messages}])[0].ids
    assert whole[: len(other.ids)] == other.ids and chatml.decode(whole[len(other.ids) :]).strip() == ""


# ---- settings and the terminal


def test_settings_are_checked_kept_and_come_back(opened):
    first = opened()
    for name, value, what in (
        ("heat", "1", "heat is no setting; there are temperature"),
        ("top_k", "x", "top_k=x must be a whole number"),
        ("temperature", "-1", "must not be negative"),
        ("temperature", "nan", "temperature=nan must be a number"),
    ):
        with pytest.raises(ConfigError, match=what):
            first.set(name, value)
    assert first.sampling == SamplingConfig(max_tokens=6, temperature=1.0)
    first.set("temperature", "0.5")
    say(first, "hello")
    first.close()
    second = opened(sampling=SamplingConfig())
    second.open(first.session.id)
    assert second.sampling == SamplingConfig(max_tokens=6, temperature=0.5)


class Kept:
    """Feedback that is written down."""

    def __init__(self):
        self.said = []

    def record(self, conversation, answered):
        self.said.append(("answer", answered.turn.text))
        return f"r{len(self.said)}"

    def give(self, *what):
        self.said.append(what)


def spoken(conversation, *lines, **how):
    written, rest = [], iter([*lines, None])
    talk(conversation, lambda: next(rest), written.append, **how)
    return "".join(written)


def test_every_command_does_what_help_says(opened):
    conversation, kept = opened(system="be kind"), Kept()
    said = spoken(
        conversation, "/stats", "/save", "/good", "hello", "/save trip", "/good well said", "/bad", "/regen",
        "/edit the mat", "/sessions", "/set temperature 0.7", "/set", "/system", "/stats", "/help", "/reset",
        "/load trip", "/load nowhere", "/edit", "/system be brief", "/system", feedback=kept,
    )  # fmt: skip
    for told in (
        "nothing was said yet", "nothing was answered yet", "kept as 'trip' in", "temperature 0.7\n", "max_tokens 6",
        "tokens/s, the first after", "/edit text", "(a new conversation)", "(going on in 'trip'",
        "there is no conversation 'nowhere'", "say what to ask instead", "(be kind)", "(be brief)",
    ):  # fmt: skip
        assert told in said, told
    thumbs = [what for what in kept.said if what[0] != "answer"]
    assert thumbs == [("r1", "thumb", "up", "well said"), ("r1", "thumb", "down", "")]
    assert conversation.messages == [{"role": "system", "content": "be brief"}]


def test_thumbs_without_feedback_say_how_to_turn_it_on(opened):
    assert "(feedback is not kept; start with server.feedback=true to keep it)" in spoken(opened(), "hello", "/good")


def test_stats_tell_what_was_cached(opened, backend):
    """The second prompt begins with the first and its answer, found again in whole pages of 16 tokens."""
    conversation = opened()
    say(conversation, "hello there, the cat sat on the mat and 1234567890")
    before = len(conversation.ids)
    say(conversation, "the cat")
    cached = conversation.last.events[0].cached
    assert 0 < cached <= before and cached % 16 == 0
    assert backend.stats().cached_tokens == cached and f" {cached} were cached" in spoken(conversation, "/stats")


def test_an_answer_that_is_stopped_is_not_kept_and_the_engine_is_free(opened, backend):
    conversation = opened(sampling=SamplingConfig(max_tokens=40, temperature=1.0))
    pressed = iter([False, False, True])
    said = spoken(conversation, "hello", stopped=lambda: next(pressed, False))
    assert said.endswith(" (stopped; the turn is not kept)\n")
    assert conversation.messages == [] and not backend.busy and backend.stats().used_slots == 0
    say(conversation, "hello")
    assert backend.asked[0] == backend.asked[1]


@pytest.mark.parametrize("line", ["1" * 2_000_000, "\ud800", "\0", "a\nb\nc", "<|end|>" * 10_000], ids=str.__len__)
def test_a_paste_of_any_kind_is_answered_or_refused_in_a_line(opened, line):
    conversation = opened()
    said = spoken(conversation, line, "hello")
    assert conversation.messages[-2]["content"] == "hello"
    assert len(said) < 1000


# ---- a kill in the middle of a turn

PROCESS = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from test_kept_conversation import *
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["hello there, the cat sat on the mat"] * 3)
    here = Conversation(engine(tokenizer, 4096), tokenizer, SamplingConfig(max_tokens=6, temperature=1.0),
                        store=SessionStore(Path(sys.argv[1])), model="m")
    say(here, "my name is Ada")
    say(here, "hello")
    print(here.session.id, flush=True)
    here.set("max_tokens", "4000")
    for piece in here.ask("the cat"):
        print("drawing", flush=True)
"""


def test_kill_in_the_middle_of_an_answer_leaves_the_last_whole_turn(opened, tokenizer, file):
    """The process dies after it has shown some tokens of its third answer. The store is what it was after the second,
    the next writer is not locked out, and what it asks begins with all that was said: the name is still read."""
    args = [sys.executable, "-c", textwrap.dedent(PROCESS), str(file), os.path.dirname(__file__)]
    child = subprocess.Popen(args, stdout=subprocess.PIPE, text=True)
    name = child.stdout.readline().strip()
    for _ in range(5):
        assert child.stdout.readline() == "drawing\n"
    with pytest.raises(SessionError, match=f"being written by process {child.pid}"):
        opened().open(name)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    backend = engine(tokenizer, 4096)
    here = opened(backend=backend)
    here.open(name)
    assert [m["content"] for m in here.messages][::2] == ["my name is Ada", "hello"] and len(here.path) == 4
    ids = [i for turn in here.store.turns(name) for i in turn.ids]
    assert here.ids == ids
    say(here, "what is my name?")
    prompt = list(backend.asked[-1].prompt_ids)
    assert prompt[: len(ids)] == ids and "my name is Ada" in tokenizer.decode(prompt)
    assert len(here.path) == 6


# ---- a template that rewrites what came before

REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content.upper() }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_is_read_as_it_writes_and_nothing_is_lost(opened, tokenizer, tmp_path):
    """Earlier turns come in capitals once there are later ones: each prompt is rendered anew, as it is in training."""
    chatml = tokenizer.extended([], "chatml")
    (tmp_path / "rewriting.jinja").write_text(REWRITING)
    rewriting = chatml.extended([], str(tmp_path / "rewriting.jinja"))
    backend = engine(rewriting, 400)
    first = opened(tokenizer=rewriting, backend=backend)
    for number in range(3):
        say(first, f"hello {number}")
        whole = Chat(rewriting).prompt_ids(first.messages[:-1])
        assert list(backend.asked[-1].prompt_ids) == whole == first.ids[: len(whole)]
    assert "HELLO 0" in rewriting.decode(whole) and len(first.messages) == 6
    ids, messages = first.ids, first.messages
    first.close()
    second = opened(tokenizer=rewriting, backend=backend)
    second.open(first.session.id)
    assert (second.ids, second.messages) == (ids, messages)
    second.close()
    copied = opened(tokenizer=rewriting, backend=backend, model="n")
    copied.open(first.session.id, copy=True)
    assert (copied.ids, copied.messages) == (ids, messages)
