"""HTTP, and only here: who may ask, how much is taken, what is sent back, and how it all ends.

Every byte string gets an answer in JSON: 4xx for what is asked wrongly, 429 for too much at once, and 5xx only where
the engine itself failed or the server is ending. A client that leaves, streaming or not, is noticed at once; one
that sends or reads too slowly is cut off.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import mimetypes
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from trivium.errors import ConfigError, TriviumError
from trivium.inference import openai as wire
from trivium.inference.answers import Counts
from trivium.inference.feedback_routes import feedback_routes, owner_of
from trivium.inference.loop import EngineFailure, EngineLoop, Overloaded, aside
from trivium.inference.openai import WireError
from trivium.inference.service import DOWN, Service
from trivium.inference.session_routes import session_routes
from trivium.schema import ServerConfig

T = TypeVar("T")
LOG = logging.getLogger("trivium.server")
PAGE = Path(__file__).parent / "page"
KEEP_ALIVE = 75
"""Seconds that a connection may be silent between two requests: longer than clients keep one (httpx 5, proxies 60), or
they would send a request while it is being closed."""
NO_KEY = "the key is missing or wrong: send Authorization: Bearer KEY"
TOO_LONG_HEAD = "the request's head has more than {:,} bytes"
LOCAL = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
}
ASKING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank")

CODES = {"missing": "not_found", "busy": "busy", "foreign": "foreign", "full": wire.TOO_LONG, "order": "invalid_value"}
"""Of a SessionError, by its reason."""


class Gone(Exception):
    """The client has left: there is nobody to answer."""


# ---- errors


def refusal(error: TriviumError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers that say what went wrong."""
    if isinstance(error, WireError):
        return error.status, error.body, {"Connection": "close"} if error.status in (408, 413) else {}
    if isinstance(error, Overloaded) and str(error) != DOWN:
        return 429, _said(error, "rate_limit_error", "rate_limit_exceeded"), {"Retry-After": "1"}
    if isinstance(error, Overloaded | EngineFailure):
        return 503 if str(error) == DOWN else 500, _said(error, "server_error", "server_error"), {"Retry-After": "1"}
    status = getattr(error, "status", 400)
    kind = {404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}.get(status, wire.INVALID)
    code = CODES.get(getattr(error, "reason", ""))
    return status, _said(error, kind, code), {"Retry-After": "60"} if status == 429 else {}


def _said(error: object, kind: str, code: str | None) -> dict[str, Any]:
    return WireError(str(error)[:1000], kind=kind, code=code).body


def _refused(status: int, message: str, kind: str = wire.INVALID, code: str | None = None) -> JSONResponse:
    return JSONResponse(_said(message, kind, code), status)


# ---- answers


