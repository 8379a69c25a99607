"""A model over HTTP, as OpenAI's API has it, until a signal ends it."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trivium.build import build_backend, build_encoder
from trivium.errors import ConfigError
from trivium.inference.loop import EngineLoop, aside
from trivium.phases.run import Run
from trivium.phases.speak import feedback_store, session_store
from trivium.registry import load
from trivium.training.stop import EXIT_CODE, SignalWatch

ASKS = {
    "chat": ("chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'),
    "text": ("completions", '"prompt": "Hello"'),
    "embeddings": ("embeddings", '"input": "Hello"'),
    "rerank": ("rerank", '"query": "Hello", "documents": ["Good morning", "A fish"]'),
}
"""Where a model of each kind is asked, and a first question."""
NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def run_serve(this: Run) -> int:
    """Answer until SIGTERM or Ctrl-C, then let what was begun end, and return 143."""
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        raise ConfigError(f'phase=serve needs {", ".join(missing)}: pip install "trivium-llm[serve]"')
    config = this.config
    if config.inference.name == "encoder" and config.init_from:
        raise ConfigError(
            f"init_from={config.init_from} has no part in inference=encoder, which reads inference.path="
            f"{config.inference.config.path}; leave one away"
        )
    parent = this.needs_parent() if config.inference.name != "encoder" else None
    limits = config.server
    store = None
    feedback = feedback_store(this)

    def loaded() -> tuple[EngineLoop, tuple[Any, ...]]:
        if parent is None:
            backend = build_encoder(config.inference.config, config.trainer.accelerator, this.say)
            this.note_parent("encoder", config.inference.config.path, backend.sha256)
            about = (config.inference.config.path, backend.sha256, backend.tokenizer, "text")
        else:
            model = parent.model(config.model)[0].eval()
            backend = build_backend(config.inference, model, parent.tokenizer, config.trainer.accelerator)
            about = (config.init_from, parent.sha256, parent.tokenizer, parent.form)
        return EngineLoop(backend, most=limits.max_requests, most_unread=limits.max_unread), about

    server = load("trivium.inference.server:listen"), load("trivium.inference.server:serve")
    sock = server[0](limits)
    try:
        engine, about = aside(loaded)
        named, sha256, tokenizer, form = about
        can = engine.capabilities
        served = load("trivium.inference.service:Served")(
            limits.model or Path(named).name, sha256, tokenizer,
            config.inference.config.sampling, config.system, int(time.time()), form,
        )  # fmt: skip
        if can.generates and tokenizer.has_template and config.sessions.keep:
            store = session_store(this)
        service = load("trivium.inference.service:Service")(
            engine, served, limits, feedback=feedback, sessions=store, full=config.sessions.full
        )
        port = sock.getsockname()[1]
        name = f"[{limits.host}]" if ":" in limits.host else limits.host
        way = "rerank" if can.rewards else "embeddings" if not can.generates else form
        path, asked = ASKS[way]
        key = " -H 'Authorization: Bearer KEY'" if limits.owners else ""

        def ready() -> None:
            this.say(
                f"{served.name} answers at http://{name}:{port}/v1 until Ctrl-C; ask: curl http://{name}:{port}/v1/{path}"
                f"{key} -H 'Content-Type: application/json' -d '{{{asked}}}'"
            )

        with SignalWatch(
            limits.drain_seconds + 10, at_once="answers were cut off", late="answers that had not ended were cut off"
        ) as watch:
            server[1](service, limits, sock, lambda: watch.received is not None, ready)
        return EXIT_CODE
    finally:
        sock.close()
        for kept in (store, feedback):
            if kept is not None:
                kept.close()
