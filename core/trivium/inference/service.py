"""What a server does with what it is asked, in OpenAI's forms and without HTTP.

Prompt to token: a request is checked (`openai`), rendered and encoded here, answered by the engine's thread (`loop`),
and comes back as text (`choice`). Everything that can be refused is refused before the first byte of an answer is sent.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from trivium.data.chat import Chat
from trivium.data.packing import encode_examples
from trivium.data.tokenizer import Tokenizer
from trivium.errors import BackendError, SessionError, TriviumError
from trivium.inference import openai as wire
from trivium.inference.answers import (
    ChatAnswer,
    CompletionAnswer,
    Counts,
    Job,
    KeptAnswer,
    ResponseAnswer,
    told_already,
)
from trivium.inference.choice import Choice
from trivium.inference.config import SamplingConfig
from trivium.inference.constrain import how_to_hold
from trivium.inference.exchange import CONTEXT, Exchange, begin, summary_prompt
from trivium.inference.feedback import FeedbackStore, Record
from trivium.inference.loop import EngineLoop
from trivium.inference.openai import TOO_LONG, WireError
from trivium.inference.protocol import similarities
from trivium.inference.sessions import RESPONSE, Session, SessionStore, Turn, new_session
from trivium.inference.text import TokenTexts
from trivium.inference.tools import writes_calls
from trivium.schema import ServerConfig
from trivium.types import Request, SamplingParams

T = TypeVar("T")
LOG = logging.getLogger("trivium.server")
NO_CALLS = (
    "this model's chat template does not write tools, or writes calls in a form that is not read here; tune it with "
    "tokenizer.chat_template=chatml_tools"
)
DOWN = "the server is shutting down"
ASKING = 16
"""Questions to kept conversations that are made ready at once."""


@dataclass(frozen=True)
class Served:
    """What is served. name: what clients call it. sha256, form: of its weights, and what it was last trained on, "chat"
    or "text"."""

    name: str
    sha256: str
    tokenizer: Tokenizer
    sampling: SamplingConfig
    system: str = ""
    created: int = 0
    form: str = "chat"


class Service:
    """The endpoints of one model. Its methods raise TriviumError before they return a job, and EngineFailure later."""

    def __init__(
        self,
        engine: EngineLoop,
        served: Served,
        limits: ServerConfig,
        *,
        feedback: FeedbackStore | None = None,
        sessions: SessionStore | None = None,
        full: str = "error",
        counted: Callable[[Counts], None] = told_already,
    ) -> None:
        """sessions: where conversations are kept, full: what is done when one fills the context. Responses are kept
        there, too, and without it in memory. counted: told what each request came to."""
        self.sessions, self.full = sessions, full
        self.store = SessionStore(None) if sessions is None else sessions
        self.engine, self.served, self.limits = engine, served, limits
        self.tokenizer, self.chat = served.tokenizer, Chat(served.tokenizer)
        self.feedback, self.counted = feedback, counted
        self.texts = TokenTexts(self.tokenizer)
        self.calls = self.tokenizer.has_template and writes_calls(self.chat)
        self._recording: set[asyncio.Task[None]] = set()
        self._asking = ThreadPoolExecutor(ASKING, thread_name_prefix="asking")  # they may wait for a summary

    def prepare(self) -> None:
        """What would take long at somebody's first question: the table of the vocabulary that constraints need."""
        if "json_schema" in self.engine.capabilities.sampling:
            asked = Request("prepare", (self.tokenizer.eos_id,), SamplingParams(max_tokens=1, json_schema="{}"))
            with suppress(BackendError):  # a tokenizer that they cannot be held with: who asks for one is told
                self.engine.backend.check(asked)

    # ---- what all of them share

    def model(self, name: str | None) -> None:
        """Refuse a request for another model."""
        if name is not None and name != self.served.name:
            raise WireError(
                f"the model {name!r} is not here; {self.served.name!r} is", 404, param="model", code="model_not_found"
            )

    def fit(self, text: str) -> None:
        """Refuse a text that cannot fit, however it is cut into tokens, before that takes long."""
        most = self.limits.max_prompt or self.engine.capabilities.context
        if len(text) > most * self.tokenizer.longest:
            raise WireError(f"a prompt of {len(text):,} characters is longer than {most:,} tokens", code=TOO_LONG)

    def room(self, ids: Sequence[int]) -> int:
        """Tokens that the context has left behind a prompt. Raises WireError where it has none."""
        context = self.engine.capabilities.context
        most = self.limits.max_prompt or context
        if len(ids) > most or len(ids) >= context:
            raise WireError(
                f"the prompt has {len(ids):,} tokens; the model's context is {context:,}, and this server takes "
                f"prompts of {most:,}", code=TOO_LONG,
            )  # fmt: skip
        return context - len(ids)

    async def job(
        self,
        kind: str,
        asked: wire.Sampling,
        prompts: list[list[int]],
        params: SamplingParams,
        stops: Sequence[str] = (),
        n: int = 1,
        owner: str = "",
    ) -> Job:
        """Have `n` answers made to each prompt."""
        if len(prompts) * n > self.limits.max_choices:
            raise WireError(
                f"{len(prompts)} prompts with n={n} are too many answers; {self.limits.max_choices} are taken",
                param="n", code="too_many",
            )  # fmt: skip
        id = f"{kind}-{uuid.uuid4().hex}"
        # a seed that was asked for gives the same answers again, whatever the request is called
        streams = [str(i) if asked.seed is not None else "" for i in range(len(prompts) * n)]
        requests = [Request(f"{id}-{i}", tuple(prompts[i // n]), params, stream) for i, stream in enumerate(streams)]
        check = self.engine.backend.check
        for request in requests[::n]:
            if params.json_schema or params.regex:  # its grammar takes a while
                await asyncio.to_thread(check, request)
            else:
                check(request)
        reply = await self.engine.ask(requests)
        choices = {r.id: (i, Choice(self.tokenizer, params.stop_ids, stops)) for i, r in enumerate(requests)}
        return Job(id, wire.now(), reply, prompts, params, choices, self.counted, owner)

    def params(self, asked: wire.Sampling, wanted: int | None, room: int, **more: Any) -> SamplingParams:
        """How to draw."""
        ends = self.tokenizer.stop_ids
        made = wire.params_of(asked, self.served.sampling, ends, wanted, room, self.limits.max_tokens)
        return replace(made, **more) if more else made

    def prompt_ids(self, messages: Sequence[dict[str, Any]], earlier: Sequence[int] = (), tools: Any = ()) -> list[int]:
        """Ids of a conversation. Raises DataError for what the template refuses."""
        for message in messages:
            self.fit(message["content"])
        return self.chat.prompt_ids(messages, earlier, tools)

    def with_system(self, messages: list[dict[str, Any]], system: str = "") -> list[dict[str, Any]]:
        """Messages behind the system message, where they bring none."""
        system = system or self.served.system
        if not system or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]

    # ---- /v1/chat/completions

    async def begin_chat(self, asked: wire.ChatRequest, owner: str = "") -> ChatAnswer:
        """Have a conversation answered."""
        self.model(asked.model)
        if asked.parent is not None and asked.session is None:
            raise WireError("parent needs session", param="parent", code="invalid_value")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise WireError("top_logprobs needs logprobs=true", param="top_logprobs", code="invalid_value")
        stops = wire.stops_of(asked.stop, self.limits)
        schema = wire.schema_of(asked.response_format, self.engine.capabilities, self.limits)
        choice = asked.tool_choice
        given = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
        tools, forced = self._tools(given, choice if isinstance(choice, str | None) else choice.function, bool(schema))
        wanted = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        more = {"top_logprobs": asked.top_logprobs or 0, "json_schema": schema or forced}
        new = wire.messages_of(asked.messages)
        if asked.session is not None:
            return await self._begin_kept(asked, asked.session, owner, new, tools, bool(forced), wanted, stops, more)
        messages = self.with_system(new)
        ids = await asyncio.to_thread(self.prompt_ids, messages, (), tools)
        params = self.params(asked, wanted, self.room(ids), **more)
        job = await self.job("chatcmpl", asked, [ids], params, stops, asked.n or 1, owner)
        return ChatAnswer(self, asked, job, messages, tools, bool(forced))

    async def _begin_kept(
        self, asked: wire.ChatRequest, id: str, owner: str, new: list[dict[str, Any]], tools: list[dict[str, Any]],
        forced: bool, wanted: int | None, stops: Sequence[str], more: Mapping[str, Any],
    ) -> ChatAnswer:  # fmt: skip
        """Have a question answered in a kept conversation, by its one writer."""
        store = self.sessions
        if store is None:
            raise WireError("this server keeps no conversations", 404, param="session", code="not_found")
        if wrong := [m["role"] for m in new if m["role"] not in ("user", "tool")]:
            raise WireError(f"a kept conversation takes new messages, not one of {wrong[0]}", param="messages")
        self._fits(new)
        session = await asyncio.to_thread(store.get, id, owner)
        waiting: list[Future[str]] = []
        loop = asyncio.get_running_loop()

        def summarise(leaving: Sequence[Turn], earlier: str) -> str:
            prompt, most = summary_prompt(self.chat, leaving, earlier, self.engine.capabilities.context)
            waiting.append(asyncio.run_coroutine_threadsafe(self._summary(prompt, most, owner), loop))
            return waiting[-1].result()

        def asking() -> Exchange:
            session = store.get(id)
            store.check(session, self.served.sha256, self.tokenizer.fingerprint)
            parent = session.head if asked.parent is None else asked.parent or None
            if parent is not None and store.turn(parent).session != id:
                raise SessionError(f"turn {parent!r} is not of conversation {id!r}", "missing")
            return begin(
                store, session, self.chat, new, parent=parent, context=self.engine.capabilities.context,
                wanted=wanted or self.served.sampling.max_tokens, full=self.full, summarise=summarise, tools=tools,
            )  # fmt: skip

        writing = ExitStack()
        writing.enter_context(store.writing(session.id))
        try:
            exchange = await loop.run_in_executor(self._asking, asking)
            params = self.params(asked, wanted, self.room(exchange.prompt_ids), **more)
            job = await self.job("chatcmpl", asked, [exchange.prompt_ids], params, stops, asked.n or 1, owner)
        except BaseException:
            writing.close()
            for one in waiting:
                one.cancel()
            raise
        return KeptAnswer(self, asked, job, exchange, forced, writing)

    async def _summary(self, prompt: list[int], most: int, owner: str) -> str:
        """The model's own words for what it will no longer read."""
        asked = wire.Sampling.model_validate({})
        params = replace(self.params(asked, None, most), max_tokens=most, temperature=0.0)
        job = await self.job("summary", asked, [prompt], params, owner=owner)
        async for _ in job.pieces():
            pass
        return job.in_order[0].text

    def _fits(self, new: Sequence[dict[str, Any]]) -> None:
        """Refuse messages that cannot fit, and results of calls where none can be written."""
        for message in new:
            self.fit(message["content"])
            if message["role"] == "tool" and not self.calls:
                raise WireError(NO_CALLS, param="messages", code="unsupported")

    def _tools(
        self, tools: list[dict[str, Any]], choice: str | wire.NamedFunction | None, formed: bool
    ) -> tuple[list[dict[str, Any]], str]:
        """Functions that the prompt shows, and the JSON schema of the one call that is asked for, if one is. formed:
        whether the answer's text is held to a form."""
        if not tools:
            if choice not in (None, "none", "auto"):
                raise WireError("tool_choice needs tools", param="tool_choice", code="invalid_value")
            return [], ""
        if choice == "none":
            return [], ""
        if not self.calls:
            raise WireError(NO_CALLS, param="tools", code="unsupported")
        if choice in (None, "auto"):
            return tools, ""
        if formed:
            raise WireError("response_format and a tool_choice that forces a call exclude each other", param="tools")
        if "json_schema" not in self.engine.capabilities.sampling:
            told = f"this server's engine cannot force a call{how_to_hold()}; use tool_choice=auto"
            raise WireError(told, param="tool_choice")
        names = [tool["function"]["name"] for tool in tools]
        wanted = names if isinstance(choice, str | None) else [choice.name]
        if unknown := [name for name in wanted if name not in names]:
            raise WireError(f"tool_choice names {unknown[0]}, which is not among tools", param="tool_choice")
        forms = [
            {
                "type": "object",
                "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters", {"type": "object"})},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for f in (tool["function"] for tool in tools)
            if f["name"] in wanted
        ]
        return tools, wire.checked_schema(forms[0] if len(forms) == 1 else {"anyOf": forms}, self.limits)

    # ---- /v1/completions

    async def begin_completion(self, asked: wire.CompletionRequest, owner: str = "") -> CompletionAnswer:
        """Have texts continued."""
        self.model(asked.model)
        stops = wire.stops_of(asked.stop, self.limits)
        n = asked.n or 1
        if asked.best_of is not None and asked.best_of != n:
            raise WireError("best_of must be n: no answers are thrown away here", param="best_of", code="unsupported")
        if asked.echo and asked.logprobs is not None:
            raise WireError("echo with logprobs is not supported: prompts have none", param="logprobs")
        prompts = await asyncio.to_thread(self.inputs, asked.prompt, "prompt")
        room = min(self.room(ids) for ids in prompts)
        params = self.params(asked, asked.max_tokens, room, top_logprobs=asked.logprobs or 0)
        job = await self.job("cmpl", asked, prompts, params, stops, n, owner)
        return CompletionAnswer(self, asked, job)

    def inputs(self, given: Any, name: str, before: str = "") -> list[list[int]]:
        """Ids of one or several texts, each with `before` before it, or lists of ids. Raises WireError."""
        several = isinstance(given, list) and not (given and isinstance(given[0], int))
        ones = given if several else [given]
        if not ones or len(ones) > wire.MOST_INPUTS:
            raise WireError(f"{name} has {len(ones)} entries; 1 to {wire.MOST_INPUTS:,} are taken", param=name)
        found = []
        for one in ones:
            if isinstance(one, str):
                self.fit(one)
                one = self.tokenizer.input_ids(before + one)
            vocabulary = self.engine.capabilities.vocab_size
            if not one or min(one) < 0 or (vocabulary and max(one) >= vocabulary):
                raise WireError(f"{name} must have tokens, with ids from 0 to {vocabulary - 1}", param=name)
            found.append(list(one))
        return found

    # ---- /v1/responses

    async def begin_response(self, asked: wire.ResponseRequest, owner: str = "") -> ResponseAnswer:
        """Have a conversation answered that goes on from a kept one, maybe."""
        self.model(asked.model)
        new, earlier = wire.input_of(asked.input), asked.previous_response_id
        if not new or (earlier and new[0]["role"] == "system"):
            wrong = "begins with a system message, which only a new conversation can" if new else "is empty"
            raise WireError(f"input {wrong}", param="input", code="invalid_value")
        self._fits(new)
        schema = wire.schema_of(asked.text.format if asked.text else None, self.engine.capabilities, self.limits)
        forms = [tool.model_dump(exclude_none=True, exclude={"type"}) for tool in asked.tools or ()]
        given = [{"type": "function", "function": form} for form in forms]
        tools, forced = self._tools(given, asked.tool_choice, bool(schema))
        wanted = asked.max_output_tokens

        def asking() -> Exchange:
            session, path = self._continued(earlier, owner) if earlier else (None, [])
            first = path[0].role if path else new[0]["role"]
            system = asked.instructions or ("" if first == "system" else self.served.system)
            if session is None:
                about = self.served.sha256, self.tokenizer.fingerprint
                session = new_session(*about, system=system, owner=owner, kind=RESPONSE)
            return begin(
                self.store, session, self.chat, new, parent=earlier or None, tools=tools, system=system,
                context=self.engine.capabilities.context, wanted=wanted or self.served.sampling.max_tokens,
            )  # fmt: skip

        held = ExitStack()
        if earlier:
            held.enter_context(self.store.going_on(earlier))
        try:
            exchange = await asyncio.to_thread(asking)
            room = self.room(exchange.prompt_ids)
            params = self.params(asked, wanted, room, json_schema=schema or forced)
            job = await self.job("resp", asked, [exchange.prompt_ids], params, owner=owner)
        except BaseException:
            held.close()
            raise
        return ResponseAnswer(self, asked, job, exchange, bool(forced), held)

    def _continued(self, id: str, owner: str) -> tuple[Session, list[Turn]]:
        """The conversation of a response, and its turns up to that. Raises SessionError."""
        turn, _ = self.store.response(id, owner)
        session = self.store.get(turn.session)
        try:
            self.store.check(session, self.served.sha256, self.tokenizer.fingerprint)
        except SessionError as error:
            told = f"response {id!r} was made by another model or chat template; begin a new conversation"
            raise SessionError(told, error.reason) from None
        return session, [one for one in self.store.path(id) if one.role != CONTEXT]

    async def response(self, id: str, owner: str = "") -> dict[str, Any]:
        """A response, as it was sent. Raises SessionError (404)."""
        return (await asyncio.to_thread(self.store.response, id, owner))[1]

    async def delete(self, id: str, owner: str = "") -> dict[str, Any]:
        """Forget a response. Raises SessionError (404)."""
        await asyncio.to_thread(self.store.delete_response, id, owner)
        return {"id": id, "object": "response", "deleted": True}

    # ---- /v1/embeddings, /v1/rerank

    async def embeddings(self, asked: wire.EmbeddingRequest) -> dict[str, Any]:
        """A vector of each input."""
        self.model(asked.model)
        inputs = await asyncio.to_thread(self.inputs, asked.input, "input", self.tokenizer.text_prompt)
        found = await self._embedded(inputs)
        if asked.dimensions is not None and asked.dimensions != len(found[0]):
            raise WireError(
                f"dimensions must be {len(found[0])}: this model's embeddings are not cut", param="dimensions"
            )
        # the official client asks for base64 of little-endian fp32
        told = [_base64(v) if asked.encoding_format == "base64" else v.tolist() for v in found]
        data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(told)]
        count = sum(map(len, inputs))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": self.served.name, "usage": usage}

    async def _embedded(self, inputs: Sequence[Sequence[int]]) -> list[Tensor]:
        if not self.engine.capabilities.embeds:
            raise WireError("this server's engine has no embeddings", code="unsupported")
        self._fit_context(inputs)
        embed = self.engine.backend.embed
        # one at a time, so that others are answered in between
        return [(await self.engine.call(lambda ids=ids: embed([ids])))[0] for ids in inputs]

    def _fit_context(self, inputs: Sequence[Sequence[int]]) -> None:
        context = self.engine.capabilities.context
        if too_long := [ids for ids in inputs if len(ids) > context]:
            raise WireError(f"{len(too_long[0])} tokens do not fit the model's context of {context}", code=TOO_LONG)

    def _answers_to(self, query: str, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as an answer to the query, as a reward model was trained on them."""
        for text in (query, *texts):
            self.fit(text)
        if self.served.form == "chat":
            asked = {"role": "user", "content": query}
            told = [{"messages": [asked, {"role": "assistant", "content": text}]} for text in texts]
        else:
            told = [{"prompt": query, "completion": text} for text in texts]
        examples = [{"id": f"documents[{i}]", **one} for i, one in enumerate(told)]
        return [one.ids for one in encode_examples(examples, self.tokenizer, "last_turn")]

    async def rerank(self, asked: wire.RerankRequest) -> dict[str, Any]:
        """Documents, the most relevant first: by the similarity of their vector and the query's, or by a reward model's
        score of each as an answer to the query."""
        self.model(asked.model)
        texts = [d if isinstance(d, str) else d.text for d in asked.documents]
        if self.engine.capabilities.rewards:
            inputs = await asyncio.to_thread(self._answers_to, asked.query, texts)
            self._fit_context(inputs)
            reward = self.engine.backend.reward
            scores = [(await self.engine.call(lambda ids=ids: reward([ids])))[0].item() for ids in inputs]
        else:
            queries = await asyncio.to_thread(self.inputs, asked.query, "query", self.tokenizer.query_prompt)
            documents = await asyncio.to_thread(self.inputs, texts, "documents", self.tokenizer.passage_prompt)
            inputs = queries + documents
            query, *others = await self._embedded(inputs)
            how = self.engine.capabilities.similarity
            scores = similarities(query, torch.stack(others), how).tolist()
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: asked.top_n]
        results = [{"index": i, "relevance_score": scores[i]} for i in order]
        if asked.return_documents:
            results = [{**one, "document": {"text": texts[one["index"]]}} for one in results]
        usage = {"total_tokens": sum(map(len, inputs))}
        id = f"rerank-{uuid.uuid4().hex}"
        return {"id": id, "model": self.served.name, "results": results, "usage": usage}

    # ---- /v1/models, /v1/feedback

    def card(self) -> dict[str, Any]:
        """The one model."""
        context = self.engine.capabilities.context
        about = {"created": self.served.created, "owned_by": "trivium", "max_model_len": context}
        return {"id": self.served.name, "object": "model", **about}

    def record(
        self, job: Job, choice: Choice, index: int, messages: list[dict[str, Any]], tools: list[dict[str, Any]],
        user: str | None,
    ) -> None:  # fmt: skip
        """Keep an answer, where feedback is on, beside answering."""
        feedback = self.feedback
        if feedback is None or not choice.drawn:
            return
        ids, latency = choice.turn_ids(), job.reply.last - job.reply.began
        drawn = [event.logprob for event, i in zip(choice.drawn, ids, strict=False) if event.token_id == i]
        missing, version = len(ids) - len(drawn), self.engine.stats.weight_version

        def add() -> None:
            feedback.add(
                Record(
                    id=job.id if index == 0 else f"{job.id}-{index}",
                    messages=messages,
                    answer=choice.text,
                    prompt_ids=job.prompts[0],
                    completion_ids=ids,
                    sampled=[True] * len(drawn) + [False] * missing,
                    logprobs=drawn + [0.0] * missing,
                    model=self.served.sha256,
                    template=self.tokenizer.fingerprint,
                    sampling=asdict(job.params),
                    weight_version=version,
                    latency=latency,
                    finish_reason=choice.finish_reason or "",
                    tools=tools,
                    user=user or "",
                    owner=job.owner,
                )
            )

        async def keep() -> None:
            try:
                await asyncio.to_thread(add)
            except TriviumError as error:
                LOG.warning("an answer was not kept for feedback: %s", error)

        task = asyncio.get_running_loop().create_task(keep())
        self._recording.add(task)
        task.add_done_callback(self._recording.discard)

    async def finish(self) -> None:
        """Wait for what is being kept."""
        await asyncio.gather(*self._recording)
        self._asking.shutdown(wait=False, cancel_futures=True)
        if self.store is not self.sessions:
            self.store.close()


def _base64(vector: Tensor) -> str:
    return base64.b64encode(vector.float().numpy().astype("<f4").tobytes()).decode()
