"""Whether a model prefers what people chose: by the likelihood it gives both answers, or by a reward model's score.

A language model prefers the answer whose trained tokens, its end-of-turn included, have the larger summed
log-probability (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, measure it less the reference's). A tie is no
preference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from trivium.data.datamodule import StepDataset
from trivium.data.packing import tokenise
from trivium.data.source import Example
from trivium.data.tokenizer import Tokenizer
from trivium.evaluation.intervals import Estimate, ratio_interval
from trivium.models.protocol import CausalLM
from trivium.objectives.logprobs import sequence_logprobs
from trivium.objectives.reward import segment_scores
from trivium.types import PreferenceBatch, TokenBatch

ROWS = 16
ROW = 512
"""Tokens of a row at least: short pairs share one."""


def packed(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    context: int,
    form: str,
    batch: type[TokenBatch],
    train_on: str = "assistant",
) -> StepDataset:
    """Examples as packed rows, to ask figures of each document; a document is cut at the model's context."""
    group = 2 if form == "pairs" else 1
    table = tokenise(examples, tokenizer, group * context, form=form, train_on=train_on)
    units = table.lengths.reshape(-1, group).sum(1)
    length = max(min(ROW, group * context), int(units.max()))
    return StepDataset(table, size=ROWS, micro_size=ROWS, length=length, pad_id=tokenizer.pad_id, seed=0, batch=batch)


@torch.no_grad()
def chosen_over_rejected(
    model: CausalLM, tokenizer: Tokenizer, pairs: Sequence[Example], *, resamples: int, confidence: float
) -> dict[str, Estimate]:
    """ "preference": the share of pairs whose chosen answer wins; "preference/TASK" the same of one task."""
    model.eval()
    ask: Callable[[TokenBatch], Tensor] = lambda batch: sequence_logprobs(model, batch)  # noqa: E731
    if model.score is not None:
        ask = lambda batch: segment_scores(model, batch)  # noqa: E731
    steps = packed(pairs, tokenizer, model.context, "pairs", PreferenceBatch)
    values = steps.per_document(ask, next(model.parameters()).device).reshape(-1, 2)
    wins = dict(zip(steps.table.ids[::2], (values[:, 0] > values[:, 1]).astype(float), strict=True))
    by_task: dict[str, list[float]] = defaultdict(list)
    for example in pairs:
        if example["id"] in wins:  # a pair whose answers were cut away has no winner
            by_task[f"preference/{example['task']}" if "task" in example else ""].append(wins[example["id"]])
    groups = {"preference": list(wins.values()), **{k: by_task[k] for k in sorted(by_task) if k}}
    return {
        k: ratio_interval(v, np.ones(len(v)).tolist(), resamples=resamples, confidence=confidence)
        for k, v in groups.items()
    }
