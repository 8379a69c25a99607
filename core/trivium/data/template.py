"""Chat templates: Jinja as Hugging Face's tokenizers come with it, in a sandbox with limits.

A template is somebody else's program. It gets what transformers gives it (`tools`, `raise_exception`, `strftime_now`,
`tojson`, `namespace`, loop controls, `{% generation %}`), can reach and change nothing else, and is stopped when it
writes too much or runs too long. Loops and macros count their steps; what multiplies text is asked for its size first.
"""

from __future__ import annotations

import json
import operator
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from trivium.errors import DataError

MOST_SOURCE = 200_000
"""Characters of a template; real ones have under 30,000."""
MOST_TEXT = 32_000_000
"""Characters that one rendering may write, and that any one value in it may have."""
MOST_STEPS = 500_000
MOST_SECONDS = 3.0
MOST_BITS = 4_096
"""Of a whole number."""

START, END = "\ue002", "\ue003"
"""Around what `{% generation %}` holds, in a rendering that is to show it."""


class TooMuch(TemplateError):
    """A template went over a limit."""


@dataclass
class _Spent:
    steps: int = 0
    written: int = 0
    until: float = field(default_factory=lambda: time.monotonic() + MOST_SECONDS)

    def step(self, written: int = 0) -> None:
        self.steps += 1
        self.written += written
        if self.written > MOST_TEXT:
            raise TooMuch(f"it writes more than {MOST_TEXT:,} characters")
        if self.steps > MOST_STEPS or time.monotonic() > self.until:
            raise TooMuch(f"it runs for more than {MOST_STEPS:,} steps or {MOST_SECONDS:g} seconds")


_spent: ContextVar[_Spent] = ContextVar("spent")
_marking: ContextVar[bool] = ContextVar("marking", default=False)


def _size(value: Any) -> int:
    """Characters of a value as text, about; it stops counting when they are too many."""
    if isinstance(value, str):
        return len(value)
    total, stack = 0, [value]
    while stack:
        here = stack.pop()
        if isinstance(here, str):
            total += len(here) + 2
        elif isinstance(here, Mapping):
            stack += [*here.keys(), *here.values()]
            total += 2
        elif isinstance(here, (list, tuple)):
            stack += here
            total += 2
        else:
            total += 6
        if total + len(stack) > MOST_TEXT:
            raise TooMuch(f"one of its values has more than {MOST_TEXT:,} characters")
    return total


def _sized(value: Any) -> Any:
    if isinstance(value, (str, list, tuple, dict)) and len(value) > MOST_TEXT:
        raise TooMuch(f"one of its values has more than {MOST_TEXT:,} characters")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise TooMuch(f"one of its numbers has more than {MOST_BITS:,} bits")
    return value


GROWING = frozenset("replace join indent center ljust rjust zfill expandtabs wordwrap format format_map slice batch "
                    "round translate tojson".split())  # fmt: skip
"""What may make of two small things a large one: their sizes, or numbers, are multiplied first."""
PLAIN = frozenset("length count list first last default d map select reject selectattr rejectattr items dictsort sort "
                  "groupby unique reverse attr min max sum random".split())  # fmt: skip
"""Filters that write no text, so nested values need no counting."""


def _refuse_growth(name: str, args: tuple[Any, ...]) -> None:
    plain = [a for a in args if isinstance(a, (str, int, list, tuple, dict))]
    if name not in PLAIN:
        for value in plain:
            if not isinstance(value, (str, int)):
                _size(value)
    if name in GROWING:
        sizes = sorted(abs(int(a)) if isinstance(a, int) else _size(a) + 1 for a in plain)
        if len(sizes) > 1 and sizes[-1] * max(1, sizes[-2]) > 8 * MOST_TEXT:
            raise TooMuch(f"its {name} would make more than {8 * MOST_TEXT:,} characters")
    if name in ("format", "format_map") and any(isinstance(a, str) and re.search(r"\d{5}", a) for a in plain):
        raise TooMuch("it formats to a width of five digits")


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps the mark by which Jinja passes an environment or a context
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _refuse_growth(name, (*args, *kwargs.values()))
        return _sized(function(*args, **kwargs))

    return guarded


