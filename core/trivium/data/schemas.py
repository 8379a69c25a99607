"""What a row means, by its columns: adapters from the schemas in use to the forms of examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trivium.data.messages import messages_of, misfit, refuse_media, short, text_of, tools_of, with_system
from trivium.data.nearest import Nearest, nearest, setting
from trivium.data.source import READS, prompt_of
from trivium.errors import DataError

Values = Mapping[str, Any]
COLUMNS = {
    "pairs": (("chosen", "rejected"),),
    "labels": (("messages", "label"), ("prompt", "completion", "label"), ("conversations", "label")),
    "steps": (("prompt", "completions", "labels"),),
    "choices": (
        ("question", "choices", "answer"),
        ("question", "choices", "answerKey"),
        ("question", "opa", "opb", "opc", "opd", "cop"),
    ),
    "answers": (("messages", "answer"), ("prompt", "answer"), ("question", "answer")),
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"),),
    "text": (("text",),),
}
"""The columns that make a schema; the most specific first, since a bad answer must never be read as one to imitate."""
FORM_OF = {
    **{name: name for name in ("pairs", "labels", "steps", "answers", "text")},
    **dict.fromkeys(("messages", "sharegpt", "alpaca", "prompt_completion"), "chat"),
    "choices": "answers",
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
VERDICTS = {"true": True, "1": True, "false": False, "0": False}


def schemas_of(
    named: str,
    columns: Sequence[str],
    file: str,
    renamed: Sequence[tuple[str, str]] = (),
    forms: Sequence[str] = (),
) -> list[str]:
    """The schemas that columns fit, the first of them the one to read. named: data.schema. renamed: data.columns.

    Raises DataError with the columns found, the schemas known and the nearest; forms: those that the phase reads.
    """
    new_of = {old: new for new, old in renamed}
    read = [new_of.get(column, column) for column in columns]
    wanted = list(COLUMNS) if named == "auto" else [named]
    fitting = [name for name in wanted if any(set(needed) <= set(read) for needed in COLUMNS[name])]
    if fitting:
        return fitting
    each = "; ".join(f"{name}: {' or '.join(', '.join(c) for c in COLUMNS[name])}" for name in wanted)
    some = "; ".join(f"{name}: {', '.join(COLUMNS[name][0])}" for name in wanted)
    known = each if len(wanted) == 1 else some
    shown = ", ".join(columns[:12]) + (f" and {len(columns) - 12} more" if len(columns) > 12 else "")
    near = nearest({name: COLUMNS[name] for name in wanted}, read)
    kept = {new: old for new, old in renamed if old in columns}
    way = _way_in(near, columns, kept, forms) if near else f"set {setting({'KNOWN': 'FOUND'})} to rename"
    if named == "auto" and (near is None or near.missing):
        way += ", or data.text_column=COLUMN to read one column as text"
    raise DataError(f"{file} has the columns {shown}; known are {known}; {way}")


def _way_in(near: Nearest, columns: Sequence[str], kept: Mapping[str, str], forms: Sequence[str]) -> str:
    """The nearest schema, what it lacks and the setting that makes the columns fit. kept: what is renamed already."""
    called = {new: kept.get(column, column) for new, column in near.columns.items() if column}
    pairs = {new: old for new, old in kept.items() if old not in called.values()}
    pairs |= {new: old for new, old in called.items() if new != old}
    said = f"nearest: {near.schema} ({', '.join(near.columns)})"
    form = FORM_OF[near.schema]
    phases = [phase for phase, read in READS.items() if form in read]
    if forms and form not in forms and phases:
        said += f", which is read with phase={' or '.join(phases)}"
    if not near.missing:
        return f"{said}; set {setting(pairs)}"
    said += f", but there is no {' and no '.join(near.missing)}"
    if len(columns) - len(called) < len(near.missing):
        return f"{said}: add what is missing"
    return f"{said}: name what it is, as in {setting({**pairs, **dict.fromkeys(near.missing, 'COLUMN')})}"


def _pair(values: Values, at: str) -> dict[str, Any]:
    """Two answers to one prompt, as text or as conversations."""
    text = isinstance(values["chosen"], str) and isinstance(values["rejected"], str)
    if text and values.get("prompt") is None:
        told = [_transcript(values[column]) for column in ("chosen", "rejected")]
        if not all(told):
            raise misfit(f"{at}: chosen and rejected are text and need the prompt they answer, in a column prompt")
        values, text = {"chosen": told[0], "rejected": told[1]}, False
    columns = ("prompt", "chosen", "rejected")
    pair = {column: text_of(values, column, at) for column in columns} if text else _conversations(values, at)
    if pair["chosen"] == pair["rejected"]:
        raise misfit(f"{at}: chosen and rejected are the same")
    shared = len(prompt_of(pair))
    answers: list[Any] = [] if text else [pair[column][shared:] for column in ("chosen", "rejected")]
    if not shared or not all(a and a[0]["role"] == a[-1]["role"] == "assistant" for a in answers):
        raise misfit(
            f"{at}: chosen and rejected must begin with the same prompt, go on with an assistant turn and end in one; "
            f"the first {shared} messages are the same"
        )
    return pair if text else {**pair, **tools_of(values, at)}


def _transcript(text: str) -> list[dict[str, str]]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..." (hh-rlhf); none of other text."""
    _, *said = re.split(r"(?:\A|\n\n)(Human|Assistant): ?", text)
    if not said or not text.lstrip("\n").startswith("Human:"):
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": what.strip()} for who, what in zip(said[::2], said[1::2], strict=True)]


