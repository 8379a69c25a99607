"""Whether a run's training data holds what the run measures on, and what is to become of it."""

from __future__ import annotations

from typing import Any

from trivium.build import build_held_out
from trivium.data.contamination import overlap
from trivium.data.lint import Finding
from trivium.data.lint_sets import check_overlap
from trivium.data.source import Source
from trivium.objectives.protocol import Objective
from trivium.phases.run import Run


def validates(this: Run, objective: Objective) -> bool:
    """Whether a run measures on its validation split: what samples its own answers does not."""
    return this.config.validation.every_steps > 0 and objective.reads != "answers"


def leaks(this: Run, objective: Objective, train: Source) -> tuple[dict[str, Any], list[Finding]]:
    """Compare training data with every set that the run measures on: its validation split, and `data.held_out`.

    Returns what is shared, for the manifest, and what is wrong with that by `data.contamination`. From the cache where
    the same sets were compared before.
    """
    settings: Any = train.config
    if settings.contamination == "off":
        return {}, []
    held_out = {"validation": this.source("validation")} if validates(this, objective) else {}
    held_out |= {path: build_held_out(path) for path in settings.held_out}
    reports, findings = {}, []
    for name, source in held_out.items():
        with this.world.first():
            found = overlap(train, source, settings.contamination_words)
        reports[name] = {
            "examples": found.examples,
            "contaminated": found.contaminated,
            "share": round(found.share, 6),
            "worst": [vars(f) for f in found.worst],
        }
        findings += check_overlap(name, found, settings.contamination_share, fails=settings.contamination == "fail")
    return reports, findings
