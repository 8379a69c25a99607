"""Verifiable tasks: ask, answer, let the source judge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from trivium.data.chat import Chat
from trivium.data.source import Example, Source
from trivium.data.tokenizer import Tokenizer
from trivium.evaluation.generation import complete
from trivium.evaluation.intervals import Estimate, ratio_interval
from trivium.inference.protocol import Backend
from trivium.types import SamplingParams, Score


@dataclass(frozen=True)
class Answer:
    """One example with what the model said and how it was judged."""

    example: Example
    completion: str
    score: Score


def answer_tasks(
    backend: Backend,
    tokenizer: Tokenizer,
    source: Source,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    temperature: float = 0.0,
) -> list[Answer]:
    """Answer each example's question (its messages but the last), greedily unless told otherwise, and score it."""
    chat = Chat(tokenizer)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, stop_ids=tokenizer.stop_ids)
    prompts = [chat.prompt_ids(e["messages"][:-1], tools=e.get("tools") or ()) for e in examples]
    texts = complete(backend, tokenizer, prompts, params)
    return [Answer(e, text, source.score(e, text)) for e, text in zip(examples, texts, strict=True)]


def accuracy(answers: Sequence[Answer], *, resamples: int, confidence: float) -> dict[str, Estimate]:
    """ "accuracy": the mean over tasks' accuracies; "accuracy/TASK": each task's, with bootstrap intervals."""
    return _by_task("accuracy", [(a.example["task"], float(a.score.correct)) for a in answers], resamples, confidence)


def measured(answers: Sequence[Answer], *, resamples: int, confidence: float) -> dict[str, Estimate]:
    """The same of scores that are no verdicts, under the name of their measure ("chrF"), else "score" (partial credit).

    Nothing where every score is a verdict: its mean is the accuracy.
    """
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for answer in answers:
        found[answer.score.measure or "score"].append((answer.example["task"], answer.score.value))
    if all(value in (0, 1) for _, value in found["score"]):
        del found["score"]
    return {k: e for name in sorted(found) for k, e in _by_task(name, found[name], resamples, confidence).items()}


def _by_task(name: str, values: Sequence[tuple[str, float]], resamples: int, confidence: float) -> dict[str, Estimate]:
    """NAME: the mean over tasks' means; NAME/TASK: each task's."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for task, value in values:
        by_task[task].append(value)

    def mean(values: list[float], weights: list[float]) -> Estimate:
        return ratio_interval(values, weights, resamples=resamples, confidence=confidence)

    found = {f"{name}/{task}": mean(vs, [1.0] * len(vs)) for task, vs in sorted(by_task.items())}
    # each answer weighs 1 / its task's size, so a task with more examples does not count more
    weighed = [v / len(vs) for vs in by_task.values() for v in vs]
    weights = [1 / len(vs) for vs in by_task.values() for _ in vs]
    return {name: mean(weighed, weights), **found}


def mean_score(answers: Sequence[Answer], *, resamples: int, confidence: float) -> Estimate:
    """The mean of the source's own scores."""
    values = [a.score.value for a in answers]
    return ratio_interval(values, [1.0] * len(values), resamples=resamples, confidence=confidence)