def _conversations(values: Values, at: str) -> dict[str, Any]:
    """Both whole conversations: many data sets have the prompt in them and beside them, others only beside them."""
    given = dict(values)
    if isinstance(given.get("conversations"), list):  # ShareGPT: the prompt, and two single answers to it
        refuse_media(values, at)
        given |= {c: [given[c]] for c in ("chosen", "rejected") if isinstance(given[c], dict)}
        given["prompt"] = given["conversations"]
    pair = {column: messages_of(given, column, at) for column in ("chosen", "rejected")}
    prompt = given.get("prompt")
    if prompt is None:
        return {column: with_system(given, said) for column, said in pair.items()}
    ahead = messages_of(given, "prompt", at) if isinstance(prompt, list) else []
    ahead = ahead or [{"role": "user", "content": text_of(given, "prompt", at)}]
    if all(said[0]["role"] == "assistant" for said in pair.values()):
        return {column: with_system(given, ahead + said) for column, said in pair.items()}
    shared = list(prompt_of(pair))
    if any(m not in shared for m in ahead):
        raise misfit(f"{at}: chosen and rejected must both begin with an assistant turn, or both with the prompt")
    return {column: with_system(given, said) for column, said in pair.items()}


def _labelled(values: Values, at: str) -> dict[str, Any]:
    label = values["label"]
    if not isinstance(label, int) or label not in (0, 1):
        raise misfit(f"{at}: label is {short(label)}; it must be true (desirable) or false (undesirable)")
    column = next((c for c in ("messages", "conversations") if c in values), "")
    if column:
        messages, tools = messages_of(values, column, at), tools_of(values, at)
    else:
        told = _completion(values, at)
        if "messages" not in told:
            return {**told, "label": bool(label)}
        messages, tools = told["messages"], {k: v for k, v in told.items() if k == "tools"}
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise misfit(f"{at}: {column or 'messages'} must be a prompt and, last, the assistant turn that label judges")
    return {"messages": with_system(values, messages), **tools, "label": bool(label)}


def _completion(values: Values, at: str) -> dict[str, Any]:
    """Text and its continuation; or two lists of messages, which make a conversation."""
    if isinstance(values["prompt"], list) and isinstance(values["completion"], list):
        both = messages_of(values, "prompt", at) + messages_of(values, "completion", at)
        return {"messages": with_system(values, both), **tools_of(values, at)}
    return {column: text_of(values, column, at) for column in ("prompt", "completion")}


def _chat(column: str) -> Callable[[Values, str], dict[str, Any]]:
    def adapt(values: Values, at: str) -> dict[str, Any]:
        refuse_media(values, at)
        messages = with_system(values, messages_of(values, column, at))
        if not any(m["role"] == "assistant" for m in messages):
            raise misfit(f"{at}: {column} has no turn of the assistant to learn from")
        return {"messages": messages, **tools_of(values, at)}

    return adapt


