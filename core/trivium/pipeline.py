"""Pipelines: phases in order, in one process, each starting from what an earlier one made."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from trivium.build import build_objective, build_source
from trivium.cluster import submit
from trivium.compose import as_dict, as_yaml, compose, options, pipeline_from_file, run_config
from trivium.data.source import WrongForm
from trivium.disk import make_folder, replace_file
from trivium.errors import ConfigError
from trivium.lineage.manifest import Manifest, digest_of, masked
from trivium.lineage.manifest import read as read_manifest
from trivium.lineage.pointer import is_pointer, read_pointer
from trivium.lineage.report import summary_table, write_report
from trivium.phases.start import run, with_checkpoint_model
from trivium.phases.verified import DATA
from trivium.registry import near_misses
from trivium.schema import DATA_PHASES, TRAINING_PHASES, RunConfig, StageConfig
from trivium.training.parallel import placed

FEEDS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "sft": (("edits", ()),),
    "preference": (("pairs", ()), ("verdicts", ("objective=kto",))),
    "reward": (("scores", ()), ("pairs", ())),
}
"""What a phase learns from feedback, the better first, and with which settings."""
HELD_OUT = ("validation.", "stop.patience", "stop.min_delta", "checkpoint.keep_best=")
"""Settings of the held-out loss."""


def run_pipeline(overrides: Sequence[str], config: RunConfig, console: Console) -> int:
    """Run a pipeline's stages in one process; a stage that is done already is left as it is."""
    if placed().size > 1:
        raise ConfigError("a pipeline starts the processes of its stages: run it once, without torchrun or srun")
    pipeline = config.pipeline
    name = config.name or f"{pipeline.name}-{config.domain}"
    key = digest_of([list(overrides), dataclasses.asdict(pipeline)])
    config, started = _with_incumbent(config, Path(config.runs) / name, key)
    ready: list[str] = []

    def make(stage: Stage) -> None:
        ready.append(stage.entry["name"])
        if run(stage.config, console, skip_done=True):
            raise ConfigError(f"stage {stage.entry['name']} was stopped")

    # all of them before the first trains: bad settings cost no time
    plan = plan_stages(overrides, config, name, make)
    folder = make_folder(Path(config.runs) / name)
    replace_file(folder / "config.yaml", as_yaml(masked(as_dict(config))))
    record = Manifest(
        folder, key, name=name, phase="pipeline",
        domain=config.domain, seed=config.seed, result=plan.result, left_out=plan.left_out, **started,
    )  # fmt: skip
    for stage in plan.left_out:
        console.print(f"left out: {stage['name']}: {stage['why']}", highlight=False, markup=False)
    done: list[dict[str, str]] = []
    for stage in plan.stages:
        done.append(stage.entry)
        record.update("running", stages=done)
        try:
            code = 0 if stage.entry["name"] in ready else run(stage.config, console, skip_done=True)
        except BaseException:
            record.update("failed")
            raise
        if code:
            record.update("stopped")
            write_report(folder)
            return code
    trained, facts = f"{config.runs}/{name}/{plan.result}" if plan.result else "", {}
    for verdict in (read_manifest(folder / s["path"]).get("verdict", {}) for s in done if s["phase"] == "promote"):
        trained = verdict["pointer"] if verdict["promoted"] else config.init_from
        facts = {} if verdict["promoted"] else {"rolled_back": verdict["why_not"]}
    commands = next_commands(trained) if trained else []
    record.update("done", next_commands=commands, **facts)
    report = write_report(folder)
    console.print(summary_table(folder))
    console.print(f"report: {report}", highlight=False)
    if commands:
        console.print("next:")
    for command in commands:
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _with_incumbent(config: RunConfig, folder: Path, key: str) -> tuple[RunConfig, dict[str, Any]]:
    """Settings in which a pointer is what it names, and what the manifest keeps of that.

    It may name another model before the last stage is done, or when the command is given again.
    """
    pointer = Path(config.init_from)
    if not is_pointer(pointer):
        return config, {}
    before = read_manifest(folder)
    started = before.get("incumbent") if before.get("key") == key else None
    started = str(started or read_pointer(pointer).path)
    promote = dataclasses.replace(config.promote, pointer=config.promote.pointer or config.init_from)
    return dataclasses.replace(config, init_from=started, promote=promote), {"incumbent": started}


