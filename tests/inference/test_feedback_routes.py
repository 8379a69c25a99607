"""Feedback over HTTP, through a real server on this machine."""

import socket
import threading
import time

import httpx
import pytest
from tests.inference.test_feedback_store import response

from trivium.inference.feedback import FeedbackStore, Limits

fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")


@pytest.fixture
def served(tmp_path):
    """served(store) -> a client of a server that has these routes."""
    from trivium.inference.feedback_routes import feedback_routes

    running = []

    def start(store):
        app = fastapi.FastAPI()
        app.include_router(feedback_routes(store))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        running.append((server, thread, client))
        return client

    yield start
    for server, thread, client in running:
        client.close()
        server.should_exit = True
        thread.join()


@pytest.fixture
def store(tmp_path):
    held = FeedbackStore(tmp_path / "f", Limits(per_minute=4))
    held.add(response("r1"))
    held.add(response("r2", answer="A long-legged bird."))
    yield held
    held.close()


def test_feedback_is_given_counted_and_removed(served, store):
    client = served(store)
    given = client.post("/v1/feedback", json={"id": "r1", "kind": "thumb", "value": "up", "comment": None})
    assert (given.status_code, given.json()) == (200, {"object": "feedback", "id": "r1", "number": 1, "new": True})
    again = client.post("/v1/feedback", json={"id": "r1", "kind": "thumb", "value": "up"})
    assert (again.status_code, again.json()["new"], again.json()["number"]) == (200, False, 1)
    stats = client.get("/v1/feedback/stats").json()
    assert (stats["records"], stats["entries"], stats["standing"]) == (2, 1, {"thumb": 1})
    gone = client.delete("/v1/feedback", params={"user": "ann"})
    assert gone.json() == {"object": "feedback.removed", "records": 2, "entries": 1}
    assert client.get("/v1/feedback/stats").json()["records"] == 0


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"[1]", 400, "the body must be an object with id, kind and value"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b'{"id": "r1", "kind": "thumb"}', 422, "feedback needs value"),
        (b'{"id": "r1", "kind": "thumb", "value": "up", "coment": "x"}', 422, "Did you mean comment?"),
        (b'{"id": "r9", "kind": "thumb", "value": "up"}', 404, "there is no response 'r9'"),
        (b'{"id": "r1", "kind": "score", "value": NaN}', 422, "a score is a finite number"),
        (b'{"id": "r1", "kind": "thumb", "value": "up", "user": "bob"}', 403, "given to another user"),
        (b'{"id": "' + b"r" * 200_000 + b'"}', 413, "the body is longer than 200,000 bytes"),
        (b'{"id": {"a": 1}, "kind": [1], "value": {}}', 422, "is not one of thumb"),
    ],
)
def test_bad_bodies_get_one_sentence(served, store, body, status, sentence):
    answer = served(store).post("/v1/feedback", content=body)
    assert answer.status_code == status
    assert sentence in answer.json()["error"]["message"]
    assert store.log() == []


def test_too_many_get_429_and_when_to_come_again(served, store):
    client = served(store)
    codes = [client.post("/v1/feedback", json={"id": "r1", "kind": "score", "value": i}).status_code for i in range(5)]
    assert codes == [200] * 4 + [429]
    answer = client.post("/v1/feedback", json={"id": "r1", "kind": "score", "value": 9})
    assert answer.headers["Retry-After"] == "60" and answer.json()["error"]["type"] == "rate_limit_error"
    assert client.delete("/v1/feedback").status_code == 422


def test_every_route_says_that_feedback_is_off(served):
    client = served(None)
    for answer in (
        client.post("/v1/feedback", json={"id": "r1", "kind": "thumb", "value": "up"}),
        client.delete("/v1/feedback", params={"user": "ann"}),
        client.get("/v1/feedback/stats"),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == (
            "feedback is off on this server; it is kept where server.feedback=true"
        )
