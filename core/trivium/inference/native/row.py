"""A request while it is served."""

from __future__ import annotations

from dataclasses import dataclass, field

from trivium.inference.sampling import Constraint, Place
from trivium.types import Request, TokenEvent


@dataclass(eq=False)
class Row:
    """number: in the order in which they came. ids: prompt and answer so far. prompt: how many of them are the prompt.
    read: how many have keys in the cache. cached: how many of the prompt's were found there. began: whether its first
    event was made. drafts: what speculation says comes next."""

    request: Request
    number: int
    ids: list[int]
    prompt: int
    constraint: Constraint | None = None
    read: int = 0
    cached: int = 0
    began: bool = False
    drafts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request, number: int, constraint: Constraint | None = None) -> Row:
        """A row that has not begun."""
        return cls(request, number, list(request.prompt_ids), len(request.prompt_ids), constraint)

    @property
    def made(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.prompt

    @property
    def most(self) -> int:
        """Tokens that it may become."""
        return self.prompt + self.request.params.max_tokens

    @property
    def unread(self) -> int:
        """Tokens whose keys are missing: one while it is decoded."""
        return len(self.ids) - self.read

    def place(self, drafted: int = 0) -> Place:
        """Where its next token is drawn, after so many of its drafts."""
        return Place(self.request, [*self.ids, *self.drafts[:drafted]], self.prompt, self.constraint)

    def finish(self, token: int) -> str | None:
        """Why `token`, its newest, is its last; None where it is not."""
        if token in self.request.params.stop_ids:
            return "stop"
        if self.constraint is not None and self.constraint.done:
            return "stop"
        return "length" if self.made >= self.request.params.max_tokens else None

    def failed(self, error: BaseException) -> TokenEvent:
        """The event that says so."""
        told = (str(error).splitlines() or [""])[0]
        return TokenEvent(self.request.id, -1, 0.0, "error", error=told or type(error).__name__)
