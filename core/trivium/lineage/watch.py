"""`watch RUN [--once]`: a run's figures in the terminal while it trains, drawn anew each second.

Reads the run's files and nothing else, so it may be started, stopped and started again beside any run, on another
machine too where the folder is shared.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from trivium.errors import ConfigError
from trivium.lineage.figures import count_text, memory_text, safe_text, time_text, whole_text
from trivium.lineage.manifest import read as read_manifest
from trivium.lineage.progress import Progress
from trivium.lineage.runs import as_dict, finite
from trivium.schema import TRAINING_PHASES

EVERY_SECONDS = 1.0
QUIET_SECONDS = 30.0
"""After so long without a step it is said: the process may have been killed, and then no file says so."""
WIDEST = 100
BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=*#"
MARKS = {"done": "✓", "running": "▶", "failed": "✗", "stopped": "■"}
PLAIN_MARKS = {"done": "+", "running": ">", "failed": "x", "stopped": "."}
COLOURS = {"done": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}
PARTS = ("data", "rollout", "forward", "backward", "optimizer", "other")


def watch(args: list[str]) -> int:
    """Show a run until it ends or Ctrl-C; once where that was asked, where it has ended, and without a terminal."""
    folders = [a for a in args if not a.startswith("-")]
    if len(folders) != 1 or set(args) - {*folders, "--once"}:
        raise ConfigError("write `watch FOLDER [--once]`, for instance `watch runs/three_phases-primer`")
    view = View(Path(folders[0]))
    console = Console(soft_wrap=False)
    if "--once" in args or not console.is_terminal or not view.running:
        console.print(view.frame(console), no_wrap=True, overflow="ellipsis", crop=True)
        return 0
    try:
        with Live(view.frame(console), console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while view.running:
                time.sleep(EVERY_SECONDS)
                view.refresh()
                live.update(view.frame(console), refresh=True)
    except KeyboardInterrupt:  # Live has given the terminal back
        pass
    return 0


class View:
    """What is shown of a folder: a run, or of a pipeline the stage at work. Raises ConfigError where neither is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stages: dict[str, Progress] = {}
        self.refresh()
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}; give a run's own, such as runs/NAME")
        if not self.manifest.get("phase") and not self.shown.recent:
            raise ConfigError(f"no run in {folder}: it holds neither MANIFEST.json nor metrics.jsonl of one")

    def refresh(self) -> None:
        """Read what is new."""
        self.manifest = as_dict(read_manifest(self.folder))
        entries = self.manifest.get("stages")
        self.entries = [e for e in map(as_dict, entries if isinstance(entries, list) else []) if e.get("name")]
        names = [str(e.get("path", e["name"])) for e in self.entries] or ["."]
        for name in names:
            self._stages.setdefault(name, Progress(self.folder / name))
        # stages are entered into the manifest as they begin: all but the last are over
        self.shown = self._stages[names[-1]]
        self.shown.refresh()
        if not self.running:  # then the last one that trained says more than what followed it
            for name in reversed(names):
                self._stages[name].refresh()
                if self._stages[name].recent:
                    self.shown = self._stages[name]
                    break

    @property
    def running(self) -> bool:
        """Whether more may come."""
        status = self.manifest.get("status")
        return status in ("running", "waiting") if status else self.shown.running

    def frame(self, console: Console) -> Group:
        """The whole picture, no wider and (samples aside) no higher than the console."""
        plain = not console.encoding.lower().startswith("utf")
        lines = Frame(self.shown, min(console.width, WIDEST), plain).lines()
        if self.entries:
            lines.insert(0, self._path(plain, min(console.width, WIDEST)))
        return Group(*(lines[: max(8, console.height - 1)] if console.is_terminal else lines))

    def _path(self, plain: bool, width: int) -> Text:
        """The pipeline's stages and how they ended; the first ones are left out where they do not fit."""
        marks = PLAIN_MARKS if plain else MARKS
        parts = []
        for number, entry in enumerate(self.entries):
            manifest = as_dict(read_manifest(self.folder / str(entry.get("path", entry["name"]))))
            last = number == len(self.entries) - 1
            status = str(manifest.get("status") or ("running" if last and self.running else "done"))
            parts.append((f"{marks.get(status, ' ')} {entry['name']}", COLOURS.get(status, "")))
        while len(parts) > 1 and sum(len(text) + 2 for text, _ in parts) > width:
            parts.pop(0)
        return Text("  ").join(Text(text, style) for text, style in parts)


