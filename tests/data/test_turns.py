"""Templates that rewrite earlier turns: each answer is trained once, after exactly what transformers asks it with."""

from types import SimpleNamespace

import pytest

from trivium.data.chat import Chat
from trivium.data.config import BPEConfig
from trivium.data.lint_examples import How, look
from trivium.data.packing import tokenise
from trivium.data.tokenizer import Tokenizer, train_bpe
from trivium.errors import DataError
from trivium.inference.chat import Conversation
from trivium.inference.config import SamplingConfig

transformers = pytest.importorskip("transformers", reason="NOT TESTED: parity needs transformers")

# As Qwen3's: what was thought before the last question is left out, and what is thought after it is always shown, if
# empty; an answer that comes before another of the same question keeps its thoughts only if it has some.
QWEN = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\\n') %}{% set thought = '' %}"
    "{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{% endif %}"
    "<|assistant|>\n{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n"
    "{% endif %}{{ content }}<|end|>\n{% else %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As Llama 3's: it strips, and asks for an answer even after one.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{{ '<|assistant|>\n\n' }}"
)
TALK = [
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "<think>\n7\n</think>\n\n23"},
    {"role": "user", "content": "4"},
    {"role": "assistant", "content": "<think>\n89\n</think>\n\n56"},
    {"role": "user", "content": "5"},
    {"role": "assistant", "content": "6"},
]
CALLS = [  # two answers to one question, the first with thoughts: the second one is asked with them
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "<think>\n7\n</think>\n\n2"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "<think>\n8\n</think>\n\n4"},
    {"role": "user", "content": "5"},
    {"role": "assistant", "content": "6"},
]


@pytest.fixture(scope="module")
def plain():
    return train_bpe(BPEConfig(vocab_size=300), ["a"])  # 256 bytes and specials: a token is a byte or a mark


@pytest.fixture
def both(plain, tmp_path):
    """both(template) -> our tokenizer with it, and transformers' own of the same folder."""

    def both(template):
        ours = Tokenizer(plain._core, {**plain.config, "chat_template": template})
        ours.save(tmp_path)
        return ours, transformers.AutoTokenizer.from_pretrained(tmp_path)

    return both


def rendered(theirs, talk, prompt):
    """The ids of a conversation, as transformers makes them."""
    return theirs.apply_chat_template(talk, add_generation_prompt=prompt, return_dict=False)


def asked_and_said(documents):
    """Each trained stretch: what comes before it, and itself."""
    found = []
    for d in documents:
        start = None
        for i, t in enumerate([*d.trained, False]):
            if t and start is None:
                start = i
            elif not t and start is not None:
                found.append((d.ids[:start], d.ids[start:i]))
                start = None
    return found


def forks(ours, talk, train_on="assistant", turns="fork"):
    return Chat(ours).encode_turns([{"id": "e", "messages": talk}], train_on, turns)[0]


def test_thoughts_that_are_left_out_later_are_trained_where_they_are_thought(both):
    """By hand, in characters and marks. Trained: (think 7 + 23), (think 89 + 56), (an empty think + 6), each with
    its end: `<think>\\n7\\n</think>\\n\\n23` is 7+1+1+1+8+2+2 = 22 bytes and the end, 23; 89 has one more, 24;
    `<think>\\n\\n</think>\\n\\n6` is 7+2+8+2+1 = 20 and the end, 21. In all 68."""
    ours, theirs = both(QWEN)
    found = forks(ours, TALK)
    assert [d.turns for d in found] == [(1, 1), (3, 3), (5, 5)]
    assert [sum(d.trained) for d in found] == [23, 24, 21]
    for number, (asked, said) in zip((1, 3, 5), asked_and_said(found), strict=True):
        assert asked == rendered(theirs, TALK[:number], prompt=True)
        assert [*asked, *said] == rendered(theirs, TALK[: number + 1], prompt=False)[:-1]  # but its line break
    texts = [ours.decode(d.ids, special=True) for d in found]
    assert texts[1] == (
        "<|user|>\n1<|end|>\n<|assistant|>\n23<|end|>\n<|user|>\n4<|end|>\n"
        "<|assistant|>\n<think>\n89\n</think>\n\n56<|end|>\n"
    )


