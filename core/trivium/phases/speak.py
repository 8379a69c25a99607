"""Answers in the terminal: prompts completed once, or a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trivium.build import build_backend
from trivium.data.chat import Chat
from trivium.data.tokenizer import Tokenizer
from trivium.errors import CheckpointError, ConfigError, SessionError
from trivium.evaluation.generation import complete
from trivium.inference.chat import HELP, talk
from trivium.inference.conversation import Answered, Conversation, sampling_params
from trivium.inference.feedback import FeedbackStore, Record
from trivium.inference.sessions import SessionStore
from trivium.inference.terminal import Terminal
from trivium.models.protocol import CausalLM
from trivium.phases.feedback import STORE
from trivium.phases.run import Run


def speaking_model(this: Run) -> CausalLM:
    """The parent's language model. Raises CheckpointError for a reward model, which has nothing to say."""
    parent = this.needs_parent()
    model, _ = parent.model(this.config.model)
    if model.score is not None:
        raise CheckpointError(f"{parent.path} is a reward model: it scores answers and writes none")
    return model


def prompt_ids(this: Run, tokenizer: Tokenizer, prompts: Sequence[str], *, chat: bool) -> list[list[int]]:
    """Token ids to answer each prompt from, as a user turn or as plain text."""
    if not chat:
        return [tokenizer.input_ids(p) for p in prompts]
    system = [{"role": "system", "content": this.config.system}] if this.config.system else []
    talker = Chat(tokenizer)
    return [talker.prompt_ids([*system, {"role": "user", "content": p}]) for p in prompts]


def run_generate(this: Run) -> int:
    """Answer prompts."""
    config = this.config
    parent = this.needs_parent()
    prompts = [config.prompt] if config.prompt else config.prompts
    if not prompts:
        raise ConfigError("phase=generate needs prompt='...' or prompts=['...','...']")
    model = speaking_model(this)
    tokenizer = parent.tokenizer
    backend = build_backend(config.inference, model, tokenizer, config.trainer.accelerator, parent)
    chat = config.prompt_format == "chat" or (config.prompt_format == "auto" and parent.form == "chat")
    params = sampling_params(config.inference.config.sampling, tokenizer.stop_ids)
    texts = complete(backend, tokenizer, prompt_ids(this, tokenizer, prompts, chat=chat), params)
    for prompt, text in zip(prompts, texts, strict=True):
        this.console.print(f"  [bold]{_plain(prompt)}[/]{'' if not chat else ' ->'} {_plain(text)}", highlight=False)
    this.write_samples(
        [{"kind": "generate", "prompt": p, "completion": t} for p, t in zip(prompts, texts, strict=True)]
    )
    return 0


def _plain(text: str) -> str:
    return text.replace("[", r"\[").strip("\n")


def run_chat(this: Run) -> int:
    """Talk in the terminal, or hold the conversation that `prompts` scripts."""
    config = this.config
    parent = this.needs_parent()
    parent.tokenizer.template  # noqa: B018 - refuses a tokenizer that cannot write conversations, before all else
    if parent.form != "chat":
        this.say("warning: this model was not tuned on conversations; expect its text to run on")
    model = speaking_model(this)
    backend = build_backend(config.inference, model, parent.tokenizer, config.trainer.accelerator, parent)
    script = iter(config.prompts)
    scripted = bool(config.prompts)
    terminal = Terminal(None if scripted else this.folder / "history")
    store = session_store(this, keep=bool(config.sessions.open or not scripted))
    conversation = Conversation(
        backend, parent.tokenizer, config.inference.config.sampling, config.system,
        store=store, model=parent.sha256, full=config.sessions.full,
    )  # fmt: skip

    def scripted_line() -> str | None:
        line = next(script, None)
        if line is not None:
            terminal.write(f"  you: {line}\n  model: ")
        return line

    feedback = ChatFeedback(kept) if (kept := feedback_store(this)) else None
    begun = 0
    try:
        if config.sessions.open:
            begun = open_or_name(conversation, config.sessions.open)
            this.say(f"conversation {config.sessions.open!r}, {len(conversation.ids)} tokens")
        if terminal.interactive and not scripted:
            this.say(HELP)
        with terminal.interrupts():
            read = scripted_line if scripted else terminal.read
            talk(conversation, read, terminal.write, terminal.stopped, feedback)
    finally:
        turns = [m["content"] for m in conversation.messages if m["role"] != "system"][begun:]
        pairs = zip(turns[::2], turns[1::2], strict=True)
        this.write_samples([{"kind": "chat", "prompt": q, "completion": a} for q, a in pairs])
        conversation.close()
        store.close()
        if feedback is not None:
            feedback.store.close()
    return 0


class ChatFeedback:
    """What `/good` and `/bad` write to."""

    def __init__(self, store: FeedbackStore) -> None:
        self.store = store

    def record(self, conversation: Conversation, answered: Answered) -> str:
        """Keep an answer; its id, which is that of its turn."""
        ids, events = list(answered.turn.ids), answered.events
        drawn = [event.logprob for event, i in zip(events, ids, strict=False) if event.token_id == i]
        missing = len(ids) - len(drawn)  # the end of a turn that was too long was not drawn
        self.store.add(
            Record(
                messages=answered.messages, answer=answered.turn.text, prompt_ids=list(answered.request.prompt_ids),
                completion_ids=ids, sampled=[True] * len(drawn) + [False] * missing, logprobs=drawn + [0.0] * missing,
                model=conversation.model, template=conversation.template, sampling=asdict(answered.request.params),
                weight_version=conversation.backend.stats().weight_version, latency=answered.seconds,
                finish_reason=events[-1].finish_reason or "", session=conversation.session.id, id=answered.turn.id,
            )
        )  # fmt: skip
        return answered.turn.id

    def give(self, id: str, kind: str, value: object, comment: str = "") -> None:
        """Keep what a person says of it."""
        self.store.give(id, kind, value, comment)


def feedback_store(this: Run) -> FeedbackStore | None:
    """Where the run keeps feedback: `server.feedback_path`, or a file in its folder; None while it is off."""
    wanted = this.config.server
    if not wanted.feedback:
        return None
    return FeedbackStore(Path(wanted.feedback_path) if wanted.feedback_path else this.folder / STORE)


def session_store(this: Run, *, keep: bool = True) -> SessionStore:
    """Where the run keeps conversations: `sessions.path`, or a file in its folder; in memory if they are not kept."""
    wanted = this.config.sessions
    if not (keep and wanted.keep):
        return SessionStore(None)
    return SessionStore(Path(wanted.path) if wanted.path else this.folder / "sessions.sqlite")


def open_or_name(conversation: Conversation, name: str) -> int:
    """Go on in the conversation of this name, or begin one; returns how many messages it has."""
    try:
        conversation.open(name)
    except SessionError as error:
        if error.reason != "missing":
            raise
        conversation.name(name)
    return sum(m["role"] != "system" for m in conversation.messages)
