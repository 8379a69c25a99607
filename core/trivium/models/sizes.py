"""`model.size=30m`: width, depth and heads that make a model of about so many parameters, embeddings included."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from trivium.errors import ConfigError

UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "": 1.0}
DERIVED = ("dim", "layers", "heads", "kv_heads", "ffn_dim")
RATIO = 64  # width over depth that is aimed at; loss hardly depends on it (Kaplan et al. 2020, 2001.08361, figure 5)
TOLERANCE = 0.06  # of the number that is asked for


def _head(width: int) -> int:
    return 16 if width < 128 else 32 if width < 512 else 64 if width < 2048 else 128


def _shares(width: int) -> bool:
    heads, rest = divmod(width, _head(width))
    return rest == 0 and (heads % 4 == 0 or heads in (1, 2, 3, 6, 9))


WIDTHS = [width for width in range(16, 16385, 16) if _shares(width)]
"""Heads of 16 to 64 (128 from a width of 2048), and as many as can be shared out."""


def parameters_of(size: str) -> float:
    """The number that a size says.

    >>> parameters_of("30m"), parameters_of("1.5B"), parameters_of("250000")
    (30000000.0, 1500000000.0, 250000.0)
    """
    found = re.fullmatch(r"(\d+\.?\d*)([kmb]?)", size.strip().lower())
    if not found or float(found[1]) == 0:
        raise ConfigError(f"model.size={size!r} is no size; write a number of parameters, such as 500k, 30m or 1.2b")
    return float(found[1]) * UNITS[found[2]]


def sized(config: Any, count: Callable[[Any], int]) -> Any:
    """`config` with the sizes that its `size` asks for, and no `size` any more; as it is where it asks for none.

    count: the parameters of a config. Of the shapes within 6 % the one is taken whose width over depth is nearest 64.
    Raises ConfigError if sizes were given besides, or no shape is near enough.
    """
    if not getattr(config, "size", ""):
        return config
    fields = {f.name: f.default for f in dataclasses.fields(config)}
    given = [name for name in DERIVED if name in fields and getattr(config, name) != fields[name]]
    if given:
        raise ConfigError(
            f"model.size={config.size} makes {', '.join(n for n in DERIVED if n in fields)}; "
            f"leave model.{given[0]}={getattr(config, given[0])} away, or choose a family that sets none (model=llama)"
        )
    wanted = parameters_of(config.size)
    near: list[tuple[float, Any]] = []
    closest = None
    for width in WIDTHS:
        low = count(_shape(config, width, 1))
        each = count(_shape(config, width, 2)) - low
        layers = max(1, round((wanted - low) / each) + 1)
        off = (low + (layers - 1) * each) / wanted - 1
        made = _shape(config, width, layers)
        ratio = width / layers / RATIO
        if abs(off) <= TOLERANCE:
            near.append((max(ratio, 1 / ratio), made))
        if closest is None or abs(off) < abs(closest[0]):
            closest = (off, made)
        if low > 2 * wanted:
            break
    if not near:
        assert closest is not None
        told = f"the nearest has {count(closest[1]):,}"
        raise ConfigError(f"model.size={config.size}: with this vocabulary no shape has so few or many; {told}")
    return min(near, key=lambda found: found[0])[1]


def _shape(config: Any, width: int, layers: int) -> Any:
    """A quarter of the heads (or a third) with keys of their own, 8/3 of the width in the feed-forward."""
    heads = width // _head(width)
    kv_heads = heads // (4 if heads % 4 == 0 else 3 if heads % 3 == 0 else 1)
    unit = 16 if width < 512 else 64
    shape = {"dim": width, "layers": layers, "heads": heads, "kv_heads": kv_heads, "size": ""}
    shape["ffn_dim"] = max(unit, round(width * 8 / 3 / unit) * unit)
    names = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in shape.items() if k in names})
