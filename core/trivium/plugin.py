"""Plugins: how a package, ours or a stranger's, adds names to the registries and files to the config search path.

A plugin is data, not code: one entry point in the group `trivium.plugins` names a `Plugin`. Discovery imports the
module that holds it and nothing more; the components it names are imported when they are chosen.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

from trivium.errors import PluginError
from trivium.registry import Entry, Registry, extra, load, registries

API_LEVEL = 1
"""Raised when a base class changes incompatibly; a plugin of another level is refused with one sentence."""


@dataclass(frozen=True)
class Plugin:
    """What a package adds. Values are "module:Class" (with a `Config` attribute) or an `Entry` naming both.

    conf: the package that holds its YAML files ("pkg://my_medical.conf"). extras: further kinds, for instance
    {"optimizers": {"lion": "my_pkg:Lion"}}.
    """

    name: str
    api: int = API_LEVEL
    conf: str | None = None
    models: Mapping[str, str | Entry] = field(default_factory=dict)
    sources: Mapping[str, str | Entry] = field(default_factory=dict)
    objectives: Mapping[str, str | Entry] = field(default_factory=dict)
    backends: Mapping[str, str | Entry] = field(default_factory=dict)
    extras: Mapping[str, Mapping[str, str | Entry]] = field(default_factory=dict)
    help: str = ""


@dataclass
class Discovered:
    """What discovery found: the plugins in use, and the failures of those that are not (name -> reason)."""

    plugins: dict[str, Plugin] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


FOUND = Discovered()
_local: dict[str, str] = {}


def register_local(points: Mapping[str, str]) -> None:
    """Entry points of a bare clone (name -> "module:attribute"), which no installed distribution announces."""
    _local.update(points)


def local_points() -> dict[str, str]:
    """What `register_local` was told, for a child process to be told too."""
    return dict(_local)


def register(plugin: Plugin, owner: str) -> None:
    """Put everything `plugin` names into the registries, or nothing."""
    if plugin.api != API_LEVEL:
        raise PluginError(
            f"plugin {plugin.name!r} is written for API level {plugin.api}; this trivium speaks {API_LEVEL}. "
            f"Install a release of {owner} for this version."
        )
    groups: dict[Registry, Mapping[str, str | Entry]] = {
        registries()[kind]: getattr(plugin, kind) for kind in ("models", "sources", "objectives", "backends")
    }
    groups |= {extra(kind): names for kind, names in plugin.extras.items()}
    try:
        for registry, names in groups.items():
            for name, value in names.items():
                entry = value if isinstance(value, Entry) else Entry(value)
                registry.add(name, Entry(entry.target, entry.config, entry.help, owner))
    except Exception:
        for registry in groups:
            registry.remove_owner(owner)
        raise


def discover() -> Discovered:
    """Register core's catalog, then every plugin; a broken one is recorded and harms nobody else. Runs once."""
    if FOUND.plugins:
        return FOUND
    catalog = load("trivium.catalog:CATALOG")
    register(catalog, "trivium")
    FOUND.plugins["trivium"] = catalog
    points: dict[str, list[tuple[str, str, str]]] = {}
    for p in entry_points(group="trivium.plugins"):
        known = (p.value, p.dist.name if p.dist else "?", p.dist.version if p.dist else "?")
        points.setdefault(p.name, []).append(known)
    for name, value in _local.items():
        points.setdefault(name, [(value, "trivium-llm", "clone")])
    files = dict.fromkeys(_files(_core_conf()), "trivium")
    for name, claims in sorted(points.items()):
        value, dist, version = claims[0]
        try:
            if len(claims) > 1:
                packages = " and ".join(f"{d} {v}" for _, d, v in claims)
                raise PluginError(f"{packages} both announce a plugin called {name!r}; uninstall one of them")
            plugin = load(value, dist)
            if not isinstance(plugin, Plugin):
                raise PluginError(f"{value!r} is a {type(plugin).__name__}, not a trivium.Plugin")
            own = _files(plugin.conf) if plugin.conf else []
            taken = [f for f in own if f in files]
            if taken:
                raise PluginError(f"its config file {taken[0]} is {files[taken[0]]}'s already; it needs another name")
            register(plugin, name)
            files |= dict.fromkeys(own, name)
        except Exception as error:  # a stranger's import can raise anything
            FOUND.failures[name] = str(error)
            continue
        FOUND.plugins[name] = plugin
        FOUND.versions[name] = f"{dist} {version}"
    return FOUND


def _core_conf() -> str:
    package = Path(__file__).parent
    inside, beside = package / "conf", package.parents[1] / "conf"
    return f"file://{inside if (inside / 'config.yaml').exists() else beside}"


def _folders(root: str) -> list[Path]:
    """A search path entry as folders on disk. Raises PluginError if it names a package that is not there."""
    if root.startswith("file://"):
        return [Path(root.removeprefix("file://"))]
    try:
        spec = importlib.util.find_spec(root.removeprefix("pkg://"))
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(f"conf={root!r} names no package")
    return [Path(p) for p in spec.submodule_search_locations]


def _files(root: str) -> list[str]:
    """The YAML files of a config tree, by their names in it."""
    return sorted(p.relative_to(f).as_posix() for f in _folders(root) for p in f.rglob("*.yaml"))


def conf_roots() -> list[tuple[str, str]]:
    """(owner, search path entry) of every config tree, core's first; `pkg://` in a wheel, the checkout's conf/ else."""
    roots = [("trivium", _core_conf())]
    for name, plugin in discover().plugins.items():
        if plugin.conf:
            roots.append((name, plugin.conf))
    return roots


def conf_folders() -> list[tuple[str, Path]]:
    """The same config trees as folders on disk, for listings and for finding which file set a key."""
    return [(name, folder) for name, root in conf_roots() for folder in _folders(root)]
