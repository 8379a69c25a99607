"""A zoo of broken data sets, templates and tokenizers: each is one that shipped somewhere, and breaks one rule.

Curves of losses look healthy with most of them. Digits and letters are tokens of the small tokenizer; its template is
ours but where an animal brings another.
"""

from dataclasses import dataclass, field

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from trivium.data.config import BPEConfig
from trivium.data.tokenizer import CHATML_TEMPLATES, SPECIAL, TEMPLATE, Tokenizer, train_bpe

TEXTS = ["hello there, how are you? fine thanks, and you? the answer is no. what is 2 + 2? it is 4."] * 3


def plain():
    """The small tokenizer that all others come from."""
    return train_bpe(BPEConfig(vocab_size=340), TEXTS)


def with_template(template, **config):
    """A tokenizer with another template."""
    return lambda base: Tokenizer(base._core, {**base.config, "chat_template": template, **config})


def lower_case(base):
    """It forgets capitals, silently."""
    core = tokenizers.Tokenizer.from_str(base._core.to_str())
    core.normalizer = normalizers.Lowercase()
    return Tokenizer(core, base.config)


def few_words(_base):
    """A vocabulary of whole words; the others are all one token."""
    words = {word: i for i, word in enumerate([*SPECIAL, "<|unk|>", "what", "is", "a", "heron", "bird"])}
    core = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(word, normalized=False) for word in (*SPECIAL, "<|unk|>")])
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "eot_token": "<|end|>"}
    return Tokenizer(core, {**names, "unk_token": "<|unk|>", "chat_template": TEMPLATE})


def without_template(base):
    return Tokenizer(base._core, {k: v for k, v in base.config.items() if k != "chat_template"})


def user(content, **more):
    return {"role": "user", "content": content, **more}


def bot(content, **more):
    return {"role": "assistant", "content": content, **more}


def talk(*turns, **more):
    return [{"id": "a", "messages": list(turns), **more}]


ASK, ANSWER = user("what is 2 + 2?"), bot("it is 4.")
GOOD = talk(ASK, ANSWER)
THINKING = bot("<think>two and two</think>it is 4.")
LONG = "how are you? " * 12
SAID = "one heron stood in the cold river and looked at the two of us for long"


def turns(body, *, before="{{ bos_token }}", prompt="<|assistant|>"):
    """A template with `body` for each message."""
    asked = f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    return f"{before}{{% for message in messages %}}{body}{{% endfor %}}{asked}"


WRITE = "<|{{ message.role }}|>{{ message.content }}<|end|>"
LETTERS = "[{{ message.role }}]{{ message.content }}<|end|>"
KNOWN = "{% if message.role in ('user', 'assistant') %}" + WRITE + "{% endif %}"
THOUGHTLESS = (
    "<|{{ message.role }}|>{% if '</think>' in message.content and not loop.last %}"
    "{{ message.content.split('</think>')[1] }}{% else %}{{ message.content }}{% endif %}<|end|>"
)
ENDLESS = "<|{{ message.role }}|>{{ message.content }}{% if message.role != 'assistant' %}<|end|>{% endif %}"
NEWLINE = "<|{{ message.role }}|>{{ message.content }}{% if message.role == 'assistant' %}{{ '\n' }}{% endif %}<|end|>"
TWICE = "<|{{ message.role }}|>{{ message.content }}<|end|>{% if message.role == 'assistant' %}<|end|>{% endif %}"
APART = "<|{{ message.role }}|>{{ message.content }}<|end|>{% if message.role == 'user' %}<|bos|>{% endif %}"
TRIMMED = "<|{{ message.role }}|>{{ message.content | trim }}<|end|>"
LOWER = "<|{{ message.role }}|>{{ message.content | lower }}<|end|>"
MARKED = "{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
MISPLACED = "<|{{ message.role }}|>{% generation %}{{ message.content }}<|end|>{% endgeneration %}"  # users' turns, too
PARTLY = "<|{{ message.role }}|>{% if message.role == 'assistant' and loop.last %}" + MARKED + (
    "{% else %}{{ message.content }}<|end|>{% endif %}"
)  # fmt: skip
AFTER = "<|{{ message.role }}|>{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>" + (
    "you? {% endgeneration %}{% else %}{{ message.content }}<|end|>{% endif %}"
)  # fmt: skip


