"""Overrides in, one strict RunConfig out: where Hydra's tree meets our dataclasses.

Every registered component is a config option by itself (`model=llama` needs no YAML file): a Hydra config source of
the scheme `registry://` turns its Config dataclass into a typed node when, and only when, it is chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from trivium.errors import ConfigError, TriviumError
from trivium.plugin import conf_folders, conf_roots, discover
from trivium.registry import Registry, extra, listed, near_misses, registries
from trivium.schema import DATA_PHASES, PHASES, PipelineConfig, RunConfig

VERSION_BASE = "1.3"
REFUSALS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
"""What composing raises; ValueError is Hydra's own for `group=null`, YAMLError means a file that cannot be read."""
OPTIONAL = ("data", "recipe")
"""Groups that conf/config.yaml calls optional: Hydra would pass over an option that is not there."""


def groups() -> dict[str, Registry]:
    """Config group -> the registry whose names are its options."""
    kinds = registries()
    return {
        "model": kinds["models"],
        "data": kinds["sources"],
        "objective": kinds["objectives"],
        "inference": kinds["backends"],
        "tokenizer": extra("tokenizers"),
        "adapter": extra("adapters"),
        "optim": extra("optimizers"),
        "schedule": extra("schedules"),
    }


@dataclasses.dataclass(frozen=True)
class Component:
    """A choice from a registry with its settings, as a run config carries it."""

    name: str
    config: Any


@functools.cache
def node_type(group: str, name: str) -> type:
    """The Config dataclass of a component with a `name` field in front: what the composed tree holds."""
    config = groups()[group].config(name)
    if not dataclasses.is_dataclass(config):
        raise ConfigError(f"{group}={name}: its Config is not a dataclass")
    if any(f.name == "name" for f in dataclasses.fields(config)):
        raise ConfigError(f"{group}={name}: a Config may not have a field called name (it is the option's own)")
    fields: list[Any] = [("name", str, dataclasses.field(default=name))]
    return dataclasses.make_dataclass(config.__name__, fields, bases=(config,), frozen=True)


def _node(type_: type) -> DictConfig:
    """A typed, writable node: OmegaConf makes frozen dataclasses read-only, which would refuse every override."""
    node = OmegaConf.structured(type_)
    stack = [node]
    while stack:
        here = stack.pop()
        OmegaConf.set_readonly(here, None)
        if OmegaConf.get_type(here) is dict:  # its keys are the user's own
            OmegaConf.set_struct(here, False)
        stack += [here._get_node(k) for k in here if isinstance(here._get_node(k), DictConfig)]
    return node


class RegistrySource(ConfigSource):
    """Hydra config source: `group/name` is the typed node of a registered component, `run` the root schema."""

    @staticmethod
    def scheme() -> str:
        return "registry"

    def load_config(self, config_path: str) -> ConfigResult:
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        node = _node(node_type(group, name)) if group else _node(RunConfig)
        package = group.replace("/", ".") if group else "_global_"
        return ConfigResult(provider=self.provider, path="registry://", config=node, header={"package": package})

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") in ("", *groups())

    def is_config(self, config_path: str) -> bool:
        group, _, name = config_path.removesuffix(".yaml").strip("/").rpartition("/")
        return name == "run" if not group else group in groups() and name in groups()[group]

    def available(self) -> bool:
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        group = config_path.strip("/")
        names = list(groups()[group]) if group in groups() else []
        if results_filter == ObjectType.GROUP:
            return [] if group else sorted(groups())
        return names if group else ["run"]


