"""Simulated users: real answers of a run's model, and scripted verdicts by a rule that can be learned.

The rule: an answer that ends is better than one that does not, and a shorter one better than a longer; of answers that
are as long as each other a user says nothing. A poisoner says the opposite of everything.
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


LONGEST = 24


def badness(tokens, ended):
    """How many tokens an answer takes to end; of one that does not, more than any other."""
    return len(tokens) if ended else LONGEST + 1


class Answering:
    """A run's model, asked what a split of the primer asks: chats and tasks, or tasks of some kinds alone."""

    def __init__(self, run, split, tasks=()):
        own = ["data.parts=[tasks]", f"data.tasks=[{','.join(tasks)}]"] if tasks else []
        config = run_config(compose(["phase=sft", "domain=primer", *own]))
        self.source = build_source(config.data, "sft", split)
        self.artifact = load_artifact(str(run))
        self.tokenizer = self.artifact.tokenizer
        self.chat = Chat(self.tokenizer)
        model, _ = self.artifact.model(None)
        self.backend = build_backend(config.inference, model, self.tokenizer, "cpu")

    def ask(self, numbers, samples, seed, temperature):
        """For each example: its first question, the prompt's ids, and the events of each sampled answer."""
        params = SamplingParams(
            max_tokens=LONGEST, temperature=temperature, seed=seed, stop_ids=self.tokenizer.stop_ids
        )
        asked, requests = [], []
        for i in numbers:
            messages = self.source[i]["messages"]
            question = messages[: next(n for n, m in enumerate(messages) if m["role"] == "assistant")]
            ids = self.chat.prompt_ids(question)
            asked.append((question, ids))
            requests += [Request(f"{len(asked) - 1}/{s}", tuple(ids), params) for s in range(samples)]
        events = collect(self.backend, requests)
        return [(*a, [events[f"{n}/{s}"] for s in range(samples)]) for n, a in enumerate(asked)]


def sampled(run, users, tasks_each, seed=0):
    """Records of the run's ANSWERS to each user's questions."""
    asking, found = Answering(run, "train"), []
    numbers = random.Random(seed).sample(range(len(asking.source)), users * tasks_each)
    model, template = asking.artifact.sha256, template_hash(asking.tokenizer)
    for n, (question, ids, answers) in enumerate(asking.ask(numbers, ANSWERS, seed, WARM)):
        user, records = f"user{n // tasks_each}", []
        for events in answers:
            tokens = [e.token_id for e in events]
            ended = events[-1].finish_reason == "stop"
            text = asking.tokenizer.decode(tokens)
            records.append(Record(
                question, text, ids, tokens, [True] * len(tokens), [e.logprob for e in events], model, template,
                {"temperature": WARM}, finish_reason="stop" if ended else "length", user=user,
            ))  # fmt: skip
        found.append(records)
    return found


def fill_store(path, answers, *, poisoned=lambda user: False):
    """What users say of the best and the worst of the answers to each question."""
    store = FeedbackStore(Path(path), Limits(per_minute=10**9))
    for n, records in enumerate(answers):
        bad = [badness(r.completion_ids, r.finish_reason == "stop") for r in records]
        worst, best = records[bad.index(max(bad))], records[bad.index(min(bad))]
        if max(bad) == min(bad):
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


def mean_badness(run, questions, seed=1):
    """Of answers to held-out questions, as users would find them: one figure a question, for paired comparisons."""
    asking = Answering(run, "validation")
    numbers = random.Random(seed).sample(range(len(asking.source)), questions)
    found = []
    for _, _, answers in asking.ask(numbers, 2, seed, WARM):
        found.append(sum(badness(events, events[-1].finish_reason == "stop") for events in answers) / len(answers))
    return found
