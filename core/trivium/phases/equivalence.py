"""Whether packing and accumulation change what a model learns: on a user's own model and data, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trivium.data.table import TokenTable
from trivium.models.protocol import CausalLM
from trivium.objectives.logprobs import target_logprobs
from trivium.objectives.protocol import Objective
from trivium.types import TokenBatch


@torch.no_grad()
def packing_error(model: CausalLM, batch: TokenBatch, table: TokenTable, rows: Sequence[Sequence[int]]) -> float:
    """The largest difference, in nats, of a trained token's log-probability in its packed row and alone."""
    packed = target_logprobs(model, batch)
    alone = []
    for row in rows:
        for d in row:
            ids, trained = table.document(d)
            tokens = torch.from_numpy(ids.astype("int64"))[None]
            labels = torch.where(torch.from_numpy(trained)[None], tokens, -100)
            labels[:, 0] = -100
            alone.append(target_logprobs(model, TokenBatch(tokens, labels, torch.arange(len(ids))[None])))
    return (packed - torch.cat(alone)).abs().max().item()


def accumulation_error(model: CausalLM, objective: Objective, whole: TokenBatch, parts: Sequence[TokenBatch]) -> float:
    """How far gradients of one batch and of its rows one by one are apart, relative to their norm.

    Of the objective where it needs no companion, else of the log-probability of the trained tokens.
    """

    def gradient(batches: Sequence[TokenBatch]) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        plain = not objective.companions and not objective.scores
        counts = [objective.count(b) if plain else (b.labels[:, 1:] != -100).sum() for b in batches]
        for batch in batches:
            loss = objective(model, batch).loss_sum if plain else -target_logprobs(model, batch).sum()
            (loss / torch.stack(list(counts)).sum()).backward()
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return torch.cat(found).double()

    one, many = gradient([whole]), gradient(parts)
    return ((one - many).norm() / one.norm()).item()
