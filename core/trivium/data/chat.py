"""Conversations to tokens, with a mask of what the assistant wrote.

The rule: training tokenises exactly as a conversation does. While chatting, the prompt is rendered and encoded, the
answer's ids are appended as they were drawn, and the next turn is encoded by itself. So a conversation is cut at the
borders of assistant turns and each piece is encoded alone; the mask is then a matter of which piece a token is in.

Some templates write earlier turns otherwise once there are later ones (Qwen3's leaves out what was thought before the
last question). Such a conversation is forked: where what was written so far is no longer how the next prompt begins,
another document begins with that prompt. Each answer is then trained once, and after exactly what it is asked with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trivium.data.template import END, START, has_generation, render
from trivium.data.tokenizer import Tokenizer
from trivium.errors import DataError

Message = Mapping[str, Any]
"""role and content; of an assistant maybe tool_calls, and what else the template reads (name, reasoning_content)."""
Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of functions, as in `{"type": "function", "function": {"name", "description", "parameters"}}`."""

REWRITES = (
    "the chat template rewrites earlier turns, so what is trained is not what is asked; make of each answer a "
    "conversation of its own (objective.turns=fork does, but for objective.train_on=all), or set "
    "tokenizer.chat_template= to a template that keeps them"
)
BEGINS = (
    "the chat template begins an answer otherwise than it asks for one (add_generation_prompt), so what is trained is "
    "not what is asked; set tokenizer.chat_template= to a template that begins both alike"
)


@dataclass
class Piece:
    """A stretch of rendered text. trained: written by the assistant. exact: to its very end, as the template says."""

    text: str
    trained: bool
    exact: bool = False


@dataclass
class Encoded:
    """ids: token ids. trained: for each id, whether the loss counts it.

    turns: of a conversation that is forked, the first and the last of its messages, by number, that this document is
    about; those before are what the first is asked with. None where it is all of a conversation.
    """

    ids: list[int]
    trained: list[bool]
    turns: tuple[int, int] | None = None


@dataclass
class Document:
    """A rendered conversation, or a part of it, cut at the borders of assistant turns. turns: as in `Encoded`."""

    pieces: list[Piece]
    turns: tuple[int, int]
    forked: bool = False


