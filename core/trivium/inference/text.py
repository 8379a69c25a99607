"""Text as it is made: tokens in, whole characters out."""

from __future__ import annotations

from trivium.data.tokenizer import Tokenizer


class TextStream:
    """Incremental decoding. A character whose bytes are split over tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._shown = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes, maybe none."""
        self.ids.append(token_id)
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd"):  # an unfinished character; if it never ends, `finish` shows it
            return ""
        new = text[len(self._shown) :]
        self._shown = text
        return new

    def finish(self) -> str:
        """What is left, unfinished characters as U+FFFD."""
        return self.tokenizer.decode(self.ids)[len(self._shown) :]
