"""The doctor's rules about one example: its words, what the template makes of them, its tokens and their mask.

`look` encodes examples by the functions that training uses, and keeps for each what its checks need. Where encoding
itself refuses an example, that is a finding like any other, so that a person sees all that is wrong at once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from trivium.data.chat import Chat, Encoded, _checked
from trivium.data.contamination import content_of
from trivium.data.lint import COPIES, FEW, MOST_COPIES, MOST_CUT, Finding, found
from trivium.data.lint_turns import check_order, check_results, check_template, check_tools
from trivium.data.packing import _encode_texts, encode_turns, pair_sides
from trivium.data.source import FORM_WORDS, Example, Source, form_of
from trivium.data.tokenizer import Tokenizer
from trivium.errors import DataError

FOREIGN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<start_of_turn>",
           "<end_of_turn>", "[INST]", "[/INST]")  # fmt: skip
"""Marks of well-known templates: in a text they say that somebody else's template has been there."""

NONE = re.compile(r"(?:^|[\n:]) *(?:None|nan)\s*$")
"""A prompt that is, or ends in, what Python and pandas write for a missing value."""
MISSING = re.compile(r"\s*(None|nan)\s*")
"""An answer that is nothing else."""
LOST = "\ufffd"
"""What decoders write in place of bytes that they could not read."""

SPEAKERS = ("tool", "function", "ipython", "environment")
"""Roles of what neither a person nor the model has written."""

PROBE = "probe of a turn"

ANSWERS = ("assistant", "completion", "text")


@dataclass(frozen=True)
class How:
    """How a run reads its examples. form: what the objective reads. length: tokens that a document may have.

    turns: what becomes of a conversation whose template rewrites earlier turns, see `Chat.documents`.
    """

    tokenizer: Tokenizer
    form: str
    train_on: str
    length: int
    room: int = 0  # for prompts that a policy answers: tokens of the longest prompt
    turns: str = "refuse"
    chat: Chat = field(init=False)
    special: dict[int, str] = field(init=False)  # the special tokens' spelling, by id

    def __post_init__(self) -> None:
        added = self.tokenizer._core.get_added_tokens_decoder().items()
        object.__setattr__(self, "chat", Chat(self.tokenizer))
        object.__setattr__(self, "special", {i: token.content for i, token in added if token.special})


@dataclass
class Seen:
    """An example, what it becomes as examples of their own, and what each is encoded to.

    sides: the two answers of a pair; of a conversation that is forked, its beginning up to each fork's end.
    """

    example: Example
    sides: Sequence[Example]
    documents: list[Encoded]


def look(examples: Sequence[Example], how: How) -> tuple[list[Seen], list[Finding]]:
    """Every example that can be encoded, and everything that the rules find in all of them."""
    findings = list(check_copies(examples))
    readable = []
    for example in examples:
        wrong = list(check_form(example, how)) or list(check_words(example, how))
        findings += wrong
        if not any(f.rule in ("form", "empty_turn", "no_answer") for f in wrong):
            readable.append(example)
    findings += check_rare(readable, how)
    findings += check_template(readable, how.chat)
    seen = []
    try:
        seen = _encoded(readable, how)
    except DataError:  # which one, and what else: one by one
        for example in readable:
            try:
                seen += _encoded([example], how)
            except DataError as error:
                said = str(error).removeprefix(f"example {example['id']}: ")
                findings.append(found(error.rule or "form", example["id"], said))
    for one in seen:
        for side, document in zip(one.sides, one.documents, strict=True):
            try:
                findings += check_document(side, document, how)
            except DataError as error:
                findings.append(found(error.rule or "form", side["id"], str(error)))
        if how.form == "pairs":
            findings += check_pair(one, how)
    return seen, [*findings, *check_lengths(seen, how)]


