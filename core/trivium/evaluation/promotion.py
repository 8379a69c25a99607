"""Whether a new model should take an incumbent's place: by feedback neither was trained on, and by an evaluation.

Of a pair, a model's margin is log p(chosen) - log p(rejected). The new model wins a pair where its margin is larger
than the incumbent's, which is where its implicit reward log(p_new / p_incumbent) is larger for the chosen answer
(Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, section 4; beta changes no sign). A tie is half a win: a model
equal to the incumbent has a win rate of one half. Of verdicts without pairs, every liked answer is compared with
every disliked one by the implicit reward (the Mann-Whitney statistic, or area under the ROC curve). Rows that share a
prompt are not independent, so intervals resample prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from trivium.data.source import Example, prompt_of
from trivium.data.tokenizer import Tokenizer
from trivium.evaluation.intervals import Estimate, ratio_interval
from trivium.evaluation.pairs import packed
from trivium.models.protocol import CausalLM
from trivium.objectives.logprobs import sequence_logprobs
from trivium.types import PreferenceBatch, TokenBatch

Found = Mapping[str, Sequence[float]]
"""What `answer_logprobs` finds."""


@torch.no_grad()
def answer_logprobs(model: CausalLM, tokenizer: Tokenizer, examples: Sequence[Example]) -> dict[str, list[float]]:
    """By example: the log-probabilities of chosen and rejected, or that of the one answer that was judged."""
    model.eval()
    if "chosen" in examples[0]:
        steps = packed(examples, tokenizer, model.context, "pairs", PreferenceBatch)
    else:
        told = [{"id": e["id"], "messages": e["messages"], "tools": e.get("tools", [])} for e in examples]
        steps = packed(told, tokenizer, model.context, "chat", TokenBatch, "last_turn")
    values = steps.per_document(lambda batch: sequence_logprobs(model, batch), next(model.parameters()).device)
    found: dict[str, list[float]] = {}
    for name, value in zip(steps.table.ids, values.tolist(), strict=True):
        found.setdefault(name.partition("#")[0], []).append(value)
    return found


def pair_wins(
    new: Found, old: Found, pairs: Sequence[Example], *, resamples: int, confidence: float
) -> dict[str, Estimate]:
    """win_rate of the new model over the old; accuracy of either, and gain, the difference of these."""
    known = [e for e in pairs if e["id"] in new and e["id"] in old]
    ours, theirs = (np.array([x[e["id"]][0] - x[e["id"]][1] for e in known], float) for x in (new, old))
    right = [(margin > 0).astype(float) + 0.5 * (margin == 0) for margin in (ours, theirs, ours - theirs)]
    values = {
        "win_rate": right[2],
        "accuracy_new": right[0],
        "accuracy_incumbent": right[1],
        "gain": right[0] - right[1],
    }
    groups = _groups(known)
    return {name: _by_group(v, groups, resamples, confidence) for name, v in values.items()}


def verdict_wins(
    new: Found, old: Found, judged: Sequence[Example], *, resamples: int, confidence: float
) -> dict[str, Estimate]:
    """win_rate: how often a liked answer has the larger implicit reward than a disliked one."""
    known = [e for e in judged if e["id"] in new and e["id"] in old]
    reward = np.array([new[e["id"]][0] - old[e["id"]][0] for e in known], float)
    liked, groups = np.array([e["label"] for e in known], bool), _groups(known)
    if not liked.any() or liked.all():
        return {}
    draw, found = np.random.default_rng(0), []
    members = [np.flatnonzero(groups == g) for g in range(groups.max() + 1)]
    while len(found) < resamples:
        chosen = np.concatenate([members[g] for g in draw.integers(0, len(members), len(members))])
        if liked[chosen].any() and not liked[chosen].all():
            found.append(area(reward[chosen], liked[chosen]))
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return {"win_rate": Estimate(area(reward, liked), float(low), float(high), len(known))}


def area(values: np.ndarray, liked: np.ndarray) -> float:
    """The share of (liked, disliked) pairs in which the liked one's value is larger; a tie is half.

    >>> area(np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False]))  # 3>2 3>1 1<2 1=1
    0.625
    """
    difference = values[liked][:, None] - values[~liked][None]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def objections(
    held_out: Mapping[str, Estimate],
    least: int,
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]],
    better: Mapping[str, int],
) -> list[str]:
    """Why the new model must not take the incumbent's place; none if it may.

    held_out: of `pair_wins` or `verdict_wins`. least: rows that these must be of. before, after: results of an
    evaluation, {value, low, high} each. better: by measure, +1 where more is better and -1 where less is.
    """
    found = []
    wins = held_out.get("win_rate")
    if wins is None or wins.count < least:
        count = wins.count if wins else 0
        found.append(f"{count} rows of held-out feedback are too few to judge by; {least} are needed")
    elif wins.low <= 0.5:
        found.append(f"on held-out feedback it wins {_told(wins)} of the time, which is not surely more than half")
    gain = held_out.get("gain")
    if gain is not None and gain.high < 0:
        found.append(f"it prefers the better of two held-out answers less often than the incumbent ({_told(gain)})")
    for name in sorted(before.keys() & after.keys()):
        sign = better.get(name.partition("/")[0], 1)
        was, now = before[name], after[name]
        worst, best = ("low", "high") if sign > 0 else ("high", "low")
        if sign * now[best] < sign * was[worst]:
            found.append(f"{name} went from {was['value']:.3f} to {now['value']:.3f}, clearly for the worse")
    return found


def _told(e: Estimate) -> str:
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def _groups(examples: Sequence[Example]) -> np.ndarray:
    """The number of each example's prompt."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(repr(prompt_of(e)), len(numbers)) for e in examples])


def _by_group(values: np.ndarray, groups: np.ndarray, resamples: int, confidence: float) -> Estimate:
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    found = ratio_interval(sums.tolist(), counts.tolist(), resamples=resamples, confidence=confidence)
    return Estimate(found.value, found.low, found.high, len(values))
