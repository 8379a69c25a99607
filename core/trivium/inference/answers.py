"""Answers on their way: a request while the engine works on it, and the forms in which each endpoint sends it, whole or
piece by piece."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trivium.errors import SessionError, TriviumError
from trivium.inference import openai as wire
from trivium.inference.choice import Choice, Piece
from trivium.inference.exchange import Answer, Exchange
from trivium.inference.loop import Reply
from trivium.inference.tools import CallReader
from trivium.types import SamplingParams

if TYPE_CHECKING:  # it makes these
    from trivium.inference.service import Service


@dataclass(frozen=True)
class Counts:
    """What a request came to, for the metrics. first: seconds to its first token; None without one."""

    prompt: int
    completion: int
    first: float | None
    seconds: float


@dataclass
class Job:
    """Requests of one client on their way. choices: by the request's id, with the number that the client knows it by.

    prompts: ids of each prompt. params: of all of them. owner: whose they are.
    """

    id: str
    created: int
    reply: Reply
    prompts: list[list[int]]
    params: SamplingParams
    choices: dict[str, tuple[int, Choice]]
    done: Callable[[Counts], None]
    owner: str = ""

    async def pieces(self) -> AsyncIterator[tuple[int, Choice, Piece]]:
        """What is made, as it is made; leaving early ends what is not made yet."""
        try:
            async for event in self.reply:
                index, choice = self.choices[event.request_id]
                piece = choice.push(event)
                if choice.finish_reason is not None:
                    self.reply.end(event.request_id)
                yield index, choice, piece
        finally:
            self.close()

    def close(self) -> None:
        """Nobody reads on."""
        if self.done is not told_already:
            reply, done = self.reply, self.done
            self.done = told_already
            reply.close()
            first = reply.first - reply.began if reply.first else None
            done(Counts(self.prompt_tokens, self.completion_tokens, first, max(reply.last - reply.began, 0.0)))

    @property
    def in_order(self) -> list[Choice]:
        """Choices by their numbers."""
        return [choice for _, choice in sorted(self.choices.values(), key=lambda one: one[0])]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.drawn) for choice in self.in_order)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tokens of prompts and answers, and of the prompts those that were in the cache: each prompt counts once."""
        choices = self.in_order
        firsts = choices[:: max(1, len(choices) // max(1, len(self.prompts)))]
        return self.prompt_tokens, self.completion_tokens, sum(choice.cached for choice in firsts)


def told_already(_: Counts) -> None:
    """In place of who counts, for a job that was told of already or that nobody counts."""


class Reading:
    """What of a job's pieces is said, and what is called. said, calls: so far, of each choice by its number.

    forced: the whole text is one call. parallel: False ends an answer after its first.
    """

    def __init__(self, job: Job, tools: Sequence[Mapping[str, Any]], forced: bool, parallel: bool | None) -> None:
        self.job, self.parallel = job, parallel
        names = [tool["function"]["name"] for tool in tools]
        self._readers = [CallReader(names, bare=forced) for _ in job.choices] if tools else None
        self.said = [""] * len(job.choices)
        self.calls: list[list[dict[str, Any]]] = [[] for _ in job.choices]

    async def pieces(self) -> AsyncIterator[tuple[int, Choice, Piece, str, list[dict[str, Any]]]]:
        """Index, choice, piece, what of it is said and what is called."""
        async for index, choice, piece in self.job.pieces():
            said, called = piece.text, []
            if self._readers:
                reader = self._readers[index]
                said, called = reader.push(piece.text)
                if reader.calls and self.parallel is False and choice.finish_reason is None:
                    choice.finish_reason = "stop"
                    self.job.reply.end(f"{self.job.id}-{index}")
                if choice.finish_reason is not None:
                    rest, more = reader.finish()
                    said, called = said + rest, called + more
            self.said[index] += said
            self.calls[index] += called
            yield index, choice, piece, said, called


class ChatAnswer:
    """One request to /v1/chat/completions: whole, or chunk by chunk."""

    def __init__(
        self, service: Service, asked: wire.ChatRequest, job: Job, messages: list[dict[str, Any]],
        tools: list[dict[str, Any]], forced: bool,
    ) -> None:  # fmt: skip
        self.service, self.asked, self.job, self.messages, self.tools = service, asked, job, messages, tools
        self.reading = Reading(job, tools, forced, asked.parallel_tool_calls)

    async def pieces(self) -> AsyncIterator[tuple[int, Choice, Piece, str, list[dict[str, Any]]]]:
        """As they are read; each answer is recorded when it has ended."""
        async for index, choice, piece, said, called in self.reading.pieces():
            yield index, choice, piece, said, called
            if choice.finish_reason is not None:
                self.service.record(self.job, choice, index, self.messages, self.tools, self.asked.user)

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        kept: dict[int, list[Piece]] = {}
        async for index, _, piece, _, _ in self.pieces():
            kept.setdefault(index, []).append(piece)
        choices = []
        for index, choice in enumerate(self.job.in_order):
            calls, texts = self.reading.calls[index], self.service.texts
            logprobs = wire.chat_logprobs(wire.joined(kept[index]), texts) if self.asked.logprobs else None
            message = wire.chat_message(self.reading.said[index], calls)
            reason = wire.reason_of(choice, calls)
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        usage = wire.usage_of(*self.job.counts)
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as it is made."""
        usage: dict[str, Any] = {"usage": None} if self._wants_usage else {}
        for index in range(len(self.job.choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, None) | usage
        async for index, choice, piece, said, called in self.pieces():
            delta: dict[str, Any] = {"content": said} if said else {}
            if called:
                number = len(self.reading.calls[index]) - len(called)
                delta["tool_calls"] = [{"index": number + i, **call} for i, call in enumerate(called)]
            logprobs = wire.chat_logprobs(piece, self.service.texts) if self.asked.logprobs and piece.tokens else None
            if delta or logprobs:
                yield self._chunk(index, delta, logprobs, None) | usage
            if choice.finish_reason is not None:
                reason = wire.reason_of(choice, self.reading.calls[index])
                yield self._chunk(index, {}, None, reason) | usage
        if self._wants_usage:
            counted = wire.usage_of(*self.job.counts)
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": counted}

    @property
    def _wants_usage(self) -> bool:
        return bool(self.asked.stream_options and self.asked.stream_options.include_usage)

    def _head(self, kind: str) -> dict[str, Any]:
        model = self.service.served
        head = {"id": self.job.id, "object": kind, "created": self.job.created, "model": model.name}
        return {**head, "system_fingerprint": f"fp_{model.sha256[:12]}"}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}


class Holding:
    """What is held for an answer until the block is left in which it is read and kept, or until its job ends before
    anybody began to read."""

    def __init__(self, job: Job, held: ExitStack) -> None:
        self._held, self._begun = held, False
        done = job.done

        def ended(counts: Counts) -> None:
            if not self._begun:
                held.close()
            done(counts)

        job.done = ended

    def __enter__(self) -> None:
        self._begun = True

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Let go before that."""
        self._held.close()


class KeptAnswer(ChatAnswer):
    """A ChatAnswer that is kept in its conversation when it is whole, before the last that is sent of it."""

    def __init__(
        self, service: Service, asked: wire.ChatRequest, job: Job, exchange: Exchange, forced: bool, writing: ExitStack
    ) -> None:
        super().__init__(service, asked, job, exchange.messages, exchange.tools, forced)
        self.exchange, self.holding = exchange, Holding(job, writing)

    async def pieces(self) -> AsyncIterator[tuple[int, Choice, Piece, str, list[dict[str, Any]]]]:
        """As of any other; after the last one, the turn is kept."""
        with self.holding:
            async for piece in super().pieces():
                yield piece
            await asyncio.to_thread(self.exchange.commit, self._answers())

    def _answers(self) -> list[Answer]:
        job, seconds = self.job, self.job.reply.last - self.job.reply.began
        return [
            Answer(
                choice.turn_ids(),
                choice.finish_reason,
                {"seconds": seconds, "tokens": len(choice.drawn)},
                f"{job.id}-{i}" if i else job.id,
                self.reading.said[i],
                self.reading.calls[i],
            )
            for i, choice in enumerate(job.in_order)
        ]


class CompletionAnswer:
    """One request to /v1/completions."""

    def __init__(self, service: Service, asked: wire.CompletionRequest, job: Job) -> None:
        self.service, self.asked, self.job = service, asked, job
        n = asked.n or 1
        given = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
        texts = [one if isinstance(one, str) else None for one in given]
        decode = service.tokenizer.decode
        echoed = [
            (texts[i] if i < len(texts) else None) if texts[:1] != [None] else decode(ids)
            for i, ids in enumerate(job.prompts)
        ]
        self.echoed = [(text or "") if asked.echo else "" for text in echoed for _ in range(n)]

    def _choice(self, index: int, piece: Piece, before: str, reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self.asked.logprobs is not None:
            logprobs = wire.text_logprobs(piece, self.service.texts, len(self.echoed[index]), self.asked.logprobs)
        return {"index": index, "text": before + piece.text, "logprobs": logprobs, "finish_reason": reason}

    async def whole(self) -> dict[str, Any]:
        """The answers at once."""
        kept: dict[int, list[Piece]] = {}
        async for index, _, piece in self.job.pieces():
            kept.setdefault(index, []).append(piece)
        choices = [
            self._choice(i, wire.joined(kept[i]), self.echoed[i], choice.finish_reason)
            for i, choice in enumerate(self.job.in_order)
        ]
        return {**self._head(), "choices": choices, "usage": wire.usage_of(*self.job.counts)}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answers as they are made."""
        wants = bool(self.asked.stream_options and self.asked.stream_options.include_usage)
        usage: dict[str, Any] = {"usage": None} if wants else {}
        waiting = dict(enumerate(self.echoed))
        async for index, choice, piece in self.job.pieces():
            before = waiting.pop(index, "")
            if before or piece.text or piece.tokens or choice.finish_reason:
                yield {**self._head(), "choices": [self._choice(index, piece, before, choice.finish_reason)]} | usage
        if wants:
            yield {**self._head(), "choices": [], "usage": wire.usage_of(*self.job.counts)}

    def _head(self) -> dict[str, Any]:
        model = self.service.served
        head = {"id": self.job.id, "object": "text_completion", "created": self.job.created, "model": model.name}
        return {**head, "system_fingerprint": f"fp_{model.sha256[:12]}"}


class ResponseAnswer:
    """One request to /v1/responses: it is kept once it is whole, and only then."""

    def __init__(
        self, service: Service, asked: wire.ResponseRequest, job: Job, exchange: Exchange, forced: bool, held: ExitStack
    ) -> None:
        self.service, self.asked, self.job, self.exchange = service, asked, job, exchange
        self.holding = Holding(job, held)
        self.reading = Reading(job, exchange.tools, forced, asked.parallel_tool_calls)
        self.item = f"msg_{uuid.uuid4().hex}"

    def _body(self, status: str, **more: Any) -> dict[str, Any]:
        return wire.response_body(
            self.asked, self.job.id, self.job.created, self.service.served.name, self.job.params, status=status,
            **{"output": [], "usage": None, **more},
        )  # fmt: skip

    async def _finished(self) -> dict[str, Any]:
        """The whole response, kept."""
        (choice,), (said,), (calls,) = self.job.in_order, self.reading.said, self.reading.calls
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        output = [wire.output_message(self.item, said, status)] if said or not calls else []
        output += map(wire.output_call, calls)
        body = self._body(status, output=output, usage=wire.response_usage(*self.job.counts))
        if self.asked.store is not False:
            data = {"seconds": self.job.reply.last - self.job.reply.began}
            answer = Answer(choice.turn_ids(), choice.finish_reason, data, self.job.id, said, calls, body)
            body = {**body, "store": await asyncio.to_thread(self._keep, answer)}
        self.service.record(self.job, choice, 0, self.exchange.messages, self.exchange.tools, self.asked.user)
        return body

    def _keep(self, answer: Answer) -> bool:
        """Whether it is kept: not where what it goes on from was deleted while it was made."""
        try:
            self.exchange.commit([answer])
        except SessionError:
            if self.exchange.parent is None or self.service.store.has(self.exchange.parent):
                raise
            return False
        self.holding.end()  # the answer holds what it goes on from, by now
        self.service.store.keep_newest(self.service.limits.max_kept, self.job.owner)
        return True

    async def whole(self) -> dict[str, Any]:
        """The response at once."""
        with self.holding:
            async for _ in self.reading.pieces():
                pass
            return await self._finished()

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Events of the response as it is made, numbered. The message comes first, calls behind it."""
        number, opened = 0, False

        def event(kind: str, **more: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            return {"type": kind, "sequence_number": number - 1, **more}

        at = {"item_id": self.item, "output_index": 0, "content_index": 0}
        empty = wire.output_message(self.item, "", "in_progress")

        def opening() -> list[dict[str, Any]]:
            return [
                event("response.output_item.added", output_index=0, item={**empty, "content": []}),
                event("response.content_part.added", **at, part=empty["content"][0]),
            ]

        started = self._body("in_progress")
        yield event("response.created", response=started)
        yield event("response.in_progress", response=started)
        try:
            with self.holding:
                async for _, _, _, said, _ in self.reading.pieces():
                    if said and not opened:
                        opened = True
                        for one in opening():
                            yield one
                    if said:
                        yield event("response.output_text.delta", **at, delta=said, logprobs=[])
                body = await self._finished()
        except TriviumError as error:
            failed = {"code": "server_error", "message": str(error)}
            yield event("response.failed", response=self._body("failed", error=failed))
            return
        for index, item in enumerate(body["output"]):
            if item["type"] == "message":
                for one in opening() if not opened else ():
                    yield one
                (part,) = item["content"]
                yield event("response.output_text.done", **at, text=part["text"], logprobs=[])
                yield event("response.content_part.done", **at, part=part)
            else:
                where = {"item_id": item["id"], "output_index": index}
                begun = {**item, "arguments": "", "status": "in_progress"}
                yield event("response.output_item.added", output_index=index, item=begun)
                yield event("response.function_call_arguments.delta", **where, delta=item["arguments"])
                told = {"arguments": item["arguments"], "name": item["name"]}
                yield event("response.function_call_arguments.done", **where, **told)
            yield event("response.output_item.done", output_index=index, item=item)
        yield event(f"response.{body['status']}", response=body)
