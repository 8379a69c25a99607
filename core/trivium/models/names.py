"""How two sets of names differ, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def few(names: Iterable[str]) -> str:
    """The first three, and how many more; names of damaged files may hold anything, and stay on one line.

    >>> few(["d", "c", "b", "a"])
    'a, b, c and 1 more'
    """
    listed = sorted(names)
    shown = [name[:80].encode("unicode_escape").decode() for name in listed[:3]]
    return ", ".join(shown) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def difference(wanted: Collection[str], found: Collection[str]) -> str:
    """What `found` lacks and what it has besides; empty where they are the same.

    >>> difference({"a", "b"}, {"b", "c"})
    'lacks a and has unknown c'
    """
    missing, unknown = set(wanted) - set(found), set(found) - set(wanted)
    parts = [f"lacks {few(missing)}"] * bool(missing) + [f"has unknown {few(unknown)}"] * bool(unknown)
    return " and ".join(parts)