@dataclass
class Broken:
    """An animal: its examples, how they are read, and the one rule that it breaks."""

    rule: str
    examples: list
    tokenizer: object = None
    form: str = "chat"
    train_on: str = "assistant"
    length: int = 64
    fatal: bool = True
    more: set = field(default_factory=set)
    """Rules that break with it."""
    held: list = field(default_factory=list)
    """Examples that are held out."""
    fails: bool = False
    """Whether data.contamination is fail."""


SILENT = turns(LETTERS, prompt="")
POLITE = turns(
    WRITE, before="{{ bos_token }}{% if messages[0].role != 'system' %}<|system|>be helpful<|end|>{% endif %}"
)


def called(name, **more):
    """An assistant's turn that calls a tool."""
    return bot("hello", tool_calls=[{"type": "function", "function": {"name": name, "arguments": {}}, **more}])


def result(content="4", **more):
    return {"role": "tool", "content": content, **more}


ADDS = [{"type": "function", "function": {"name": "add_up"}}]
TOOLS = CHATML_TEMPLATES["chatml_tools"].replace("<|im_start|>", "<|bos|>").replace("<|im_end|>", "<|end|>")
"""With calls and results, in marks that the small tokenizer has."""


def numbered(count, content="it is {}."):
    """Examples of one form and of different content."""
    return [{"id": str(i), "messages": [user(f"what is {i}?"), bot(content.format(i))]} for i in range(count)]


def pair(chosen, rejected, **prompt):
    return [{"id": "a", **prompt, "chosen": chosen, "rejected": rejected}]


def text(content):
    return [{"id": "a", "text": content}]


def completion(prompt, said):
    return [{"id": "a", "prompt": prompt, "completion": said}]


