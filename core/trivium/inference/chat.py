"""A conversation: turns in, streamed answers out, history kept as the ids that were really read and drawn.

Where the template writes earlier turns otherwise than they were drawn, the history is what it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trivium.data.chat import Chat
from trivium.data.tokenizer import Tokenizer
from trivium.errors import BackendError, DataError, TriviumError
from trivium.inference.config import SamplingConfig
from trivium.inference.protocol import Backend
from trivium.inference.text import TextStream
from trivium.types import Request, SamplingParams

HELP = "/reset forgets the conversation, /exit leaves, /help shows this"


def sampling_params(config: SamplingConfig, stop_ids: tuple[int, ...]) -> SamplingParams:
    """Settings of a run -> parameters of a request."""
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_ids=stop_ids,
    )


class Conversation:
    """Messages and their exact ids. A turn that fails leaves both as they were."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, sampling: SamplingConfig, system: str = "") -> None:
        self.backend, self.tokenizer, self.sampling = backend, tokenizer, sampling
        self.chat = Chat(tokenizer)
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.ids: list[int] = []

    def ask(self, content: str) -> Iterator[str]:
        """Answer one user turn, as text pieces. The turn is kept when the answer is complete."""
        messages = [*self.messages, {"role": "user", "content": content}]
        try:
            prompt = self.chat.prompt_ids(messages, self.ids)
        except DataError as error:
            if error.rule != "rewrites_history":
                raise
            prompt = self.chat.prompt_ids(messages)  # as it was trained: what is asked with is rendered anew
        room = self.backend.capabilities().context - len(prompt)
        if room < 1:
            raise BackendError(f"the conversation fills the model's context ({len(prompt)} tokens); /reset starts anew")
        params = sampling_params(self.sampling, self.tokenizer.stop_ids)
        if params.max_tokens > room:
            params = SamplingParams(**{**params.__dict__, "max_tokens": room})
        turn = sum(m["role"] == "user" for m in messages)
        stream, drawn, reason = TextStream(self.tokenizer), [], None
        for event in self.backend.generate([Request(f"turn-{turn}", tuple(prompt), params)]):
            drawn.append(event.token_id)
            reason = event.finish_reason
            if event.finish_reason != "stop":
                yield stream.push(event.token_id)
        yield stream.finish()
        if reason is None:
            raise BackendError("the answer was aborted; the turn is not kept")
        if drawn[-1] != self.tokenizer.eot_id:  # cut short: close the turn, as every turn in training is closed
            drawn = [*drawn[: -1 if drawn[-1] in params.stop_ids else None], self.tokenizer.eot_id]
        answer = self.tokenizer.decode(drawn)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.ids = [*prompt, *drawn]


def talk(conversation: Conversation, read: Callable[[], str | None], write: Callable[[str], None]) -> None:
    """Read turns until the end of input or /exit. A turn that cannot be answered says why, and the talk goes on."""
    while (line := read()) is not None:
        line = line.strip()
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            conversation.reset()
            write("(forgotten)\n")
        elif line.startswith("/"):
            write(HELP + "\n")
        elif line:
            try:
                for piece in conversation.ask(line):
                    write(piece)
            except TriviumError as error:
                write(f"({error})")
            except KeyboardInterrupt:
                write(" (stopped; the turn is not kept)")
            write("\n")
