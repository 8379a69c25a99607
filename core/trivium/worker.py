"""One process of a training run on several: `python -m trivium.worker`, started by training/processes.py alone."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console

from trivium.cli import spoken
from trivium.compose import config_of
from trivium.phases.start import run
from trivium.plugin import discover, register_local
from trivium.training.parallel import PeerLost
from trivium.training.processes import orders


def work(order: dict[str, Any]) -> int:
    """Run the phase that the launcher composed."""
    register_local(order["plugins"])
    discover()
    try:
        return run(config_of(order["config"]), Console(soft_wrap=True), skip_done=order["skip_done"])
    except PeerLost as lost:
        return lost.exit_code  # the launcher tells what the other died of


def main() -> int:
    """Read the order, run it, say what went wrong in one sentence."""
    order = orders(sys.stdin.buffer)
    return spoken(lambda: work(order), debug=order["config"]["debug"])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: after an error the connections have nobody to take leave of
