"""What a frozen reference says of a data set: asked once, kept in the shared cache, checked when read.

A reference never changes, so its log-probabilities are a column of the data. The cache's key names the reference's
weights, the data, the rows and the precision; a file that is damaged or of another length is made anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trivium.data.datamodule import StepDataset
from trivium.disk import cache_folder, make_folder, replace_file
from trivium.lineage.manifest import digest_of
from trivium.models.protocol import CausalLM
from trivium.objectives.protocol import Objective
from trivium.types import TokenBatch

COLUMN = "reference"
DIGEST = 32  # bytes of SHA-256 before the values


def note_reference(
    objective: Objective,
    reference: Callable[[], CausalLM],
    sha256: str,
    steps: StepDataset,
    autocast: torch.dtype | None,
    device: torch.device,
) -> bool:
    """Put the reference's log-probability of each document into the table's columns; True if they were in the cache.

    reference: loads the model, if it must be asked. sha256: of its checkpoint.
    """
    key = digest_of([sha256, steps.table.fingerprint, steps.length, steps.micro_size, str(autocast)])
    path = cache_folder() / COLUMN / f"{key}.bin"
    values = read_values(path, len(steps.table.ids))
    found = values is not None
    if values is None:
        values = _ask(objective, reference().to(device).eval(), steps, autocast, device)
        data = values.tobytes()
        make_folder(path.parent)
        replace_file(path, hashlib.sha256(data).digest() + data)
    steps.table.columns[COLUMN] = values
    return found


def read_values(path: Path, count: int) -> np.ndarray | None:
    """The fp32 values of a cached file; None if there is none, or one that is damaged or not of `count` values."""
    content = path.read_bytes() if path.is_file() else b""
    digest, data = content[:DIGEST], content[DIGEST:]
    whole = hashlib.sha256(data).digest() == digest and len(data) == 4 * count
    return np.frombuffer(data, np.float32) if whole else None


@torch.no_grad()
def _ask(
    objective: Objective, model: CausalLM, steps: StepDataset, autocast: torch.dtype | None, device: torch.device
) -> np.ndarray:
    def said(batch: TokenBatch) -> Tensor:
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            objective.consult(batch, {COLUMN: model})
        return batch.reference  # type: ignore[attr-defined]

    return steps.per_document(said, device)