class Chat:
    """Renders and encodes the conversations of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _specials(self) -> list[str]:
        # the marks themselves come first, so that a person's own U+E000 is hidden before any other is put in; tokens
        # that are not special (Qwen's <think>) may be read in anybody's text
        added = self.tokenizer._core.get_added_tokens_decoder().values()
        return ["\ue000", START, END, *(token.content for token in added if token.special)]

    def render(self, messages: Sequence[Message], *, prompt: bool, tools: Tools = (), marked: bool = False) -> str:
        """The template's text; prompt: ends where the assistant is to speak; marked: `{% generation %}` shows."""
        variables = {"messages": messages, "tools": list(tools) or None, "add_generation_prompt": prompt}
        template = self.tokenizer.template_for(tools=bool(tools))
        return render(template, {**variables, "documents": None, **self.tokenizer.words}, marked=marked)

    def documents(
        self, messages: Sequence[Message], train_on: str = "assistant", tools: Tools = (), turns: str = "refuse"
    ) -> list[Document]:
        """The rendered conversation as one document, or as several where the template rewrites what came before.

        turns: "fork" or "refuse", which raises DataError for such a template, as train_on="all" always does: what
        nobody draws has no prompt to stand after. Where the last turn alone is trained, there is one document anyway.
        """
        messages = _checked(messages)
        for m in messages:
            if m["role"] == "assistant" and not m["content"].strip() and not m.get("tool_calls"):
                raise DataError("an assistant turn is empty", "empty_turn")
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not answers:
            raise DataError("a conversation without an assistant turn has nothing to train on", "no_answer")
        messages, tools = self._protected(messages), self._protected(tools)
        refuses = train_on == "all" or (train_on == "assistant" and turns == "refuse")
        found: list[Document] = []
        done = ""
        for i in answers:
            before = self.render(messages[:i], prompt=True, tools=tools)
            after = self.render(messages[: i + 1], prompt=False, tools=tools)
            kept = self._kept(done, before)
            if found and not kept and refuses:
                raise DataError(REWRITES, "rewrites_history")
            if not after.startswith(before):
                raise DataError(BEGINS, "rewrites_history")
            if kept:
                _shorten(found[-1], len(done) - len(kept))
            else:
                found.append(Document([], (i, i)))
            trained = train_on == "assistant" or i == answers[-1]
            pieces = [Piece(before[len(kept) :], False), Piece(after[len(before) :], trained)]
            _ensure_written(_names(messages[i].get("tool_calls") or ()), pieces[1].text, "tool_calls")
            found[-1].pieces += pieces
            found[-1].turns = found[-1].turns[0], i
            done = after
        for document in found:
            _ensure_written(_names(tools), document.pieces[0].text, "tools")
        if answers[-1] != len(messages) - 1:
            whole = self.render(messages, prompt=False, tools=tools)
            if kept := self._kept(done, whole):
                _shorten(found[-1], len(done) - len(kept))
                found[-1].pieces.append(Piece(whole[len(kept) :], False))
                found[-1].turns = found[-1].turns[0], len(messages) - 1
            elif refuses:
                raise DataError(REWRITES, "rewrites_history")
        forked = len(found) > 1 or found[-1].turns[1] < len(messages) - 1
        found = [Document(d.pieces, d.turns, forked) for d in found if any(p.trained for p in d.pieces)]
        if train_on == "all":
            return [Document([Piece(p.text, True) for p in d.pieces], d.turns) for d in found]
        if has_generation(self.tokenizer.template_for(tools=bool(tools))):
            for d in found:
                marked = self.render(messages[: d.turns[1] + 1], prompt=False, tools=tools, marked=True)
                d.pieces = _cut_at_marks(d.pieces, marked, begun=d.turns[0] > answers[0])
        return found

    def encode(self, examples: Sequence[Mapping], train_on: str = "assistant") -> list[Encoded]:
        """Ids and masks of examples with `id`, `messages` and maybe `tools`, encoded together on all cores.

        train_on: assistant | last_turn (completion is the same) | all. A bad conversation is named by its id.
        """
        return [document for [document] in self.encode_turns(examples, train_on, "refuse")]

    def encode_turns(self, examples: Sequence[Mapping], train_on: str, turns: str) -> list[list[Encoded]]:
        """`encode`, to the documents of each example: several where `turns` is "fork" and the template rewrites."""
        cut = []
        for example in examples:
            with _naming(example):
                cut.append(self.documents(example["messages"], train_on, example.get("tools") or (), turns))
        ids = iter(self._encode_rendered([piece.text for found in cut for d in found for piece in d.pieces]))
        encoded = []
        for example, found in zip(examples, cut, strict=True):
            encoded.append([])
            for document in found:
                one = Encoded([], [], document.turns if document.forked else None)
                for piece in document.pieces:
                    tokens = next(ids)
                    one.ids += tokens
                    with _naming(example):
                        answer = piece.trained and train_on != "all"
                        one.trained += self._mask(tokens, piece) if answer else [piece.trained] * len(tokens)
                encoded[-1].append(one)
        return encoded

    def prompt_ids(self, messages: Sequence[Message], earlier: Sequence[int] = (), tools: Tools = ()) -> list[int]:
        """Ids to answer `messages` from. earlier: the ids of the conversation so far, kept as they are.

        With `earlier`, which ends with the end of the last answer, only what the template writes after it is encoded.
        """
        messages, tools = self._protected(_checked(messages)), self._protected(tools)
        text = self.render(messages, prompt=True, tools=tools)
        _ensure_written(_names(tools), text, "tools")
        if not earlier:
            return self._encode_rendered([text])[0]
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        asked = self.render(messages[:last], prompt=True, tools=tools)
        before = self._kept(self.render(messages[: last + 1], prompt=False, tools=tools), text)
        if not before or not before.startswith(asked):
            raise DataError("the chat template rewrites earlier turns; start a new conversation", "rewrites_history")
        # a line break after the end of the turn was not drawn; in training it is there, encoded by itself
        _, end, rest = before[len(asked) :].rpartition(self._end)
        after, new = self._encode_rendered([rest if end else "", text[len(before) :]])
        return [*earlier, *after, *new]

    @cached_property
    def _end(self) -> str:
        return self.tokenizer.decode([self.tokenizer.eot_id], special=True)

    def _kept(self, done: str, text: str) -> str:
        """What was rendered so far, if `text` begins with it; empty if not.

        Llama 3's template writes the prompt of an answer even after one: then it is all up to the last end of turn.
        """
        if text.startswith(done):
            return done
        kept = done[: done.rfind(self._end) + len(self._end)] if self._end in done else ""
        return kept if text.startswith(kept) else ""

    def _mask(self, tokens: list[int], piece: Piece) -> list[bool]:
        """True up to and including the end-of-turn token; what the template writes after it is not the assistant's."""
        end = self.tokenizer.eot_id
        if end not in tokens:
            raise DataError(
                "the chat template does not end an assistant turn with the end-of-turn token", "end_of_turn"
            )
        if piece.exact:
            return [True] * len(tokens)
        last = len(tokens) - 1 - tokens[::-1].index(end)
        return [i <= last for i in range(len(tokens))]

    def _protected(self, value: Any) -> Any:
        """Hide the spelling of special tokens in what people wrote from the template's reading of them."""
        if isinstance(value, str):
            for i, special in enumerate(self._specials):
                if special in value:
                    value = value.replace(special, f"\ue000{i}\ue001")
            return value
        if isinstance(value, Mapping):
            return {key: self._protected(inner) for key, inner in value.items()}
        return [self._protected(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    def _encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch(texts, special=True)
        for i, text in enumerate(texts):
            if "\ue000" in text:
                encoded[i] = self._encode_protected(text)
        return encoded

    def _encode_protected(self, text: str) -> list[int]:
        ids: list[int] = []
        first, *rest = text.split("\ue000")
        ids += self.tokenizer.encode_batch([first], special=True)[0]
        for part in rest:
            number, mark, after = part.partition("\ue001")
            known = mark and number.isdigit() and int(number) < len(self._specials)
            ids += self.tokenizer.encode(self._specials[int(number)] if known else "\ue000" + number + mark)
            ids += self.tokenizer.encode_batch([after], special=True)[0]
        return ids


def _shorten(document: Document, by: int) -> None:
    """Take characters off its end."""
    last = document.pieces[-1]
    last.text = last.text[: len(last.text) - by]


def _names(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tools, or calls of them, are called."""
    inner = (f.get("function") or f for f in functions)
    return [str(f["name"]) for f in inner if isinstance(f, Mapping) and f.get("name")]


def _ensure_written(names: Sequence[str], text: str, what: str) -> None:
    """Many templates pass over tools without a word, and the model would learn to call nothing."""
    for name in names:
        if name not in text:
            raise DataError(
                f"the chat template does not write {what} ({name}); set tokenizer.chat_template=chatml_tools, or to a "
                ".jinja file that does",
                "message_dropped",
            )


@contextmanager
def _naming(example: Mapping) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"example {example['id']}: {error}", error.rule) from error


def _cut_at_marks(pieces: Sequence[Piece], marked: str, begun: bool) -> list[Piece]:
    """Cut each answer where its `{% generation %}` block ends. Raises DataError where it begins elsewhere.

    begun: the first piece holds answers itself, with blocks of their own.
    """
    spans, place = [], 0
    for i, part in enumerate(marked.replace(END, START).split(START)):
        if i % 2:
            spans.append((place, place + len(part)))
        place += len(part)
    plain = "".join(p.text for p in pieces)
    if marked.replace(START, "").replace(END, "") != plain:
        raise DataError("the chat template's generation blocks change what it writes", "generation_marks")
    if begun:
        spans = [(start, end) for start, end in spans if end > len(pieces[0].text)]
    cut, place, answer = [], 0, iter(spans)
    for i, piece in enumerate(pieces):
        if i % 2:  # an answer: the pieces before it and after it are not
            start, end = next(answer, (-1, -1))
            if start != place or end > place + len(piece.text):
                raise DataError(
                    "the chat template's generation blocks are not what the assistant writes: one must begin where "
                    "add_generation_prompt ends and close with the turn",
                    "generation_marks",
                )
            inside = piece.text[: end - start]
            cut += [Piece(inside, piece.trained, exact=True), Piece(piece.text[len(inside) :], False)]
        else:
            cut.append(piece)
        place += len(piece.text)
    if next(answer, None) is not None:
        raise DataError(
            "the chat template has more generation blocks than the conversation has answers", "generation_marks"
        )
    return cut


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages without entries that are None, as many APIs and Arrow give them; a tool call may have no content."""
    if not messages:
        raise DataError("a conversation needs at least one message", "form")
    found = []
    for message in messages:
        given = {key: value for key, value in message.items() if value is not None}
        if given.get("role") == "assistant" and isinstance(given.get("tool_calls"), (list, tuple)):
            given.setdefault("content", "")
        if not isinstance(given.get("content"), str) or not isinstance(given.get("role"), str):
            raise DataError(f"a message needs a role and a content, both text; found {str(dict(message))[:80]}", "form")
        found.append(given)
    return found
