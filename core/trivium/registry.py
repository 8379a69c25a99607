"""A registry is a small, loud dictionary: name -> where the class and its Config live, imported when asked for.

Nothing is imported at registration, so listing, completing and refusing names costs nothing (and needs no torch).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from trivium.errors import ConfigError, PluginError


@dataclass(frozen=True)
class Entry:
    """Where a component lives: `target` is its class and `config` its Config dataclass, both as "module:attribute".

    Without `config`, the class's own `Config` attribute is used (which imports the class's module to show its options).
    """

    target: str
    config: str | None = None
    help: str = ""
    owner: str = "trivium"


def load(path: str, owner: str = "trivium") -> Any:
    """Import "module:attribute"; a failure names the plugin that owns it."""
    module, _, attribute = path.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (Exception, SystemExit) as error:  # a module that exits must not end the program that lists it
        raise PluginError(f"{owner}: {path!r} cannot be imported ({type(error).__name__}: {error})") from error
    return value


def near_misses(name: str, names: Iterable[str]) -> str:
    """' Did you mean a or b?' or nothing; one wording for every unknown name in the program."""
    near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""


MOST = 18  # options that an error lists


def listed(names: Iterable[str]) -> str:
    """The options there are, in one line; of very many the first, and how many more.

    >>> listed(["b", "a"]), listed([]), listed(f"m{i}" for i in range(100, 121))[-30:]
    ('b, a', '(none)', 'm116, m117 and 3 more (--help)')
    """
    found = list(names)
    more = f" and {len(found) - MOST} more (--help)" if len(found) > MOST else ""
    return (", ".join(found[:MOST]) or "(none)") + more


class Registry:
    """Names of one kind. `add` refuses a taken name; `resolve` refuses an unknown one with near misses and the list.

    >>> fruit = Registry("fruit")
    >>> fruit.add("apple", Entry("math:pi"))
    >>> fruit.load("apple")
    3.141592653589793
    >>> fruit.resolve("aple")
    Traceback (most recent call last):
    ...
    trivium.errors.ConfigError: unknown fruit 'aple'. Did you mean apple? Available: apple
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, list[Entry]] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Register `entry`; the same name from one owner twice is an error, from two owners one at resolve time."""
        taken = self._entries.setdefault(name, [])
        if any(other.owner == entry.owner for other in taken):
            raise PluginError(f"{entry.owner} registers the {self.kind} {name!r} twice")
        taken.append(entry)

    def resolve(self, name: str) -> Entry:
        """The entry of `name` or of the qualified `owner:name`."""
        owner, _, short = name.rpartition(":")
        found = [e for e in self._entries.get(short, []) if not owner or e.owner == owner]
        if not found:
            raise ConfigError(f"unknown {self.kind} {name!r}.{near_misses(short, self)} Available: {listed(self)}")
        if len(found) > 1:
            choices = " or ".join(f"{e.owner}:{short}" for e in found)
            raise PluginError(f"the {self.kind} {short!r} comes from {len(found)} packages; write {choices}")
        return found[0]

    def load(self, name: str) -> Any:
        """Import and return the class registered as `name`."""
        entry = self.resolve(name)
        return load(entry.target, entry.owner)

    def config(self, name: str) -> type:
        """The Config dataclass of `name`, without importing the class itself where the entry names both."""
        entry = self.resolve(name)
        return load(entry.config or f"{entry.target}.Config", entry.owner)

    def remove_owner(self, owner: str) -> None:
        """Take back all that `owner` registered (a plugin whose registration failed half way)."""
        for name in list(self._entries):
            self._entries[name] = [e for e in self._entries[name] if e.owner != owner]
            if not self._entries[name]:
                del self._entries[name]

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Every (name, entry) in order of name; a clashing name appears once for each owner."""
        for name in self:
            for entry in self._entries[name]:
                yield name, entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


MODELS = Registry("model")
SOURCES = Registry("data source")
OBJECTIVES = Registry("objective")
BACKENDS = Registry("inference backend")

_EXTRAS: dict[str, Registry] = {}


def extra(kind: str) -> Registry:
    """The registry of another kind (optimizers, schedules, ...): the same mechanism, made when first asked for."""
    return _EXTRAS.setdefault(kind, Registry(kind))


def registries() -> dict[str, Registry]:
    """Every registry by its plural name, the four first."""
    return {"models": MODELS, "sources": SOURCES, "objectives": OBJECTIVES, "backends": BACKENDS, **_EXTRAS}
