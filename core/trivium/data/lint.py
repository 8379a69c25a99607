"""What can be wrong with data before anything is learnt from it: the doctor's rules, by name.

They look at what training itself makes (`Chat`, `packing`, `collate`), and check it by another way than it was made by.
Those about one example are in `lint_examples`, those about turns and the template as such in `lint_turns`, those about
batches and data sets in `lint_sets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from trivium.errors import ConfigError
from trivium.registry import near_misses

ALL = ("text", "chat", "any", "pairs", "labels", "answers")
LEARNT = ALL[:-1]  # of answers to score against, only prompts are read
TALKS = ALL[1:]
ANSWERED = ALL[1:-1]


@dataclass(frozen=True)
class Rule:
    """What must hold, in a few words. fatal: whether a finding stops a run, unless `doctor.ignore` names the rule.

    forms: what an objective may read (`Objective.reads`) for the rule to be asked.
    """

    holds: str
    forms: tuple[str, ...] = ALL
    fatal: bool = True


RULES: dict[str, Rule] = {
    # the examples as they come
    "form": Rule("examples have the fields their phase reads"),
    "same_id": Rule("no two examples have one id"),
    "repeated": Rule("at most one in five examples is a copy of another"),
    "empty_turn": Rule("no question, answer or text is empty or white space"),
    "no_answer": Rule("conversations have an assistant turn", TALKS),
    "assistant_first": Rule("no conversation begins with the assistant", TALKS),
    "assistant_twice": Rule("no assistant turn follows another", TALKS),
    "unanswered": Rule("conversations end with the assistant", TALKS, fatal=False),
    "tool_orphan": Rule("every tool's result answers an earlier call", TALKS),
    "unknown_tool": Rule("tools that are called are among those given", TALKS),
    "none_text": Rule("no prompt ends in None or nan, no answer is it"),
    "replacement": Rule("no trained text has U+FFFD, a letter that was lost", LEARNT),
    "special_spelling": Rule("no text spells a special token"),
    # the template and the tokenizer
    "template": Rule("the template can write every conversation", TALKS),
    "generation_prompt": Rule("answers begin where the template asks for them", TALKS),
    "system_added": Rule("the template adds no system message of its own", TALKS, fatal=False),
    "rewrites_history": Rule("turns stay as they are when others follow", ANSWERED),
    "generation_marks": Rule("generation blocks are what the assistant writes", ANSWERED),
    "message_dropped": Rule("messages and tools are all in the rendered text", TALKS),
    "content_altered": Rule("answers are written as they are in the data", TALKS),
    "double_bos": Rule("the token that begins a text is there once", LEARNT),
    "double_end": Rule("no token that ends a turn follows itself", LEARNT),
    "border": Rule("prompts have the tokens they are asked with", ANSWERED),
    "unknown_tokens": Rule("no trained token is the unknown token", LEARNT),
    "round_trip": Rule("trained text can be read back from its tokens", LEARNT),
    "vocabulary": Rule("the model has a row for every token"),
    # the mask
    "end_of_turn": Rule("trained turns end with a trained end-of-turn token", LEARNT),
    "tool_trained": Rule("no tool's result is trained on", ANSWERED),
    "nothing_trained": Rule("every row has a token to learn", LEARNT),
    "cut_end": Rule("at most one in ten is longer than a row", ANSWERED),
    "prompt_room": Rule("prompt and answer fit the context", ("answers",)),
    # pairs, verdicts, answers
    "pair_identical": Rule("chosen and rejected differ in what is kept", ("pairs",)),
    "one_sided": Rule("verdicts are of both kinds", ("labels",)),
    "answer_scores": Rule("right answers are scored as right", ("answers",)),
    # batches
    "label_vocabulary": Rule("labels are -100 or tokens of the model", LEARNT),
    "label_place": Rule("a label stands at its own token", LEARNT),
    "pad_by_mask": Rule("every trained token has a label, whatever its id", LEARNT),
    "first_label": Rule("the first token of a document is no target", LEARNT),
    "segments": Rule("positions restart with a document, only there", LEARNT),
    # train against held-out data
    "leak": Rule("no held-out set is in the training data"),  # data.contamination=warn makes it a warning
    "held_out_seen": Rule("no held-out example is trained on"),
    "same_prompt": Rule("no held-out prompt has another answer in training", TALKS, fatal=False),
}
"""In the order in which they are shown."""

MOST_CUT = 0.1
"""The share of conversations that may be cut at a row's end before it is no longer a matter of a few."""
COPIES, MOST_COPIES = 0.1, 0.2
"""The shares of examples that are copies from which it is a warning, and stops a run. Small tasks are drawn twice (4 in
100 of the primer's), crawls hold pages twice; of a file joined to itself it is half."""
FEW = 0.01
"""The share that may have what an honest example has now and then; above it, something has happened to the data."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. example_id: empty where it is not one example's."""

    rule: str
    fatal: bool
    example_id: str
    message: str

    def __str__(self) -> str:
        return f"example {self.example_id}: {self.message}" if self.example_id else self.message


def found(rule: str, example_id: str, message: str, fatal: bool | None = None) -> Finding:
    """A finding, as fatal as its rule unless told otherwise."""
    return Finding(rule, RULES[rule].fatal if fatal is None else fatal, str(example_id), message)


def check_names(ignore: Sequence[str]) -> None:
    """Raise ConfigError for a rule that there is not."""
    for name in ignore:
        if name not in RULES:
            raise ConfigError(
                f"doctor.ignore={list(ignore)} has {name!r}, which is no rule.{near_misses(name, RULES)} "
                f"Rules: {', '.join(RULES)}"
            )


def judged(findings: Iterable[Finding], ignore: Sequence[str]) -> list[Finding]:
    """The findings in the order of the rules, each once; those of ignored rules as warnings."""
    place = {name: i for i, name in enumerate(RULES)}
    kept = sorted(dict.fromkeys(findings), key=lambda f: place[f.rule])  # stable: examples stay in their order
    return [replace(f, fatal=False) if f.rule in ignore else f for f in kept]


def verdict(findings: Sequence[Finding], command: str = "python launch.py doctor ...") -> str:
    """The sentence that stops a run: the first fatal finding, how many more, and what to do. Empty if there is none."""
    fatal = [f for f in findings if f.fatal]
    if not fatal:
        return ""
    first, more = fatal[0], len(fatal) - 1
    others = f" ({more} more finding{'s' * (more > 1)})" if more else ""
    return (
        f"{first} [{first.rule}]{others}; `{command}` shows all, and doctor.ignore=[{first.rule}] trains all the same"
    )
