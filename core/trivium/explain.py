"""`explain KEY [overrides]`: what a setting is, its value, its default, and which file or argument set it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from trivium.compose import VERSION_BASE, _known_keys, compose, groups, install, main_conf, node_type
from trivium.errors import ConfigError
from trivium.registry import near_misses
from trivium.schema import RunConfig


def explain(args: list[str]) -> int:
    """Print one setting's meaning, value, default and origin."""
    if not args or "=" in args[0]:
        raise ConfigError("write `explain KEY [overrides]`, for instance `explain optim.lr phase=sft`")
    key, overrides = args[0], args[1:]
    cfg = compose(overrides)
    keys = _known_keys(cfg)
    if key not in keys:
        raise ConfigError(f"unknown option {key!r}.{near_misses(key, keys)}")
    value = OmegaConf.select(cfg, key)
    shown = OmegaConf.to_yaml(value).strip() if OmegaConf.is_config(value) else repr(value)
    print(f"{key} = {shown}" if "\n" not in shown else f"{key}:\n{shown}")
    owner, field = owner_of(cfg, key)
    if owner is not None and field is not None:
        print(f"  type     {field.type}")
        if field.default is not dataclasses.MISSING:
            print(f"  default  {field.default!r} ({owner.__name__})")
        note = comment_of(owner, field.name)
        if note:
            print(f"  meaning  {note}")
    for origin in origins(key, overrides):
        print(f"  set by   {origin}")
    return 0


def owner_of(cfg: DictConfig, key: str) -> tuple[Any, dataclasses.Field | None]:
    """The dataclass and field that a dotted key names."""
    here: Any = RunConfig
    path = key.split(".")
    for i, part in enumerate(path):
        fields = {f.name: f for f in dataclasses.fields(here)} if dataclasses.is_dataclass(here) else {}
        if part not in fields:
            return None, None
        if i == len(path) - 1:
            return here, fields[part]
        if i == 0 and part in groups():
            here = node_type(part, cfg[part].name)
        else:
            sample = fields[part].default_factory() if fields[part].default_factory is not dataclasses.MISSING else None  # type: ignore[misc]
            here = type(sample)
    return None, None


def comment_of(owner: type, name: str) -> str:
    """The comment beside a field in its dataclass, which is where settings are documented."""
    for cls in owner.__mro__:
        if name not in cls.__dict__.get("__annotations__", {}) or cls.__module__ not in sys.modules:
            continue
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):  # a node made at run time; its base has the source
            continue
        lines = source.splitlines()
        for node in ast.parse(inspect.cleandoc(source)).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name:
                return lines[(node.end_lineno or node.lineno) - 1].partition("#")[2].strip()
    return ""


def origins(key: str, overrides: list[str]) -> list[str]:
    """Every file and argument that sets a key, the one that counts last."""
    install()
    GlobalHydra.instance().clear()
    found = []
    with initialize_config_dir(main_conf(), version_base=VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list("config", list(overrides), RunMode.RUN)
        for default in defaults.defaults:
            path = default.config_path
            if path is None or path.startswith("hydra"):
                continue
            result = loader.repository.load_config(path)  # type: ignore[attr-defined]
            if result is None or result.path == "registry://":
                continue
            package = f"{default.package}." if default.package not in (None, "", "_global_") else ""
            inside = key.removeprefix(package) if key.startswith(package) else None
            if inside and OmegaConf.select(result.config, inside) is not None:
                found.append(f"{result.path.removeprefix('file://').removeprefix('pkg://')}/{path}.yaml")
    return found + [f"the command line: {o}" for o in overrides if o.lstrip("+").split("=")[0] == key]