@dataclass(frozen=True)
class Stage:
    """One stage, ready to run. entry: what the pipeline's manifest says of it."""

    config: RunConfig
    entry: dict[str, str]


@dataclass
class Plan:
    """The stages that will run, those that will not and why, and the stage whose model stands for the whole."""

    stages: list[Stage]
    left_out: list[dict[str, str]]
    result: str


class _Planner:
    """Walks through a pipeline's stages and keeps what each one made."""

    def __init__(
        self, overrides: Sequence[str], config: RunConfig, name: str, make: Callable[[Stage], None] | None = None
    ) -> None:
        self.overrides, self.config, self.name, self.make = overrides, config, name, make
        self.measured: dict[str, str] = {}  # evaluation -> what it is of
        self.made: dict[str, str] = {}  # stage -> the folder a later stage starts from
        self.trained: set[str] = set()  # folders that will hold a model
        self.newest = config.init_from
        self.plan = Plan([], [], "")

    def folder(self, stage: str) -> str:
        return f"{self.config.runs}/{self.name}/{stage}"

    def earlier(self, stage: str, named: str, what: str) -> str:
        """The folder that `named` left. Raises ConfigError for a stage that does not come before."""
        if named not in self.made:
            raise ConfigError(
                f"stage {stage}: {what}={named} is no earlier stage.{near_misses(named, self.made)} "
                f"Earlier: {', '.join(self.made) or '(none)'}"
            )
        return self.made[named]

    def add(self, settings: StageConfig) -> None:
        """Plan a stage and what follows it."""
        stage = settings.name or settings.phase
        if stage in self.made:
            raise ConfigError(f"two stages are called {stage}; give one another name")
        if not re.fullmatch(r"\w[\w.-]*", stage):  # it is a folder's name, and part of an override
            raise ConfigError(f"a stage cannot be called {stage!r}; a name is of letters, digits, '_', '-' and '.'")
        origin = "" if settings.phase == "distill" else self.newest  # a student is new unless it is said otherwise
        if settings.init_from:
            origin = self.earlier(stage, settings.init_from, "init_from")
        teacher = self.earlier(stage, settings.teacher, "teacher") if settings.teacher else ""
        if settings.versus:
            self.earlier(stage, settings.versus, "versus")
        self.made[stage] = origin  # of a stage that is left out: what it would have started from
        if stage in self.config.pipeline.skip:
            self.plan.left_out.append({"name": stage, "phase": settings.phase, "why": "pipeline.skip names it"})
            return
        same = settings.phase == "evaluate" and self.measured.get(settings.versus) == origin
        if same or (settings.phase == "promote" and origin == self.config.init_from):
            why = "no stage before it trained a model"
            self.plan.left_out.append({"name": stage, "phase": settings.phase, "why": why})
            return
        if settings.phase == "evaluate":
            self.measured[stage] = origin
        asked = [f"teacher.init_from={teacher}"] if teacher and settings.phase == "evaluate" else []
        if settings.phase == "promote":
            asked = self.compared(stage, settings, origin)
        fed = None
        if settings.data and settings.phase in TRAINING_PHASES:
            fed = self.fed(stage, settings)
            if not fed:
                return
        composed = self.compose(stage, settings.phase, [*settings.overrides, *asked], origin, fed)
        if composed is None:
            return
        entry = {"name": stage, "phase": settings.phase, "path": stage}
        if settings.versus:
            entry["versus"] = settings.versus
        if settings.phase not in TRAINING_PHASES:
            if origin and settings.phase != "tokenizer":
                entry["of"] = Path(origin).name
            self.plan.stages.append(Stage(composed, entry))
            if settings.phase == "feedback":
                self.made[stage] = self.folder(stage)
                if self.make:  # what it makes decides what follows
                    self.make(self.plan.stages[-1])
            if settings.phase == "tokenizer":
                self.made[stage] = self.newest = self.folder(stage)
            return
        assert composed.objective is not None
        objective = build_objective(composed.objective, settings.phase)
        if teacher and "teacher" in objective.companions:
            given = [*settings.overrides, f"teacher.init_from={teacher}"]
            composed = self.compose(stage, settings.phase, given, origin, fed) or composed
        asked_of = composed.teacher.init_from
        if "teacher" in objective.companions and (
            not asked_of or (asked_of == teacher and teacher not in self.trained)
        ):
            raise ConfigError(f"stage {stage}: phase={settings.phase} needs a teacher: name an earlier trained stage")
        self.plan.stages.append(Stage(composed, entry))
        self.made[stage] = self.folder(stage)
        self.trained.add(self.folder(stage))
        if not objective.scores:
            self.newest, self.plan.result = self.folder(stage), stage
        for phase in self.config.pipeline.after:
            if objective.scores and phase != "evaluate":
                continue  # a reward model has nothing to say
            more = [f"teacher.init_from={teacher}"] if teacher and phase == "evaluate" else []
            name = f"{phase}_{stage}"
            if name in (s.name or s.phase for s in self.config.pipeline.stages):
                raise ConfigError(f"a stage is called {name}, as what follows {stage} is (pipeline.after); rename it")
            following = self.compose(name, phase, more, self.folder(stage))
            if following is not None:
                self.plan.stages.append(Stage(following, {"name": name, "phase": phase, "path": name, "of": stage}))

    def fed(self, stage: str, settings: StageConfig) -> list[str] | None:
        """The overrides by which a stage trains on feedback; None, and a note in the plan, where that is too little."""
        folder = Path(self.earlier(stage, settings.data, "data"))
        rows = read_manifest(folder).get("feedback", {}).get("rows", {})
        had, least = rows.get("train", {}), self.config.feedback.min_rows
        wanted = FEEDS.get(settings.phase, ())
        for file, more in wanted:
            if had.get(file, 0) >= least:
                held_out = folder / DATA / "validation" / f"{file}.jsonl"
                place = [f"data.path={folder / DATA / 'train' / file}.jsonl", "data.validation_share=0"]
                place += [f"data.validation_path={held_out}"] if rows["validation"][file] else []
                return ["domain=files", *place, *more]
        counts = " and ".join(f"{had.get(file, 0)} {file}" for file, _ in wanted) or "nothing"
        why = f"feedback has {counts} to learn from, and feedback.min_rows={least}"
        self.plan.left_out.append({"name": stage, "phase": settings.phase, "why": why})
        return None

    def compared(self, stage: str, settings: StageConfig, origin: str) -> list[str]:
        """The overrides of phase=promote: the incumbent, held-out feedback, and an evaluation of either model."""
        found = [f"reference.init_from={self.config.init_from}", f"promote.pointer={self.config.promote.pointer}"]
        if settings.data:
            found.append(f"promote.feedback={self.earlier(stage, settings.data, 'data')}")
        ours = [name for name, of in self.measured.items() if of == origin]
        if settings.versus and ours:
            found.append(f"promote.evaluations=[{self.folder(settings.versus)},{self.folder(ours[-1])}]")
        return found

    def compose(
        self, stage: str, phase: str, stage_overrides: Sequence[str], origin: str, fed: Sequence[str] | None = None
    ) -> RunConfig | None:
        """A stage's settings; None, and a note in the plan, when the domain has nothing for it. fed: of its data."""
        overrides, domain = stage_overrides_of(self.overrides, phase, stage_overrides)
        if fed:
            overrides = [o for o in overrides if not o.startswith(("domain=", "data.", "data="))] + list(fed)
            domain = "files"
        if phase in DATA_PHASES and not any(o.startswith("data=") for o in overrides):
            has = [o.split("/")[1] for o in options("data") if o.startswith(f"{domain}/")]
            if has and phase not in has:
                why = f"domain={domain} has no data for phase={phase}"
                self.plan.left_out.append({"name": stage, "phase": phase, "why": why})
                return None
        fixed = [f"phase={phase}", f"name={self.name}/{stage}", f"init_from={origin}"]
        composed = run_config(compose(with_checkpoint_model([*fixed, *overrides], trained=origin in self.trained)))
        if phase == "generate" and not (composed.prompt or composed.prompts):
            return None
        if phase in DATA_PHASES:
            try:
                build_source(composed.data, phase).expect(phase)
            except WrongForm as error:
                if phase != "rlhf":  # which few people's own files are for
                    raise
                self.plan.left_out.append({"name": stage, "phase": phase, "why": str(error)})
                return None
        return composed


