"""Whether torch.compile can work here: it writes C++ for a CPU and Triton for a GPU, and needs what builds either."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from importlib.util import find_spec

import torch

from trivium.errors import ConfigError


def check_compiler(device: torch.device) -> None:
    """Refuse `trainer.compile=true` where its first step would fail. Raises ConfigError."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise ConfigError("trainer.compile=true needs the package triton on a GPU; install it, or leave it false")
    named = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")  # as inductor does
    if device.type == "cpu" and shutil.which(shlex.split(named)[0]) is None:
        raise ConfigError(
            f"trainer.compile=true needs a C++ compiler, and there is no {named}; install one, name it in the "
            "environment variable CXX, or leave it false"
        )
