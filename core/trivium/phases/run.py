"""One run: its folder, manifest, parent, companions and console: what every phase needs."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from trivium.build import Artifact, build_source, load_artifact
from trivium.compose import as_dict, as_yaml
from trivium.data.source import Source
from trivium.disk import append_file, make_folder, replace_file
from trivium.errors import ConfigError
from trivium.lineage.figures import safe_text
from trivium.lineage.manifest import Manifest, digest_of, masked
from trivium.lineage.manifest import read as read_manifest
from trivium.phases.verified import verified_files, verified_rows
from trivium.schema import DATA_PHASES, TRAINING_PHASES, RunConfig
from trivium.training.parallel import ALONE, World

COMPANIONS = ("reference", "teacher")
USED_BY = {"reference": ("promote",), "teacher": ("evaluate",)}
"""Phases that use a companion, beside those that train: there the objective says."""
ASIDE = ("name", "runs", "debug", "pipeline", "launcher", "init_from", "base", "average", "doctor", "server")
ASIDE += COMPANIONS
"""Settings that change no result: init_from, here and of companions, and average are replaced by the hash of what they
named."""
RESULTS_OF = {
    "tokenizer": ("data", "tokenizer", "phase", "domain"),
    "evaluate": ("data", "evaluation", "inference", "system", "phase", "domain"),
    "generate": ("prompt", "prompts", "prompt_format", "system", "inference", "phase"),
    "chat": ("prompts", "system", "inference", "phase"),
    "serve": ("system", "inference", "phase"),
    "export": ("format", "quantize", "average", "push", "push_public", "phase"),
    "search": ("data", "search", "query", "system", "prompt_format", "inference", "phase"),
    "feedback": ("feedback", "phase"),
    "promote": ("promote", "evaluation", "phase"),
}


def _about(config: RunConfig) -> str:
    """What a run without a name is called after, behind its phase."""
    if config.phase == "search" and config.data is not None:
        return Path(getattr(config.data.config, "path", "")).resolve().name or config.domain
    if config.phase == "serve" and getattr(config.inference.config, "alone", False):
        return Path(config.inference.config.path).name
    speaks = config.phase in RESULTS_OF and config.init_from
    return Path(config.init_from).name if speaks else config.domain


class Run:
    """One run's folder, manifest, parent and console, and which of its processes this is: the first alone writes."""

    def __init__(self, config: RunConfig, console: Console, world: World = ALONE) -> None:
        self.world = world
        self.name = config.name or f"{config.phase}-{_about(config)}"
        self.config = config = dataclasses.replace(config, name=self.name)
        self.console = console
        self._sources: dict[str | None, Source] = {}
        # loaded before the folder is made: a wrong one leaves none
        family = config.model.name if config.model is not None else ""
        self.parent = load_artifact(config.init_from, config.base, family) if config.init_from else None
        self.averaged = [load_artifact(path, config.base, family) for path in config.average]
        if config.base and not any(a is not None and a.base is not None for a in (self.parent, *self.averaged)):
            raise ConfigError(
                f"base={config.base} is for an adapter, and init_from={config.init_from or '(none)'} is none"
            )
        self.companions: dict[str, Artifact] = {}
        for name in COMPANIONS:
            if getattr(config, name).init_from:
                if config.phase not in (*TRAINING_PHASES, *USED_BY[name]):
                    raise ConfigError(f"phase={config.phase} has no use for a {name}; leave {name}.init_from away")
                chosen = getattr(config, name)
                self.companions[name] = load_artifact(chosen.init_from, chosen.base)
        self.folder = make_folder(Path(config.runs) / self.name)
        there = read_manifest(self.folder).get("phase", config.phase)
        if there != config.phase:
            raise ConfigError(f"{self.folder} holds a run of phase={there}; choose another name=")
        plain = as_dict(config)
        keys = RESULTS_OF.get(config.phase, tuple(k for k in plain if k not in ("feedback", "promote")))
        came_from = [self.parent.sha256 if self.parent else "", *(self.companions[n].sha256 for n in self.companions)]
        came_from += [artifact.sha256 for artifact in self.averaged]
        key = digest_of([{k: plain[k] for k in keys if k not in ASIDE}, *came_from, config.seed])
        roles = [("init_from", self.parent), *self.companions.items(), *(("average", a) for a in self.averaged)]
        parents = [
            {"role": role, "path": str(artifact.checkpoint or artifact.path), "sha256": artifact.sha256}
            for role, artifact in roles
            if artifact is not None
        ]
        self.manifest = Manifest(
            self.folder, key, writes=world.is_first, name=self.name, phase=config.phase, domain=config.domain,
            seed=config.seed, config=masked(plain), parents=parents,
        )  # fmt: skip

    def begin(self, **facts: Any) -> None:
        """Make the folder this run's own. Training waits until its checkpoints are known to be this run's."""
        if self.world.is_first:
            replace_file(self.folder / "config.yaml", as_yaml(self.manifest.facts["config"]))
        self.manifest.update("running", **facts)

    def say(self, text: str) -> None:
        """A line under the phase's header, on the console and in log.txt."""
        if not self.world.is_first:
            return
        text = safe_text(text)
        self.console.print(f"  {text}", highlight=False, markup=False)
        append_file(self.folder / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {masked(text)}\n")

    def source(self, split: str | None = None) -> Source:
        """The run's data, built once for each split."""
        if split not in self._sources:
            self._sources[split] = source = build_source(self.config.data, self.config.phase, split)
            self._note(source)
        return self._sources[split]

    def _note(self, source: Source) -> None:
        """Tell once how the data was read and cleaned, and keep it for the manifest."""
        with self.world.first():  # what one has cleaned, the others read from the cache
            notes, split = dict(source.notes), source.config.split
        if not notes:
            return
        self.manifest.facts["read"] = {**self.manifest.facts.get("read", {}), split: notes}
        counted = {"cleaned": {k: v for k, v in notes.items() if isinstance(v, int) and not k.endswith("rows")}}
        for what, counts in (notes | counted).items():
            if isinstance(counts, Mapping) and any(counts.values()):
                shown = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
                self.say(f"data ({split}): {what.replace('_', ' ')}: {shown}")

    def same_content(self) -> bool:
        """Whether the data, or what was exported or made, holds what it held when the run was done."""
        if self.config.phase == "export":
            return bool(verified_files(self.folder / self.config.format))
        if self.config.phase == "feedback":
            return verified_rows(self.folder, self.manifest.facts)
        if self.config.phase == "search":  # it looks for itself, and makes what is missing
            return False
        if self.config.phase not in DATA_PHASES:
            return True
        return self.manifest.facts.get("source") == self.source().fingerprint

    def needs_parent(self) -> Artifact:
        """The parent of a phase that cannot start from nothing."""
        if self.parent is None:
            raise ConfigError(f"phase={self.config.phase} needs a trained model: set init_from=runs/...")
        return self.parent

    def note_parent(self, role: str, path: str, sha256: str) -> None:
        """Tell the manifest of a model that came into the run later."""
        others = [p for p in self.manifest.facts["parents"] if p["role"] != role]
        self.manifest.update(parents=[*others, {"role": role, "path": path, "sha256": sha256}])

    def write_samples(self, rows: Sequence[dict]) -> None:
        """samples.jsonl, whole."""
        replace_file(
            self.folder / "samples.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
        )
