"""Pipelines: phases in order, in one process, each starting from what an earlier one made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from trivium.build import build_source
from trivium.compose import as_dict, compose, options, run_config
from trivium.disk import make_folder, replace_file
from trivium.errors import ConfigError
from trivium.lineage.manifest import Manifest, digest_of, masked
from trivium.lineage.report import summary_table, write_report
from trivium.phases import run
from trivium.schema import DATA_PHASES, TRAINING_PHASES, RunConfig
from trivium.training.checkpoint import RECORD


def run_pipeline(overrides: Sequence[str], config: RunConfig, console: Console) -> int:
    """Run a pipeline's stages in one process, each from the newest stage that made what it needs."""
    pipeline = config.pipeline
    name = config.name or f"{pipeline.name}-{config.domain}"
    folder = make_folder(Path(config.runs) / name)
    replace_file(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(masked(as_dict(config)))).encode())
    record = Manifest(
        folder, digest_of(list(overrides)), name=name, phase="pipeline", domain=config.domain, seed=config.seed
    )
    stages = plan_stages(overrides, config, name)  # all of them before the first starts: bad settings cost no time
    done: list[dict[str, str]] = []
    trained = config.init_from
    for stage in stages:
        done.append(stage.entry)
        record.update("running", stages=done)
        try:
            code = run(stage.config, console, skip_done=True)
        except BaseException:
            record.update("failed")
            raise
        if code:
            record.update("stopped")
            write_report(folder)
            return code
        if stage.makes:
            trained = f"{config.runs}/{name}/{stage.entry['path']}"
    commands = next_commands(trained)
    record.update("done", next_commands=commands)
    report = write_report(folder)
    console.print(summary_table(folder))
    console.print(f"report: {report}", highlight=False)
    console.print("next:")
    for command in commands:
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
    return 0


@dataclass(frozen=True)
class Stage:
    """One stage, ready to run. makes: later stages may start from it."""

    config: RunConfig
    entry: dict[str, str]
    makes: bool


def plan_stages(overrides: Sequence[str], config: RunConfig, name: str) -> list[Stage]:
    """The stages with their settings composed and checked. One that would generate from no prompts is left out."""
    first = next(iter(config.pipeline.stages.values())).phase
    if config.init_from and first == "tokenizer":
        raise ConfigError(
            f"pipeline={config.pipeline.name} starts from nothing, with a tokenizer of its own; leave init_from= away "
            "or run one phase, for instance phase=sft init_from=..."
        )
    stages = []
    trained = config.init_from
    for stage, settings in config.pipeline.stages.items():
        origin = f"{config.runs}/{name}/{settings.init_from}" if settings.init_from else trained
        composed = stage_run_config(overrides, settings.phase, settings.overrides, f"{name}/{stage}", origin)
        if settings.phase == "generate" and not (composed.prompt or composed.prompts):
            continue
        if settings.phase in DATA_PHASES:
            build_source(composed.data, settings.phase).expect(settings.phase)
        entry = {"name": stage, "phase": settings.phase, "path": stage}
        if origin and settings.phase in ("evaluate", "generate", "chat"):
            entry["of"] = Path(origin).name
        makes = settings.phase in ("tokenizer", *TRAINING_PHASES)
        stages.append(Stage(composed, entry, makes))
        if makes:
            trained = f"{config.runs}/{name}/{stage}"
    return stages


def stage_run_config(
    overrides: Sequence[str], phase: str, stage_overrides: Sequence[str], name: str, init_from: str
) -> RunConfig:
    """The settings of one stage: its own overrides, then the command line's, which beat them.

    `data.*` of the command line goes to the stages that have data, `model.*` to those that start a model.
    """
    aside = ("phase=", "pipeline=", "pipeline.", "name=", "init_from=")
    given = [o for o in overrides if not o.startswith(aside)]
    domain = next((o.split("=", 1)[1] for o in [*stage_overrides, *given][::-1] if o.startswith("domain=")), None)
    if f"{domain or compose([]).domain}/{phase}" not in options("data"):
        given = [o for o in given if not o.startswith(("data.", "data="))]
    if phase != "pretrain" and not any(o.startswith("model=") for o in given):
        given = [o for o in given if not o.startswith("model.")]
    fixed = [f"phase={phase}", f"name={name}", f"init_from={init_from}"]
    return run_config(compose(with_checkpoint_model([*fixed, *stage_overrides, *given])))


def with_checkpoint_model(overrides: Sequence[str]) -> list[str]:
    """Overrides under which a checkpoint in init_from= brings its own model, unless one is chosen beside it."""
    said = dict(o.split("=", 1) for o in overrides if "=" in o)
    path = Path(said.get("init_from", "").strip("'\""))
    trained = (path / "checkpoints").is_dir() or (path / RECORD).is_file()
    chosen = any(key == "model" or key.startswith("model.") for key in said)
    return [*overrides, "~model"] if trained and not chosen and said.get("phase") == "pretrain" else list(overrides)


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
    config = run_config(compose(with_checkpoint_model(overrides)))
    if config.pipeline.stages:
        return run_pipeline(overrides, config, console)
    return run(config, console)
