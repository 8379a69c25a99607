"""Freed memory is kept for the next allocation: a loop of large tensors meets no page faults after its first turn."""

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
    """Ten turns of 60 MB are 153,600 pages of 4 KB; without keeping, at least the 40 MB tensors come anew each time."""
    assert faults("keep") < 2_000
    assert faults("as it comes") > 20_000