def test_answers_to_one_question_share_a_document(both):
    """A document goes on as long as the template keeps what was written: the thought before the tool is context."""
    ours, theirs = both(QWEN)
    found = forks(ours, CALLS)
    assert [d.turns for d in found] == [(1, 3), (5, 5)]
    pairs = asked_and_said(found)
    assert [len(said) for _, said in pairs] == [22, 22, 21]  # one byte of answer each
    for number, (asked, said) in zip((1, 3, 5), pairs, strict=True):
        assert asked == rendered(theirs, CALLS[:number], prompt=True)
        assert ours.decode(said, special=True).endswith(f"{CALLS[number]['content'][-1]}<|end|>")


def test_a_template_that_asks_after_every_answer_needs_no_fork(both):
    """Llama 3's: 2 bytes and an end, twice, are 6 trained tokens; the last prompt stands there and is not learnt."""
    ours, theirs = both(LLAMA)
    talk = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ("1", "23 ", " 4", "56"), strict=True)]
    for turns in ("fork", "refuse"):
        (found,) = forks(ours, talk, turns=turns)
        assert found.turns is None and found.ids == rendered(theirs, talk, prompt=False)
        pairs = asked_and_said([found])
        assert [asked for asked, _ in pairs] == [rendered(theirs, talk[:n], prompt=True) for n in (1, 3)]
        assert [ours.decode(said, special=True) for _, said in pairs] == ["23<|end|>", "56<|end|>"]
    earlier = [*Chat(ours).prompt_ids(talk[:1]), *pairs[0][1]]
    assert Chat(ours).prompt_ids(talk[:3], earlier) == pairs[1][0]


@pytest.mark.parametrize("train_on", ["assistant", "last_turn", "all"])
def test_templates_that_keep_what_they_wrote_are_as_before(plain, train_on):
    """And so is a single turn, whatever the template."""
    for tokenizer, talk in ((plain, TALK), (Tokenizer(plain._core, {**plain.config, "chat_template": QWEN}), TALK[:2])):
        (found,) = forks(tokenizer, talk, train_on)
        assert found == Chat(tokenizer).encode([{"id": "e", "messages": talk}], train_on)[0] and found.turns is None


def test_the_last_turn_alone_is_one_document(both):
    """As for pairs and verdicts: whatever is said of turns."""
    ours, theirs = both(QWEN)
    for turns in ("fork", "refuse"):
        (found,) = forks(ours, TALK, "last_turn", turns)
        assert asked_and_said([found])[0][0] == rendered(theirs, TALK[:5], prompt=True) and sum(found.trained) == 21
    table = tokenise([{"id": "p", "chosen": TALK, "rejected": [*TALK[:5], {"role": "assistant", "content": "9"}]}],
                     ours, 400, form="pairs")  # fmt: skip
    assert table.group == 2 and table.trained.sum() == 42 and table.forked == 1


def test_refused_where_it_is_asked_for_and_where_nothing_is_drawn(both):
    ours, _ = both(QWEN)
    for train_on, turns in (("assistant", "refuse"), ("all", "fork")):
        with pytest.raises(DataError, match="example e: the chat template rewrites earlier turns") as caught:
            forks(ours, TALK, train_on, turns)
        assert caught.value.rule == "rewrites_history"


def test_a_question_at_the_end_is_left_out_where_it_would_rewrite(both):
    """The thought is dropped before it, so that the document ends with the answer; 22 bytes and an end."""
    ours, theirs = both(QWEN)
    (found,) = forks(ours, TALK[:3])
    assert found.ids == rendered(theirs, TALK[:2], prompt=False) and sum(found.trained) == 23
    assert found.turns == (1, 1)


