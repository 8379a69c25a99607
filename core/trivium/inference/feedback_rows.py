"""What people said of answers -> rows to train on, in the columns that domain=files reads.

A thumb is a verdict (KTO). An edit is a conversation to imitate, and a pair: the edit over the answer. An answer that
was asked for anew makes a pair where the later one was kept: the user said so, gave it a thumb, or went on from it. A
ranking of K answers makes all K (K - 1) / 2 pairs (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.5).
Scores make pairs with a margin for a reward model, of answers to one prompt by one user: what two people's scores mean
need not be the same. An answer that was cut short is never one to imitate.

What is left out, by rule and counted: answers of other models, where one is asked for; empty answers; what cleaning
spoils; verdicts that contradict one another on the same answers to the same prompt, all of them (most of few is
chance); a prompt that is held out elsewhere; exact repeats; and a user's oldest rows beyond the cap. A user is in one
split only, by the hash of the name, and so for ever. Who gave no name is their session, and without one the prompt.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from trivium.data.chat import Chat
from trivium.data.clean_text import Change, change_of
from trivium.data.cleaning import changed, spoiled
from trivium.data.config import SPLITS, CleaningConfig
from trivium.data.source import prompt_of, split_of
from trivium.errors import DataError
from trivium.inference.feedback import Entry, Record, answer_key, template_hash
from trivium.schema import FeedbackConfig

FORMS = ("edits", "pairs", "verdicts", "scores")
"""The files of a split: conversations, pairs, labelled answers, and pairs by their scores."""
NOT_KEPT, CUT, CONTRADICTED = "not kept", "cut short", "contradicting verdicts"


@dataclass(frozen=True)
class Row:
    """One row. id: which feedback made it. of: the responses whose answers it holds. owner: who gave it, for splits."""

    id: str
    form: str
    owner: str
    time: float
    of: tuple[str, ...]
    content: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """What makes its prompt the same as another's."""
        return answer_key([prompt_of(self.content), self.content.get("tools")])

    @property
    def answers(self) -> list[str]:
        """Its answers: the one to imitate or to judge, or the chosen and the rejected one."""
        sides = [self.content[side] for side in ("messages", "chosen", "rejected") if side in self.content]
        return [side[-1]["content"] for side in sides]


@dataclass
class Compiled:
    """Rows by split and form, and what became of the rest. dropped: (form, reason) -> rows; contradicted: their ids."""

    rows: dict[str, dict[str, list[Row]]]
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    contradicted: list[str] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)


def compiled(
    records: Iterable[Record], entries: Sequence[Entry], settings: FeedbackConfig, chat: Chat | None = None
) -> Compiled:
    """The rows of a store's records and standing entries. chat: re-encodes the answers of rows, to compare the ids."""
    known = {r.id: r for r in records}
    found = Compiled({split: {form: [] for form in FORMS} for split in SPLITS})
    changes: list[Change] = [change_of(step, CleaningConfig()) for step in settings.clean]
    rows = _Made(known, entries, settings, found.dropped).rows
    left = _split(_without_contradictions(_cleaned(rows, changes, found), found), settings, found)
    for split, forms in left.items():
        for form, some in forms.items():
            found.rows[split][form] = _capped(_once(some, found), settings.per_user, found)
    kept = {id for forms in found.rows.values() for some in forms.values() for row in some for id in row.of}
    found.tokens = Counter(_tokens(known[id], chat, changes) for id in sorted(kept))
    return found


