"""`doctor [--show N] [overrides]`: what a run would learn from, as it would learn it, and what is wrong with it.

Nothing is trained and no run folder is made. Data, tokenizer and masks are made by the functions that training uses.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trivium.build import build_objective, cached_tokenizer
from trivium.compose import compose, run_config
from trivium.data.cache import cached_plan, cached_table
from trivium.data.chat import Encoded
from trivium.data.collate import collate
from trivium.data.datamodule import StepDataset
from trivium.data.lint import RULES, Finding, check_names
from trivium.data.lint_sets import spread
from trivium.data.mixture import Mixture, document_ends
from trivium.data.packing import plan
from trivium.data.shown import Stretch, exchanges, plain, stretches, visible
from trivium.data.source import Source
from trivium.data.tokenizer import Tokenizer
from trivium.errors import ConfigError, DataError
from trivium.models.protocol import CausalLM
from trivium.objectives.protocol import Objective
from trivium.phases.equivalence import accumulation_error, packing_error
from trivium.phases.estimates import estimate
from trivium.phases.preflight import Examination, examine, forked_words, reading_of, table_of_some
from trivium.phases.run import Run
from trivium.phases.start import with_checkpoint_model
from trivium.phases.train import _count, _model_and_tokenizer
from trivium.schema import TRAINING_PHASES

USAGE = "write `doctor [--show N] [--examples N | --all] [--rules] [--equivalence] [overrides]`, as for the run itself"
SHOWN_FINDINGS = 5
"""Findings of a rule that are printed; the others are counted."""
SHOWN_FIRST, SHOWN_LAST = 400, 200
"""Tokens of an example that are shown of its beginning and of its end, which an answer may be."""


def doctor(args: list[str]) -> int:
    """The verb: 0 if nothing fatal is found, 1 if something is."""
    options, overrides = _options(args)
    # a terminal gets whole words; what reads a pipe gets whole lines
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        config = run_config(compose(with_checkpoint_model(overrides)))
        if config.phase not in TRAINING_PHASES:
            raise ConfigError(f"phase={config.phase} trains nothing; the doctor is for {', '.join(TRAINING_PHASES)}")
        check_names(config.doctor.ignore)
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        one = dataclasses.replace(config.trainer, devices=1, nodes=1, strategy="auto", tensor_parallel=1)
        this = Run(dataclasses.replace(config, runs=folder, name="doctor", trainer=one), console)
        console.rule(f"[bold]doctor[/]: {config.phase} on {config.domain}", align="left", style="dim")
        return _examined(this, options)


def _options(args: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Flags with their numbers (1 where they have none), and what is left."""
    given, left, rest = {"show": 0, "examples": 0, "all": 0, "rules": 0, "equivalence": 0}, [], list(args)
    while rest:
        word, _, value = rest.pop(0).partition("=")
        name = word.removeprefix("--")
        if not word.startswith("--"):
            left.append(f"{word}={value}" if _ else word)
        elif name in ("all", "rules", "equivalence") and not value:
            given[name] = 1
        elif name in ("show", "examples"):
            value = value or (rest.pop(0) if rest else "")
            if not value.isdigit() or not int(value):
                raise ConfigError(f"--{name}={value or '(nothing)'} is not a number above 0; {USAGE}")
            given[name] = int(value)
        else:
            raise ConfigError(f"there is no {word}; {USAGE}")
    for word in left:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"{word!r} is no setting; {USAGE}")
    return given, left


def _examined(this: Run, options: dict[str, int]) -> int:
    console, config = this.console, this.config
    objective = build_objective(config.objective, config.phase)
    source = this.source()
    try:
        source.expect(config.phase)
        model, tokenizer = _made(this, source, objective)
        count = len(source) if options["all"] else options["examples"] or config.doctor.examples
        seen = examine(this, objective, source, tokenizer, model, count=count, among=0)
    except DataError as error:  # nothing can be looked at
        console.print(Text(f"✗ {error}", "red"))
        return 1
    if options["show"]:
        show(console, seen, options["show"])
    _print_rules(console, seen, config.doctor.ignore, whole=bool(options["rules"]))
    _print_findings(console, seen.findings)
    wrong = [f for f in seen.findings if f.fatal]
    if seen.how.form == "answers":
        _prompt_sizes(console, seen)
    else:
        wrong += _sizes(console, this, objective, source, seen, model)
    if options["equivalence"]:
        wrong += _equivalence(console, this, seen, objective, model)
    looked = f"{seen.looked:,} of {seen.of:,} examples looked at in {seen.seconds:.1f} s"
    console.print(Text(f"{looked}: {f'{len(wrong)} fatal' if wrong else 'clean'}", "red" if wrong else "green"))
    return 1 if wrong else 0


