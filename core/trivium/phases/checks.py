"""Whether a run's training data holds what the run measures on, and what is to become of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trivium.build import build_held_out, build_source, evaluation_data
from trivium.data.config import RowsConfig
from trivium.data.contamination import overlap
from trivium.data.lint import Finding
from trivium.data.lint_sets import check_overlap
from trivium.data.source import Source
from trivium.errors import TriviumError
from trivium.objectives.protocol import Objective
from trivium.phases.run import Run

EVALUATE = "evaluate"
"""The phase, and the name of what it reads."""


def validates(this: Run, objective: Objective) -> bool:
    """Whether a run measures on its validation split: what samples its own answers does not."""
    return this.config.validation.every_steps > 0 and objective.reads != "answers"


def leaks(this: Run, objective: Objective, train: Source) -> tuple[dict[str, Any], list[Finding]]:
    """Compare training data with what is measured on: the run's validation split, what `phase=evaluate` reads of its
    domain, and `data.held_out`.

    Returns what is shared, for the manifest, and what is wrong with that by `data.contamination`. From the cache where
    the same sets were compared before.
    """
    settings: Any = train.config
    words = 0 if settings.contamination == "off" else settings.contamination_words
    reports, findings = {}, []
    for name, held_out in _held_out(this, objective, settings.held_out):
        with this.world.first():
            try:
                found = overlap(train, held_out(), words, settings.contamination_text)
            except TriviumError as error:
                if name != EVALUATE:
                    raise
                this.say(_not_compared(this, error))
                continue
        reports[name] = {
            "examples": found.examples,
            "contaminated": found.contaminated,
            "share": round(found.share, 6),
            "worst": [vars(f) for f in found.worst],
            "touched": found.touched,
            "same": found.same.count,
            "same_prompt": found.prompts.count,
        }
        findings += check_overlap(name, found, settings.contamination_share, fails=settings.contamination == "fail")
    return reports, findings


def _not_compared(this: Run, error: TriviumError) -> str:
    return f"nothing was compared with what phase=evaluate reads of {this.config.domain}: {error}"


def _held_out(this: Run, objective: Objective, paths: Sequence[str]) -> Iterator[tuple[str, Callable[[], Source]]]:
    """Each set by its name, and what builds it."""
    config = this.config
    assert config.data is not None
    if validates(this, objective):
        yield "validation", lambda: this.source("validation")
    try:
        judged = evaluation_data(config)
    except TriviumError as error:  # settings that it cannot have
        this.say(_not_compared(this, error))
        judged = None
    forms = {"forms": judged.config.forms} if judged and isinstance(judged.config, RowsConfig) else {}
    if judged and not (
        validates(this, objective)
        and judged.config == dataclasses.replace(config.data.config, split="validation", **forms)
    ):
        yield EVALUATE, lambda: build_source(judged, EVALUATE)
    for path in paths:
        yield path, lambda path=path: build_held_out(path)