class _Made:
    """The rows of every entry, before anything is weighed against anything else."""

    def __init__(
        self,
        records: Mapping[str, Record],
        entries: Sequence[Entry],
        settings: FeedbackConfig,
        dropped: Counter[tuple[str, str]],
    ) -> None:
        self.records, self.settings, self.dropped = records, settings, dropped
        self.rows: list[Row] = []
        self.thumbs = {e.id: e.value for e in entries if e.kind == "thumb"}
        # whoever asks on has taken the answer: it is in what the next one was asked with
        self.continued = {answer_key(r.messages[:i], m["content"]) for r in records.values()
                          for i, m in enumerate(r.messages) if m.get("role") == "assistant"}  # fmt: skip
        scored: dict[tuple[str, str], list[tuple[Entry, Record]]] = defaultdict(list)
        for entry in entries:
            record = records.get(entry.id)
            if record is None or (entry.kind == "thumb" and entry.value == "none"):
                continue
            form = {"thumb": "verdicts", "edit": "edits", "score": "scores"}.get(entry.kind, "pairs")
            if not record.model.startswith(settings.model):
                self.dropped[form, "another model"] += 1
            elif entry.kind == "thumb":
                self._add(entry, form, [record], {"messages": _told(record), "label": entry.value == "up"},
                          imitated=record if entry.value == "up" else None)  # fmt: skip
            elif entry.kind == "edit":
                self._add(entry, form, [], {"messages": _told(record, entry.value)}, asked=record)
                self._pair(entry, None, record, entry.value)
            elif entry.kind == "regenerate":
                self._regenerated(entry, record)
            elif entry.kind == "preference":
                for better, worse in combinations(entry.value, 2):
                    self._pair(entry, records.get(better), records.get(worse))
            else:
                scored[_owner(record), answer_key([record.messages, record.tools])].append((entry, record))
        for some in scored.values():
            self._scored(some)

    def _regenerated(self, entry: Entry, earlier: Record) -> None:
        later, said = self.records.get(entry.value["by"]), entry.value["kept"]
        thumb = self.thumbs.get(later.id) if later else None
        taken = later is not None and answer_key(later.messages, later.answer) in self.continued
        kept = said is True or thumb == "up" or (taken and said is None)
        if not kept or said is False or thumb == "down":
            self.dropped["pairs", NOT_KEPT] += 1
        else:
            self._pair(entry, later, earlier)

    def _pair(self, entry: Entry, better: Record | None, worse: Record | None, edit: str = "") -> None:
        """A pair of two responses; better None: of an edit and what it was made of."""
        if worse is None or (better is None and not edit):
            self.dropped["pairs", "an answer was removed"] += 1
            return
        chosen = _told(worse, edit) if better is None else _told(better)
        of = [worse] if better is None else [better, worse]
        self._add(entry, "pairs", of, {"chosen": chosen, "rejected": _told(worse)}, imitated=better)

    def _scored(self, some: list[tuple[Entry, Record]]) -> None:
        if len(some) == 1:
            self.dropped["scores", "no other score for its prompt"] += 1
        for one, other in combinations(some, 2):
            (low, worse), (high, better) = sorted((one, other), key=lambda s: s[0].value)
            content = {"chosen": _told(better), "rejected": _told(worse), "margin": high.value - low.value}
            if high.value == low.value:
                self.dropped["scores", "equal scores"] += 1
            else:
                self._add(max(high, low, key=lambda e: e.number), "scores", [better, worse], content, imitated=better)

    def _add(
        self, entry: Entry, form: str, of: Sequence[Record], content: Mapping[str, Any],
        imitated: Record | None = None, asked: Record | None = None,
    ) -> None:  # fmt: skip
        first = of[0] if of else asked
        assert first is not None
        tools = {"tools": first.tools} if first.tools else {}
        name = f"{entry.number}:{entry.kind}:{'>'.join(r.id for r in of) or first.id}"
        row = Row(name, form, _owner(first), entry.time, tuple(r.id for r in of), {**content, **tools})
        why = ""
        if any(not r.model.startswith(self.settings.model) for r in of):
            why = "another model"
        elif imitated is not None and imitated.finish_reason == "length":
            why = CUT
        elif not all(answer.strip() for answer in row.answers):
            why = "empty answer"
        elif len(set(row.answers)) < len(row.answers):
            why = "the same answer"
        elif not _is_unicode(row.content):
            why = "half a character"
        if why:
            self.dropped[form, why] += 1
        else:
            self.rows.append(row)


def _told(record: Record, answer: str = "") -> list[dict[str, Any]]:
    return [*record.messages, {"role": "assistant", "content": answer or record.answer}]