def _encoded(examples: Sequence[Example], how: How) -> list[Seen]:
    """What training makes of the examples, before documents are cut to rows."""
    texts = [e for e in examples if "text" in e]
    encoded = iter([_listed(unit[0]) for unit in _encode_texts(texts, how.tokenizer)])
    asked = {e["id"]: pair_sides(e) if how.form == "pairs" else [e] for e in examples if "text" not in e}
    flat = [side for sides in asked.values() for side in sides]
    documents = encode_turns(flat, how.tokenizer, how.train_on, how.turns)
    found = {side["id"]: (side, [_listed(d) for d in made]) for side, made in zip(flat, documents, strict=True)}
    seen = []
    for e in examples:
        if "text" in e:
            seen.append(Seen(e, [e], [next(encoded)]))
            continue
        made = [pair for s in asked[e["id"]] for pair in _forks(*found[s["id"]])]
        seen.append(Seen(e, [side for side, _ in made], [document for _, document in made]))
    return seen


def _forks(side: Example, documents: Sequence[Encoded]) -> Iterator[tuple[Example, Encoded]]:
    """Each document with the part of the conversation that it is of."""
    for number, document in enumerate(documents, 1):
        if document.turns is None:
            yield side, document
        else:
            name = f"{side['id']}#{number}" if len(documents) > 1 else side["id"]
            yield {**side, "id": name, "messages": side["messages"][: document.turns[1] + 1]}, document


def _listed(document: Encoded) -> Encoded:
    """Plain numbers, whatever array they come in."""
    return Encoded([int(i) for i in document.ids], [bool(t) for t in document.trained], document.turns)


# ---- words


def words_of(example: Example) -> Iterator[tuple[str, str]]:
    """Everything that is said in an example, with who says it: a role, "prompt", "completion" or "text"."""
    for talk in ("messages", "chosen", "rejected"):
        if isinstance(example.get(talk), str):
            yield "completion", example[talk]
        else:
            yield from ((m["role"], m.get("content") or "") for m in example.get(talk, ()))
    yield from ((key, example[key]) for key in ("prompt", "completion", "text") if key in example)


def check_form(example: Example, how: How) -> Iterator[Finding]:
    """The fields that the objective reads, and their types."""
    id_, form = example["id"], form_of(example)
    wanted = {"any": ("text", "chat", "answers"), "chat": ("chat", "answers")}.get(how.form, (how.form,))
    if form not in wanted:
        has = ", ".join(k for k in example if k != "id")
        yield found("form", id_, f"has {has}; this objective needs {FORM_WORDS[wanted[0]]}")
        return
    talks = [k for k in ("messages", "chosen", "rejected") if isinstance(example.get(k), (list, tuple))]
    needed = {
        "text": ["text"],
        "pairs": talks if len(talks) == 2 else ["prompt", "chosen", "rejected"],
        "answers": talks or ["messages"],
    }.get(form, talks or ["prompt", "completion"])
    for key in needed:
        value = example.get(key)
        if key in talks:
            try:
                _checked(example[key])
            except (DataError, AttributeError, TypeError) as error:
                yield found(
                    "form", id_, str(error) if isinstance(error, DataError) else f"{key} is no list of messages"
                )
        elif not isinstance(value, str):
            yield found("form", id_, f"{key} is {str(value)[:40]!r} ({type(value).__name__}); it must be text")
    if form == "labels" and not isinstance(example["label"], (bool, int)):
        yield found("form", id_, f"label is {str(example['label'])[:40]!r}; it must be true or false")


def check_words(example: Example, how: How) -> Iterator[Finding]:
    """Empty answers, turns out of order, missing values and spelled marks."""
    id_ = example["id"]
    for key in ("messages", "chosen", "rejected"):
        if isinstance(example.get(key), (list, tuple)):
            messages = _checked(example[key])
            yield from _check_turns(id_, messages)
            yield from check_order(id_, messages)
            yield from check_results(id_, messages)
            if key != "rejected" and example.get("label", True):  # a bad answer may call what there is not
                yield from check_tools(id_, messages, example.get("tools") or ())
    for who, text in words_of(example):
        if who in ("completion", "text") and not text.strip():
            yield found("empty_turn", id_, f"its {who} is {'only white space' if text else 'empty'}; leave it out")
        if who in ("user", "system", "prompt") and NONE.search(text):
            said = text[-30:].replace("\n", "\\n")
            yield found("none_text", id_, f"a prompt ends in '{said}', which looks like a missing value; fill it in")
        yield from _check_marks(id_, who, text, how)


