"""The command line: verbs first, then Hydra overrides. `--help` and the listing verbs never import torch.

Exit codes: 0 done, 1 failure, 2 wrong usage or configuration, 143 stopped by a signal after a clean save.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from trivium.errors import ConfigError, TriviumError
from trivium.plugin import conf_folders, discover
from trivium.registry import load, near_misses, registries

VERBS = {
    "plugins": "trivium.cli:plugins",
    "doctor": "trivium.phases.doctor:doctor",
    "explain": "trivium.explain:explain",
    "report": "trivium.cli:report",
    "watch": "trivium.lineage.watch:watch",
    "convert": "trivium.phases.convert:convert",
    "selftest": "trivium.selftest.verb:selftest",
}
"""Looked up before anything heavy is imported: a verb loads only what it needs."""

TEXTS = ("name", "prompt", "query", "system", "init_from", "runs", "data.path")
"""Settings whose words are kept as they were typed."""

USAGE = """\
Trivium: a language model learns, improves and speaks.

  python launch.py                                   the main job: three phases on the bundled primer
  python launch.py phase=sft domain=files data.path=my.jsonl init_from=runs/...
  python launch.py -m phase=pretrain optim.lr=1e-3,3e-3        one run for each value
  python launch.py phase=chat init_from=runs/...
  python launch.py doctor phase=sft domain=files data.path=my.jsonl --show 5      see what it would learn
  python launch.py plugins list | explain optim.lr [overrides] | report runs/... | watch runs/...
  python launch.py convert pytorch_model.bin OUT.safetensors    pickled weights, or a folder with such, as safetensors
  python launch.py selftest faults [--quick]          kill, fill and break real runs on this disk; prints a table
"""

FLAGS = """\
Flags: --cfg job (show the composed settings)  -m (sweep)  --debug (stack traces)  --shell-completion install=bash
Every setting is key=value; `explain KEY` says what it is, what it was set to and where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every TriviumError becomes one sentence."""
    # OpenMP's threads wait by spinning; beside another busy process a step then takes ten times as long. A short spin
    # costs nothing on quiet cores (LOG.md). Read by libgomp when torch is loaded, so it is set before anything else.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if argv is None:  # this is the program: until a phase listens, Ctrl-C ends it at once, imports and all
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or "debug=true" in args
    args = [as_typed("debug=true" if a == "--debug" else a) for a in args]
    return spoken(lambda: dispatch(args), debug=debug)


def spoken(action: Callable[[], int], *, debug: bool) -> int:
    """The exit code of `action`; whatever it raises is told in one sentence."""
    try:
        return action()
    except TriviumError as error:
        if debug:
            traceback.print_exc()
        # a message names files and quotes rows, whose control characters a terminal would obey
        print(f"error: {load('trivium.lineage.figures:safe_text')(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 143
    except BrokenPipeError:  # who read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain when it flushes the rest
        return 141
    except OSError as error:  # a full disk, a folder that may not be written
        if debug:
            traceback.print_exc()
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except Exception as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            print("error: out of memory; lower batch.micro_size, batch.length or the model's sizes", file=sys.stderr)
            return 1
        # anything else is a bug of ours, said as such
        if debug:
            traceback.print_exc()
        print(f"error: {type(error).__name__}: {error} (a fault of the program; --debug shows where)", file=sys.stderr)
        return 1


def dispatch(args: list[str]) -> int:
    """Verb, help, Hydra's own flags, or a run."""
    if "phase=search" in args and not any(a.startswith("domain=") for a in args):
        args = [
            *args,
            "domain=files",
        ]  # the one that a search reads; a phase cannot choose a domain, which goes over it
    if args and args[0] in VERBS:
        verb = load(VERBS[args[0]])
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # what it shows or starts is cleaned up after Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return verb(args[1:])
    if any(a in ("-h", "--help", "help") for a in args):
        print(help_text())
        return 0
    if args and "=" not in args[0] and not args[0].startswith("-"):
        raise ConfigError(
            f"unknown command {args[0]!r}.{near_misses(args[0], VERBS)} "
            f"Commands: {', '.join(VERBS)}; settings are key=value"
        )
    if not any(a.startswith(("phase=", "pipeline=")) for a in args):
        args = ["pipeline=three_phases", *args]
    if any(a.startswith("-") for a in args):
        return load("trivium.compose:hydra_main")(args)
    return load("trivium.pipeline:launch")(args)


def as_typed(argument: str) -> str:
    """Quote a text setting that Hydra would read as a number: `name=2024_01_05` is no integer.

    >>> as_typed("name=2024_01_05"), as_typed("seed=1_0")
    ("name='2024_01_05'", 'seed=1_0')
    """
    key, _, value = argument.partition("=")
    number = value[:1].isdigit() and all(c in "0123456789_.eE+-" for c in value)
    return f"{key}='{value}'" if key in TEXTS and number else argument


def help_text() -> str:
    """Every config group with its options, ours and plugins', from file names and registries alone."""
    compose = load("trivium.compose:file_groups"), load("trivium.compose:options")
    discover()
    lines = [USAGE, "Groups (choose with GROUP=OPTION):"]
    for group in compose[0]():
        names = [o for o in compose[1](group) if group != "data" or "/" not in o]
        lines.append(f"  {group:<11} {', '.join(names) or '(none)'}")
    schema = load("trivium.schema:RunConfig")
    plain = [f.name for f in dataclasses.fields(schema) if f.name not in compose[0]()]
    return "\n".join([*lines, "", f"Further settings: {', '.join(plain)}", "", FLAGS])


def plugins(args: list[str]) -> int:
    """`plugins list`: every plugin, what it adds, and what failed."""
    if args[:1] != ["list"] or len(args) > 1:
        raise ConfigError("write `plugins list`")
    found = discover()
    for name, plugin in found.plugins.items():
        print(f"{name:<12} {found.versions.get(name, 'core'):<24} {plugin.help}")
    print()
    for kind, registry in registries().items():
        for name, entry in registry.items():
            print(f"{kind:<12} {name:<14} {entry.owner:<12} {entry.help}")
    roots = ", ".join(f"{owner} ({folder})" for owner, folder in conf_folders())
    print(f"\nconfigs from {roots}")
    for name, reason in found.failures.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if found.failures else 0


def report(args: list[str]) -> int:
    """`report RUN`: write the run's report.html anew and print its table."""
    if len(args) != 1 or not Path(args[0]).is_dir():
        raise ConfigError("write `report FOLDER`, for instance `report runs/three_phases-primer`")
    path = load("trivium.lineage.report:write_report")(Path(args[0]))
    load("rich.console:Console")().print(load("trivium.lineage.report:summary_table")(Path(args[0])))
    print(f"report: {path}")
    return 0