class Frame:
    """One picture of one run. plain: in ASCII, for terminals that have nothing else."""

    def __init__(self, run: Progress, width: int, plain: bool) -> None:
        self.run, self.width, self.plain = run, max(width, 20), plain

    def lines(self) -> list[Text]:
        """From what is looked at most to what is looked at least."""
        made = [self.heading(), *self.bar()]
        for key, name in (("rollout/reward", "reward"), ("train/loss", "loss"), ("val/loss", "val loss")):
            made += self.curve(key, name)
        made += [*self.rates(), *self.time(), *self.gradients(), *self.sources(), *self.notes(), *self.samples()]
        return made

    def heading(self) -> Text:
        """What it is, how it stands."""
        run, manifest = self.run, self.run.manifest
        parameters = finite(as_dict(manifest.get("model")).get("parameters"))
        facts = [str(manifest.get("phase") or ""), f"on {manifest['domain']}" if manifest.get("domain") else ""]
        facts += [f"{count_text(parameters)} parameters" if parameters else ""]
        seconds = None if run.running else finite(manifest.get("seconds"))
        state = run.status + (f" after {time_text(seconds)}" if seconds is not None else "")
        name = safe_text(str(manifest.get("name") or run.folder.resolve().name))
        return Text.assemble(
            (name, "bold"), "  ", (state, COLOURS.get(run.status, "")), "  ", (" ".join(filter(None, facts)), "dim")
        )

    def bar(self) -> list[Text]:
        """Steps done, of how many, and how long it will take."""
        run, whole = self.run, self.run.max_steps
        if not run.recent:
            waits = run.running and run.manifest.get("phase") in (None, *TRAINING_PHASES)
            return [Text("no step is done yet", "dim")] if waits else []
        if whole is None:
            return [Text(f"step {whole_text(run.step)}")]
        count = f"step {whole_text(run.step)}/{whole_text(whole)} "
        left = run.seconds_left
        end = f" {100 * min(1.0, run.step / whole):.0f}%"
        if run.running and left is not None and run.step < whole:
            end += f"  {time_text(left)} left"
        room = max(4, self.width - len(count) - len(end))
        full = min(room, room * run.step // whole)
        done, rest = ("#", "-") if self.plain else ("━", "─")
        return [Text.assemble(count, (done * full, "cyan"), (rest * (room - full), "dim"), end)]

    def curve(self, key: str, name: str) -> list[Text]:
        """A figure over all steps, its last value in front."""
        points = self.run.curves[key]
        if not points:
            return []
        lowest = f"  lowest {min(v for _, v in points):.3f}" if key == "val/loss" else ""
        head = f"{name:<9}{points[-1][1]:<8.3f}"
        room = self.width - len(head) - len(lowest)
        drawn = sparkline([v for _, v in points], room, PLAIN_BLOCKS if self.plain else BLOCKS)
        return [Text.assemble(head, (drawn, "cyan"), (lowest, "dim"))]

    def rates(self) -> list[Text]:
        """How fast, how full, how large."""
        run = self.run
        shown = [
            ("tokens/s", run.typical("tokens_per_second"), whole_text),
            ("MFU", run.typical("mfu"), lambda v: f"{100 * v:.1f}%"),
            ("memory", run.last("memory"), memory_text),
            ("lr", run.last("lr"), lambda v: f"{v:.3g}"),
            ("tokens", run.last("tokens"), count_text),
        ]
        return self.flow([(name, show(value)) for name, value, show in shown if value is not None])

    def time(self) -> list[Text]:
        """What a step's time is spent on."""
        spent = self.run.split()
        whole = sum(spent.values())
        if not whole:
            return []
        names = [*[n for n in PARTS if n in spent], *sorted(spent.keys() - set(PARTS))]
        length = f"{1000 * whole:.0f} ms" if whole < 1 else time_text(whole)
        return self.flow([("step", length), *((n, f"{100 * spent[n] / whole:.0f}%") for n in names)])

    def gradients(self) -> list[Text]:
        """The norm of the gradient, and of its parts."""
        norm = self.run.last("grad_norm")
        groups = [(name, f"{value:.3g}") for name, value in self.run.group("grad_norm/").items()]
        return self.flow([("gradient", f"{norm:.3g}"), *groups]) if norm is not None else []

    def sources(self) -> list[Text]:
        """The loss of each source."""
        found = self.run.group("loss/", "train/loss/")
        shown = [(safe_text(name), f"{value:.3f}") for name, value in found.items()]
        return self.flow([("by source", ""), *shown]) if shown else []

    def notes(self) -> list[Text]:
        """What went wrong, what was kept, how long nothing came."""
        run, made = self.run, []
        if run.skipped:
            steps = "1 step was" if run.skipped == 1 else f"{run.skipped} steps were"
            made.append(Text(f"{steps} skipped: loss or gradient not usable", "yellow"))
        if run.manifest.get("error"):
            made.append(Text(safe_text(str(run.manifest["error"])).partition("\n")[0], "red"))
        quiet = run.silent_seconds
        usual = run.typical("step_seconds") or 0.0
        if run.running and run.recent and quiet is not None and quiet > max(QUIET_SECONDS, 10 * usual):
            made.append(Text(f"no step for {time_text(quiet)}; does its process still run?", "yellow"))
        kept = run.checkpoints
        return made + self.flow([("checkpoints", kept[0]), *(("", name) for name in kept[1:])] if kept else [])

    def samples(self) -> list[Text]:
        """What the model said last."""
        said = self.run.samples
        if not said:
            return []
        step = said[0].get("step")
        lines = [Text(f"samples{f' of step {step}' if isinstance(step, int) else ''}")]
        quote = ascii if self.plain else repr  # no control character of a model's reaches the terminal
        return lines + [Text(f"  {quote(s['prompt'])} -> {quote(s['completion'])}", "dim") for s in said]

    def flow(self, items: Sequence[tuple[str, str]]) -> list[Text]:
        """Names and values side by side, in as many lines as it takes; those after the first are indented."""
        lines: list[Text] = []
        for name, value in items:
            item = Text.assemble((f"{name} " if name and value else name, "dim" if lines else ""), value)
            if lines and lines[-1].cell_len + 2 + item.cell_len <= self.width:
                lines[-1].append("  ").append_text(item)
            else:
                lines.append(Text("  " if lines else "").append_text(item))
        return lines


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """`values` as at most `width` characters, each the mean of its share of them.

    >>> sparkline([8, 6, 4, 2, 1, 1], 6, "01234567"), sparkline([4.0, 2.0, 3.0, 3.0], 2, "01"), sparkline([5.0], 9)
    ('753100', '00', '▁')
    """
    columns = min(max(width, 1), len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    span: Any = (high - low) or 1.0
    return "".join(blocks[min(len(blocks) - 1, int((mean - low) / span * len(blocks)))] for mean in means)
