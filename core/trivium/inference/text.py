"""Text as it is made: tokens in, whole characters out, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from trivium.data.tokenizer import Tokenizer

BROKEN = "\ufffd"
LONGEST_CHARACTER = 16
"""Tokens that wait for the rest of a character before they are taken for bytes that are none. It has at most four."""


class TextStream:
    """Incremental decoding. A character whose bytes are split over tokens is held back until it is whole.

    What a token decodes to may depend on the one before it (a word's leading space), never on more: each is decoded
    behind the last piece of text, so a long answer costs no more a token than a short one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._window: list[int] = []  # from the last piece of text on, without special tokens
        self._read = 0  # where in it what was not shown yet begins
        self._shown = 0  # characters of its text that were shown

    def push(self, token_id: int) -> str:
        """The text that this token completes, maybe none."""
        self.ids.append(token_id)
        if token_id in self.tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        text = self.tokenizer.decode(self._window)
        if text.endswith(BROKEN):
            if len(self._window) - self._read < LONGEST_CHARACTER:
                return ""  # an unfinished character; if it never ends, `finish` shows it
            return self._cut(len(self._window) - 3)  # no character is so long: all but what may begin another
        new = text[self._shown :]
        if new:
            self._window, self._read = self._window[self._read :], len(self._window) - self._read
            self._shown = len(self.tokenizer.decode(self._window))
        return new

    def _cut(self, end: int) -> str:
        new = self.tokenizer.decode(self._window[:end])[self._shown :]
        self._window, self._read, self._shown = self._window[end:], 0, 0
        return new

    def finish(self) -> str:
        """What is left, unfinished characters as U+FFFD."""
        return self.tokenizer.decode(self._window)[self._shown :]


class StopStrings:
    """Text up to the first stop string, however it is cut into pieces.

    The stop that is complete first counts, the longest of those that end at the same character; neither it nor what
    follows is shown, and nothing is shown that may still turn out to be its beginning.

    >>> stops = StopStrings(["112"])
    >>> [stops.push(piece) for piece in ("1", "1", "1", "2")], stops.met
    (['', '', '1', ''], '112')
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.met: str | None = None
        self.rest = ""
        """Of the piece that completed a stop, what came behind it."""
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that can be shown after this piece; nothing once a stop is met."""
        if self.met is not None:
            return ""
        self._held += piece
        found = [(self._held.find(stop), stop) for stop in self.stops]
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if ends:
            end, start, self.met = min(ends)
            shown, self.rest, self._held = self._held[:start], self._held[end:], ""
            return shown
        longest = max(map(len, self.stops), default=0)
        places = range(max(0, len(self._held) - longest + 1), len(self._held))
        keep = next((i for i in places if any(s.startswith(self._held[i:]) for s in self.stops)), len(self._held))
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown

    def finish(self) -> str:
        """What was held back, when no more comes."""
        shown, self._held = self._held, ""
        return shown


class TokenTexts:
    """What single tokens are called where log-probabilities are told, with the bytes they stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int] | None]] = {}
        self._anchor = tokenizer.encode("a")[-1:]  # a word's leading space shows behind another token only
        self._skip = len(tokenizer.decode(self._anchor))

    def __call__(self, token_id: int) -> tuple[str, list[int] | None]:
        """Text (U+FFFD for part of a character) and UTF-8 bytes, None where they cannot be known."""
        if token_id not in self._known:
            text = self.tokenizer.decode([*self._anchor, token_id], special=True)[self._skip :]
            own = list(text.encode()) if BROKEN not in text else self.tokenizer.bytes_of(token_id)
            self._known[token_id] = text, own
        return self._known[token_id]