def _is_unicode(content: Mapping[str, Any]) -> bool:
    try:
        return bool(json.dumps(content, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def _owner(record: Record) -> str:
    """Whose feedback this is: of a name, a session, or a prompt that anybody may have asked."""
    if record.user:
        return f"user {record.user}" + f" of {record.owner}" * bool(record.owner)
    return f"session {record.session}" if record.session else f"prompt {answer_key(record.messages)}"


def _changed(content: Mapping[str, Any], changes: Sequence[Change]) -> Mapping[str, Any]:
    for change in changes:
        content, _ = changed(content, change)
    return content


def _cleaned(rows: Sequence[Row], changes: Sequence[Change], found: Compiled) -> list[Row]:
    left = []
    for row in rows:
        content = _changed(row.content, changes)
        why = spoiled(row.content, content) if content is not row.content else ""
        if why:
            found.dropped[row.form, f"cleaning: {why}"] += 1
        else:
            left.append(replace(row, content=content))
    return left


def _without_contradictions(rows: Sequence[Row], found: Compiled) -> list[Row]:
    """All rows but those of which another says the opposite, whoever gave it."""
    said: dict[Any, set[Any]] = defaultdict(set)
    for row in rows:
        for what, verdict in _claims(row):
            said[what].add(verdict)
    left = []
    for row in rows:
        if any(len(said[what]) > 1 for what, _ in _claims(row)):
            found.dropped[row.form, CONTRADICTED] += 1
            found.contradicted.append(row.id)
        else:
            left.append(row)
    return left


def _claims(row: Row) -> list[tuple[Any, Any]]:
    """What a row says: (of what, the verdict)."""
    answers = row.answers
    if len(answers) == 1:  # an edit says that it is good
        return [((row.prompt, answers[0]), row.content.get("label", True))]
    return [((row.form, row.prompt, *sorted(answers)), answers[0] > answers[1])]


def _split(rows: Sequence[Row], settings: FeedbackConfig, found: Compiled) -> dict[str, dict[str, list[Row]]]:
    """By owner; what is asked in a held-out split is asked in no other."""
    of = {row.owner: split_of(row.owner, settings.validation_share, settings.test_share) for row in rows}
    asked = {split: {row.prompt for row in rows if of[row.owner] == split} for split in SPLITS}
    above = {"train": asked["validation"] | asked["test"], "validation": asked["test"], "test": set()}
    left: dict[str, dict[str, list[Row]]] = {split: {form: [] for form in FORMS} for split in SPLITS}
    for row in rows:
        split = of[row.owner]
        if row.prompt in above[split]:
            found.dropped[row.form, "its prompt is held out"] += 1
        else:
            left[split][row.form].append(row)
    return left


def _once(rows: Sequence[Row], found: Compiled) -> list[Row]:
    """The first of exact repeats."""
    seen: set[str] = set()
    left = []
    for row in sorted(rows, key=lambda r: (r.time, r.id)):
        said = answer_key([row.prompt, row.answers, row.content.get("label")])
        if said in seen:
            found.dropped[row.form, "repeated"] += 1
        else:
            seen.add(said)
            left.append(row)
    return left


def _capped(rows: Sequence[Row], most: int, found: Compiled) -> list[Row]:
    """At most so many rows of each owner, the newest; 0 is no limit."""
    counts: Counter[str] = Counter()
    left = []
    for row in reversed(rows):
        counts[row.owner] += 1
        if most and counts[row.owner] > most:
            found.dropped[row.form, "beyond the cap of a user"] += 1
        else:
            left.append(row)
    return left[::-1]


def _tokens(record: Record, chat: Chat | None, changes: Sequence[Change]) -> str:
    """How the ids that training will read compare with those that were read and drawn."""
    if _changed(told := {"messages": _told(record)}, changes) is not told:
        return "changed by cleaning"
    if chat is None or record.template != template_hash(chat.tokenizer):
        return "not compared: another tokenizer or template" if chat else "not compared: no init_from"
    example = {"id": record.id, **told, **({"tools": record.tools} if record.tools else {})}
    try:
        encoded = chat.encode([example], "last_turn")[0]
    except DataError:
        return "cannot be encoded"
    ids = [*record.prompt_ids, *record.completion_ids]
    behind = encoded.trained[len(ids) :]
    # an answer that was cut short has no end: training gives it one
    ends = not any(behind) or (record.finish_reason == "length" and not any(behind[1:]))
    return "equal" if encoded.ids[: len(ids)] == ids and ends else "differ"