def plan_stages(
    overrides: Sequence[str], config: RunConfig, name: str, make: Callable[[Stage], None] | None = None
) -> Plan:
    """The stages with their settings composed and checked. One that would generate from no prompts is left out.

    make: runs a stage of phase=feedback at once; without it, what is there decides what follows.
    """
    pipeline = config.pipeline
    if not config.init_from and any(s.phase == "promote" for s in pipeline.stages):
        raise ConfigError(f"pipeline={pipeline.name} improves a model that is there: name the incumbent in init_from=")
    names = [s.name or s.phase for s in pipeline.stages]
    if config.init_from and pipeline.stages[0].phase == "tokenizer":
        raise ConfigError(
            f"pipeline={pipeline.name} starts from nothing, with a tokenizer of its own; leave init_from= away "
            "or run one phase, for instance phase=sft init_from=..."
        )
    for key, wanted in (("skip", pipeline.skip), ("result", [pipeline.result] if pipeline.result else [])):
        unknown = [w for w in wanted if w not in names]
        if unknown:
            raise ConfigError(
                f"pipeline.{key}={unknown[0]} is no stage.{near_misses(unknown[0], names)} Stages: {', '.join(names)}"
            )
    planner = _Planner(overrides, config, name, make)
    for settings in pipeline.stages:
        planner.add(settings)
    if pipeline.result:
        result = planner.made[pipeline.result]  # of one that is left out: the stage it would have continued
        planner.plan.result = Path(result).name if result in planner.trained else planner.plan.result
    return planner.plan


