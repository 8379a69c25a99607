"""What people said of answers, made into training data: a folder of .jsonl files with a card."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trivium.data.chat import Chat
from trivium.data.config import SPLITS
from trivium.disk import digest_file, make_folder, replace_file
from trivium.errors import ConfigError, DataError
from trivium.inference.feedback import FeedbackStore
from trivium.inference.feedback_rows import CONTRADICTED, FORMS, Compiled, compiled
from trivium.phases.run import Run
from trivium.phases.verified import DATA

STORE = "feedback.sqlite"
"""A store's name in the folder of the run that filled it."""
NAMED = 20
"""Contradictory rows that the card names; the manifest has all."""


def run_feedback(this: Run) -> int:
    """Compile a store: data/SPLIT/FORM.jsonl, data/README.md, and counts in the manifest."""
    settings = this.config.feedback
    store = FeedbackStore(_store_path(settings.path))
    chat = Chat(this.parent.tokenizer) if this.parent is not None else None
    records = list(store.records())
    found = compiled(records, store.standing(), settings, chat)
    stats = store.stats()
    store.close()
    if not any(some for forms in found.rows.values() for some in forms.values()):
        why = ", ".join(f"{n} {form}: {reason}" for (form, reason), n in sorted(found.dropped.items()))
        raise DataError(
            f"{settings.path} has {stats['records']} responses and {stats['entries']} entries of feedback, and none of "
            f"it makes a row ({why or 'nothing was said'})"
        )
    models = Counter(r.model for r in records)
    facts: dict[str, Any] = {
        "rows": {split: {form: len(rows) for form, rows in forms.items()} for split, forms in found.rows.items()},
        "users": {s: len({r.owner for rows in forms.values() for r in rows}) for s, forms in found.rows.items()},
        "dropped": {f"{form}: {reason}": n for (form, reason), n in sorted(found.dropped.items())},
        "contradicted": found.contradicted,
        "tokens": dict(sorted(found.tokens.items())),
        "responses": stats["records"],
        "entries": stats["entries"],
        "removed": stats["removed"],
        "models": dict(sorted(models.items())),
        "span": [_day(min(r.time for r in records)), _day(max(r.time for r in records))],
    }
    facts["files"] = _write(this.folder / DATA, found, facts, settings)
    this.manifest.update(feedback=facts)
    for split in SPLITS:
        shown = ", ".join(f"{len(rows):,} {form}" for form, rows in found.rows[split].items() if rows)
        this.say(f"{split}: {shown or 'nothing'} of {facts['users'][split]:,} users")
    for what, count in facts["dropped"].items():
        this.say(f"left out: {count:,} {what}")
    for what, count in facts["tokens"].items():
        this.say(f"ids of answers, recorded and encoded again: {count:,} {what}")
    return 0


def _store_path(named: str) -> Path:
    if not named:
        raise ConfigError("phase=feedback needs feedback.path=, the store of a server or the run that it served in")
    path = Path(named)
    path = path / STORE if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"feedback.path={named}: there is no {path}; a server keeps one where server.feedback=true")
    return path


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _write(place: Path, found: Compiled, facts: dict[str, Any], settings: Any) -> dict[str, str]:
    """The files, whole or not there; returns the SHA-256 of each."""
    new = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    files = {}
    for split, forms in found.rows.items():
        for form, rows in forms.items():
            if not rows:
                continue  # a file without rows is one that cannot be read
            lines = (json.dumps({"id": r.id, **r.content}, ensure_ascii=False) + "\n" for r in rows)
            path = make_folder(new / split) / f"{form}.jsonl"
            replace_file(path, "".join(lines).encode())
            files[f"{split}/{form}.jsonl"] = digest_file(path)[1]
    replace_file(new / "README.md", _card(found, facts, settings, files).encode())
    shutil.rmtree(place, ignore_errors=True)
    new.rename(place)
    return files


def _card(found: Compiled, facts: dict[str, Any], settings: Any, files: dict[str, str]) -> str:
    """The data set's card."""

    def table(heads: list[str], rows: list[list[Any]]) -> str:
        return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [heads, ["---"] * len(heads), *rows])

    rows = [[split, *(facts["rows"][split][form] for form in FORMS), facts["users"][split]] for split in SPLITS]
    named = found.contradicted[:NAMED]
    more = len(found.contradicted) - len(named)
    parts = [
        "# Feedback",
        f"Made of {facts['responses']:,} responses and {facts['entries']:,} entries of feedback, "
        f"{facts['span'][0]} to {facts['span'][1]}. Removed at users' wish before that: "
        f"{facts['removed']['records']:,} responses, {facts['removed']['entries']:,} entries.",
        table(["split", *FORMS, "users"], rows),
        "edits: conversations to imitate. pairs: chosen and rejected. verdicts: answers with a label. scores: pairs "
        "with a margin, for a reward model. A user is in one split, by the hash of the name; users are not named here.",
        f"At most {settings.per_user or 'any number of'} rows of a user a file. Cleaning: "
        f"{', '.join(settings.clean) or 'none'}. Model: {settings.model or 'all'}.",
        "## Left out",
        table(["what", "rows"], [[k, v] for k, v in facts["dropped"].items()]) if facts["dropped"] else "Nothing.",
    ]
    if named:
        listed = "\n".join(f"- `{name}`" for name in named) + (f"\n- and {more} more" if more else "")
        parts += [f"Rows with {CONTRADICTED}, all left out (a majority of few is chance):", listed]
    parts += [
        "## Models",
        table(["SHA-256", "responses"], [[k, v] for k, v in facts["models"].items()]),
        "## Tokens",
        "Answers in these rows, encoded again as training does it, against the ids that were read and drawn:",
        table(["ids", "answers"], [[k, v] for k, v in facts["tokens"].items()]),
        "## Files",
        table(["file", "SHA-256"], [[k, v] for k, v in files.items()]),
    ]
    return "\n\n".join(parts) + "\n"
