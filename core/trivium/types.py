"""The nouns that cross folders: batches, what a loss returns, what a score is, what a backend takes and gives.

Letters in shapes: `B` sequences, `T` tokens, `V` vocabulary, `C` width, `H` query heads, `K` key/value heads, `D` head
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, NamedTuple, Self

from trivium.errors import BackendError

if TYPE_CHECKING:  # the nouns are needed where torch must not be imported (sources, the command line)
    import torch
    from torch import Tensor, nn

IGNORE = -100
"""The label of a token that is not trained on."""


@dataclass
class TokenBatch:
    """Rows of tokens, one or several packed documents each.

    tokens: (B, T) int64. labels: (B, T) int64, aligned with `tokens` (the shift happens once, in the objective);
    -100 where not trained, always so on the first token of each document and on padding.
    positions: (B, T) int64, restarting at 0 in each document. segments: (B, T) int64, the document's number in its row
    from 1, 0 on padding; None when every row is one document without padding. origin: (B, S) int64, each segment's
    number in `origins`, the names under which losses are counted apart, or one more; None where they are not.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor | None = None
    origin: Tensor | None = None
    origins: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Self:
        """The same batch with every tensor on `device`."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in held.items() if hasattr(v, "to") and v is not None}
        return replace(self, **moved)

    def pinned(self) -> Self:
        """The same batch in page-locked memory, from which a GPU fetches it while it computes."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in held.items() if hasattr(v, "pin_memory")})


@dataclass
class PreferenceBatch(TokenBatch):
    """Packed pairs: in every row, segments 2k-1 and 2k are the chosen and the rejected document of one pair.

    reference: (B, S) fp32, the log-probability of each segment's trained tokens under the reference; column s-1 is
    segment s, 0 where a row has fewer. None until it is known.
    """

    reference: Tensor | None = None


@dataclass
class UnpairedBatch(TokenBatch):
    """Packed verdicts: segment 2k-1 is a judged document, 2k the same prompt with another example's completion.

    desirable: (B, S) fp32, 1 or 0 for each document. reference: (B, S), as for pairs. baseline: the step's, a scalar.
    """

    desirable: Tensor | None = None
    reference: Tensor | None = None
    baseline: Tensor | None = None


@dataclass
class DistillBatch(TokenBatch):
    """Rows of tokens with what the teacher made of them.

    teacher: (N, C) hidden states before each of the N trained tokens, in the order of the rows; teacher_head: what
    turns them into logits. None until the teacher was asked.
    """

    teacher: Tensor | None = None
    teacher_head: nn.Linear | None = None


@dataclass
class RolloutBatch(TokenBatch):
    """Packed samples of the policy, each a prompt and its completion; only what the policy wrote is labelled.

    advantage: (B, S) fp32, one a segment. old, reference: (B, T) fp32 log-probabilities of each token under the policy
    that drew it and under the reference, aligned with `tokens` (0 where not trained). None until they are known.
    temperature: at which it was drawn and every log-probability is taken. max_tokens: the longest completion asked.
    drawn: (N,) the sampler's own log-probability of each labelled token, in the order of the rows, at temperature 1.
    """

    advantage: Tensor | None = None
    old: Tensor | None = None
    reference: Tensor | None = None
    temperature: float = 1.0
    max_tokens: int = 1
    drawn: Tensor | None = None


class Metric(NamedTuple):
    """A figure as a sum and its own count: it is averaged over what it counts, never over ranks or batches."""

    total: Tensor
    count: Tensor


@dataclass
class LossOutput:
    """What an objective returns: a **sum** over counted units, never a mean; the module divides once."""

    loss_sum: Tensor
    metrics: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A verdict on one completion. `value`: the reward (0.0 is a reward, not a missing one). `correct`: the verdict.

    measure: what `value` is where it is no verdict, such as "chrF"; an evaluation reports its mean under this name.
    """

    value: float
    correct: bool
    measure: str = ""


@dataclass(frozen=True)
class SamplingParams:
    """How to draw a request's tokens. Steps in this order: logit_bias, the penalties, what is forbidden (a constraint,
    stops before min_tokens), temperature, top_k, top_p, min_p.

    temperature: 0 is greedy, exactly argmax. top_k: 0 is off. top_p: 1.0 is off. min_p: keep tokens at least this
    fraction as likely as the likeliest; 0 is off. repetition_penalty: positive logits of tokens in prompt or answer are
    divided by it, negative ones multiplied (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1).
    presence_penalty, frequency_penalty: subtracted from logits of tokens in the answer, once and as often as they
    occur. logit_bias: (token, what is added). min_tokens: no stop id is drawn before so many others. stop_ids: end the
    answer. top_logprobs: how many of the likeliest tokens each event tells of. json_schema (a JSON text), regex: what
    the answer's text must be.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    top_logprobs: int = 0
    json_schema: str = ""
    regex: str = ""

    def __post_init__(self) -> None:
        numbers = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        odd = [name for name in numbers if not math.isfinite(getattr(self, name))]
        odd += ["logit_bias"] * any(math.isnan(value) or value == math.inf for _, value in self.logit_bias)
        if odd:
            raise BackendError(f"cannot sample with {odd[0]}={getattr(self, odd[0])}: it must be a number")
        if self.max_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise BackendError(
                f"cannot sample with max_tokens={self.max_tokens} (at least 1), temperature={self.temperature} and "
                f"top_k={self.top_k} (not negative), top_p={self.top_p} (more than 0, at most 1)"
            )
        if not 0 <= self.min_p <= 1 or self.repetition_penalty <= 0 or self.top_logprobs < 0:
            raise BackendError(
                f"cannot sample with min_p={self.min_p} (0 to 1), repetition_penalty={self.repetition_penalty} (more "
                f"than 0), top_logprobs={self.top_logprobs} (not negative)"
            )
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise BackendError(f"cannot sample with min_tokens={self.min_tokens} (0 to max_tokens={self.max_tokens})")
        if self.json_schema and self.regex:
            raise BackendError("cannot sample with both json_schema and regex: an answer has one form")


@dataclass(frozen=True)
class Request:
    """One prompt for a backend: token ids in, token ids out. Random numbers are a function of the seed, `stream` and
    the position; stream: "" is the request's id."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    stream: str = ""


@dataclass(frozen=True)
class TokenEvent:
    """One generated token, or the end of a request that failed (`token_id` -1).

    logprob: natural log-probability under the unmodified distribution. finish_reason: None but on a request's last
    event: "stop" (a stop id, which is this token, or the end of what a constraint allows), "length", or "error".
    drawn_logprob: under the distribution that it was drawn from; None where that was not computed. kept: the
    probability, after temperature, of what top_k, top_p and min_p left to draw from. top: the likeliest tokens and
    their log-probabilities under the unmodified distribution. cached: on a request's first event, how many tokens of
    its prompt were not computed again. error: why it failed.
    """

    request_id: str
    token_id: int
    logprob: float
    finish_reason: str | None = None
    drawn_logprob: float | None = None
    kept: float = 1.0
    top: tuple[tuple[int, float], ...] = ()
    cached: int = 0
    error: str = ""