def encoded(value: Any) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` comes to; it is cancelled, and Gone is raised, as soon as the client has left."""
    main = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({main, left}, return_when=asyncio.FIRST_COMPLETED)
        if not main.done():
            raise Gone
        return main.result()
    finally:
        for task in (main, left):
            task.cancel()
        await asyncio.gather(main, left, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of an answer, each with a blank line behind it."""

    def __init__(self, answer: Any, write_seconds: float, *, named: bool) -> None:
        """named: events have names, and the last one says that it is the last; else "[DONE]" does."""
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.answer, self.write_seconds, self.named = answer, write_seconds, named
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pushed(body: bytes, *, more: bool = True) -> None:
            try:
                async with asyncio.timeout(self.write_seconds):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError:
                scope["state"]["cut"]()
                raise Gone from None

        async def work() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            chunks: AsyncIterator[dict[str, Any]] = self.answer.chunks()
            try:
                async for chunk in chunks:
                    name = f"event: {chunk['type']}\n".encode() if self.named else b""
                    await pushed(name + b"data: " + encoded(chunk) + b"\n\n")
            except TriviumError as error:
                await pushed(b"data: " + encoded(refusal(error)[1]) + b"\n\n")
            await pushed(b"" if self.named else b"data: [DONE]\n\n", more=False)

        try:
            await unless_gone(receive, work())
        finally:
            self.answer.job.close()


# ---- routes


class Routes:
    """The endpoints, over HTTP."""

    def __init__(self, service: Service, limits: ServerConfig, metrics: Metrics) -> None:
        self.service, self.limits, self.metrics = service, limits, metrics
        self.draining = False

    async def body(self, request: Request) -> bytes:
        """The whole body, in time and within bounds. Raises WireError."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site can send text without asking, but not this
            raise WireError(f"the body must be application/json, not {kind[:100] or 'of no type'}", 415)
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > self.limits.max_body:
                        raise WireError(f"the body has more than {self.limits.max_body:,} bytes", 413)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise WireError(f"the body did not arrive in {self.limits.body_seconds:g} s", 408) from None

    def asking(self, form: type[wire.Wire], begin: Callable[[Any, str], Awaitable[Any]], *, named: bool = False) -> Any:
        """A route whose answer can be streamed."""

        async def route(request: Request) -> Response:
            asked = wire.parsed(form, await self.body(request))
            answer = await unless_gone(request.receive, begin(asked, owner_of(request)))
            if getattr(asked, "stream", None):
                return EventStream(answer, self.limits.write_seconds, named=named)
            try:
                return Response(encoded(await unless_gone(request.receive, answer.whole())), media_type=JSON)
            finally:
                answer.job.close()

        return route

    def telling(self, form: type[wire.Wire], answer: Callable[[Any], Awaitable[dict[str, Any]]]) -> Any:
        """A route that answers at once."""

        async def route(request: Request) -> Response:
            asked = wire.parsed(form, await self.body(request))
            told = await unless_gone(request.receive, answer(asked))
            return Response(encoded(told), media_type=JSON)

        return route

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.service.card()]})

    async def model(self, request: Request) -> Response:
        self.service.model(request.path_params["model"])
        return JSONResponse(self.service.card())

    async def response(self, request: Request) -> Response:
        found = await self.service.response(request.path_params["id"], owner_of(request))
        return Response(encoded(found), media_type=JSON)

    async def delete_response(self, request: Request) -> Response:
        return JSONResponse(await self.service.delete(request.path_params["id"], owner_of(request)))

    async def health(self, request: Request) -> Response:
        well = self.service.engine.healthy(self.limits.stale_seconds)
        return JSONResponse({"status": "ok" if well else "the engine does not answer"}, 200 if well else 503)

    async def ready(self, request: Request) -> Response:
        engine = self.service.engine
        ready = engine.healthy(self.limits.stale_seconds) and not self.draining
        return JSONResponse({"status": "ready" if ready else "not ready", "live": engine.live}, 200 if ready else 503)

    async def tell_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


JSON = "application/json"


class Metrics:
    """What Prometheus reads."""

    def __init__(self, engine: EngineLoop) -> None:
        self.registry = CollectorRegistry()
        self.engine = engine
        self.requests = Counter(
            "trivium_http_requests", "Requests by path and status", ["path", "code"], registry=self.registry
        )
        slow = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        fast = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
        self.first = Histogram(
            "trivium_time_to_first_token_seconds", "From the question to the first token", buckets=slow,
            registry=self.registry,
        )  # fmt: skip
        self.whole = Histogram(
            "trivium_request_seconds", "From the question to the last token", buckets=slow, registry=self.registry
        )
        self.each = Histogram(
            "trivium_time_per_token_seconds", "Of a request's tokens after the first, their mean", buckets=fast,
            registry=self.registry,
        )  # fmt: skip
        self.registry.register(self)

    def counted(self, counts: Counts) -> None:
        """What one request came to."""
        if counts.first is None:
            return
        self.first.observe(counts.first)
        self.whole.observe(counts.seconds)
        if counts.completion > 1:
            self.each.observe((counts.seconds - counts.first) / (counts.completion - 1))

    def collect(self) -> Any:
        """The engine's own counts, as they stand."""
        stats, engine = self.engine.stats, self.engine
        for name in ("requests", "prompt_tokens", "generated_tokens", "cached_tokens", "drafted_tokens",
                     "accepted_tokens", "preempted", "cut_texts"):  # fmt: skip
            yield CounterMetricFamily(f"trivium_{name}", "Of the engine, since it was started", getattr(stats, name))
        yield CounterMetricFamily("trivium_engine_failures", "Steps of the engine that raised", engine.failures)
        for name in ("running", "waiting", "slots", "used_slots", "cached_slots", "weight_version"):
            yield GaugeMetricFamily(f"trivium_{name}", "Of the engine, now", getattr(stats, name))
        yield GaugeMetricFamily("trivium_live", "Answers that are being made or waited for", engine.live)


def create_app(service: Service, limits: ServerConfig, *, extra: Callable[[FastAPI], None] | None = None) -> Gate:
    """The ASGI application. extra: adds routes of its own."""
    metrics = Metrics(service.engine)
    service.counted = metrics.counted
    routes = Routes(service, limits, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(aside, service.prepare)
        service.engine.start()
        yield
        await service.engine.stop()
        await service.finish()

    app = FastAPI(title="Trivium", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    posts = {
        "/v1/chat/completions": (wire.ChatRequest, routes.asking(wire.ChatRequest, service.begin_chat)),
        "/v1/completions": (wire.CompletionRequest, routes.asking(wire.CompletionRequest, service.begin_completion)),
        "/v1/responses": (
            wire.ResponseRequest,
            routes.asking(wire.ResponseRequest, service.begin_response, named=True),
        ),
        "/v1/embeddings": (wire.EmbeddingRequest, routes.telling(wire.EmbeddingRequest, service.embeddings)),
        "/v1/rerank": (wire.RerankRequest, routes.telling(wire.RerankRequest, service.rerank)),
    }
    errors: dict[int | str, dict[str, Any]] = {
        code: {"description": said, "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
        for code, said in ((400, "asked wrongly"), (404, "not here"), (408, "too slow"), (413, "too large"),
                           (415, "not JSON"), (429, "too much at once"))
    }  # fmt: skip
    for path, (form, route) in posts.items():
        schema = {"$ref": f"#/components/schemas/{form.__name__}"}
        content = {"required": True, "content": {JSON: {"schema": schema}}}
        app.add_api_route(
            path, route, methods=["POST"], openapi_extra={"requestBody": content}, responses=errors,
            operation_id=path.removeprefix("/v1/").replace("/", "_"), response_class=Response,
        )  # fmt: skip
    gets = {
        "/v1/models": routes.models, "/v1/models/{model:path}": routes.model, "/v1/responses/{id}": routes.response,
        "/health": routes.health, "/ready": routes.ready, "/metrics": routes.tell_metrics,
    }  # fmt: skip
    for path, route in gets.items():
        names = [part.strip("{}").partition(":")[0] for part in path.split("/") if part.startswith("{")]
        told = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
        app.add_api_route(path, route, methods=["GET"], openapi_extra={"parameters": told},
                          responses={404: errors[404]} if names else {},
                          response_class=PlainTextResponse if path == "/metrics" else JSONResponse)  # fmt: skip
    named = {"parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]}
    app.add_api_route("/v1/responses/{id}", routes.delete_response, methods=["DELETE"], openapi_extra=named,
                      responses={404: errors[404]})  # fmt: skip
    app.include_router(feedback_routes(service.feedback), responses=errors)
    if service.sessions is not None:
        served = service.served
        app.include_router(
            session_routes(
                service.sessions, service.chat, served.sha256, service.tokenizer.fingerprint, system=served.system,
                read=routes.body,
            )
        )  # fmt: skip
    _add_page(app)
    if extra is not None:
        extra(app)
    app.openapi_schema = _with_forms(app.openapi(), [form for form, _ in posts.values()])
    app.add_exception_handler(TriviumError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    return Gate(app, routes)


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, TriviumError)
    status, body, headers = refusal(error)
    return JSONResponse(body, status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"[:200]
    said = {404: f"there is no {what} here", 405: f"{what} is not possible"}.get(error.status_code, error.detail)
    response = _refused(error.status_code, said, code="not_found" if error.status_code == 404 else None)
    response.headers.update(error.headers or {})
    return response


def _with_forms(schema: dict[str, Any], forms: list[type[wire.Wire]]) -> dict[str, Any]:
    """The OpenAPI description with the requests' forms, and that of an error."""
    kept = schema.setdefault("components", {}).setdefault("schemas", {})
    for form in forms:
        told = form.model_json_schema(ref_template="#/components/schemas/{model}")
        kept.update(told.pop("$defs", {}))
        kept[form.__name__] = told
    kept["Error"] = ErrorForm.model_json_schema(ref_template="#/components/schemas/{model}")
    kept.update(kept["Error"].pop("$defs", {}))
    return schema


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorForm(BaseModel):
    """Every error's form."""

    error: ErrorBody


def _add_page(app: FastAPI) -> None:
    """The files of the chat page, read once: no path of a request reaches the disk."""
    if not PAGE.is_dir():
        return
    for path in sorted(p for p in PAGE.rglob("*") if p.is_file() and not p.name.startswith(".")):
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        body, name = path.read_bytes(), path.relative_to(PAGE).as_posix()

        async def route(_: Request, body: bytes = body, kind: str = kind) -> Response:
            return Response(body, media_type=kind, headers={**HEADERS, "Cache-Control": "no-cache"})

        for place in [f"/{name}", "/"] if name == "index.html" else [f"/{name}"]:
            app.router.add_route(place, route, methods=["GET"], include_in_schema=False)


# ---- who may ask


class Gate:
    """Before everything else: is there a key, is the server ending, is there room. Around it: counts, last resorts."""

    def __init__(self, app: FastAPI, routes: Routes) -> None:
        self.app, self.routes, self.limits = app, routes, routes.limits
        self._owners = [(key.encode(), name) for key, name in self.limits.owners.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            refused = self._refuse(scope)
            await (self.app if refused is None else refused)(scope, receive, noted)
        except Gone:
            status = 499  # nginx's number for a client that has left
        except Exception as error:
            if not isinstance(error, asyncio.CancelledError):
                LOG.exception("%s %s failed", scope["method"], scope["path"])
            if status:
                scope["state"]["cut"]()
            else:
                told = f"a fault of the server: {type(error).__name__}"
                await _refused(500, told, "server_error", "server_error")(scope, receive, noted)
        finally:
            known = scope.get("route")
            path = getattr(known, "path", "other")
            self.routes.metrics.requests.labels(path, str(status or 499)).inc()

    def _refuse(self, scope: Scope) -> Response | None:
        path, headers = scope["path"], dict(scope["headers"])
        if path == "/health":
            return None
        size = (
            sum(len(k) + len(v) + 4 for k, v in scope["headers"]) + len(scope["raw_path"]) + len(scope["query_string"])
        )
        if size > self.limits.max_headers:  # h11 limits what comes in pieces; this came whole
            return _refused(431, TOO_LONG_HEAD.format(self.limits.max_headers))
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if not self._owners and name not in (*LOCAL, self.limits.host.lower()):
            # a page whose name was pointed at this machine must not read what only this machine may ask
            return _refused(421, f"this server is not called {name[:100] or 'nothing'}; ask 127.0.0.1")
        owner = self._owner(headers.get(b"authorization", b"")) if self._owners else ""
        if owner is None:
            page = not path.startswith("/v1/")  # browsers ask for it, and send it with all that the page asks
            response = _refused(401, NO_KEY, code="invalid_api_key")
            response.headers["WWW-Authenticate"] = 'Basic realm="trivium"' if page else "Bearer"
            return response
        scope["state"]["owner"] = owner
        if self.routes.draining and path != "/ready":
            response = _refused(503, DOWN, "server_error", "server_error")
            response.headers["Retry-After"] = "1"
            return response
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.limits.max_body:
            return _refused(413, f"the body has {int(length[:20]):,} bytes; {self.limits.max_body:,} are taken")
        engine = self.routes.service.engine
        if path in ASKING and engine.full():
            status, body, more = refusal(engine.overloaded())
            return JSONResponse(body, status, more)
        return None

    def _owner(self, header: bytes) -> str | None:
        """The name of who has the key; None for no key that is known. Each is compared in full, whichever it is."""
        kind, _, given = header.partition(b" ")
        if kind.lower() == b"basic":  # what a browser asks a person for: any name, and the key as password
            with suppress(ValueError):
                given = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
        given = given.strip()
        known = [name for key, name in self._owners if hmac.compare_digest(given, key)]
        return known[0] if known else None


# ---- connections


class Connection(H11Protocol):
    """uvicorn's, with limits of time and number, and errors in JSON."""

    limits = ServerConfig()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, "cut": self._cut}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # asyncio does this for sockets that say they are TCP, which those of socket.create_server do not: without it
        # what is sent in two pieces, and each event of a stream, waits 40 ms for the other side's acknowledgement
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > self.limits.max_connections:
            self._write_error(429, "too many connections", "rate_limit_error", "retry-after: 1\r\n")
            return
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_head()
        self.loop.call_later(self.limits.write_seconds, self._cut_if_unread, self.transport.get_write_buffer_size())

    def _cut_if_unread(self, before: int) -> None:
        """Nothing of an answer's end was taken: closing would wait for a reader that may never come."""
        if before and self.transport.get_write_buffer_size() >= before and not self._answering:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if self._answering and self.cycle.response_started:
            self._cut()
            return
        said = TOO_LONG_HEAD.format(self.limits.max_headers) if status == 431 else "this is not HTTP"
        self._write_error(status, said)

    def _time_head(self) -> None:
        """A head that has begun to come must be whole in time, and so must a body that was answered before its end."""
        if self._answering:
            self._disarm()
        elif self._timer is None and (self.conn.trailing_data[0] or self.conn.their_state is h11.SEND_BODY):
            self._arm()

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self.limits.header_seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._answering or self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY:
            self._cut()
        elif self.conn.trailing_data[0]:
            self._write_error(408, f"the request's head did not arrive in {self.limits.header_seconds:g} s")
        else:
            self.transport.close()

    def _cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _write_error(self, status: int, message: str, kind: str = wire.INVALID, more: str = "") -> None:
        body = encoded(_said(message, kind, None))
        phrase = {400: "Bad Request", 408: "Request Timeout", 429: "Too Many Requests", 431: "Headers Too Large"}
        head = f"HTTP/1.1 {status} {phrase.get(status, 'Error')}\r\ncontent-type: application/json\r\n{more}"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
        self.loop.call_later(self.limits.write_seconds, self.transport.abort)


class Server(uvicorn.Server):
    """uvicorn's, ended from outside: what is being answered may end, until the deadline."""

    def __init__(self, config: uvicorn.Config, gate: Gate, stopping: Callable[[], bool], ready: Callable[[], None]):
        super().__init__(config)
        self.gate, self.stopping, self.ready = gate, stopping, ready

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await self._serve(sockets)  # signals are not uvicorn's here

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.stopping()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        routes = self.gate.routes
        routes.draining = True
        engine = routes.service.engine
        engine.refuse(DOWN)
        late = asyncio.get_running_loop().call_later(routes.limits.drain_seconds, engine.break_off, DOWN)
        await super().shutdown(sockets)
        late.cancel()


def listen(limits: ServerConfig) -> socket.socket:
    """The socket. Raises ConfigError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in limits.host else socket.AF_INET
    try:
        return socket.create_server((limits.host, limits.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"server.host={limits.host} server.port={limits.port} cannot be listened at ({error.strerror or error}); "
            "choose another, or server.port=0 for one that is free"
        ) from error


def serve(
    service: Service, limits: ServerConfig, sock: socket.socket, stopping: Callable[[], bool], ready: Callable[[], None]
) -> None:
    """Answer until `stopping`, then finish what was begun. ready: called once requests are taken."""
    gate = create_app(service, limits)
    bound = type("BoundConnection", (Connection,), {"limits": limits})
    config = uvicorn.Config(
        gate, http=bound, ws="none", loop="asyncio", lifespan="on", interface="asgi3", log_config=None,
        access_log=False, server_header=False, date_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(limits.drain_seconds) + 5, h11_max_incomplete_event_size=limits.max_headers,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    server = Server(config, gate, stopping, ready)
    asyncio.run(server.serve([sock]))
