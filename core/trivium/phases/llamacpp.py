"""llama.cpp as the export gate's reader of a GGUF file: its own server, in a process of its own.

Where llama.cpp does not like a file it may end the process; and the server renders chats and stops as it will for those
who use the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trivium.errors import CheckpointError, ConfigError
from trivium.inference.llamacpp_server import FORCED, SECONDS, Server, environment, last_words

INSTALL = "pip install trivium-llm[gguf], or pip install xllamacpp"
PROBABLE = 20
"""How many tokens' log-probabilities are told of each step of the answer; of its first all are."""


@dataclass(frozen=True)
class Asked:
    """texts: to be tokenised as documents. message: what a user says, for the chat template; empty for none. prompt:
    ids that an answer of up to `answer` tokens is to follow. ends: ids that should end an answer. size: of the
    vocabulary."""

    texts: Sequence[str]
    message: str
    prompt: Sequence[int]
    answer: int
    ends: Sequence[int]
    size: int


@dataclass(frozen=True)
class Told:
    """ids: of each text, with its beginning. chat: ids of the rendered message. template: as it found it. answer:
    greedy, its end included where it ended. ended: whether an end ended it. first: the log-probability of every token
    (by id) to be the answer's first. steps: of the most probable ones of each step, by id. ends: those that did end an
    answer. version: of its package."""

    ids: list[list[int]]
    chat: list[int]
    template: str
    answer: list[int]
    ended: bool
    first: dict[int, float]
    steps: list[dict[int, float]]
    ends: list[int]
    version: str


def installed() -> None:
    """Raise ConfigError with what to install unless llama.cpp is there."""
    try:
        __import__("xllamacpp")
    except ImportError as error:
        raise ConfigError(
            f"format=gguf is checked with llama.cpp before it is called good, which is not installed: {INSTALL}"
        ) from error


def ask(file: Path, asked: Asked) -> Told:
    """What llama.cpp makes of a file. Raises CheckpointError with its own last words where it cannot read it."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "trivium.phases.llamacpp"], input=json.dumps({"file": str(file), **asdict(asked)}),
            capture_output=True, text=True, errors="replace", timeout=SECONDS, env=environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{file}: llama.cpp has not answered within {SECONDS} seconds") from error
    if done.returncode:
        raise CheckpointError(f"{file}: llama.cpp cannot read it: {last_words(done.stderr)}")
    told = json.loads(done.stdout.splitlines()[-1])
    numbered = [{int(id): logprob for id, logprob in step} for step in (told.pop("first"), *told.pop("steps"))]
    return Told(first=numbered[0], steps=numbered[1:], **told)


def answers(order: Mapping[str, Any]) -> dict[str, Any]:
    """What `Told` holds."""
    prompt, count, ends = order["prompt"], order["answer"], order["ends"]
    server = Server(order["file"], len(prompt) + count + 1)
    facts = server.get("/props")
    spoken = server.complete(prompt, count)
    answer = spoken["tokens"]
    chat: list[int] = []
    if order["message"]:
        asked = {"messages": [{"role": "user", "content": order["message"]}]}
        chat = server.tokenise(server.get("/apply-template", asked)["prompt"], rendered=True)
    forced = {end: server.complete(prompt, 2, logit_bias=[[end, FORCED]]) for end in ends}
    return {
        "ids": [server.tokenise(text) for text in order["texts"]],
        "chat": chat,
        "template": facts["chat_template"],
        "answer": answer,
        "ended": spoken["stop_type"] == "eos",
        "first": server.logprobs(prompt, order["size"], ends[0]),
        "steps": [server.logprobs(prompt + answer[:i], PROBABLE, ends[0]) for i in range(len(answer))],
        "ends": [end for end, said in forced.items() if said["stop_type"] == "eos"],
        "version": server.version,
    }


def main() -> None:
    """Read the order, obey, and tell."""
    told = answers(json.load(sys.stdin))
    sys.stdout.write("\n" + json.dumps(told) + "\n")
    sys.stdout.flush()
    os._exit(0)  # nothing is left to be put in order


if __name__ == "__main__":
    main()