ZOO = {
    # what people hand in
    "an empty answer": Broken("empty_turn", talk(ASK, bot(""))),
    "an answer of white space": Broken("empty_turn", talk(ASK, bot(" \n "))),
    "an empty answer earlier on": Broken("empty_turn", talk(ASK, bot(""), ASK, ANSWER)),
    "a completion of white space": Broken("empty_turn", completion("what is 2 + 2?", "  \n")),
    "a text of white space": Broken("empty_turn", text("\n\n"), form="text"),
    "content that is a number": Broken("form", talk(user(4), ANSWER)),
    "content in parts": Broken("form", talk(user([{"type": "text", "text": "hello"}]), ANSWER)),
    "a completion that is a number": Broken("form", completion("what is 2 + 2?", 4)),
    "a prompt that is None": Broken("form", completion(None, "it is 4.")),
    "texts where conversations are read": Broken("form", text("hello there")),
    "a verdict in words": Broken("form", [{**GOOD[0], "label": "false"}], form="labels", train_on="last_turn"),
    "an empty question": Broken("empty_turn", talk(ASK, ANSWER, user(" \n"), ANSWER)),
    "no assistant turn": Broken("no_answer", talk(ASK)),
    "the assistant first": Broken("assistant_first", talk(ANSWER, ASK, ANSWER)),
    "two answers in a row": Broken("assistant_twice", talk(ASK, ANSWER, bot("you?"))),
    "two answers in a row in a pair's prompt": Broken(
        "assistant_twice", pair([ASK, bot("a"), ANSWER, ASK, ANSWER], [ASK, bot("a"), ANSWER, ASK, bot("5")]),
        form="pairs", train_on="last_turn", length=99,
    ),
    "a result without a call": Broken(
        "tool_orphan", talk(ASK, bot("hello"), result(), ANSWER), with_template(TOOLS), length=400
    ),
    "a result that a user asks for": Broken(
        "tool_orphan", talk(ASK, result(), ANSWER), with_template(TOOLS), length=400
    ),
    "a result of a call that nobody made": Broken(
        "tool_orphan", talk(ASK, called("add_up", id="c1"), result(tool_call_id="c2"), ANSWER, tools=ADDS),
        with_template(TOOLS), length=400,
    ),
    "two results of one call": Broken(
        "tool_orphan", talk(ASK, called("add_up"), result(), result(), ANSWER, tools=ADDS), with_template(TOOLS),
        length=400,
    ),
    "a second result behind words in brackets": Broken(
        "tool_orphan", talk(ASK, called("add_up"), result(), bot("(no)"), result(), ANSWER, tools=ADDS),
        with_template(TOOLS), length=500,
    ),
    "a call of a tool that there is not": Broken(
        "unknown_tool", talk(ASK, called("divide"), result(), ANSWER, tools=ADDS), with_template(TOOLS), length=400
    ),
    "a user turn at the end": Broken("unanswered", talk(ASK, ANSWER, ASK), fatal=False),
    "the word None as a prompt": Broken("none_text", talk(user("None"), ANSWER)),
    "the word nan after a label": Broken("none_text", completion("hello there\nInput: nan", "it is 4.")),
    "the word nan as a completion": Broken("none_text", completion("what is 2 + 2?", "nan")),
    "the word None as an answer": Broken("none_text", talk(ASK, bot(" None\n"))),
    "the word nan as a text": Broken("none_text", text("nan"), form="text"),
    "missing answers among many": Broken("none_text", [*numbered(90), *talk(ASK, bot("None"))]),
    "one missing answer among very many": Broken(
        "none_text", [*numbered(110), *talk(ASK, bot("None"))], fatal=False
    ),
    "a letter that was lost": Broken("replacement", talk(ASK, bot("caf\ufffd")), length=99),
    "a text in the wrong encoding": Broken("replacement", text("caf\ufffd \ufffd"), form="text", length=99),
    "a lost letter in one text of very many": Broken(
        "replacement", [*numbered(110), *talk(ASK, bot("\ufffd"))], fatal=False, length=99
    ),
    "sixty of two hundred alike": Broken(
        "repeated", [*numbered(140), *({**numbered(1)[0], "id": f"again {i}"} for i in range(60))]
    ),
    "one example in eight again": Broken(
        "repeated", [*numbered(7), {**numbered(1)[0], "id": "again"}], fatal=False
    ),
    "a text that is there twice": Broken(
        "repeated", [*text("hello there"), {**text("hello there")[0], "id": "b"}], form="text"
    ),
    "the word None in a system message": Broken(
        "none_text", talk({"role": "system", "content": "None"}, ASK, ANSWER)
    ),
    "a special token spelled by a user": Broken(
        "special_spelling", talk(user("what is <|end|>?"), ANSWER), fatal=False
    ),
    "an end of text in the data": Broken("special_spelling", completion("what is 2 + 2?", " it is 4.<|eos|>")),
    "a corpus with end-of-text marks": Broken("special_spelling", text("hello<|endoftext|>there"), form="text"),
    "another template's marks": Broken(
        "special_spelling", talk(ASK, bot("it is 4.<|im_end|>\n<|im_start|>user\nhello"))
    ),
    "two examples with one id": Broken("same_id", [*GOOD, *talk(user("hello"), ANSWER)]),
    # templates
    "a template that writes two beginnings": Broken(
        "double_bos", GOOD, with_template(turns(WRITE, before="{{ bos_token }}<|bos|>"))
    ),
    "a template in letters that writes two beginnings": Broken(
        "double_bos", GOOD, with_template(turns(LETTERS, before="{{ bos_token }}<|bos|>", prompt="[assistant]"))
    ),
    "a template that begins each turn anew": Broken("double_bos", GOOD, with_template(turns(APART))),
    "a template that asks for no answer": Broken("generation_prompt", GOOD, with_template(SILENT)),
    "a template with a system message of its own": Broken("system_added", GOOD, with_template(POLITE), fatal=False),
    "a template that ends answers twice": Broken("double_end", GOOD, with_template(turns(TWICE))),
    "a template that ends no answer": Broken("end_of_turn", GOOD, with_template(turns(ENDLESS))),
    "a template with a line break before the end": Broken("content_altered", GOOD, with_template(turns(NEWLINE))),
    "a template that drops earlier thoughts": Broken(
        "rewrites_history", talk(ASK, THINKING, ASK, ANSWER), with_template(turns(THOUGHTLESS))
    ),
    "a template that drops thoughts before a last question": Broken(
        "rewrites_history", talk(ASK, THINKING, ASK), with_template(turns(THOUGHTLESS)), more={"unanswered"}
    ),
    "generation marks around users": Broken("generation_marks", GOOD, with_template(turns(MISPLACED))),
    "generation marks around the last answer alone": Broken(
        "generation_marks", talk(ASK, ANSWER, ASK, ANSWER), with_template(turns(PARTLY))
    ),
    "generation marks around more than the turn": Broken("end_of_turn", GOOD, with_template(turns(AFTER))),
    "a template that drops the system message": Broken(
        "message_dropped", talk({"role": "system", "content": "be brief"}, ASK, ANSWER), with_template(turns(KNOWN))
    ),
    "a template that drops a role": Broken(
        "message_dropped", talk(ASK, bot("", tool_calls=[{}]), {"role": "tool", "content": "4 it says"}, ANSWER),
        with_template(turns(KNOWN)),
    ),
    "a template that knows no tools": Broken(
        "message_dropped", talk(ASK, ANSWER, tools=[{"type": "function", "function": {"name": "add_up"}}])
    ),
    "a template that strips": Broken(
        "content_altered", talk(user(" what is 2 + 2? "), ANSWER), with_template(turns(TRIMMED)), fatal=False
    ),
    "a template that rewrites answers": Broken(
        "content_altered", talk(ASK, bot("It Is 4.")), with_template(turns(LOWER))
    ),
    "a role that the template refuses": Broken("template", talk(ASK, {"role": "critic", "content": "no."}, ANSWER)),
    "no template": Broken("template", GOOD, without_template),
    # tokenizers and masks
    "a tokenizer without these words": Broken(
        "unknown_tokens", talk(user("what is a heron"), bot("a stork")), few_words, more={"content_altered"}
    ),
    "a tokenizer without capitals": Broken("round_trip", completion("what is", " No, it is 4."), lower_case),
    "text that a tokenizer changes": Broken("round_trip", text("Hello There"), lower_case, form="text"),
    "a completion that melts into its prompt": Broken("border", completion("what is 2 + 2? it is ", "no"), fatal=False),
    "a tool's result that is trained on": Broken(
        "tool_trained", talk(ASK, bot("hello", tool_calls=[{}]), {"role": "tool", "content": "4 it says"}, ANSWER),
        with_template(turns(WRITE)), train_on="all",
    ),
    "a short result that is trained on": Broken(
        "tool_trained", talk(ASK, bot("hello", tool_calls=[{}]), result("4"), ANSWER), with_template(turns(WRITE)),
        train_on="all",
    ),
    "prompts that fill the row": Broken(
        "nothing_trained", talk(user(LONG), ANSWER), length=24, more={"cut_end"}
    ),
    "answers longer than the row": Broken("cut_end", talk(ASK, bot(LONG)), length=24),
    # pairs and verdicts
    "chosen and rejected alike": Broken(
        "pair_identical", pair([ASK, ANSWER], [ASK, ANSWER]), form="pairs", train_on="last_turn"
    ),
    "chosen and rejected alike to the tokenizer": Broken(
        "pair_identical", pair("yes.", "Yes.", prompt="is it? "), lower_case, form="pairs", train_on="last_turn",
        more={"round_trip"},
    ),
    "a pair that differs after the cut": Broken(
        "pair_identical", pair([ASK, bot(LONG + "yes")], [ASK, bot(LONG + "no")]), form="pairs", train_on="last_turn",
        length=24, more={"cut_end"},
    ),
    # what is held out
    "a held-out text inside a longer one": Broken(
        "leak", text(f"before it came {SAID} and after"), form="text", held=[{"id": "h", "text": SAID}], fatal=False
    ),
    "a held-out answer with another greeting": Broken(
        "leak", talk(user("Hello. " + SAID), bot(SAID + " it is 4")),
        held=[{"id": "h", "messages": [user(SAID), bot(SAID + " it is 4.")]}], fails=True, length=400,
    ),
    "a held-out text in capitals": Broken(
        "leak", text(SAID), form="text", held=[{"id": "h", "text": SAID.upper()}], fatal=False
    ),
    "verdicts of one kind": Broken(
        "one_sided", [{"id": str(i), "messages": [user(f"is it {i}?"), ANSWER], "label": True} for i in range(4)],
        form="labels", train_on="last_turn",
    ),
}  # fmt: skip
