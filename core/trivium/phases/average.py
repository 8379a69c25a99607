"""The mean of several models' weights: a model soup (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482), of runs
that began at the same weights; of other runs the mean is, as a rule, worse than each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trivium.build import Artifact
from trivium.errors import CheckpointError
from trivium.models.protocol import CausalLM
from trivium.models.weights import check_names, check_tensor, weights_of
from trivium.registry import MODELS


@torch.no_grad()
def average_into(model: CausalLM, parent: Artifact, others: Sequence[Artifact]) -> None:
    """Make the weights of `model`, which are those of `parent`, the mean of theirs and those of `others`.

    Each counts alike. The mean is taken in fp64, a tensor at a time; an adapter counts with what it makes of its base.
    Raises CheckpointError naming the one that is of another architecture, vocabulary or tokenizer.
    """
    for other in others:
        _alike(parent, other)
    ours = dict(model.named_parameters())
    theirs = [_weights(other) for other in others]
    for other, tensors in zip(others, theirs, strict=True):
        check_names(ours, tensors, f"average={other.origin}")
    for name, parameter in ours.items():
        total = parameter.double()
        for other, tensors in zip(others, theirs, strict=True):
            tensor = tensors[name]
            check_tensor(name, tensor, parameter.shape, f"average={other.origin}")
            total += tensor.double()
        parameter.copy_(total / (1 + len(others)))


def _weights(other: Artifact) -> Mapping[str, Tensor]:
    return other.tensors() if other.base is None else weights_of(other.merged(None)[0])


def _alike(parent: Artifact, other: Artifact) -> None:
    here, there = _record(parent), _record(other)
    free = getattr(MODELS.config(here["name"]), "runtime_fields", ())
    wanted = {"model": here["name"], "vocab_size": here["vocab_size"], **here["config"]}
    found = {"model": there["name"], "vocab_size": there["vocab_size"], **there["config"]}
    if differ := [k for k in wanted if k not in free and wanted[k] != found.get(k)]:
        shown = ", ".join(f"{k}={found.get(k)} there and {wanted[k]} in {parent.origin}" for k in differ[:3])
        raise CheckpointError(f"average={other.origin} cannot be averaged with: {shown}")
    if other.tokenizer.fingerprint != parent.tokenizer.fingerprint:
        raise CheckpointError(
            f"average={other.origin} cannot be averaged with: it has another tokenizer than {parent.origin} "
            f"({other.tokenizer.fingerprint[:10]} and {parent.tokenizer.fingerprint[:10]}), so rows mean other tokens"
        )


def _record(artifact: Artifact) -> dict[str, Any]:
    if artifact.record is None or artifact.scores:
        what = "a tokenizer and no model" if artifact.record is None else "a reward model"
        raise CheckpointError(f"average={artifact.origin} is {what}; language models are averaged")
    return artifact.record
