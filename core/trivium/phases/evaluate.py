"""Held-out figures of a trained model, each with an interval."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trivium.build import Artifact, build_backend, build_companion
from trivium.data.config import FilesConfig
from trivium.data.source import Example, Source, form_of
from trivium.data.tokenizer import Tokenizer
from trivium.errors import ConfigError, DataError
from trivium.evaluation.divergence import kl_to_teacher
from trivium.evaluation.intervals import Estimate
from trivium.evaluation.pairs import chosen_over_rejected
from trivium.evaluation.perplexity import answer_bits_per_byte, bits_per_byte, whole
from trivium.evaluation.probes import Answer, accuracy, answer_tasks, mean_score, measured
from trivium.models.protocol import CausalLM
from trivium.phases.run import Run


@dataclasses.dataclass
class HeldOut:
    """What an evaluation reads: texts for bits per byte, tasks to answer, pairs to choose from, talks for the bits of
    their answers, chats for the KL to a teacher."""

    texts: list[str]
    tasks: list[Example]
    pairs: list[Example]
    talks: list[Example]
    chats: list[Example]

    def __str__(self) -> str:
        names = ("texts", "tasks", "pairs", "conversations", "examples for the KL")
        counts = map(len, (self.texts, self.tasks, self.pairs, self.talks, self.chats))
        return ", ".join(f"{n} {name}" for name, n in zip(names, counts, strict=True) if n)


def run_evaluate(this: Run) -> int:
    """Bits per byte, accuracy and reward on tasks, chosen over rejected, KL to a teacher: what the data allows."""
    config, parent = this.config, this.needs_parent()
    source = this.source()
    source.expect("evaluate")
    _refuse_trained_text(this, parent)
    model, _ = parent.model(config.model)
    tokenizer, teacher = parent.tokenizer, None
    if "teacher" in this.companions:
        teacher = build_companion("teacher", this.companions["teacher"], tokenizer, length=2)
    read = _read(this, source)
    _leave_out(this, read, model, tokenizer)
    if teacher is None:
        read.chats = []
    elif not read.chats:
        raise ConfigError(f"teacher.init_from= is for the KL to a teacher, and {parent.path} has none on this data")
    if not str(read):
        raise DataError(
            f"data={config.data.name if config.data else ''} has no text, verifiable tasks, pairs or conversations "
            f"to evaluate {parent.path} on"
        )
    this.say(f"{read} of the {len(source)} examples held out")
    backend = build_backend(config.inference, model, tokenizer, config.trainer.accelerator, parent)
    found = _measure(this, read, model, teacher, tokenizer, lambda examples, **how: answer_tasks(
        backend, tokenizer, source, examples, **how))  # fmt: skip
    for name, e in found.items():
        this.say(f"{name:<20} {e.value:.3f}  [{e.low:.3f}, {e.high:.3f}]  n={e.count}")
    results = {k: dataclasses.asdict(e) for k, e in found.items()}
    this.manifest.update(results=results, source=source.fingerprint)
    return 0


def _read(this: Run, source: Source) -> HeldOut:
    """As many examples of each form as the settings say, drawn once."""
    settings = this.config.evaluation
    examples = [source[i] for i in range(len(source))]
    random.Random(0).shuffle(examples)  # a cap must not read one book or one task only

    def of(*forms: str) -> list[Example]:
        return [e for e in examples if form_of(e) in forms]

    texts = of("text")[: settings.max_texts]
    chats = balanced(of("chat", "answers"), settings.max_chats)
    return HeldOut(
        texts=[e["text"] for e in texts],
        tasks=balanced(of("answers"), settings.max_tasks),
        pairs=balanced(of("pairs"), settings.max_pairs),
        talks=balanced(of("chat"), settings.max_chats),
        chats=chats or texts,  # the KL is of what there is
    )


def _leave_out(this: Run, read: HeldOut, model: CausalLM, tokenizer: Tokenizer) -> None:
    """What the model cannot be measured on, said."""
    if model.score is not None:
        this.say("a reward model: it scores answers and writes none, so only its choice between answers is measured")
        read.texts, read.tasks, read.talks, read.chats = [], [], [], []
    all_talks, read.talks = len(read.talks), whole(read.talks, tokenizer, model.context)
    if len(read.talks) < all_talks:
        this.say(
            f"{all_talks - len(read.talks)} of {all_talks} conversations are left out: they are longer than the "
            f"context of {model.context} tokens, or call tools"
        )


def _measure(
    this: Run, read: HeldOut, model: CausalLM, teacher: CausalLM | None, tokenizer: Tokenizer,
    answer: Callable[..., list[Answer]],
) -> dict[str, Estimate]:  # fmt: skip
    """Every figure that there are examples for."""
    settings, found = this.config.evaluation, {}
    bootstrap: dict[str, Any] = {"resamples": settings.resamples, "confidence": settings.confidence}
    if read.texts:
        found["bits_per_byte"] = bits_per_byte(model, tokenizer, read.texts, stride=settings.stride, **bootstrap)
    if read.tasks:
        limit = min(this.config.inference.config.sampling.max_tokens, model.context // 4)
        answers = answer(read.tasks, max_tokens=limit)
        this.write_samples(list(map(_sample, answers)))
        found |= accuracy(answers, **bootstrap)
        found |= measured(answers, **bootstrap)
        if settings.reward:
            found["reward"] = mean_score(answer(read.tasks, max_tokens=limit, temperature=1.0), **bootstrap)
    if read.pairs:
        found |= chosen_over_rejected(model, tokenizer, read.pairs, **bootstrap)
    if read.talks:
        found["answer_bits_per_byte"] = answer_bits_per_byte(model, tokenizer, read.talks, **bootstrap)
    if read.chats and teacher is not None:
        found["kl_to_teacher"] = kl_to_teacher(model, teacher, tokenizer, read.chats, **bootstrap)
    return found


def _sample(answer: Answer) -> dict[str, Any]:
    """An answer's row in samples.jsonl."""
    return {
        "kind": "evaluate",
        "task": answer.example["task"],
        "prompt": answer.example["messages"][-2]["content"],
        "completion": answer.completion,
        "answer": answer.example["answer"],
        "correct": answer.score.correct,
        "score": answer.score.value,
    }


