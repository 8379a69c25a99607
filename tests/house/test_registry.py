"""Every registered name with its owner, against a committed snapshot: a name that comes or goes is seen in review."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("registry.txt")
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
OURS = {"trivium", *PROJECT["entry-points"]["trivium.plugins"]}
LIST = """
from trivium.plugin import discover
from trivium.registry import registries
found = discover()
assert not found.failures, found.failures
for kind, registry in registries().items():
    for name, entry in registry.items():
        print(kind, name, entry.owner)
"""


def test_registered_names_equal_the_snapshot():
    """To accept a change: UPDATE_REGISTRY=1 python -m pytest tests/house/test_registry.py, and look at the diff."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # no stranger's plugins
    listed = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, env=env, check=True).stdout
    names = "".join(f"{line}\n" for line in listed.splitlines() if line.split()[2] in OURS)
    if os.environ.get("UPDATE_REGISTRY"):
        SNAPSHOT.write_text(names)
    assert names == SNAPSHOT.read_text()
    assert "models llama trivium" in names.splitlines(), "the snapshot must not be empty"
