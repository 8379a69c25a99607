"""Everything that learns from its own samples: as ObjectiveModule, but for where the data comes from.

An item of the loader is a list of prompts. The policy answers each several times through the backend, on the very
weights that are being trained; the source judges each answer; the answers, with their advantages, are the micro-batches
of the next `updates` optimizer steps. Ids travel as they were drawn: text is made for the judge only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trivium.data.chat import Encoded
from trivium.data.collate import collate
from trivium.data.datamodule import Prompt
from trivium.data.packing import pack, table_of
from trivium.data.position import key_of
from trivium.data.source import Source
from trivium.data.tokenizer import Tokenizer
from trivium.errors import TrainingError
from trivium.inference.native.engine import collect
from trivium.inference.protocol import Backend
from trivium.objectives.advantage import group_advantage
from trivium.objectives.logprobs import target_logprobs
from trivium.training.objective_module import ObjectiveModule
from trivium.types import IGNORE, Request, RolloutBatch, SamplingParams, TokenEvent

MISMATCH = 0.2
"""Nats a token by which the sampler's and the trainer's log-probabilities may differ on average: rounding stays far
below it, weights that were not synced far above."""


@dataclass(frozen=True)
class RolloutSettings:
    """samples: answers for each prompt. updates: optimizer steps a rollout serves. length: tokens of a packed row."""

    samples: int
    updates: int
    max_tokens: int
    temperature: float
    seed: int
    micro_size: int
    length: int


class RolloutModule(ObjectiveModule):
    """Composes a policy, an objective, a backend that samples from the policy, and a source that scores."""

    def __init__(
        self,
        *parts: Any,
        backend: Backend,
        source: Source,
        tokenizer: Tokenizer,
        rollouts: RolloutSettings,
        **more: Any,
    ) -> None:
        super().__init__(*parts, **more)
        self.backend, self.source, self.tokenizer, self.rollouts = backend, source, tokenizer, rollouts
        self._pending: list[list[RolloutBatch]] = []
        self._figures: dict[str, float] = {}

    @property
    def between_items(self) -> bool:
        return not self._pending

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._pending.clear()  # drawn by weights that are given up

    def training_step(self, prompts: Sequence[Prompt], _index: int) -> None:
        if not self._pending:
            self.watch.lap("data")
            self._pending = self.roll_out(prompts)
            self.watch.lap("rollout")
        self.take_step(self._pending.pop(0), self._figures)

    def roll_out(self, prompts: Sequence[Prompt]) -> list[list[RolloutBatch]]:
        """Sample, score, compare within groups: the micro-batches of each of the next `updates` steps."""
        r = self.rollouts
        self.backend.update_weights(self.step)
        parts = [range(u, len(prompts), r.updates) for u in range(r.updates)]
        parts = [part[self.global_rank :: self.world_size] for part in parts]  # this rank's prompts
        answers = self._sample(prompts, sorted(i for part in parts for i in part))
        rewards = torch.zeros(len(prompts), r.samples)
        for i, group in answers.items():
            rewards[i] = torch.tensor([self._score(prompts[i], answer) for answer in group])
        rewards = self.global_sum(rewards.to(self.device)).cpu()  # a prompt's are known to one rank, 0 to the others
        advantage = group_advantage(rewards, self.objective.config.advantage).numpy()
        steps = [self._batches(prompts, answers, advantage, part) for part in parts]
        apart = np.sum([self._consulted(batches) for batches in steps], axis=0)
        ends = [answer[-1].finish_reason for group in answers.values() for answer in group]
        tokens = sum(len(answer) for group in answers.values() for answer in group)
        facts = torch.tensor([*apart, tokens, ends.count("length"), len(ends)], dtype=torch.float32)
        nats, drawn, tokens, cut, samples = self.global_sum(facts.to(self.device)).tolist()
        self._figures = {
            "rollout/reward": rewards.mean().item(),
            "rollout/length": tokens / samples,
            "rollout/truncated": cut / samples,
            "rollout/idle_groups": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
            "rollout/mismatch": nats / drawn,
        }
        if self._figures["rollout/mismatch"] > MISMATCH:
            raise TrainingError(
                f"step {self.step}: the sampler's log-probabilities are {self._figures['rollout/mismatch']:.2f} nats a "
                f"token away from the trainer's (at most {MISMATCH}); it does not sample from the weights being trained"
            )
        return steps

    def _sample(self, prompts: Sequence[Prompt], chosen: Sequence[int]) -> dict[int, list[list[TokenEvent]]]:
        """The events of the answers to each chosen prompt. Every answer has an id, and so random numbers, of its own,
        whichever rank draws it."""
        r = self.rollouts
        params = SamplingParams(
            max_tokens=r.max_tokens,
            temperature=r.temperature,
            seed=key_of(self.settings.seed, r.seed, "rollout", self.step) % 2**31,
            stop_ids=self.tokenizer.stop_ids,
        )
        names = {i: [f"{i}/{prompts[i].example['id']}/{g}" for g in range(r.samples)] for i in chosen}
        events = collect(self.backend, [Request(n, prompts[i].ids, params) for i in chosen for n in names[i]])
        return {i: [events[n] for n in group] for i, group in names.items()}

    def _score(self, prompt: Prompt, answer: list[TokenEvent]) -> float:
        text = self.tokenizer.decode([e.token_id for e in answer if e.finish_reason != "stop"])
        value = self.source.score(prompt.example, text).value
        if not math.isfinite(value):
            raise TrainingError(f"step {self.step}: the score of example {prompt.example['id']} is {value}")
        return value

    def _batches(
        self, prompts: Sequence[Prompt], answers: dict[int, list[list[TokenEvent]]], advantage: np.ndarray, part: range
    ) -> list[RolloutBatch]:
        """The answers to `part` of the prompts, packed."""
        r = self.rollouts
        documents, drawn = [], []
        for i in part:
            for answer in answers[i]:
                ids = [e.token_id for e in answer]
                documents.append(Encoded([*prompts[i].ids, *ids], [False] * len(prompts[i].ids) + [True] * len(ids)))
                drawn.append([e.logprob for e in answer])
        columns = {"advantage": advantage[list(part)].flatten()}
        table = table_of(documents, [""] * len(documents), columns=columns)
        rows = pack(table.lengths, r.length)
        batches = []
        for start in range(0, len(rows), r.micro_size):
            here = rows[start : start + r.micro_size]
            facts = {"temperature": r.temperature, "max_tokens": r.max_tokens}
            batch = collate(table, here, r.length, self.tokenizer.pad_id, RolloutBatch, **facts)
            assert isinstance(batch, RolloutBatch)
            batch.drawn = torch.tensor([x for row in here for d in row for x in drawn[d]])
            batches.append(batch.to(self.device))
        return batches

    def _consulted(self, batches: list[RolloutBatch]) -> tuple[float, int]:
        """Ask policy and companions; returns the nats by which the sampler was off, and over how many tokens."""
        apart, tokens = 0.0, 0
        with self.asking() as models:
            for batch in batches:
                self.objective.consult(batch, models)
                assert batch.drawn is not None
                if batch.temperature == 1 and batch.old is not None:
                    raw = batch.old[:, 1:][batch.labels[:, 1:] != IGNORE]
                else:
                    raw = target_logprobs(models["policy"], batch)
                apart += (raw - batch.drawn).abs().sum().item()
                tokens += len(raw)
        return apart, tokens