class TriviumSearchPath(SearchPathPlugin):
    """Adds the registries and every plugin's config tree to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("trivium-registries", "registry://")
        for owner, root in conf_roots()[1:]:
            search_path.append(owner, root)


def install() -> None:
    """Make Hydra know our config source and search path; may be called again."""
    discover()
    Plugins.instance().register(RegistrySource)
    Plugins.instance().register(TriviumSearchPath)


def main_conf() -> str:
    """The folder of core's own config tree."""
    return conf_roots()[0][1].removeprefix("file://")


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The composed tree of these overrides. Raises ConfigError with near misses and what is possible."""
    install()
    for group, _, name in (o.partition("=") for o in overrides):
        if group in OPTIONAL and name not in (*options(group), "null"):
            raise _no_option(group, name, overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(main_conf(), version_base=VERSION_BASE, job_name="trivium"):
            cfg = hydra_compose("config", overrides=list(overrides))
    except REFUSALS as error:
        raise explain_failure(error, overrides) from error
    return cfg


def data_option(name: str) -> Component:
    """An option of the group `data` alone, such as `books/evaluate`, as it is without overrides."""
    install()
    GlobalHydra.instance().clear()
    with initialize_config_dir(main_conf(), version_base=VERSION_BASE, job_name="trivium"):
        plain: Any = OmegaConf.to_container(hydra_compose(f"data/{name}").data, resolve=True)
    found = component("data", plain)
    assert found is not None
    return found


def options(group: str) -> list[str]:
    """Every option of a config group, from files and registries."""
    names = set(groups()[group]) if group in groups() else set()
    for _, folder in conf_folders():
        base = folder / group
        names |= {p.relative_to(base).with_suffix("").as_posix() for p in base.rglob("*.yaml")}
    return sorted(names)


def file_groups() -> list[str]:
    """Every config group a person can choose from."""
    names = {p.name for _, folder in conf_folders() if folder.is_dir() for p in folder.iterdir() if p.is_dir()}
    return sorted((names | set(groups())) - {"__pycache__"})


def _known_keys(cfg: Any, prefix: str = "") -> list[str]:
    found = []
    for key in cfg:
        found.append(f"{prefix}{key}")
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            found += _known_keys(node, f"{prefix}{key}.")
    return found


def explain_failure(error: BaseException, overrides: Sequence[str]) -> TriviumError:
    """One sentence for what Hydra or OmegaConf refused."""
    cause: BaseException | None = error
    texts = []
    while cause is not None:  # our own sentence, or the reason, may lie under Hydra's wrapping
        if isinstance(cause, TriviumError):
            return cause
        texts.append(str(cause).strip())
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(texts)
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if missing:
        group, _, name = missing.group(1).rpartition("/")
        head = group.split("/")[0] if group else ""
        if head in file_groups():
            return _no_option(head, missing.group(1).removeprefix(f"{head}/"), overrides)
        return ConfigError(f"no config group or option {missing.group(1)!r}.{near_misses(name, file_groups())}")
    first = text.splitlines()[0] if text else type(error).__name__
    unknown = re.search(r"Could not override '([^']+)'|Key '(\w+)' (?:is )?not in '\w+'", text)
    if unknown:
        full = re.search(r"full_key: ([\w.]+)", text)
        key = (unknown.group(1) or (full and full.group(1)) or unknown.group(2)).split("=")[0].split("@")[0]
        given = [o.lstrip("+~").split("=")[0] for o in overrides]
        if key not in given:  # a file is to blame, and composing without it would meet it again
            file = re.search(r"In '([^']+)'", text)
            return ConfigError(f"unknown option {key!r}{f' in {file.group(1)}.yaml' if file else ''}")
        if key.startswith("data."):  # no such key, or no data at all?
            bare = compose([o for o, k in zip(overrides, given, strict=True) if not k.startswith("data.")])
            if bare.data is None and bare.phase in DATA_PHASES:
                return _no_option("data", f"{bare.domain}/{bare.phase}", overrides)
        known = _known_keys(compose([o for o, k in zip(overrides, given, strict=True) if k != key]))
        inner = re.search(r"Key '(\w+)' (?:is )?not in '\w+'", text)
        if inner and key in known:  # a list of settings, whose entries have no such key
            return ConfigError(f"unknown option {inner.group(1)!r} in an entry of {key}")
        return ConfigError(
            f"unknown option {key!r}.{near_misses(key, {*known, *file_groups()})} `--help` lists the groups"
        )
    where = re.search(r"full_key: ([\w.]+)", text)
    value = re.search(r"Value '([^']*)' of type '[^']*' could not be converted to (\w+)", text)
    if value:
        kind = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}.get(
            value.group(2), "valid"
        )
        return ConfigError(f"{where.group(1) if where else 'value'}={value.group(1)} is not {kind}")
    if where and ("not Optional" in text or "is not Optional" in text or "unsupported" in text):
        return ConfigError(f"{where.group(1)} needs a value; it was given none")
    if "Config group override must be a string" in text:
        for group, _, name in (o.partition("=") for o in overrides):
            if group in file_groups() and name == "null":
                return _no_option(group, name, overrides)
    if any(sign in text for sign in ("mismatched input", "no viable alternative", "missing EQUAL", "extraneous input")):
        bad = getattr(error, "override", None) or next((o for o in overrides if "=" not in o), first)
        return ConfigError(
            f"cannot read {bad!r}; write key=value, lists as key=[a,b] and quote odd characters: 'key=\"a, b\"'"
        )
    return ConfigError(" ".join(line.strip() for line in text.splitlines()[:2] if line.strip()))


def _no_option(group: str, name: str, overrides: Sequence[str]) -> ConfigError:
    known = options(group)
    domain, _, phase = name.partition("/")
    if group == "data" and phase:
        phases = [o.split("/")[1] for o in known if o.startswith(f"{domain}/")]
        return ConfigError(f"domain={domain} has no data for phase={phase}; it has {', '.join(phases) or 'none'}")
    shown = [o for o in known if group != "data" or "/" not in o]
    return ConfigError(f"unknown {group}={name}.{near_misses(name, shown)} Available: {listed(shown)}")


def run_config(cfg: DictConfig) -> RunConfig:
    """The composed tree as frozen dataclasses; nothing of OmegaConf travels further. Raises ConfigError."""
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain_failure(error, ()) from error
    assert isinstance(plain, dict)
    return config_of(plain)  # type: ignore[arg-type]


def config_of(tree: Mapping[str, Any]) -> RunConfig:
    """Plain data as a RunConfig, the inverse of `as_dict`. Raises ConfigError."""
    plain, values = dict(tree), {}
    try:
        for f in dataclasses.fields(RunConfig):
            value = plain.pop(f.name)
            if f.name in groups():
                value = component(f.name, value)
            elif f.name != "debug" and dataclasses.is_dataclass(type(getattr(_DEFAULT, f.name))):
                value = _typed(type(getattr(_DEFAULT, f.name)), value)
            values[f.name] = value
    except OmegaConfBaseException as error:
        raise explain_failure(error, ()) from error
    if plain:
        raise ConfigError(f"unknown option {next(iter(plain))!r}")
    if values["data"] is None and values["domain"] not in options("domain"):
        raise _no_option("domain", values["domain"], ())
    if values["data"] is None and values["phase"] in DATA_PHASES:
        raise _no_option("data", f"{values['domain']}/{values['phase']}", ())
    return RunConfig(**values)


def pipeline_from_file(path: Path) -> PipelineConfig:
    """A pipeline that somebody wrote: a YAML list of stages, or a mapping that has one as `stages`."""
    try:
        content = OmegaConf.load(path)
        if isinstance(content, ListConfig):
            content = OmegaConf.create({"stages": content})
        settings: dict[str, Any] = {"name": path.stem, **OmegaConf.to_container(content)}  # type: ignore[dict-item]
        stages = settings.get("stages") or []
        if not isinstance(stages, list):
            raise TypeError("stages must be a list")
        settings["stages"] = [{"phase": s} if isinstance(s, str) else s for s in stages]
        pipeline = _typed(PipelineConfig, settings)
    except OSError as error:
        raise ConfigError(f"pipeline={path} cannot be read: {error.strerror or error}") from error
    except MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path} is no pipeline: {where}{error.problem}") from error
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no pipeline: {str(error).splitlines()[0]}") from error
    unknown = [p for p in (*(s.phase for s in pipeline.stages), *pipeline.after) if p not in PHASES]
    if unknown or not pipeline.stages:
        wrong = f"phase {unknown[0]!r} is not one of {', '.join(PHASES)}" if unknown else "it has no stages"
        raise ConfigError(f"{path} is no pipeline: {wrong}")
    return pipeline


_DEFAULT = RunConfig(data=Component("none", None))


def component(group: str, value: Mapping[str, Any] | None) -> Component | None:
    """{name, ...settings} -> Component with its typed Config; None for nothing (`adapter: {}`)."""
    if not value:
        return None
    settings = dict(value)
    name = settings.pop("name", None)
    if name is None:
        raise ConfigError(f"{group} has no name; choose one of {', '.join(groups()[group])}")
    try:
        return Component(name, _typed(groups()[group].config(name), settings))
    except OmegaConfBaseException as error:
        raise explain_failure(error, ()) from error


def _typed(type_: type, values: Any) -> Any:
    node = _node(type_)
    merged = OmegaConf.merge(node, OmegaConf.create(values)) if values else node
    return OmegaConf.to_object(merged)


def as_dict(config: RunConfig) -> dict[str, Any]:
    """A RunConfig as plain data, the inverse of `config_of`: for config.yaml, manifests and comparisons."""

    def plain(value: Any) -> Any:
        if isinstance(value, Component):
            return {"name": value.name, **dataclasses.asdict(value.config)}
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value

    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def as_yaml(plain: Mapping[str, Any]) -> bytes:
    """Plain data as the text of a config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(plain))).encode()


def hydra_main(args: Sequence[str]) -> int:
    """What Hydra itself does: `-m` sweeps, `--cfg`, `--info`, `--shell-completion`."""
    install()
    name = next((a.partition("=")[2] for a in args if a.startswith("name=")), "")
    sys.argv = [sys.argv[0], *args, *([f"hydra.sweep.dir=${{runs}}/{name}"] if name else [])]

    @hydra.main(config_path=main_conf(), config_name="config", version_base=VERSION_BASE)
    def job(_cfg: DictConfig) -> None:
        raise ConfigError("set hydra/launcher=process: each job of a sweep is a process of its own")

    os.environ["HYDRA_FULL_ERROR"] = "1"  # else hydra.main prints a trace of its own and exits
    try:
        job()
    except REFUSALS as error:
        raise explain_failure(error, [a for a in args if not a.startswith("-")]) from error
    except SystemExit as left:
        return int(left.code or 0)
    return 0
