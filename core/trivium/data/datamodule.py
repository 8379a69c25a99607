"""Steps of training data: item k of the loader is everything optimizer step k needs, whatever came before."""

from __future__ import annotations

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset

from trivium.data.collate import collate
from trivium.data.packing import TokenTable, plan
from trivium.data.position import Order
from trivium.types import TokenBatch


class StepDataset(Dataset):
    """step -> its micro-batches, a pure function of (table, seed, step)."""

    def __init__(self, table: TokenTable, *, size: int, micro_size: int, length: int, pad_id: int, seed: int) -> None:
        self.table, self.length, self.pad_id = table, length, pad_id
        self.size, self.micro_size = size, micro_size
        self.rows = plan(table, length, seed)
        self.order = Order(len(self.rows), seed, table.fingerprint)

    def __getitem__(self, step: int) -> list[TokenBatch]:
        chosen = self.order.rows(step * self.size, self.size)
        parts = np.split(chosen, self.size // self.micro_size)
        return [collate(self.table, [self.rows[r] for r in part], self.length, self.pad_id) for part in parts]

    def sample_id(self, step: int) -> str:
        """Id of the first example of a step: what a resume compares."""
        return self.table.ids[self.rows[self.order.rows(step * self.size, 1)[0]][0]]

    @property
    def utilisation(self) -> float:
        """Share of the rows' tokens that are real."""
        return float(self.table.lengths.sum() / (len(self.rows) * self.length))


def validation_batches(
    table: TokenTable, *, max_rows: int, micro_size: int, length: int, pad_id: int
) -> list[TokenBatch]:
    """`max_rows` packed rows, drawn once: packing puts the longest documents first, so the first rows are no sample."""
    packed = plan(table, length, seed=0)
    chosen = Order(len(packed), 0, table.fingerprint).rows(0, min(max_rows, len(packed)))
    rows = [packed[r] for r in chosen]
    return [collate(table, rows[i : i + micro_size], length, pad_id) for i in range(0, len(rows), micro_size)]


class StepDataModule(L.LightningDataModule):
    """Feeds steps start..max_steps-1; its length is known, so no batch is lost at a resume."""

    def __init__(self, steps: StepDataset, start: int, max_steps: int) -> None:
        super().__init__()
        self.steps, self.start, self.max_steps = steps, start, max_steps

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.steps, batch_size=None, sampler=range(self.start, self.max_steps))