def _check_turns(id_: str, messages: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        yield found("no_answer", id_, "a conversation without an assistant turn has nothing to train on")
        return
    for m in messages:
        if m["role"] == "assistant" and not m["content"].strip() and not m.get("tool_calls"):
            yield found("empty_turn", id_, "an assistant turn is empty; leave the conversation out or cut it before")
        if m["role"] == "user" and not m["content"].strip():
            yield found("empty_turn", id_, "a user turn is empty, so its answer answers nothing; leave it out")
    if next((r for r in roles if r not in ("system", "developer")), "") == "assistant":
        yield found("assistant_first", id_, "the assistant speaks first, to nobody; begin with a user turn")
    if roles[-1] != "assistant":
        yield found("unanswered", id_, f"it ends with a turn of {roles[-1]}, which is read and never answered")


def _check_marks(id_: str, who: str, text: str, how: How) -> Iterator[Finding]:
    if "<" not in text and "[" not in text:
        return
    for mark in dict.fromkeys([*how.special.values(), *FOREIGN]):
        # of short ones, such as </s> and <s>, only those that begin or end a text: they are HTML, too
        if mark in text and (len(mark) > 4 or text.strip().startswith(mark) or text.strip().endswith(mark)):
            what = "it is trained as letters, not as that token" if who in ANSWERS else "it is read as letters"
            message = f"the {who} spells {mark}: {what}; take it out where a template or exporter left it"
            yield found("special_spelling", id_, message, fatal=who in ANSWERS)


def check_rare(examples: Sequence[Example], how: How) -> Iterator[Finding]:
    """What stands in an honest answer now and then, and in more of them only by mistake: fatal above FEW.

    A function returns None, and a page about encodings shows U+FFFD; a script that wrote missing values, or read a
    file in the wrong encoding, does it all over.
    """
    missing, lost = [], []
    for example in examples:
        words = list(words_of(example))
        said = [(who, text) for who, text in words if who in ANSWERS]
        for who, text in said:
            nothing = MISSING.fullmatch(text)
            if nothing and not any(re.search(rf"\b{nothing[1]}\b", other) for _, other in words if other != text):
                missing.append(
                    (example, f"its {who} is '{nothing[1]}', which looks like a missing value; leave it out")
                )
        trained = words if how.train_on == "all" else said
        broken = next((text for _, text in trained if LOST in text), "") if how.form != "answers" else ""
        if broken:
            at = broken.index(LOST)
            here = broken[max(0, at - 10) : at + 10]
            lost.append((example, f"it is trained on U+FFFD in {here!r}; read the data again in its own encoding"))
    for example, message in missing:  # what is asked for may rightly be None, where answers are checked
        fatal = len(missing) > FEW * len(examples) and form_of(example) != "answers"
        yield found("none_text", example["id"], message, fatal)
    for example, message in lost:
        yield found("replacement", example["id"], message, len(lost) > FEW * len(examples))


def check_copies(examples: Sequence[Example], *, fatal: bool = True) -> Iterator[Finding]:
    """Examples that are others again, as a whole: short answers may well be alike."""
    first: dict[str, str] = {}
    copies = [(e["id"], twin) for e in examples if (twin := first.setdefault(content_of(e), e["id"])) != e["id"]]
    if len(copies) > COPIES * len(examples):
        copy, twin = copies[0]
        message = (
            f"{len(copies):,} of the {len(examples):,} examples looked at are copies of others, such as {copy} of "
            f"{twin}; data.clean=[exact] leaves them out"
        )
        yield found("repeated", "", message, fatal and len(copies) > MOST_COPIES * len(examples))


# ---- tokens


def spans(document: Encoded) -> list[tuple[int, int]]:
    """The stretches of trained tokens, as (first, after the last)."""
    cut, place = [], 0
    for trained, run in groupby(document.trained):
        start, place = place, place + len(list(run))
        if trained:
            cut.append((start, place))
    return cut


def check_document(example: Example, document: Encoded, how: How) -> Iterator[Finding]:
    """A document as it is encoded, before it is cut to a row."""
    id_, ids, tokenizer = example["id"], document.ids, how.tokenizer
    again = _begins_again(ids, how)
    if again:
        bos = tokenizer.decode([ids[again]], special=True)
        message = f"{bos} begins the text and is there again as token {again}; the template must write it once"
        yield found("double_bos", id_, message)
    twice = next((a for a, b in zip(ids, ids[1:], strict=False) if a == b and a in tokenizer.stop_ids), None)
    if twice is not None:
        shown = tokenizer.decode([twice], special=True)
        yield found("double_end", id_, f"{shown} follows itself; one of the template and the data must not write it")
    if not any(document.trained[1:]):
        yield found("nothing_trained", id_, "no token of it is trained on; look at the template and objective.train_on")
    unknown = _unknown_id(tokenizer)
    if unknown is not None and any(i == unknown for i, t in zip(ids, document.trained, strict=True) if t):
        shown = tokenizer.decode([unknown], special=True)
        yield found("unknown_tokens", id_, f"trained text becomes {shown}; the tokenizer cannot write this data")
    if "messages" in example:
        yield from _check_talk(example, document, how)
    else:
        yield from _check_plain(example, document, how)


def _begins_again(ids: Sequence[int], how: How) -> int:
    """Where the token that begins a text follows itself, or begins another turn's mark; 0 if it does not.

    Alone it may be a mark of turns itself, as in ChatML and Llama 2; as the end of text, too, it may end one.
    """
    name = how.tokenizer.config.get("bos_token")
    bos = how.tokenizer._core.token_to_id(name) if name is not None else None
    if bos in how.tokenizer.stop_ids:
        return int(ids[:2] == [bos, bos])
    places = [i for i in range(1, len(ids)) if ids[i] == bos]
    return next((i for i in places if ids[i - 1] == bos or (i + 1 < len(ids) and ids[i + 1] in how.special)), 0)


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    name = tokenizer.config.get("unk_token") or getattr(tokenizer._core.model, "unk_token", None)
    found_id = tokenizer._core.token_to_id(name) if name else None
    return None if found_id in tokenizer.stop_ids else found_id  # GPT-2's is its end of text, which is trained


def _check_plain(example: Example, document: Encoded, how: How) -> Iterator[Finding]:
    """Text, or prompt and completion: the trained tokens are the text, and then the end."""
    id_, tokenizer = example["id"], how.tokenizer
    if document.ids[-1] not in tokenizer.stop_ids or not document.trained[-1]:
        yield found("end_of_turn", id_, "its last token is no trained end-of-text token")
    text = example["text"] if "text" in example else example["completion"]
    first = len(tokenizer.start) if "text" in example else 0
    if "completion" in example:
        prompt = tokenizer.encode(example["prompt"])
        first = len(tokenizer.start) + len(prompt)
        if document.ids[len(tokenizer.start) : first] != prompt:
            yield found("border", id_, "the tokens of the prompt are not those of the prompt alone")
        elif tokenizer.encode(example["prompt"] + text) != document.ids[len(tokenizer.start) : -1]:
            message = (
                "prompt and completion would share a token where they meet, and are kept apart as when the prompt is "
                "asked; begin completions, not end prompts, with the space between them"
            )
            yield found("border", id_, message, fatal=False)
    yield from _compare("round_trip", id_, text, tokenizer.decode(document.ids[first:-1]), "the tokenizer reads back")


def _compare(rule: str, id_: str, said: str, read: str, who: str) -> Iterator[Finding]:
    """Whether `read` is `said`: fatal where letters differ, a warning where white space inside does."""
    if read.strip() == said.strip():
        return
    letters, others = ("".join(unicodedata.normalize("NFKC", text).split()) for text in (said, read))
    at = next((i for i, (a, b) in enumerate(zip(said, read, strict=False)) if a != b), min(len(said), len(read)))
    here, there = said[max(0, at - 10) : at + 20], read[max(0, at - 10) : at + 20]
    yield found(rule, id_, f"{who} {there!r} where {here!r} was written", fatal=letters != others)


def _check_talk(example: Example, document: Encoded, how: How) -> Iterator[Finding]:
    """A conversation: what is rendered has all that was said, and what is trained is what the assistant said."""
    id_, chat, tools = example["id"], how.chat, example.get("tools") or ()
    messages = _checked(example["messages"])
    text = chat.render(chat._protected(messages), prompt=False, tools=chat._protected(tools))
    yield from _check_rendered(id_, messages, tools, text, how)
    shown = how.tokenizer.decode([i for i, t in zip(document.ids, document.trained, strict=True) if t])
    for m in messages:
        if (
            m["role"] in SPEAKERS
            and m["content"].strip()
            and m["content"].strip() in shown
            and _learnt(example, m, how)
        ):
            yield found("tool_trained", id_, "a tool's result is trained on as if the model wrote it; set "
                        "objective.train_on=assistant")  # fmt: skip
            break
    if how.train_on == "all":
        ends = sum(i in how.tokenizer.stop_ids for i in document.ids)
        if ends < sum(m["role"] == "assistant" for m in messages):
            yield found("end_of_turn", id_, "an assistant turn has no end-of-turn token")
        return
    first = document.turns[0] if document.turns else 0  # those before are context, and trained in other documents
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    wanted = answers if how.train_on == "assistant" else answers[-1:]
    trained = spans(document)
    if len(trained) != len(wanted):
        yield found("end_of_turn", id_, f"{len(trained)} stretches are trained on, and {len(wanted)} answers are there")
        return
    asked = chat.prompt_ids(messages[: wanted[0]], tools=tools) if wanted[0] else None
    if asked is not None and how.train_on == "assistant" and document.ids[: trained[0][0]] != asked:
        yield found("border", id_, "the tokens before the first answer are not those that a chat asks with")
    for (start, stop), number in zip(trained, wanted, strict=True):
        yield from _check_answer(id_, messages[number], document.ids[start:stop], how.tokenizer)


def _learnt(example: Example, spoken: Mapping, how: How) -> bool:
    """Whether a turn itself is trained on, not an answer that says the same: another word in its place is."""
    messages = [{**m, "content": PROBE} if m == spoken else m for m in _checked(example["messages"])]
    (documents,) = encode_turns([{**example, "messages": messages}], how.tokenizer, how.train_on, how.turns)
    trained = [i for d in documents for i, t in zip(d.ids, d.trained, strict=True) if t]
    return PROBE in how.tokenizer.decode(trained)


def _check_rendered(id_: str, messages: Sequence[Mapping], tools: Any, text: str, how: How) -> Iterator[Finding]:
    place = 0
    for m in messages:
        wanted = how.chat._protected(m["content"])
        at = text.find(wanted, place)
        if at >= 0:
            place = at + len(wanted)
        elif wanted.strip() and text.find(wanted.strip(), place) >= 0:
            place = text.find(wanted.strip(), place) + len(wanted.strip())
            message = f"the template takes white space from a turn of {m['role']}; take it out of the data too"
            yield found("content_altered", id_, message, fatal=False)
        elif m["role"] != "assistant" and _letters(wanted) and _letters(wanted) not in _letters(text):
            message = f"the template leaves out, or rewrites, a turn of {m['role']} ({m['content'][:40]!r})"
            yield found("message_dropped", id_, message)
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name", "") if isinstance(function, Mapping) else ""
        if name and name not in text:
            yield found("message_dropped", id_, f"the template leaves out the tool {name}; choose one that knows tools")


def _letters(text: str) -> str:
    """Letters and digits alone: what is left of a text in JSON, too."""
    return "".join(filter(str.isalnum, text))


def _check_answer(id_: str, message: Mapping, ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[Finding]:
    """One trained turn: what was said, then the end-of-turn token, then at most white space."""
    end = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in tokenizer.stop_ids), None)
    if end is None:
        yield found("end_of_turn", id_, "a trained turn has no end-of-turn token, so the model would never stop")
        return
    after = tokenizer.decode(ids[end + 1 :], special=True)
    if after:
        message_ = f"{after!r} is trained after the end of the turn, where nothing is drawn; end the generation block"
        yield found("end_of_turn", id_, message_, fatal=bool(after.strip()))
    said, read = message["content"], tokenizer.decode(ids[:end])
    if message.get("tool_calls") or read == said:
        return
    if said.strip() and read.strip() == said.strip():
        kept = f"the answer {said[-20:]!r} is trained as {read[-20:]!r}"
        more = len(read) > len(said)  # the template writes something that the model has to learn
        yield found("content_altered", id_, f"{kept}: white space around it is not the data's own", fatal=more)
    elif said.strip() not in read:
        yield from _compare("content_altered", id_, said, read, "the assistant's turn is trained as")