def test_a_template_that_begins_answers_otherwise_than_it_asks_is_refused(both):
    """DeepSeek-R1's: it asks with `<think>` and writes answers without; no fork makes one of the other."""
    asks = "{% if add_generation_prompt %}<|assistant|>\n"
    ours, _ = both(QWEN.replace(asks, asks + "<think>x"))
    with pytest.raises(DataError, match="begins an answer otherwise than it asks for one") as caught:
        forks(ours, TALK)
    assert caught.value.rule == "rewrites_history"


def test_generation_blocks_are_cut_in_every_fork(both):
    """A block around what each answer writes after the prompt: the same ids and mask as without."""
    marked = QWEN.replace("<|assistant|>\n{% if loop", "<|assistant|>\n{% generation %}{% if loop")
    end = "{{ content }}<|end|>{% endgeneration %}{{ '\\n' }}{% else %}"
    marked = marked.replace("{{ content }}<|end|>\n{% else %}", end)
    for talk in (TALK, CALLS):
        with_blocks, without = (forks(both(t)[0], talk) for t in (marked, QWEN))
        assert with_blocks == without


def test_rows_hold_every_answer_once_and_the_table_says_so(both):
    """Two conversations, one of which has one turn: 1 + 3 documents, of which 3 are forks; an id for each."""
    ours, _ = both(QWEN)
    examples = [{"id": "one", "messages": TALK[:2]}, {"id": "many", "messages": TALK}]
    table = tokenise(examples, ours, 200, form="chat", turns="fork")
    assert (list(table.ids), table.forked, table.forks) == (["one", "many", "many", "many"], 1, 3)
    assert table.trained.sum() == 23 + 68
    # a question is 5 tokens, a prompt 2, an answer shown later 2 + 2 + 1 + 1, and a break after an answer 1
    lengths = [5 + 2 + 23 + 1, 5 + 6 + 5 + 2 + 24 + 1, 5 + 6 + 5 + 6 + 5 + 2 + 21 + 1]
    assert table.lengths.tolist() == [lengths[0], *lengths]
    cut = tokenise([{**examples[1], "id": "x"}], ours, 45, form="chat", turns="fork")
    assert (cut.truncated, cut.lost_ends, cut.lengths.tolist()) == (1, 1, [31, 43, 45])


def test_the_doctor_looks_at_every_fork_and_finds_nothing(both):
    ours, _ = both(QWEN)
    examples = [{"id": "e", "messages": TALK}, {"id": "c", "messages": CALLS}]
    seen, findings = look(examples, How(ours, "chat", "assistant", 256, turns="fork"))
    assert findings == []
    assert [side["id"] for one in seen for side in one.sides] == ["e#1", "e#2", "e#3", "c#1", "c#2"]
    assert {f.rule for f in look(examples, How(ours, "chat", "assistant", 256))[1]} == {"rewrites_history"}


class Says:
    """A backend that draws what it is told, and remembers what it was asked with."""

    def __init__(self, answers):
        self.answers, self.asked = list(answers), []

    def capabilities(self):
        return SimpleNamespace(context=4096)

    def generate(self, requests):
        self.asked.append(list(requests[0].prompt_ids))
        ids = self.answers.pop(0)
        for n, i in enumerate(ids):
            yield SimpleNamespace(token_id=i, finish_reason="stop" if n == len(ids) - 1 else None)


def test_a_chat_asks_as_was_trained(both):
    """The second question of a chat stands after the first answer without its thoughts, as in training."""
    ours, theirs = both(QWEN)
    trained = asked_and_said(forks(ours, TALK))
    backend = Says([said for _, said in trained])
    talk = Conversation(backend, ours, SamplingConfig())
    for message in TALK[::2]:
        "".join(talk.ask(message["content"]))
    assert backend.asked == [asked for asked, _ in trained]
