"""A user's own files as a source: text, conversations, pairs, labelled and checked answers, source code.

One folder may hold files of every form: each phase reads those that `data.forms` names and leaves the others. Plain
text is cut into documents at blank lines, about 4,000 characters each, so that a share of it can be held out.
"""

from __future__ import annotations

from pathlib import Path

from trivium.data.adapted import Adapted
from trivium.data.config import FilesConfig
from trivium.data.find import find_files
from trivium.data.readers import Sources, kind_of, open_rows
from trivium.errors import DataError


class Files(Adapted):
    """The rows of the files that data.path, or for held-out data data.validation_path, names."""

    config: FilesConfig

    def _open(self) -> list[list[str]]:
        config = self.config
        if not config.path and not (config.split != "train" and config.validation_path):
            raise DataError("domain=files needs data.path=FILE, a folder or a glob")
        held_out = config.split != "train"
        if held_out and not config.validation_path and not config.validation_share:
            raise DataError(self._nothing())
        found = find_files(self._where, config.code)
        self._left_out.update(found.left_out)
        if found.code:
            rows = Sources(Path(self._where), config.max_chars, found.files)
            return [] if self._wants("text") and self._add(rows) else [["text"]]
        left_out = []
        for file in found.files:
            if kind_of(file) == "text" and not self._wants("text"):
                left_out.append(["text"])
                continue
            schemas = self._add(open_rows(file, config.max_chars, int(config.max_unpacked_gb * 1e9)))
            if not self._wants(schemas[0]):
                left_out.append(schemas)
        return left_out

    @property
    def _where(self) -> str:
        held_out = self.config.split != "train" and self.config.validation_path
        return self.config.validation_path if held_out else self.config.path

    @property
    def _shared(self) -> bool:
        return bool(self.config.validation_share) and not self.config.validation_path
