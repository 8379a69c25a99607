"""Conversations to tokens, with a mask of what the assistant wrote.

The rule: training tokenises exactly as a conversation does. While chatting, the prompt is rendered and encoded, the
answer's ids are appended as they were drawn, and the next turn is encoded by itself. So a conversation is cut at the
borders of assistant turns and each piece is encoded alone; the mask is then a matter of which piece a token is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trivium.data.tokenizer import Tokenizer
from trivium.errors import DataError

Message = Mapping[str, str]


@dataclass
class Piece:
    """A stretch of rendered text. trained: written by the assistant."""

    text: str
    trained: bool


@dataclass
class Encoded:
    """ids: token ids. trained: for each id, whether the loss counts it."""

    ids: list[int]
    trained: list[bool]


def _refuse(message: str) -> None:
    raise TemplateError(message)


@lru_cache(maxsize=16)
def _compiled(template: str):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


class Chat:
    """Renders and encodes the conversations of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _specials(self) -> list[str]:
        # the mark itself comes first, so that a person's own U+E000 is hidden before any other is put in
        return ["\ue000", *(token.content for token in self.tokenizer._core.get_added_tokens_decoder().values())]

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The template's text; prompt: ends where the assistant is to speak."""
        config = self.tokenizer.config
        try:
            return _compiled(self.tokenizer.template).render(
                messages=messages,
                add_generation_prompt=prompt,
                bos_token=config["bos_token"],
                eos_token=config["eos_token"],
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error

    def pieces(self, messages: Sequence[Message], train_on: str = "assistant") -> list[Piece]:
        """The rendered conversation, cut at the borders of assistant turns.

        Raises DataError for a template that rewrites history: its prefixes would not be what was trained on.
        """
        _check(messages)
        if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
            raise DataError("an assistant turn is empty")
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise DataError("a conversation without an assistant turn has nothing to train on")
        protected = [{**m, "content": self._protect(m["content"])} for m in messages]
        pieces, done = [], ""
        for i in turns:
            before, after = self.render(protected[:i], prompt=True), self.render(protected[: i + 1], prompt=False)
            if not before.startswith(done) or not after.startswith(before):
                raise DataError("the chat template rewrites earlier turns, so what is trained is not what is asked")
            trained = train_on == "assistant" or i == turns[-1]
            pieces += [Piece(before[len(done) :], False), Piece(after[len(before) :], trained)]
            done = after
        if turns[-1] != len(messages) - 1:
            pieces.append(Piece(self.render(protected, prompt=False)[len(done) :], False))
        return [Piece(p.text, True) for p in pieces] if train_on == "all" else pieces

    def encode(self, examples: Sequence[Mapping], train_on: str = "assistant") -> list[Encoded]:
        """Ids and masks of examples with `id` and `messages`, encoded together on all cores.

        train_on: assistant | last_turn (completion is the same) | all. A bad conversation is named by its id.
        """
        cut = []
        for example in examples:
            with _naming(example):
                cut.append(self.pieces(example["messages"], train_on))
        ids = iter(self._encode_rendered([piece.text for pieces in cut for piece in pieces]))
        found = []
        for example, pieces in zip(examples, cut, strict=True):
            encoded = Encoded([], [])
            for piece in pieces:
                tokens = next(ids)
                encoded.ids += tokens
                with _naming(example):
                    answer = piece.trained and train_on != "all"
                    encoded.trained += self._mask(tokens) if answer else [piece.trained] * len(tokens)
            found.append(encoded)
        return found

    def prompt_ids(self, messages: Sequence[Message], earlier: Sequence[int] = ()) -> list[int]:
        """Ids to answer `messages` from. earlier: the ids of the conversation so far, kept as they are.

        With `earlier`, `messages` ends in one new user turn and only the text after the last answer is encoded.
        """
        _check(messages)
        protected = [{**m, "content": self._protect(m["content"])} for m in messages]
        text = self.render(protected, prompt=True)
        if not earlier:
            return self._encode_rendered([text])[0]
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        before = self.render(protected[: last + 1], prompt=False)
        if not text.startswith(before):
            raise DataError("the chat template rewrites earlier turns; start a new conversation")
        return [*earlier, *self._encode_rendered([text[len(before) :]])[0]]

    def _mask(self, tokens: list[int]) -> list[bool]:
        """True up to and including the end-of-turn token; what the template writes after it is not the assistant's."""
        end = self.tokenizer.eot_id
        if end not in tokens:
            raise DataError("the chat template does not end an assistant turn with the end-of-turn token")
        last = len(tokens) - 1 - tokens[::-1].index(end)
        return [i <= last for i in range(len(tokens))]

    def _protect(self, content: str) -> str:
        """Hide the spelling of special tokens in a person's text from the template's reading of them."""
        for i, special in enumerate(self._specials):
            content = content.replace(special, f"\ue000{i}\ue001")
        return content

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


@contextmanager
def _naming(example: Mapping) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"example {example['id']}: {error}") from error


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise DataError("a conversation needs at least one message")
    for message in messages:
        if not isinstance(message.get("content"), str) or not isinstance(message.get("role"), str):
            raise DataError(f"a message needs a role and a content, both text; found {str(dict(message))[:80]}")
