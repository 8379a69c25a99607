"""How much better a sample was than its group: the baseline of policy gradients without a value model.

Groups are the samples of one prompt, keyed by example, never by its text. GRPO: Shao et al. 2024,
https://arxiv.org/abs/2402.03300. Dr. GRPO: Liu et al. 2025, https://arxiv.org/abs/2503.20783. RLOO: Ahmadian et al.
2024, https://arxiv.org/abs/2402.14740.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-4


def group_advantage(rewards: Tensor, kind: str = "group") -> Tensor:
    """(P, G) rewards, G samples for each of P prompts -> (P, G) advantages; fp64 in between.

    group: (r - mean) / (std + 1e-4), std unbiased. none: r - mean (Dr. GRPO). rloo: G / (G - 1) * (r - mean), r against
    the mean of the others. batch: r - mean over the std of all samples. A group of equal rewards gives exactly 0.

    >>> group_advantage(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), "none")
    tensor([[ 0.5000, -0.5000,  0.5000, -0.5000]])
    """
    samples = rewards.shape[1]
    if samples < 2:
        raise ValueError(f"a group of {samples} sample has nothing to be compared with")
    wide = rewards.double()
    centred = wide - wide.mean(1, keepdim=True)
    centred = centred.masked_fill(wide.amax(1, keepdim=True) == wide.amin(1, keepdim=True), 0.0)
    if kind == "group":
        centred = centred / (wide.std(1, keepdim=True) + EPS)
    elif kind == "rloo":
        centred = centred * samples / (samples - 1)
    elif kind == "batch":
        centred = centred / (wide.std() + EPS)
    else:
        assert kind == "none", kind
    return centred.to(torch.float32)
