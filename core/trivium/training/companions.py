"""What a frozen reference says of a data set: asked once, kept in the shared cache, checked when read.

A reference that is the very model an adapter is trained on is that model with the adapter off, and takes no memory.

A reference never changes, so its log-probabilities are a column of the data. The cache's key names the reference's
weights, the data, the rows and the precision; a file that is damaged or of another length is made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.data.datamodule import StepDataset
from trivium.disk import cache_folder, keep, kept
from trivium.lineage.manifest import digest_of
from trivium.models.adapters import without
from trivium.models.protocol import CausalLM
from trivium.objectives.protocol import Objective
from trivium.training.precision import Precision
from trivium.types import TokenBatch

COLUMN = "reference"


class AdapterOff:
    """A model as it is without its adapters, to be asked as a companion; the one that is trained stays as it is."""

    score = None
    num_parameters = 0

    def __init__(self, model: CausalLM) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with without(self._model) as model:
            return model(*args, **kwargs)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states to logits."""
        with without(self._model) as model:
            return model.head(hidden)

    def to(self, *args: Any) -> AdapterOff:
        """Takes the model along."""
        self._model.to(*args)
        return self

    def eval(self) -> AdapterOff:
        """Puts the model into eval mode; who trains it takes it out again."""
        self._model.eval()
        return self

    def requires_grad_(self, wanted: bool) -> AdapterOff:
        """Nothing: it is asked without gradient, and what is trained must stay so."""
        return self


def note_reference(
    objective: Objective,
    reference: Callable[[], CausalLM],
    sha256: str,
    steps: StepDataset,
    rows: np.ndarray,
    precision: Precision,
    device: torch.device,
) -> bool:
    """Put the reference's log-probability of each document into the table's columns; True if they were in the cache.

    reference: loads the model, if it must be asked. sha256: of its checkpoint. rows: those that will be read; what is
    said of the others stays as it was, NaN at first, and so would be the loss of a row that was not foreseen.
    """
    # the documents: another seed packs others under the same row numbers
    read = [steps.rows[row].tolist() for row in rows]
    key = digest_of([sha256, steps.table.fingerprint, steps.length, steps.micro_size, read, precision.name])
    path = cache_folder() / COLUMN / f"{key}.bin"
    values = np.frombuffer(kept(path) or b"", np.float32)
    found = len(values) == len(steps.table.ids)
    if not found:
        values = _ask(objective, reference().to(device, precision.weights).eval(), steps, rows, precision, device)
        keep(path, values.tobytes())
    known = steps.table.columns.get(COLUMN)
    steps.table.columns[COLUMN] = values if known is None else np.where(np.isnan(values), known, values)
    return found


@torch.no_grad()
def _ask(
    objective: Objective,
    model: CausalLM,
    steps: StepDataset,
    rows: np.ndarray,
    precision: Precision,
    device: torch.device,
) -> np.ndarray:
    def said(batch: TokenBatch) -> Tensor:
        dtype = precision.autocast
        batch.reference = None  # type: ignore[attr-defined]  # of other rows something may be known already
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            objective.consult(batch, {COLUMN: model})
        return batch.reference  # type: ignore[attr-defined]

    return steps.per_document(said, device, rows)