def stage_overrides_of(overrides: Sequence[str], phase: str, own: Sequence[str]) -> tuple[list[str], str]:
    """The overrides of one stage, its own first, then the command line's, which beat them; and its domain.

    `data.*` of the command line goes to the stages that have data, `model.*` to those that start a model, settings of a
    held-out loss to those that have one.
    """
    aside = ("phase=", "pipeline=", "pipeline.", "name=", "init_from=")
    given = [o for o in overrides if not o.startswith(aside)]
    domain = next((o.split("=", 1)[1] for o in [*own, *given][::-1] if o.startswith("domain=")), None)
    domain = domain or default_domain()
    if f"{domain}/{phase}" not in options("data"):
        given = [o for o in given if not o.startswith(("data.", "data="))]
    if phase != "pretrain" and not any(o.startswith("model=") for o in [*own, *given]):
        given = [o for o in given if not o.startswith("model.")]
    if phase not in TRAINING_PHASES or phase == "rlhf":  # which have no held-out loss
        given = [o for o in given if not o.startswith(HELD_OUT)]
    if phase == "evaluate":  # which answers greedily, whatever the others do
        given = [o for o in given if not o.startswith("system=")]
        given = [o for o in given if not o.startswith("inference.sampling.") or "max_tokens" in o]
    return [*own, *given], domain


@functools.cache
def default_domain() -> str:
    """The domain where none is named."""
    return compose([]).domain


def next_commands(trained: str) -> list[str]:
    """Three things to try after a pipeline."""
    return [
        f"python launch.py phase=chat init_from={trained}",
        f"python launch.py phase=generate init_from={trained} prompt='Reverse: r i v e r'",
        f"python launch.py phase=sft domain=files data.path=my.jsonl init_from={trained}",
    ]


def launch(overrides: Sequence[str]) -> int:
    """The front door of phases and pipelines: overrides in, exit code out."""
    console = Console(soft_wrap=True)
    files = [o for o in overrides if o.startswith("pipeline=") and o.endswith((".yaml", ".yml"))]
    whole = [o for o in overrides if o not in files]
    if any(o.startswith("pipeline=") and o != "pipeline=null" for o in overrides):
        # data and models are the stages' own, and a domain need not have data for any one phase
        aside = ("phase=", "data=", "data.", "model=", "model.", *HELD_OUT)
        whole = [*(o for o in whole if not o.startswith(aside)), "phase=chat"]
    config = run_config(compose(with_checkpoint_model(whole)))
    keys = {o.partition("=")[0] for o in overrides}
    for chosen in files:
        said = {k: getattr(config.pipeline, k) for k in ("skip", "after", "result") if f"pipeline.{k}" in keys}
        pipeline = dataclasses.replace(pipeline_from_file(Path(chosen.partition("=")[2])), **said)
        config = dataclasses.replace(config, pipeline=pipeline)
    if config.launcher.kind != "here" and placed().size == 1:
        return submit(config, console)
    if config.pipeline.stages:
        return run_pipeline(overrides, config, console)
    return run(config, console)
