"""Freed memory is kept for the next allocation: a loop of large tensors meets no page faults once it has run."""

import subprocess
import sys

import pytest

LOOP = """
import resource, sys, torch
from trivium.training.memory import keep_freed
if sys.argv[1] == "keep":
    keep_freed()
def turn():
    for size in (4, 16, 40):
        torch.ones(size << 18)  # MB of fp32, every page touched
for _ in range(12):
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    command = [sys.executable, "-c", LOOP, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of glibc")
def test_memory_is_not_fetched_from_the_system_again():
    """A tensor of 40 MB is 10,240 pages of 4 KB, and glibc hands everything above 32 MB back at once: ten turns."""
    assert faults("as it comes") >= 100_000
    assert faults("keep") < 1_000
