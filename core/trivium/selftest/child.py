"""The process under test: the command line itself, in a process that a fault was planned for.

`serve` imports everything once and forks a process for each line of its input, so that a kill costs no imports;
`alone` is one fresh interpreter, for faults while it starts.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from typing import Any

from trivium.plugin import register_local
from trivium.registry import load, registries
from trivium.selftest.inject import install


def serve() -> None:
    """Fork a process for each order read from standard input; `PLACE.code` appears when that has ended."""
    load("trivium.pipeline:launch")
    register_local(json.loads(sys.argv[1]))
    load("trivium.plugin:discover")()
    for registry in registries().values():
        for name in registry:
            registry.load(name)
    load("trivium.compose:compose")(["phase=pretrain"])  # warms the parser's tables
    orders, children = open(0, "rb", buffering=0, closefd=False), {}
    while True:
        while children and (found := os.waitpid(-1, os.WNOHANG))[0]:
            place = children.pop(found[0])
            with open(f"{place}.tmp", "w") as f:
                f.write(str(os.waitstatus_to_exitcode(found[1])))
            os.rename(f"{place}.tmp", f"{place}.code")
        if not select.select([orders], [], [], 0.005)[0]:
            continue
        line = orders.readline()
        if not line:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            sys.exit()
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            os.dup2(os.open(order.get("input", os.devnull), os.O_RDONLY), 0)
            for number, kind in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{order['place']}.{kind}", os.O_WRONLY | os.O_CREAT), number)
            sys.exit(obey(order))
        children[pid] = order["place"]
        print(pid, flush=True)


def alone() -> None:
    """One order, from the command line."""
    order = json.loads(sys.argv[1])
    open(f"{order['place']}.begun", "w").close()
    register_local(order["plugins"])
    sys.exit(obey(order))


def obey(order: dict[str, Any]) -> int:
    """Plan the order's faults, then be the command line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as launch.py does
    os.environ.update(order.get("environment", {}))
    os.chdir(order.get("home", "."))
    if "faults" in order:
        install(**order["faults"])
    return load("trivium.cli:main")(order["args"])
