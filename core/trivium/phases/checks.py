"""What a run says of its data before it trains: whether it holds what is held out."""

from __future__ import annotations

from typing import Any

from trivium.build import build_held_out
from trivium.data.contamination import Overlap, overlap
from trivium.data.source import Source
from trivium.errors import DataError
from trivium.phases.run import Run


def told_contamination(this: Run, train: Source, validation: Source | None) -> dict[str, Any]:
    """Compare training data with each held-out set that the run knows, and act by `data.contamination`.

    Returns what was found, for the manifest. Raises DataError where the policy is to fail.
    """
    settings: Any = train.config
    if settings.contamination == "off":
        return {}
    held_out = {"validation": validation} if validation is not None else {}
    held_out |= {path: build_held_out(path) for path in settings.held_out}
    reports = {}
    for name, source in held_out.items():
        with this.world.first():
            found = overlap(train, source, settings.contamination_words)
        reports[name] = {
            "examples": found.examples,
            "contaminated": found.contaminated,
            "share": round(found.share, 6),
            "worst": [vars(f) for f in found.worst],
        }
        if found.share > settings.contamination_share:
            sentence = _sentence(name, found)
            if settings.contamination == "fail":
                raise DataError(
                    f"{sentence}; take them out of either, or set data.contamination=warn to train all the same"
                )
            this.say(f"warning: {sentence}; a figure on them is of what was learned by heart")
    return reports


def _sentence(name: str, found: Overlap) -> str:
    worst = found.worst[0]
    return (
        f"{found.contaminated:,} of {found.examples:,} held-out examples ({name}) are in the training data, such as "
        f"{worst.held_out} in {worst.train} ({worst.shared:,} of its {worst.of:,} n-grams)"
    )
