"""The largest micro-batch, found by trying: real memory, a limit of our own."""

import subprocess
import sys

import pytest
import torch

from trivium.errors import ConfigError, TrainingError
from trivium.schema import BatchConfig
from trivium.training import probe

ROW = 48 << 20  # bytes: far above what an allocator keeps to itself


def hold(rows):
    torch.ones(rows * ROW // 4).sum()


@pytest.mark.parametrize(("room", "expected"), [(2.5, 2), (5.5, 4), (10.5, 8), (12.5, 12), (100, 24)])
def test_the_largest_divisor_that_fits(monkeypatch, room, expected):
    """24 rows a step; memory for `room` rows once a fifth is left aside."""
    monkeypatch.setattr(probe, "free_bytes", lambda: int(room * ROW / probe.SHARE))
    assert probe.largest_micro_size(24, hold, weights=0) == expected


def test_moments_that_are_still_to_come_are_left_room(monkeypatch):
    monkeypatch.setattr(probe, "free_bytes", lambda: int(10.5 * ROW / probe.SHARE))
    assert probe.largest_micro_size(24, hold, weights=3 * ROW) == 4  # 10.5 - 2 x 3 = 4.5 rows


def test_a_row_that_does_not_fit_is_one_sentence():
    def never(rows):
        raise torch.OutOfMemoryError

    with pytest.raises(TrainingError, match="batch.auto: not even 1 rows of batch.length tokens fit"):
        probe.largest_micro_size(24, never, weights=0)


def test_free_memory_is_that_of_the_system():
    """Within the machine's own total, and less by what is held."""
    total = int(open("/proc/meminfo").readline().split()[1]) * 1024
    before = probe.free_bytes()
    assert 0 < before <= total
    held = torch.ones(1 << 28)  # 1 GiB
    assert before - probe.free_bytes() > 0.5 * held.nbytes


def test_a_step_in_tokens():
    assert BatchConfig(tokens=16384, length=512, micro_size=8).size == 32
    with pytest.raises(ConfigError, match="batch.tokens=1000 must be a multiple of batch.length=256"):
        BatchConfig(tokens=1000)
    with pytest.raises(ConfigError, match="batch.size=3 must be a multiple of batch.micro_size=2"):
        BatchConfig(tokens=768, micro_size=2)


TRAINED_BEFORE = """
import torch
from trivium.training import probe
from trivium.training.memory import keep_freed
row = 48 << 20
keep_freed()
blocks = [torch.ones(row // 4) for _ in range(24)]  # 1.2 GB, freed and kept
del blocks
probe.free_bytes = lambda: int(5.5 * row / probe.SHARE)
print(probe.largest_micro_size(24, lambda rows: torch.ones(rows * row // 4).sum(), weights=0))
"""


def test_what_an_earlier_run_freed_does_not_make_rows_cheap():
    """As the second stage of a pipeline finds its process; 24 rows where nothing is handed back."""
    found = subprocess.run([sys.executable, "-c", TRAINED_BEFORE], check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["4"]