def _alpaca(values: Values, at: str) -> dict[str, Any]:
    """instruction, maybe input behind it, and output; maybe earlier [question, answer] in history."""
    refuse_media(values, at)
    asked, more = text_of(values, "instruction", at), values.get("input")
    if more is not None and not isinstance(more, str):
        raise misfit(f"{at}: input is {short(more)}, not text")
    turns = []
    for earlier in values.get("history") or []:
        if not isinstance(earlier, list) or len(earlier) != 2 or not all(isinstance(t, str) and t for t in earlier):
            raise misfit(f"{at}: history has {short(earlier)}, not a question and its answer")
        turns += _exchange(*earlier)
    asked = f"{asked}\n\n{more}" if more else asked
    return {"messages": with_system(values, turns + _exchange(asked, text_of(values, "output", at)))}


def _exchange(asked: str, said: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def _answer(values: Values, at: str) -> dict[str, Any]:
    """A question and the answer that is checked; a worked solution, where there is one, is what is imitated."""
    answer = values["answer"]
    answer = str(answer) if isinstance(answer, (int, float)) and not isinstance(answer, bool) else answer
    if not isinstance(answer, str) or not answer.strip():
        raise misfit(f"{at}: answer is {short(values['answer'])}, not text")
    if "messages" in values:
        messages = with_system(values, messages_of(values, "messages", at))
    else:
        column = "prompt" if "prompt" in values else "question"
        listed = isinstance(values[column], list)
        asked = (
            messages_of(values, column, at) if listed else [{"role": "user", "content": text_of(values, column, at)}]
        )
        messages = with_system(values, asked)
    if messages[-1]["role"] != "assistant":
        worked = [c for c in ("completion", "solution") if isinstance(values.get(c), str) and values[c].strip()]
        messages = [*messages, {"role": "assistant", "content": values[worked[0]] if worked else answer}]
    if len(messages) < 2:
        raise misfit(f"{at}: messages has an answer and no question")
    return {"messages": messages, **tools_of(values, at), "answer": answer, "task": _task(values)}


def _task(values: Values) -> str:
    return values["task"] if isinstance(values.get("task"), str) else ""


def _choices(values: Values, at: str) -> dict[str, Any]:
    """A question with lettered options (MMLU's, ARC's and MedMCQA's columns); the answer is a letter."""
    asked = text_of(values, "question", at)
    if "opa" in values:
        options, right = [values.get(c) for c in ("opa", "opb", "opc", "opd")], values.get("cop")
        marks: list[Any] = []
    else:
        given = values["choices"]
        marks = list(given.get("label") or []) if isinstance(given, Mapping) else []
        options = given.get("text") if isinstance(given, Mapping) else given
        right = values.get("answerKey", values.get("answer"))
    if not isinstance(options, list) or not 2 <= len(options) <= 26 or not all(isinstance(o, str) for o in options):
        raise misfit(f"{at}: its options are {short(options)}; 2 to 26 texts are read")
    if isinstance(right, str) and right in marks:
        right = marks.index(right)
    elif isinstance(right, str) and right.upper() in LETTERS[: len(options)] and len(right) == 1:
        right = LETTERS.index(right.upper())
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(options):
        raise misfit(
            f"{at}: the right one of {len(options)} options is {short(right)}; a number from 0 or a letter is read"
        )
    lines = [f"{LETTERS[i]}. {option}" for i, option in enumerate(options)]
    subject = values.get("subject_name") or values.get("subject")
    task = _task(values) or (subject if isinstance(subject, str) else "")
    return {"messages": _exchange("\n".join([asked, *lines]), LETTERS[right]), "answer": LETTERS[right], "task": task}


def _steps(values: Values, at: str) -> dict[str, Any]:
    """Steps of a solution, each with a verdict."""
    said, labels = values["completions"], values["labels"]
    if not isinstance(said, list) or not said or not all(isinstance(s, str) and s for s in said):
        raise misfit(f"{at}: completions is {short(said)}, not a list of texts")
    right = isinstance(labels, list) and all(isinstance(label, int) and label in (0, 1) for label in labels)
    if not right or len(labels) != len(said):
        raise misfit(f"{at}: labels is {short(labels)}; it must be true or false for each of {len(said)} completions")
    return {"prompt": text_of(values, "prompt", at), "completions": said, "labels": [bool(label) for label in labels]}


ADAPTERS: dict[str, Callable[[Values, str], dict[str, Any]]] = {
    "pairs": _pair,
    "labels": _labelled,
    "steps": _steps,
    "choices": _choices,
    "answers": _answer,
    "messages": _chat("messages"),
    "sharegpt": _chat("conversations"),
    "alpaca": _alpaca,
    "prompt_completion": _completion,
    "text": lambda values, at: {"text": text_of(values, "text", at)},
}
