"""Steps of training data: item k of the loader is everything optimizer step k needs, whatever came before."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trivium.data.chat import Chat
from trivium.data.collate import collate
from trivium.data.config import MixtureConfig
from trivium.data.mixture import MixedOrder, Mixture, shares_of
from trivium.data.packing import Rows, plan
from trivium.data.position import Order
from trivium.data.source import Example, Source, form_of
from trivium.data.table import TokenTable
from trivium.data.tokenizer import Tokenizer
from trivium.errors import DataError
from trivium.types import TokenBatch


class Steps(Dataset):
    """What a training run reads: step -> what that step needs, a pure function of (data, seed, step).

    updates: steps in a row that learn from the same data.
    """

    updates: int = 1

    @abstractmethod
    def __getitem__(self, step: int) -> Any: ...

    @abstractmethod
    def sample_id(self, step: int) -> str:
        """Id of the first example of a step: what a resume compares."""

    def figures(self, step: int) -> dict[str, float]:
        """What has been read before `step`, for the run's figures."""
        return {}


class StepDataset(Steps):
    """step -> its micro-batches."""

    def __init__(
        self,
        table: TokenTable,
        *,
        size: int,
        micro_size: int,
        length: int,
        pad_id: int,
        seed: int,
        batch: type[TokenBatch] = TokenBatch,
        rank: int = 0,
        world: int = 1,
        rows: Rows | None = None,
        shares: MixtureConfig | None = None,
    ) -> None:
        """rows: the table's plan, where it is there already. shares: of a mixture's parts, where it is one's table.

        rank, world: this process takes the micro-batches rank, rank + world, ... of a step; the rows of a step are
        the same for any number of processes."""
        self.rank, self.world = rank, world
        self.table, self.length, self.pad_id, self.batch = table, length, pad_id, batch
        self.size, self.micro_size = size, micro_size
        self.rows = plan(table, length, seed) if rows is None else rows
        self.order: Order | MixedOrder = Order(len(self.rows), seed, table.fingerprint)
        if shares is not None:
            counts = dict(zip(shares.parts, self.rows.counts(table.ends), strict=True))
            self.order = MixedOrder(shares_of(shares, counts, length), size, seed, table.fingerprint)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs: arrays it can share, and no list of ids, which may be longer than the tokens."""
        table = copy.copy(self.table)
        table.ids = []
        return {**self.__dict__, "table": table}

    def __getitem__(self, step: int) -> list[TokenBatch]:
        chosen = self.order.rows(step * self.size, self.size)
        parts = np.split(chosen, self.size // self.micro_size)
        return [self.collated(part) for part in parts[self.rank :: self.world]]

    def collated(self, rows: np.ndarray) -> TokenBatch:
        """Rows, by number, as one batch."""
        return collate(self.table, [self.rows[r] for r in rows], self.length, self.pad_id, self.batch)

    def first_rows(self, count: int) -> np.ndarray:
        """The numbers of the rows among the first `count` that are read, each once."""
        return self.order.first(count)

    def per_document(
        self, figures: Callable[[TokenBatch], Tensor], device: torch.device, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """What `figures` makes of each document, (documents,) fp32; it is given batches and makes (B, S) of each.

        rows: the numbers of the rows to ask about, all unless given; documents of other rows get NaN.
        """
        values = np.full(len(self.table.ids), np.nan, np.float32)
        asked = np.arange(len(self.rows)) if rows is None else rows
        for start in range(0, len(asked), self.micro_size):
            numbers = asked[start : start + self.micro_size]
            said = figures(self.collated(numbers).to(device)).float().cpu().numpy()
            for row, number in enumerate(numbers):
                documents = self.rows[number]
                values[documents] = said[row, : len(documents)]
        return values

    def sample_id(self, step: int) -> str:
        return self.table.ids[int(self.rows[self.order.rows(step * self.size, 1)[0]][0])]

    def figures(self, step: int) -> dict[str, float]:
        return self.order.figures(step, self.length) if isinstance(self.order, MixedOrder) else {}

    @property
    def utilisation(self) -> float:
        """Share of the rows' tokens that are real."""
        return float(self.table.offsets[-1] / (len(self.rows) * self.length))


class Prompt(NamedTuple):
    """What a policy is asked: an example, and the token ids it answers from."""

    example: Example
    ids: tuple[int, ...]


class PromptDataset(Steps):
    """step -> the prompts its rollout asks; `updates` steps in a row learn from one rollout."""

    def __init__(self, source: Source, tokenizer: Tokenizer, *, size: int, updates: int, seed: int) -> None:
        chat = Chat(tokenizer)
        examples = [source[i] for i in range(len(source))]
        for example in examples:
            if form_of(example) != "answers":
                raise DataError(f"example {example['id']} has no answer to score against; phase=rlhf needs one")
        self.prompts = [
            Prompt(e, tuple(chat.prompt_ids(e["messages"][:-1], tools=e.get("tools") or ()))) for e in examples
        ]
        self.size, self.updates = size, updates
        self.order: Order | MixedOrder = Order(len(examples), seed, source.fingerprint)
        if isinstance(source, Mixture):
            counts = {name: len(part) for name, part in source.parts.items()}
            self.order = MixedOrder(shares_of(source.config, counts, 1), size, seed, source.fingerprint)

    def __getitem__(self, step: int) -> list[Prompt]:
        return [self.prompts[i] for i in self.order.rows(step // self.updates * self.size, self.size)]

    def sample_id(self, step: int) -> str:
        return self[step][0].example["id"]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(p.ids) for p in self.prompts)


def validation_batches(
    table: TokenTable,
    *,
    max_rows: int,
    micro_size: int,
    length: int,
    pad_id: int,
    batch: type[TokenBatch] = TokenBatch,
) -> list[TokenBatch]:
    """`max_rows` packed rows, drawn once: packing puts the longest documents first, so the first rows are no sample."""
    packed = plan(table, length, seed=0)
    chosen = Order(len(packed), 0, table.fingerprint).rows(0, min(max_rows, len(packed)))
    rows = [packed[r] for r in chosen]
    return [collate(table, rows[i : i + micro_size], length, pad_id, batch) for i in range(0, len(rows), micro_size)]
