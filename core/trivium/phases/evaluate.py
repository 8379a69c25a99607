"""Held-out figures of a trained model, each with an interval."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from trivium.build import Artifact, build_backend, build_companion
from trivium.data.config import FilesConfig
from trivium.data.source import Example, form_of
from trivium.errors import ConfigError, DataError
from trivium.evaluation.divergence import kl_to_teacher
from trivium.evaluation.intervals import Estimate
from trivium.evaluation.pairs import chosen_over_rejected
from trivium.evaluation.perplexity import answer_bits_per_byte, bits_per_byte, whole
from trivium.evaluation.probes import accuracy, answer_tasks, mean_score, measured
from trivium.phases.run import Run


def run_evaluate(this: Run) -> int:
    """Bits per byte, accuracy and reward on tasks, chosen over rejected, KL to a teacher: what the data allows."""
    config, settings = this.config, this.config.evaluation
    parent = this.needs_parent()
    sampling = config.inference.config.sampling
    source = this.source()
    source.expect("evaluate")
    _refuse_trained_text(this, parent)
    model, _ = parent.model(config.model)
    tokenizer = parent.tokenizer
    teacher = None
    if "teacher" in this.companions:
        teacher = build_companion("teacher", this.companions["teacher"], tokenizer, length=2)
    examples = [source[i] for i in range(len(source))]
    random.Random(0).shuffle(examples)  # a cap must not read one book or one task only
    texts = [e["text"] for e in examples if form_of(e) == "text"][: settings.max_texts]
    tasks = balanced([e for e in examples if form_of(e) == "answers"], settings.max_tasks)
    pairs = balanced([e for e in examples if form_of(e) == "pairs"], settings.max_pairs)
    talks = balanced([e for e in examples if form_of(e) == "chat"], settings.max_chats)
    chats = balanced([e for e in examples if form_of(e) in ("chat", "answers")], settings.max_chats)
    chats = chats or [e for e in examples if form_of(e) == "text"][: settings.max_texts]  # the KL is of what there is
    if model.score is not None:
        this.say("a reward model: it scores answers and writes none, so only its choice between answers is measured")
        texts, tasks, talks, chats = [], [], [], []
    all_talks, talks = len(talks), whole(talks, tokenizer, model.context)
    if len(talks) < all_talks:
        this.say(
            f"{all_talks - len(talks)} of {all_talks} conversations are left out: they are longer than the context of "
            f"{model.context} tokens, or call tools"
        )
    if teacher is None:
        chats = []
    elif not chats:
        raise ConfigError(f"teacher.init_from= is for the KL to a teacher, and {parent.path} has none on this data")
    if not (texts or tasks or pairs or talks or chats):
        raise DataError(
            f"data={config.data.name if config.data else ''} has no text, verifiable tasks, pairs or conversations "
            f"to evaluate {parent.path} on"
        )
    read = {
        "texts": len(texts),
        "tasks": len(tasks),
        "pairs": len(pairs),
        "conversations": len(talks),
        "examples for the KL": len(chats),
    }
    shown = ", ".join(f"{n} {name}" for name, n in read.items() if n)
    this.say(f"{shown} of the {len(source)} examples held out")
    bootstrap: dict[str, Any] = {"resamples": settings.resamples, "confidence": settings.confidence}
    found: dict[str, Estimate] = {}
    backend = build_backend(config.inference, model, tokenizer, config.trainer.accelerator, parent)
    if texts:
        found["bits_per_byte"] = bits_per_byte(model, tokenizer, texts, stride=settings.stride, **bootstrap)
    if tasks:
        limit = min(sampling.max_tokens, model.context // 4)
        answers = answer_tasks(backend, tokenizer, source, tasks, max_tokens=limit)
        this.write_samples(
            [
                {
                    "kind": "evaluate",
                    "task": a.example["task"],
                    "prompt": a.example["messages"][-2]["content"],
                    "completion": a.completion,
                    "answer": a.example["answer"],
                    "correct": a.score.correct,
                    "score": a.score.value,
                }
                for a in answers
            ]
        )
        found |= accuracy(answers, **bootstrap)
        found |= measured(answers, **bootstrap)
        drawn = answer_tasks(backend, tokenizer, source, tasks, max_tokens=limit, temperature=1.0)
        found["reward"] = mean_score(drawn, **bootstrap)
    if pairs:
        found |= chosen_over_rejected(model, tokenizer, pairs, **bootstrap)
    if talks:
        found["answer_bits_per_byte"] = answer_bits_per_byte(model, tokenizer, talks, **bootstrap)
    if chats and teacher is not None:
        found["kl_to_teacher"] = kl_to_teacher(model, teacher, tokenizer, chats, **bootstrap)
    for name, e in found.items():
        this.say(f"{name:<20} {e.value:.3f}  [{e.low:.3f}, {e.high:.3f}]  n={e.count}")
    results = {k: dataclasses.asdict(e) for k, e in found.items()}
    this.manifest.update(results=results, source=source.fingerprint)
    return 0


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
