"""Answers of a given form on the server: a large vocabulary costs at the start; a missing library is named."""

import json
import sys
import threading

import httpx
import pytest
import tokenizers
from tests.inference.serving import CONTEXT, model_of, running, tokenizer_of

from trivium.data.tokenizer import Tokenizer
from trivium.errors import BackendError
from trivium.inference import constrain
from trivium.types import Request, SamplingParams

FORM = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
HELD = {"type": "json_schema", "json_schema": {"name": "f", "schema": FORM}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
SIZE = 128_000


def tokenizer_of_size(size):
    """The small one, with a merge for every pair of bytes, and for those behind an "a" and a space, up to `size`."""
    base = tokenizer_of()
    made = json.loads(base.text)
    vocab, merges = made["model"]["vocab"], made["model"]["merges"]
    special = {token["content"] for token in made["added_tokens"]}
    pieces = [piece for piece in vocab if piece not in special and len(piece) == 1]
    number = max(vocab.values()) + 1
    for left in [lead + piece for lead in ("", "a", "Ġ") for piece in pieces]:
        for right in pieces:
            if left in vocab and left + right not in vocab and number < size:
                merges.append([left, right])
                vocab[left + right] = number
                number += 1
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(made)), base.config)


def test_streams_go_on_while_a_form_is_made_ready_for_128k_tokens(monkeypatch):
    """The table is there before the first question; a grammar is made beside the event loop; and what streams goes on:
    of another stream at least as many events come as the answer has tokens."""
    pytest.importorskip("llguidance")
    tokenizer = tokenizer_of_size(SIZE)
    assert tokenizer.vocab_size >= SIZE
    with running(tokenizer, model=model_of(tokenizer)) as server:
        made, loop = constrain.table_of.cache_info().misses, server.service.engine._events
        checked, check = [], server.backend.check
        monkeypatch.setattr(
            server.backend,
            "check",
            lambda request: (checked.append((request, threading.current_thread())), check(request))[1],
        )
        body = {"prompt": "a", "max_tokens": CONTEXT - 50, "stream": True,
                "logit_bias": {str(i): -100 for i in tokenizer.stop_ids}}  # fmt: skip
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60, trust_env=False) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            before = server.service.engine.stats.generated_tokens
            asked = {"messages": [{"role": "user", "content": "hello"}], "response_format": HELD, "max_tokens": 40}
            answer = server.post("/v1/chat/completions", asked)
            between = server.service.engine.stats.generated_tokens - before
        assert json.loads(answer["choices"][0]["message"]["content"])["a"] in (1, 2)
        assert between >= 2 * answer["usage"]["completion_tokens"] - 1
        assert constrain.table_of.cache_info().misses == made, "the table was made at the start"
        (first, *_) = [thread for request, thread in checked if request.params.json_schema]
        ident = server.thread.ident  # of the event loop
        assert loop.is_running() and first.ident not in (ident, server.service.engine._thread.ident)


def test_what_to_install_is_told_where_the_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)  # as Python has it: an import raises, and there is no spec
    assert not constrain.installed()
    with running() as server:
        for more in ({"response_format": HELD}, {"response_format": {"type": "json_object"}},
                     {"tools": TOOLS, "tool_choice": "required"}):  # fmt: skip
            body = {"messages": [{"role": "user", "content": "hello"}], **more}
            found = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60, trust_env=False)
            said = found.json()["error"]["message"]
            assert found.status_code == 400 and 'pip install -e ".[grammar]"' in said and "\n" not in said
        body = {"input": "hello", "text": {"format": {"type": "json_object"}}}
        found = httpx.post(server.url + "/v1/responses", json=body, timeout=60, trust_env=False)
        assert found.status_code == 400 and 'pip install -e ".[grammar]"' in found.json()["error"]["message"]
        for asked in ({"regex": "a+"}, {"json_schema": "{}"}):
            with pytest.raises(BackendError, match=r'pip install -e "\.\[grammar\]"$'):
                server.backend.check(Request("r", (10,), SamplingParams(max_tokens=2, **asked)))
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 2})["choices"]


def test_a_tokenizer_that_cannot_be_held_is_tried_once(monkeypatch):
    """Its table is not made again at each request."""
    pytest.importorskip("llguidance")
    tokenizer = tokenizer_of()
    monkeypatch.setattr(tokenizer, "eos_id", 10**9)  # no token of the vocabulary
    grammars = constrain.Grammars(tokenizer, tokenizer.vocab_size)
    made = constrain.table_of.cache_info().misses
    for _ in range(3):
        with pytest.raises(BackendError, match="cannot be held with this tokenizer"):
            grammars.constraint(SamplingParams(json_schema="{}"))
    assert constrain.table_of.cache_info().misses == made + 1
