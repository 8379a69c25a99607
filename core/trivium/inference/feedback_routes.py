"""Feedback over HTTP: `POST` and `DELETE /v1/feedback`, `GET /v1/feedback/stats`, for a server to mount."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from trivium.errors import FeedbackError
from trivium.inference.feedback import FeedbackStore

OFF = "feedback is off on this server; it is kept where server.feedback=true"
MOST = 200_000
"""Bytes of a body: an edit of 20,000 characters, escaped, and what stands beside it."""


def feedback_routes(store: FeedbackStore | None) -> APIRouter:
    """The routes of a store; None: feedback is off, and each says so with 404."""
    router = APIRouter()

    anything = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}

    @router.post("/v1/feedback", openapi_extra={"requestBody": anything})
    async def give(request: Request) -> JSONResponse:
        async def said(there: FeedbackStore) -> dict[str, Any]:
            return await run_in_threadpool(there.feedback, await _body(request), owner_of(request))

        return await _answered(store, said)

    user = {"name": "user", "in": "query", "required": True, "schema": {"type": "string"}}

    @router.delete("/v1/feedback", openapi_extra={"parameters": [user]})
    async def remove(request: Request) -> JSONResponse:
        async def said(there: FeedbackStore) -> dict[str, Any]:
            user = request.query_params.get("user", "")
            return {"object": "feedback.removed", **await run_in_threadpool(there.remove, user, owner_of(request))}

        return await _answered(store, said)

    @router.get("/v1/feedback/stats")
    async def stats(request: Request) -> JSONResponse:
        async def said(there: FeedbackStore) -> dict[str, Any]:
            return {"object": "feedback.stats", **await run_in_threadpool(there.stats, owner_of(request))}

        return await _answered(store, said)

    return router


def owner_of(request: Request) -> str:
    """Who asks: the name of the key that was sent, empty where there is but one."""
    return getattr(request.state, "owner", "")


async def _answered(store: FeedbackStore | None, said: Any) -> JSONResponse:
    try:
        if store is None:
            raise FeedbackError(OFF, 404)
        return JSONResponse(await said(store))
    except FeedbackError as error:
        kind = {404: "not_found_error", 429: "rate_limit_error"}.get(error.status, "invalid_request_error")
        kind = kind if error.status < 500 else "server_error"
        body = {"message": str(error), "type": kind, "param": None, "code": None}
        return JSONResponse({"error": body}, error.status, {"Retry-After": "60"} if error.status == 429 else None)


async def _body(request: Request) -> dict[str, Any]:
    """The body, an object. Raises FeedbackError."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MOST:
            raise FeedbackError(f"the body is longer than {MOST:,} bytes", 413)
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FeedbackError(f"the body is not JSON: {str(error)[:80]}", 400) from error
    if not isinstance(given, dict):
        raise FeedbackError("the body must be an object with id, kind and value", 400)
    return given
