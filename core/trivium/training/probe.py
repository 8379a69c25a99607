"""How many rows fit in memory at once, found by trying; the step stays what it is, only its cut changes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trivium.errors import TrainingError
from trivium.models.memory import free_bytes
from trivium.training.memory import hand_back_freed, peak_bytes, reset_peak

SHARE = 0.8
"""Of the memory that is left: the rest is for what grows later (validation, samples, fragments)."""


def largest_micro_size(size: int, run: Callable[[int], None], weights: int) -> int:
    """The largest divisor of `size` whose rows fit in memory together.

    run: a forward and backward pass of so many rows. weights: bytes of the trained weights; their gradients are there
    after the first try, an optimizer's two moments of each are still to come. One and two rows are tried (on a GPU the
    result too); what a row takes is their difference, for activations grow with rows.
    """
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    reached = []
    for rows in divisors[:2]:
        _try(run, rows, rows)
        hand_back_freed()  # or a row that fits into what was freed before would seem to cost nothing
        reset_peak()
        before = peak_bytes()
        _try(run, rows, rows)
        reached.append((rows, peak_bytes() - before))
    room = SHARE * free_bytes() - 2 * weights
    (few, low), (more, high) = reached[0], reached[-1]
    each = max(
        (high - low) / max(1, more - few), high / more / 2
    )  # peaks are coarse: never believe a row costs nothing
    fitting = [n for n in divisors if low + (n - few) * each <= room] or [1]
    while torch.cuda.is_available() and len(fitting) > 1:
        try:
            run(fitting[-1])
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            fitting.pop()
    return fitting[-1]


def _try(run: Callable[[int], None], rows: int, asked: int) -> None:
    try:
        run(rows)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"batch.auto: not even {asked} rows of batch.length tokens fit in memory; lower batch.length, the model's "
            "sizes, or set trainer.recompute=1"
        ) from error
