"""The peak counts what was held since the reset, and nothing from before it."""

import subprocess
import sys

import pytest
import torch

ADDED, SLACK = 200_000_000, 30_000_000
"""Bytes held by an array of the tests, and what else a process may take or give back meanwhile."""
CODE = f"""
import sys
import numpy as np
from trivium.training.memory import peak_bytes, reset_peak

def hold():
    np.ones({ADDED}, np.uint8)  # touched, so that the system must give the pages; freed at once

if sys.argv[1] == "before":
    hold()
reset_peak()
start = peak_bytes()
if sys.argv[1] == "after":
    hold()
print(start, peak_bytes())
"""


def peaks(when):
    """(right after the reset, at the end) of a process that held the array before or after it, or never."""
    done = subprocess.run([sys.executable, "-c", CODE, when], capture_output=True, text=True, check=True)
    return map(int, done.stdout.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the device's memory")
def test_peak_sees_what_is_held_after_the_reset():
    start, end = peaks("after")
    assert ADDED - SLACK < end - start < ADDED + SLACK


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the device's memory")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's clear_refs")
def test_peak_forgets_what_was_freed_before_the_reset():
    _, without = peaks("never")
    _, freed = peaks("before")
    assert abs(freed - without) < SLACK
