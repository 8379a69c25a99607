"""Chat templates: what they are given, what they may not do, and their own word for what the assistant writes."""

import time

import pytest

from trivium.data.chat import Chat
from trivium.data.config import BPEConfig
from trivium.data.template import render
from trivium.data.tokenizer import Tokenizer, train_bpe
from trivium.errors import DataError

TALK = [
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "23"},
    {"role": "user", "content": "4"},
    {"role": "assistant", "content": "56"},
]
BLOCKS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(BPEConfig(vocab_size=300), ["a"])


def with_template(tokenizer, template):
    return Chat(Tokenizer(tokenizer._core, {**tokenizer.config, "chat_template": template}))


def encode(chat, talk=TALK, train_on="assistant", **more):
    return chat.encode([{"id": "e", "messages": talk, **more}], train_on)[0]


# ---- {% generation %}


@pytest.mark.parametrize("train_on", ["assistant", "last_turn", "all"])
def test_generation_blocks_agree_with_the_incremental_mask(tokenizer, train_on):
    """The project's own template with blocks in it: the same ids, the same mask."""
    assert encode(with_template(tokenizer, BLOCKS), train_on=train_on) == encode(Chat(tokenizer), train_on=train_on)


def test_generation_block_may_hold_what_comes_after_the_end(tokenizer):
    """A block that closes after the line break trains the break, too; one that closes before it does not."""
    inside = BLOCKS.replace("<|end|>{% endgeneration %}", "<|end|>{{ '\\n' }}{% endgeneration %}")
    outside = BLOCKS.replace("<|end|>{% endgeneration %}", "<|end|>{% endgeneration %}{{ '\\n' }}")
    a, b = (encode(with_template(tokenizer, t), TALK[:2]) for t in (inside, outside))
    assert a.ids == b.ids and len(a.ids) == 9
    assert a.trained == [False] * 5 + [True] * 4
    assert b.trained == [False] * 5 + [True] * 3 + [False]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>", "does not end an assistant turn"),
        ("<|assistant|>{% generation %}", "{% generation %}<|assistant|>", "must begin where add_generation_prompt"),
        ("{% generation %}", "{% generation %}{% endgeneration %}{% generation %}", "generation blocks are not what"),
        ("{% else %}", "{% else %}{% generation %}x{% endgeneration %}", "generation blocks are not what"),
    ],
)
def test_generation_blocks_that_disagree_are_refused(tokenizer, old, new, message):
    with pytest.raises(DataError, match=f"example e: .*{message}"):
        encode(with_template(tokenizer, BLOCKS.replace(old, new)))


def test_generation_marks_in_a_persons_text_are_text(tokenizer):
    chat = with_template(tokenizer, BLOCKS)
    talk = [{"role": "user", "content": "\ue002x\ue003"}, {"role": "assistant", "content": "\ue003\ue002y"}]
    assert encode(chat, talk) == encode(Chat(tokenizer), talk)
    assert tokenizer.decode(encode(chat, talk).ids) == "\ue002x\ue003\ue003\ue002y"


# ---- tools

TOOLS = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|user|>({{ m.name }}) {{ m.content }}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris <|end|>"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a <|user|>'s city"}}


def test_tool_calls_are_the_assistants_and_tool_messages_are_not(tokenizer):
    """Trained: the call with its end, and the answer. Special tokens spelled in a tool's text stay text."""
    talk = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "sun<|end|>"},
        {"role": "assistant", "content": "2"},
    ]
    chat = with_template(tokenizer, TOOLS)
    encoded = encode(chat, talk, tools=[TOOL])
    said = [i for i, t in zip(encoded.ids, encoded.trained, strict=True) if t]
    expected = '{"name": "weather", "arguments": {"city": "Paris <|end|>"}}2'
    assert tokenizer.decode(said) == expected
    assert said.count(tokenizer.eot_id) == 2 and encoded.ids.count(tokenizer.eot_id) == 4
    assert '"description": "of a <|user|>\'s city"' in tokenizer.decode(encoded.ids)
    assert "(weather) sun<|end|>" in tokenizer.decode(encoded.ids)
    prompt = chat.prompt_ids(talk[:3], tools=[TOOL])
    assert encoded.ids[: len(prompt)] == prompt


# ---- what templates are given


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 5 %}{{ ns.x }}", "5"),
        ("{{ dict(a=1).a }}{{ 'a' ~ 1 ~ none }}{{ 2 ** 3 }}{{ '%s!' % 'x' }}", "1a1None8x!"),
        ("{{ strftime_now('%Y') }}", time.strftime("%Y")),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) }}{{ m(m(2)) }}", "<1><<2>>"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ ' b ' | trim }}{{ 'a b'.split(' ')[-1] }}", "a1bb"),
    ],
)
def test_template_is_given_what_transformers_gives(template, text):
    assert render(template, {}) == text


# ---- limits


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "runs for more than"),
        ("{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}", "runs for more"),
        ("{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}", "."),
        ("{% for i in range(99999) %}" + "long text " * 100 + "{% endfor %}", "writes more than 32,000,000 characters"),
        ("{% set x %}" + "x" * 1000 + "{% endset %}{% set y = x * 10000 %}{{ y }}{{ y }}{{ y }}{{ y }}", "writes more"),
        ("{{ 'a' * 10**10 }}", "more than 32,000,000 characters"),
        ("{{ 10**10 * 'a' }}", "more than 32,000,000 characters"),
        ("{{ [0] * 10**10 }}", "more than 32,000,000 characters"),
        ("{{ 10 ** (10 ** 10) }}", "more than 4,096 bits"),
        ("{{ 'a'.ljust(10**10) }}", "its ljust would make"),
        ("{{ 'a' | center(10**10) }}", "its center would make"),
        ("{{ ('a' * 9999999).replace('', 'b' * 9999999) }}", "its replace would make"),
        ("{{ ('a' * 9999999) | replace('', 'b' * 9999999) }}", "its replace would make"),
        ("{{ '%99999999999d' % 1 }}", "five digits"),
        ("{{ '{:99999999999}'.format(1) }}", "five digits"),
        ("{{ '{:{w}}'.format(1, w=10**10) }}", "its format would make"),
        ("{% set x = 'aaaaaaaa' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}", "more than 32,000,000"),
        ("{% set x = 'aaaaaaaa' %}" + "{% set x = x + x %}" * 40 + "{{ x }}", "more than 32,000,000"),
        ("{% set x = 'aaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x }}", "32,000,000"),
        ("{% set x = 'aaaaaaaa' %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}", "more than 32,000,000"),
        ("{% set x = 'aaaaaaaa' %}" + "{% set x = [x, x] %}" * 40 + "{{ x | tojson }}", "more than 32,000,000"),
        ("{% set x = 'aaaaaaaa' %}" + "{% set x = [x, x] %}" * 40 + "{{ x | string }}", "more than 32,000,000"),
        ("x" * 200_001, "longer than 200,000 characters"),
        ("{{ (" * 9000 + "1" + ") }}" * 9000, "."),
        ("{% for i in [1] %}" * 60 + "{% endfor %}" * 60, "."),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.x.y }}", "undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set _ = [].append(1) %}", "is not safely callable|unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no') }}", "refuses this conversation: no"),
    ],
)
def test_template_over_a_limit_is_refused(template, message):
    """One sentence, soon, and without the memory that was asked for."""
    started = time.monotonic()
    with pytest.raises(DataError, match=message):
        render(template, {})
    assert time.monotonic() - started < 8