def check_pair(one: Seen, how: How) -> Iterator[Finding]:
    """What is kept of the two answers of a pair."""
    chosen, rejected = (d.ids for d in one.documents)
    if chosen == rejected:
        yield found("pair_identical", one.example["id"], "chosen and rejected are the same")
    elif chosen[: how.length] == rejected[: how.length]:
        message = f"chosen and rejected are the same in their first {how.length} tokens; raise batch.length"
        yield found("pair_identical", one.example["id"], message)


def check_lengths(seen: Sequence[Seen], how: How) -> Iterator[Finding]:
    """What a row's end takes away. Text is split and loses nothing."""
    cut = []
    for one in seen:
        longest = max(len(d.ids) for d in one.documents)
        if "text" in one.example or longest <= how.length:
            continue
        cut.append(one)
        if any(any(d.trained[1:]) and not any(d.trained[1 : how.length]) for d in one.documents):
            message = f"its prompt fills a row of {how.length} tokens, so it would be left out; raise batch.length"
            yield found("nothing_trained", one.example["id"], message, len(cut) > MOST_CUT * len(seen))
    for one in cut:
        longest = max(len(d.ids) for d in one.documents)
        message = (
            f"{longest} tokens are cut to the first {how.length} (their end goes, on the right); raise batch.length to "
            f"keep it, or cut the data"
        )
        yield found("cut_end", one.example["id"], message, fatal=len(cut) > MOST_CUT * len(seen))