def _refuse_trained_text(this: Run, parent: Artifact) -> None:
    """The same path cut another way than in training would call trained text held out."""
    ours = dataclasses.asdict(this.config.data.config) if this.config.data else {}
    theirs = {k.removeprefix("data."): v for k, v in parent.guard.items() if k.startswith("data.")}
    usual = dataclasses.asdict(FilesConfig())
    cuts = ("validation_path", "validation_share", "schema", "columns", "text_column", "code")
    for mine, trained in itertools.product(_places(ours), _places(theirs)):
        scored = mine.get("validation_path") or mine.get("path")
        if not scored or scored != trained.get("path"):
            continue
        known = [{k: at.get(k, usual[k]) or None for k in cuts} for at in (mine, trained)]
        if differ := [k for k in cuts if known[0][k] != known[1][k]]:
            shown = ", ".join(f"data.{k}={known[1][k] or repr('')}" for k in differ)
            raise ConfigError(
                f"{parent.path} was trained on {scored} with {shown}; the same here, or other text in "
                "data.validation_path, keeps trained text out of the score"
            )


def _places(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings of data as they are, and those of each part of a mixture, flat or not."""
    of_mixture = settings.get("parts")
    named = of_mixture.items() if isinstance(of_mixture, Mapping) else ()  # the primer's are a list of its own
    parts: dict[str, dict[str, Any]] = {name: dict(own or {}) for name, own in named}
    for key, value in settings.items():
        if key.count(".") > 1 and key.startswith("parts."):
            _, name, own = key.split(".", 2)
            parts.setdefault(name, {})[own] = value
    return [dict(settings), *parts.values()]


def balanced(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most `limit` examples, as many of each task as can be."""
    by_task: dict[str, list] = {}
    for example in examples:
        by_task.setdefault(example.get("task", ""), []).append(example)
    share = max(1, limit // max(1, len(by_task)))
    return [e for _, some in sorted(by_task.items()) for e in some[:share]]
