"""Simulated users: real answers of a run's model to spelling tasks, and scripted verdicts by a rule that can be learned.

The rule: of two answers the one with more letters in their right places is better; where they are equally good a user
says nothing. A poisoner says the opposite of everything.
"""

import random
from pathlib import Path

from trivium.build import build_backend, build_source, load_artifact
from trivium.compose import compose, run_config
from trivium.data.chat import Chat
from trivium.inference.feedback import FeedbackStore, Limits, Record, template_hash
from trivium.inference.protocol import collect
from trivium.types import Request, SamplingParams

ANSWERS = 4
"""Of which a user sees the best and the worst."""
WARM = 1.3
"""The temperature of what users see: warm enough that answers differ."""


def goodness(answer, right):
    """Share of letters that stand where they should: "s o n" for "s u n" has two of three."""
    said, wanted = answer.split(), right.split()
    return sum(a == b for a, b in zip(said, wanted, strict=False)) / max(len(said), len(wanted), 1)


class Answering:
    """A run's model, asked tasks of a split."""

    def __init__(self, run, split, tasks=("copy", "reverse", "count")):
        config = run_config(compose(["phase=sft", "domain=primer", "data.parts=[tasks]", f"data.tasks=[{','.join(tasks)}]"]))
        self.source = build_source(config.data, "sft", split)
        self.artifact = load_artifact(str(run))
        self.tokenizer = self.artifact.tokenizer
        self.chat = Chat(self.tokenizer)
        model, _ = self.artifact.model(None)
        self.backend = build_backend(config.inference, model, self.tokenizer, "cpu")

    def ask(self, numbers, samples, seed, temperature):
        """For each task: the question, the right answer, the prompt's ids and the events of each sampled answer."""
        params = SamplingParams(max_tokens=16, temperature=temperature, seed=seed, stop_ids=self.tokenizer.stop_ids)
        asked, requests = [], []
        for i in numbers:
            *question, right = self.source[i]["messages"]
            ids = self.chat.prompt_ids(question)
            asked.append((question, right["content"], ids))
            requests += [Request(f"{len(asked) - 1}/{s}", tuple(ids), params) for s in range(samples)]
        events = collect(self.backend, requests)
        return [(*a, [events[f"{n}/{s}"] for s in range(samples)]) for n, a in enumerate(asked)]


def sampled(run, users, tasks_each, seed=0):
    """Answers of the run to each user's tasks: (the right answer, a record for each of ANSWERS)."""
    asking, found = Answering(run, "train"), []
    numbers = random.Random(seed).sample(range(len(asking.source)), users * tasks_each)
    model, template = asking.artifact.sha256, template_hash(asking.tokenizer)
    for n, (question, right, ids, answers) in enumerate(asking.ask(numbers, ANSWERS, seed, WARM)):
        user, records = f"user{n // tasks_each}", []
        for events in answers:
            tokens = [e.token_id for e in events]
            ended = events[-1].finish_reason == "stop"
            text = asking.tokenizer.decode(tokens)
            records.append(Record(
                question, text, ids, tokens, [True] * len(tokens), [e.logprob for e in events], model, template,
                {"temperature": WARM}, finish_reason="stop" if ended else "length", user=user,
            ))  # fmt: skip
        found.append((right, records))
    return found


def fill_store(path, answers, *, poisoned=lambda user: False):
    """What users say of the best and the worst of the answers to each task."""
    store = FeedbackStore(Path(path), Limits(per_minute=10**9))
    for n, (right, records) in enumerate(answers):
        records.sort(key=lambda r: goodness(r.answer, right))
        worst, best = records[0], records[-1]
        if goodness(worst.answer, right) == goodness(best.answer, right):
            continue
        for record in (worst, best):
            store.add(record)
        if poisoned(best.user):
            worst, best = best, worst
        way = n % 4
        if way == 0:
            store.give(worst.id, "regenerate", {"by": best.id, "kept": True})
        elif way == 1:
            store.give(best.id, "thumb", "up")
            store.give(worst.id, "thumb", "down")
        else:
            store.give(best.id, "preference", worst.id)
    stats = store.stats()
    store.close()
    return stats


def mean_goodness(run, tasks, seed=1):
    """Of answers to held-out tasks, as users would find them: by task, for paired comparisons."""
    asking = Answering(run, "validation")
    numbers = random.Random(seed).sample(range(len(asking.source)), tasks)
    decode = lambda events: asking.tokenizer.decode([e.token_id for e in events])  # noqa: E731
    return [
        sum(goodness(decode(events), right) for events in answers) / len(answers)
        for _, right, _, answers in asking.ask(numbers, 2, seed, 1.0)
    ]
