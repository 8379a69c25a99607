"""The front door: `python launch.py phase=sft domain=files ...` from a clone, an editable install or a wheel."""

import signal
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the program listens, Ctrl-C ends it at once and without a trace

if find_spec("trivium") is None:  # a bare clone: what an install would have announced is read from pyproject.toml
    root = Path(__file__).resolve().parent
    sys.path[:0] = [str(root / "core"), str(root / "plugins")]
    from trivium.plugin import register_local

    register_local(tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["trivium.plugins"])

from trivium.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
