"""Before a run trains, a look at a sample of what it would learn from: the doctor's rules, and what they found."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from trivium.data.collate import collate
from trivium.data.lint import RULES, Finding, check_names, found, judged, verdict
from trivium.data.lint_examples import How, Seen, check_form, check_words, look, look_at_prompts
from trivium.data.lint_sets import LOOKED_AT, check_batch, check_vocabulary, spread, survey
from trivium.data.packing import plan, tokenise
from trivium.data.shown import stretches, visible
from trivium.data.source import Example, Source, prompt_of
from trivium.data.table import TokenTable
from trivium.data.tokenizer import Tokenizer
from trivium.errors import DataError
from trivium.models.protocol import CausalLM
from trivium.objectives.protocol import Objective
from trivium.phases.checks import leaks
from trivium.phases.run import Run

COLLATED = 32
"""Examples that are packed and collated to look at the batches."""
ROWS = 8
SHOWN, SHOWN_TOKENS = 3, 400
"""Examples that a run's report shows, and tokens of each."""
KEPT = 20
"""Findings that a run's manifest keeps; all are counted."""


@dataclass
class Examination:
    """What was looked at, and found. seen: encoded examples. looked: how many were looked at closely, of so many.

    shared: what the training data holds of each held-out set, as `leaks` says.
    """

    how: How
    seen: list[Seen]
    findings: list[Finding]
    looked: int
    of: int
    seconds: float
    shared: dict[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """Findings of each rule that has any."""
        return dict(Counter(f.rule for f in self.findings))


def reading_of(objective: Objective) -> dict[str, Any]:
    """What an objective says of how conversations are tokenised, as `cached_table` takes it."""
    settings = objective.config
    return {"train_on": getattr(settings, "train_on", "all"), "turns": getattr(settings, "turns", "refuse")}


def forked_words(conversations: int, documents: int) -> str:
    """What became of conversations whose template rewrites earlier turns."""
    return (
        f"{conversations:,} conversations, whose earlier turns the template rewrites, are {documents:,} documents "
        "(objective.turns=fork)"
    )


def how_of(this: Run, objective: Objective, tokenizer: Tokenizer, model: CausalLM | None) -> How:
    """How a run reads its examples."""
    judged_answers = objective.reads in ("pairs", "labels")
    reading = reading_of(objective) | ({"train_on": "last_turn"} if judged_answers else {})
    length = this.config.batch.length
    room = 0
    if objective.reads == "answers":
        room = min(length, model.context if model is not None else length)
        room -= this.config.inference.config.sampling.max_tokens
    return How(tokenizer, objective.reads, length=length // (2 if judged_answers else 1), room=room, **reading)


def examine(
    this: Run,
    objective: Objective,
    source: Source,
    tokenizer: Tokenizer,
    model: CausalLM | None,
    *,
    count: int,
    among: int = LOOKED_AT,
) -> Examination:
    """Look closely at `count` of the source's examples, and at their batches; at the ids and words of `among` (0: all).

    All of them are compared with what is held out.
    """
    start = time.monotonic()
    check_names(this.config.doctor.ignore)
    how = how_of(this, objective, tokenizer, model)
    chosen, findings = survey(source, count, among, lambda e: [*check_form(e, how)] or check_words(e, how))
    if model is not None:
        findings += check_vocabulary(tokenizer, model.vocab_size)
    if how.form == "answers":
        seen, more = look_at_prompts(chosen, source, how)
    else:
        seen, more = look(chosen, how)
        bad = {f.example_id for f in more if f.fatal}
        good = [one for one in seen if str(one.example["id"]) not in bad]
        more += _check_batches(good, objective, how, this, model)
    findings += more
    shared, more = leaks(this, objective, source)
    findings += more
    findings = judged(findings, this.config.doctor.ignore)
    return Examination(how, seen, findings, len(chosen), len(source), time.monotonic() - start, shared)


def _check_batches(
    seen: list[Seen], objective: Objective, how: How, this: Run, model: CausalLM | None
) -> list[Finding]:
    """Some of the examples on the way that training takes: tokenised, packed, collated."""
    examples = [seen[i].example for i in spread(len(seen), COLLATED)]
    if not examples or (how.form == "labels" and all(prompt_of(e) == prompt_of(examples[0]) for e in examples)):
        return []  # of one prompt alone no verdict can be mismatched; whether all are of one, training says
    try:
        table = table_of_some(examples, how, this.config.batch.length)
    except DataError as error:
        return [found(error.rule or "form", "", str(error))]
    packed = plan(table, this.config.batch.length, this.config.seed)
    rows = [list(packed[r]) for r in range(min(ROWS, len(packed)))]
    batch = collate(table, rows, this.config.batch.length, how.tokenizer.pad_id, objective.batch)
    vocab = model.vocab_size if model is not None else how.tokenizer.vocab_size
    return list(check_batch(batch, table, rows, vocab))


def table_of_some(examples: list[Example], how: How, length: int) -> TokenTable:
    """What training makes of some examples."""
    unique = {e["id"]: e for e in examples}  # two with one id are a finding already
    return tokenise(list(unique.values()), how.tokenizer, length, form=how.form, train_on=how.train_on, turns=how.turns)


def preflight(
    this: Run, objective: Objective, source: Source, tokenizer: Tokenizer, model: CausalLM
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Look at a sample before training. Returns what the manifest is to say of it, and of what is shared with held-out
    data. Raises DataError if something is fatal.
    """
    settings = this.config.doctor
    if not settings.preflight:
        this.say("warning: doctor.preflight=false, so nobody looks at the data before it is trained on")
        shared, findings = leaks(this, objective, source)
        _act_on(this, judged(findings, settings.ignore))
        return None, shared
    seen = examine(this, objective, source, tokenizer, model, count=settings.examples)
    _act_on(this, seen.findings)
    asked = sum(seen.how.form in rule.forms for rule in RULES.values())
    outcome = "nothing found" if not seen.findings else f"{len(seen.findings)} warnings"
    this.say(f"doctor: {seen.looked:,} of {seen.of:,} examples, {asked} rules, {seen.seconds:.2f} s: {outcome}")
    return record_of(seen, settings.ignore), seen.shared


def _act_on(this: Run, findings: list[Finding]) -> None:
    # whether prompts leave room is looked at for every one when they are made, and told by the settings to change
    stop = verdict([f for f in findings if f.rule != "prompt_room"])
    if stop:
        raise DataError(stop)
    for rule, number in Counter(f.rule for f in findings).items():
        first = next(f for f in findings if f.rule == rule)
        more = f" ({number - 1} more)" if number > 1 else ""
        this.say(f"warning: {first} [{rule}]{more}")


def record_of(seen: Examination, ignored: list[str]) -> dict[str, Any]:
    """An examination as plain data, for the manifest and the report."""
    return {
        "examples": seen.looked,
        "of": seen.of,
        "seconds": round(seen.seconds, 3),
        "ignored": list(ignored),
        "counts": seen.counts,
        "findings": [{"rule": f.rule, "fatal": f.fatal, "message": str(f)} for f in seen.findings[:KEPT]],
        "shown": [
            {
                "id": str(side["id"]),
                "tokens": len(document.ids),
                "trained": sum(document.trained),
                "parts": [
                    [visible(part.text), part.trained, part.special]
                    for part in stretches(document, seen.how.tokenizer, SHOWN_TOKENS)
                ],
            }
            for one in (seen.seen[i] for i in spread(len(seen.seen), SHOWN))
            for side, document in zip(one.sides, one.documents, strict=True)
        ],
    }