class _Counted(NodeTransformer):
    """Puts a step into every loop and macro, and a look at the size where text is joined."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._stepping(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._stepping(node)

    def _stepping(self, node: Any) -> nodes.Node:
        written = sum(len(data.data) for part in node.body for data in _data_in(part))
        self.generic_visit(node)
        step = nodes.Call(nodes.EnvironmentAttribute("step"), [nodes.Const(written)], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, "sized", [], [], None, None)  # type: ignore[arg-type]
        return node


def _data_in(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` is around what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{START}{caller()}{END}" if _marking.get() else caller()


class _TemplateDict:
    """`dict(...)` and `dict.fromkeys(...)`, without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if (indent if isinstance(indent, int) else len(indent or "")) > 64:
        raise TooMuch("its tojson indents by more than 64")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = (_Generation, loopcontrols)
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.written)
        self.optimized = False  # constant expressions are worked out under the limits, too
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = Namespace
        del self.globals["lipsum"]
        self.filters["tojson"] = _tojson
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.filters["sized"] = _sized

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Counted().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)

    def step(self, written: int) -> None:
        """One round of a loop or one call of a macro, whose text is so long."""
        _spent.get().step(written)

    def written(self, value: Any) -> Any:
        """What an expression writes, counted."""
        _spent.get().step(_size(value))
        return value

    def joined(self, *values: Any) -> str:
        """The `~` of expressions."""
        for value in values:
            _size(value)
        return _sized("".join(map(str, values)))

    def call_binop(self, context: Any, operator_: str, left: Any, right: Any) -> Any:
        _spent.get().step()
        if operator_ == "%" and isinstance(left, str):
            if re.search(r"\d{5}|%[^a-zA-Z%]*\*", left):
                raise TooMuch("it formats to a width of five digits")
            _size(right)
        if operator_ == "*":
            for many, count in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(count, int) and len(many) * count > MOST_TEXT:
                    raise TooMuch(f"one of its values has more than {MOST_TEXT:,} characters")
        if operator_ == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MOST_BITS:
                raise TooMuch(f"one of its numbers has more than {MOST_BITS:,} bits")
            return operator.pow(left, right)
        return _sized(super().call_binop(context, operator_, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        if __obj != __self.step:
            _spent.get().step()
            method = getattr(__obj, "__wrapped__", __obj)
            receiver = getattr(method, "__self__", None)
            _refuse_growth(getattr(method, "__name__", ""), (receiver, *args, *kwargs.values()))
        return _sized(super().call(__context, __obj, *args, **kwargs))


_SANDBOX = _Sandbox()


@lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    if len(source) > MOST_SOURCE:
        raise TooMuch(f"it is longer than {MOST_SOURCE:,} characters")
    return _SANDBOX.from_string(source)


@lru_cache(maxsize=32)
def has_generation(source: str) -> bool:
    """Whether a template says itself what the assistant writes."""
    return bool(re.search(r"\{%[-+]?\s*generation\b", source))


def render(source: str, variables: Mapping[str, Any], *, marked: bool = False) -> str:
    """The template's text. marked: with START and END around its `{% generation %}` blocks.

    Raises DataError for whatever goes wrong in it, its own `raise_exception` and the limits included.
    """
    spent, marking = _spent.set(_Spent()), _marking.set(marked)
    try:
        return _compiled(source).render(**variables)
    except TooMuch as error:
        raise DataError(f"the chat template is stopped: {error}", "template") from error
    except Exception as error:  # a foreign program: any exception may come out of it
        said = str(error) or type(error).__name__
        raise DataError(f"the chat template refuses this conversation: {said}", "template") from error
    finally:
        _spent.reset(spent)
        _marking.reset(marking)