# ---- prompts that a policy answers


def look_at_prompts(examples: Sequence[Example], source: Source, how: How) -> tuple[list[Seen], list[Finding]]:
    """Verifiable examples, of which the policy is given the prompt: nothing of them is trained on."""
    # tasks are drawn again and again anyway, and no answer of theirs is learnt by heart
    findings = list(check_copies(examples, fatal=False))
    seen, readable = [], []
    for example in examples:
        id_ = example["id"]
        wrong = list(check_form(example, how)) or list(check_words(example, how))
        findings += wrong
        if any(f.rule in ("form", "no_answer") for f in wrong):
            continue
        readable.append(example)
        messages = _checked(example["messages"])
        try:
            ids = how.chat.prompt_ids(messages[:-1])
            text = how.chat.render(how.chat._protected(messages[:-1]), prompt=True)
            findings += _check_rendered(id_, messages[:-1], (), text, how)
            if not source.score(example, messages[-1]["content"]).correct:
                message = f"its own answer {messages[-1]['content'][:40]!r} is scored as wrong, so no policy could win"
                findings.append(found("answer_scores", id_, message))
        except DataError as error:
            findings.append(found(error.rule or "form", id_, str(error)))
            continue
        if len(ids) > how.room:
            message = f"its prompt of {len(ids)} tokens leaves no room for the answer; {how.room} is the most"
            findings.append(found("prompt_room", id_, message))
        seen.append(Seen(example, [example], [Encoded(ids, [False] * len(ids))]))
    return seen, [*findings, *check_rare(readable, how), *check_template(readable, how.chat)]
