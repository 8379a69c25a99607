"""Stored conversations over HTTP, for a server to mount: `/v1/sessions`.

A question is asked where all are, POST /v1/chat/completions, with two fields more: `session`, and `parent`, the turn
that it is asked behind ("" for none; left away, the newest). `messages` then holds the new ones only.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from trivium.data.chat import Chat
from trivium.errors import SessionError, TriviumError
from trivium.inference.exchange import copy_for
from trivium.inference.feedback_routes import owner_of
from trivium.inference.sessions import Session, SessionStore, Turn, new_session
from trivium.registry import near_misses

MOST = 200_000
"""Bytes of a body: a system message of 20,000 characters, escaped."""
LISTED = 200
KINDS = {404: "not_found_error", 409: "conflict_error"}
Said = Callable[[], dict[str, Any]]
Read = Callable[[Request], Awaitable[bytes]]


def session_routes(
    store: SessionStore, chat: Chat, model: str, template: str, *, system: str = "", read: Read | None = None
) -> APIRouter:
    """The routes of a store. chat, model, template: of the model that is served. system: of conversations begun without
    one. read: the body of a request, within the server's bounds."""
    read = read or _body
    router = APIRouter()

    @router.get("/v1/sessions")
    async def sessions(request: Request) -> JSONResponse:
        def said() -> dict[str, Any]:
            mine = store.sessions(LISTED, owner_of(request))
            return {"object": "list", "data": [_told(s, model, template) for s in mine]}

        return await _answered(said)

    @router.post("/v1/sessions")
    async def begin(request: Request) -> JSONResponse:
        def said(given: dict[str, Any]) -> dict[str, Any]:
            title, own = given.get("title") or "", given.get("system") or system
            made = store.create(new_session(model, template, system=own, title=title, owner=owner_of(request)))
            return _told(made, model, template, [])

        return await _asked(read, request, ("title", "system"), said)

    @router.get("/v1/sessions/{id}")
    async def session(id: str, request: Request) -> JSONResponse:
        return await _answered(lambda: _whole(store, store.get(id, owner_of(request)), model, template))

    @router.post("/v1/sessions/{id}")
    async def change(id: str, request: Request) -> JSONResponse:
        def said(given: dict[str, Any]) -> dict[str, Any]:
            store.get(id, owner_of(request))
            with store.writing(id):
                if "head" in given:
                    store.move(id, given["head"] or None)
                found = store.update(id, title=given.get("title"))
            return _told(found, model, template)

        return await _asked(read, request, ("title", "head"), said)

    @router.post("/v1/sessions/{id}/copy")
    async def copy(id: str, request: Request) -> JSONResponse:
        def said(_: dict[str, Any]) -> dict[str, Any]:
            return _told(copy_for(store, store.get(id, owner_of(request)), chat, model, template), model, template)

        return await _asked(read, request, (), said)

    @router.delete("/v1/sessions/{id}")
    async def delete(id: str, request: Request) -> JSONResponse:
        def said() -> dict[str, Any]:
            store.get(id, owner_of(request))
            store.delete(id)
            return {"id": id, "object": "session", "deleted": True}

        return await _answered(said)

    return router


def _whole(store: SessionStore, found: Session, model: str, template: str) -> dict[str, Any]:
    store.path(found.head)  # raises for one that is damaged
    return _told(found, model, template, store.turns(found.id))


def _told(session: Session, model: str, template: str, turns: list[Turn] | None = None) -> dict[str, Any]:
    """A session as it is sent. foreign: it was held with another model or template, so it is not gone on with."""
    told = {
        "id": session.id, "object": "session", "title": session.title, "created": session.created,
        "updated": session.updated, "system": session.system, "model": session.model, "head": session.head,
        "foreign": (session.model, session.template) != (model, template),
    }  # fmt: skip
    if turns is not None:
        told["turns"] = [
            {"id": t.id, "parent": t.parent, "role": t.role, "text": t.text, "created": t.created, "data": t.data}
            for t in turns
        ]
    return told


async def _asked(
    read: Read, request: Request, fields: tuple[str, ...], said: Callable[[dict[str, Any]], dict[str, Any]]
) -> JSONResponse:
    try:
        given = _checked(await read(request), fields)
    except TriviumError as error:
        return _refused(error)
    return await _answered(lambda: said(given))


async def _answered(said: Said) -> JSONResponse:
    try:
        return JSONResponse(await run_in_threadpool(said))
    except TriviumError as error:
        return _refused(error)


def _refused(error: TriviumError) -> JSONResponse:
    status = getattr(error, "status", 500)
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    told = {"message": str(error)[:1000], "type": kind, "param": None, "code": getattr(error, "reason", None)}
    return JSONResponse({"error": told}, status)


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site can send text without asking, but not this
        raise SessionError("the body must be application/json", "form")
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MOST:
            raise SessionError(f"the body is longer than {MOST:,} bytes", "form")
    return body


def _checked(body: bytes, fields: tuple[str, ...]) -> dict[str, Any]:
    """The fields that were given, all text; null is unset."""
    try:
        given = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise SessionError(f"the body is not JSON: {str(error)[:80]}", "form") from error
    if not isinstance(given, dict):
        raise SessionError("the body must be an object", "form")
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if key not in fields:
            told = near_misses(key[:40], fields)
            raise SessionError(f"{key[:40]!r} is no field here; there are {', '.join(fields) or 'none'}.{told}", "form")
        if not isinstance(value, str):
            raise SessionError(f"{key} must be text", "form")
    return given