def _made(this: Run, source: Source, objective: Objective) -> tuple[CausalLM | None, Tokenizer]:
    """The run's model and tokenizer; without a model to start from, the tokenizer alone."""
    if this.config.model is not None or (this.parent is not None and this.parent.record is not None):
        model, _, tokenizer = _model_and_tokenizer(this, source, objective)
        return model, tokenizer
    settings = this.config.tokenizer.config
    if this.parent is not None:
        return None, this.parent.tokenizer.extended(settings.add_tokens, settings.chat_template)
    tokenizer, how = cached_tokenizer(this.config.tokenizer, source)
    this.say(how)
    this.say("no model: the run itself needs init_from= or model=")
    return None, tokenizer


# ---- what is shown


def show(console: Console, seen: Examination, number: int) -> None:
    """Examples as they are learnt: trained tokens green; in [brackets] where there are no colours."""
    chosen = [seen.seen[i] for i in spread(len(seen.seen), number)]
    shown = [(s, d) for one in chosen for s, d in zip(one.sides, one.documents, strict=True)]
    for side, document in shown:
        trained = sum(document.trained)
        cut = f", cut at {seen.how.length}" if len(document.ids) > seen.how.length and "text" not in side else ""
        share = f", {trained} trained ({trained / max(1, len(document.ids)):.0%})" * (seen.how.form != "answers")
        title = f"example {side['id']}: {len(document.ids)} tokens{share}{cut} "
        line = "─" * (console.width - len(title) % console.width)  # to the end, however long an id is
        console.print(Text.assemble(title, (line, "dim")), soft_wrap=True)
        for part in _told(document):
            if isinstance(part, int):
                console.print(Text(f"... {part:,} tokens are not shown ...", "italic"))
                continue
            for turns in exchanges(stretches(part, seen.how.tokenizer)):
                text = coloured(turns) if console.is_terminal else Text(plain(turns))
                console.print(text, soft_wrap=True)  # a terminal breaks it where it will: every space counts


def _told(document: Encoded) -> list[Encoded | int]:
    """A long document's beginning and end, and how many tokens are between them."""
    more = len(document.ids) - SHOWN_FIRST - SHOWN_LAST
    if more <= 0:
        return [document]
    ends = (slice(None, SHOWN_FIRST), slice(-SHOWN_LAST, None))
    first, last = (Encoded(document.ids[end], document.trained[end]) for end in ends)
    return [first, more, last]


def coloured(parts: list[Stretch]) -> Text:
    """For a terminal: trained text green, the rest dim, special tokens bold."""
    styles = {(True, False): "green", (True, True): "bold green", (False, False): "dim", (False, True): "bold dim"}
    return Text.assemble(*((visible(p.text), styles[p.trained, p.special]) for p in parts))


def _print_rules(console: Console, seen: Examination, ignored: Sequence[str], whole: bool) -> None:
    """A line for each rule that something broke, or for all; how many hold."""
    asked = sum(seen.how.form in rule.forms for rule in RULES.values())
    if whole or seen.counts:
        console.print(rules_table(seen, ignored, whole))
    console.print(f"rules     {asked} asked, {len(seen.counts)} broken" + " (--rules lists all)" * (not whole))


