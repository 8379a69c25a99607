"""Contract suites for plugin authors: subclass one in a test file, say how to make the part, and pytest does the rest.

from trivium.testing import SourceContract

class TestMySource(SourceContract):
    def make(self):
        return MySource(MySource.Config())
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["BackendContract", "ModelContract", "ObjectiveContract", "SourceContract"]  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trivium.testing' has no attribute {name!r}")
    return getattr(importlib.import_module("trivium.testing.contracts"), name)
