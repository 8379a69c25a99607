"""The end of a turn of the flywheel: a new model takes the incumbent's place, or everything stays as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from trivium.build import Artifact, build_companion, same_tokenizer
from trivium.data.config import FilesConfig
from trivium.data.files import Files
from trivium.disk import alone, make_folder
from trivium.errors import ConfigError
from trivium.evaluation.intervals import Estimate
from trivium.evaluation.promotion import answer_logprobs, objections, pair_wins, verdict_wins
from trivium.lineage.figures import MEASURES
from trivium.lineage.manifest import read as read_manifest
from trivium.lineage.pointer import Pointer, read_pointer, write_pointer
from trivium.phases.run import Run
from trivium.phases.verified import DATA, verified_rows


def run_promote(this: Run) -> int:
    """Compare with the incumbent on held-out feedback and evaluations; replace the pointer, or say why not."""
    new, old = this.needs_parent(), this.companions.get("reference")
    if old is None:
        raise ConfigError("phase=promote needs the incumbent to compare with: set reference.init_from=")
    settings = this.config.promote
    pointer = Path(settings.pointer or Path(this.config.runs) / "incumbent.json")
    _confirm_incumbent(pointer, old, new)
    held_out = _held_out(this, new, old)
    before, after = _evaluations(settings.evaluations, old, new)
    better = {name: measure.better for name, measure in MEASURES.items()}
    reasons = objections(held_out, settings.min_rows, before, after, better)
    for name, e in held_out.items():
        this.say(f"{name:<20} {e.value:.3f}  [{e.low:.3f}, {e.high:.3f}]  n={e.count}")
    with alone(make_folder(pointer.parent), this.say):
        if not reasons and _named(pointer) not in ("", old.sha256, new.sha256):
            reasons = [f"{pointer} has come to name another model meanwhile, with which this one was not compared"]
        if not reasons:
            write_pointer(pointer, Pointer(_place(new), new.sha256, str(_place(old))), str(this.folder))
    this.manifest.update(
        results={name: dataclasses.asdict(e) for name, e in held_out.items()},
        verdict={"promoted": not reasons, "why_not": reasons, "pointer": str(pointer)},
    )
    if not reasons:
        this.say(f"promoted: {pointer} names {_place(new)} now, and named {_place(old)} before")
    for reason in reasons:
        this.say(f"rolled back: {reason}")
    if reasons:
        this.say(f"{pointer} is as it was; the incumbent is {_place(old)}")
    return 0


def _place(artifact: Artifact) -> Path:
    return Path(artifact.checkpoint or artifact.path)


def _named(pointer: Path) -> str:
    """The hash of the model that a pointer names; "" where there is no pointer yet."""
    return read_pointer(pointer).sha256 if pointer.exists() else ""


def _confirm_incumbent(pointer: Path, old: Artifact, new: Artifact) -> None:
    if _named(pointer) not in ("", old.sha256, new.sha256):  # the last: killed behind the promotion
        raise ConfigError(
            f"{pointer} names another incumbent than reference.init_from={old.origin}; start from it "
            f"(init_from={pointer}), or set promote.pointer= to another file"
        )


def _held_out(this: Run, new: Artifact, old: Artifact) -> dict[str, Estimate]:
    """What both models make of the test rows: pairs where there are some, else verdicts."""
    folder = Path(this.config.promote.feedback)
    facts = read_manifest(folder)
    if not this.config.promote.feedback or "feedback" not in facts:
        raise ConfigError(f"promote.feedback={this.config.promote.feedback} is no run of phase=feedback")
    if not verified_rows(folder, facts):
        raise ConfigError(f"promote.feedback={folder}: its files are not those that its manifest tells of")
    counts = facts["feedback"]["rows"]["test"]
    file = "pairs" if counts["pairs"] else "verdicts"
    if not counts[file]:
        return {}
    path = folder / DATA / "test" / f"{file}.jsonl"
    source = Files(FilesConfig(path=str(path), validation_share=0.0))
    rows = [source[i] for i in range(len(source))]
    same_tokenizer("reference", old, new.tokenizer)
    model, _ = new.model(this.config.model)
    incumbent = build_companion("reference", old, new.tokenizer, length=2)
    ours, theirs = (answer_logprobs(m, new.tokenizer, rows) for m in (model, incumbent))
    asked: dict[str, Any] = {
        "resamples": this.config.evaluation.resamples,
        "confidence": this.config.evaluation.confidence,
    }
    return (pair_wins if file == "pairs" else verdict_wins)(ours, theirs, rows, **asked)


def _evaluations(folders: list[str], old: Artifact, new: Artifact) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of two evaluations on the same data, checked to be of these two models."""
    if not folders:
        return {}, {}
    facts = [read_manifest(Path(folder)) for folder in folders]
    for folder, said, model in zip(folders, facts, (old, new), strict=True):
        of = [p["sha256"] for p in said.get("parents", []) if p.get("role") == "init_from"]
        if said.get("phase") != "evaluate" or said.get("status") != "done" or of != [model.sha256]:
            raise ConfigError(f"promote.evaluations: {folder} is no finished evaluation of {_place(model)}")
    if facts[0]["source"] != facts[1]["source"]:
        raise ConfigError(f"promote.evaluations: {folders[0]} and {folders[1]} are of different data")
    return facts[0]["results"], facts[1]["results"]