def rules_table(seen: Examination, ignored: Sequence[str], whole: bool = True) -> Table:
    """Every rule that was asked, with what became of it; those that hold only if `whole`."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("rule")
    table.add_column("what must hold")
    table.add_column("", justify="right", no_wrap=True)
    fatal = {f.rule for f in seen.findings if f.fatal}
    for name, rule in RULES.items():
        number = seen.counts.get(name, 0)
        if not number and not (whole and seen.how.form in rule.forms):
            continue
        word = f"{number} found" if name in fatal else f"{number} warned" if number else "passed"
        style = "red" if name in fatal else "yellow" if number else "green"
        table.add_row(Text(name), Text(rule.holds), Text(word + " (ignored)" * (name in ignored), style))
    return table


def _print_findings(console: Console, findings: Sequence[Finding]) -> None:
    for rule in dict.fromkeys(f.rule for f in findings):
        here = [f for f in findings if f.rule == rule]
        for finding in here[:SHOWN_FINDINGS]:
            mark, style = ("✗", "red") if finding.fatal else ("!", "yellow")
            console.print(Text.assemble((f"{mark} [{rule}] ", style), str(finding)))
        if len(here) > SHOWN_FINDINGS:
            console.print(Text(f"  ... and {len(here) - SHOWN_FINDINGS} more of {rule}", "dim"))


# ---- sizes


def _lengths(lengths: np.ndarray) -> str:
    middle, most = np.percentile(lengths, (50, 95))
    return f"median {middle:.0f}, 95 % {most:.0f}, longest {lengths.max()}"


def _prompt_sizes(console: Console, seen: Examination) -> None:
    lengths = np.array([len(one.documents[0].ids) for one in seen.seen] or [0])
    console.print(f"prompts   {_lengths(lengths)} tokens; {seen.how.room} is the most")


def _sizes(
    console: Console, this: Run, objective: Objective, source: Source, seen: Examination, model: CausalLM | None
) -> list[Finding]:
    """Lengths, rows, what is cut, and what the run would take, of the whole data set; a finding if it makes no rows."""
    config, how = this.config, seen.how
    sizes: dict[str, Any] = {"size": config.batch.size, "micro_size": config.batch.micro_size, "seed": config.seed}
    length = config.batch.length
    try:
        table = cached_table(source, how.tokenizer, length, form=how.form, **reading_of(objective))
        mixture = source if isinstance(source, Mixture) else None
        if mixture:
            table.ends = document_ends(mixture, table)
        sizes |= {"rows": cached_plan(table, length, config.seed), "shares": mixture.config if mixture else None}
        steps = StepDataset(table, length=length, pad_id=how.tokenizer.pad_id, batch=objective.batch, **sizes)
        steps.figures(config.trainer.max_steps)  # a mixture may have too little for so many
    except DataError as error:
        console.print(Text(f"✗ the data set cannot be made into rows: {error}", "red"))
        known = any(f.rule == error.rule for f in seen.findings)
        return [] if known else [Finding(error.rule or "form", True, "", str(error))]
    share = table.trained.mean()
    console.print(f"tokens    {len(table.tokens):,}, {share:.1%} of them trained; {len(table.ids):,} documents")
    if table.forked:
        console.print(f"turns     {forked_words(table.forked, table.forks)}")
    console.print(f"lengths   {_lengths(table.lengths)} tokens")
    console.print(f"rows      {len(steps.rows):,} of {config.batch.length} tokens, {steps.utilisation:.1%} full")
    cut = (
        f"{table.truncated:,} documents cut at {how.length} tokens, on the right; {table.lost_ends:,} without their end"
    )
    console.print(f"cut       {cut if table.truncated else 'nothing'}")
    if model is not None:
        taken = estimate(config, model, how.tokenizer, steps)
        console.print(
            f"the run   {_count(model.num_parameters)} parameters, {taken.steps:,} steps of {config.batch.size} rows, "
            f"{taken.tokens:,} tokens ({taken.epochs:.1f} epochs)"
        )
        console.print(f"it takes  {taken}")
    return []


# ---- equivalence


def _equivalence(
    console: Console, this: Run, seen: Examination, objective: Objective, model: CausalLM | None
) -> list[Finding]:
    """On the run's own model and data in fp32: packing and accumulation must change nothing."""
    if model is None:
        raise ConfigError("--equivalence needs a model; set init_from=runs/... or model=")
    if seen.how.form == "answers" or not seen.seen:
        console.print("equivalence  not for prompts, or no example to compare on")
        return []
    table = table_of_some([one.example for one in seen.seen[:64]], seen.how, this.config.batch.length)
    packed = plan(table, this.config.batch.length, seed=0)
    rows = sorted((list(packed[r]) for r in range(len(packed))), key=len, reverse=True)[
        :4
    ]  # those with the most documents have the most borders
    pad, model = seen.how.tokenizer.pad_id, model.float().cpu().eval()
    batches = [collate(table, [row], this.config.batch.length, pad, objective.batch) for row in rows]
    whole = collate(table, rows, this.config.batch.length, pad, objective.batch)
    errors = {
        "packed and separate documents: log-probabilities": (packing_error(model, whole, table, rows), 1e-5),
        f"1 x {len(rows)} and {len(rows)} x 1 rows: gradients": (
            accumulation_error(model, objective, whole, batches),
            1e-6,
        ),
    }
    for what, (error, most) in errors.items():
        said = f"{'✓' if error <= most else '✗'} {what} differ by {error:.1e} (at most {most:g})"
        console.print(Text(said, "green" if error <= most else "red"))
    return [Finding("equivalence", True, "", what) for what, (error, most) in errors.items() if not error <= most]
