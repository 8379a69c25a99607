"""Our own engine: continuous batching over the very weights that are being trained.

A step decodes every running row by one token (or more, where drafts turn out right), then reads prompts until the
step's budget of tokens is spent: whole prompts of about the same length together, or the next piece of a long one. Rows
that finish leave, rows that wait come in. Padding of a shorter neighbour is never read, since a cache slot is a
position and a query sees only slots up to its own, and is overwritten when its position comes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from trivium.data.tokenizer import Tokenizer
from trivium.errors import BackendError
from trivium.inference.config import NativeConfig
from trivium.inference.constrain import CONSTRAINTS, Grammar, Grammars, installed
from trivium.inference.native.memory import GROWTH, Memory, Paged, Slab
from trivium.inference.native.row import Row
from trivium.inference.native.scheduler import Scheduler
from trivium.inference.native.speculative import Draft, Guesser, NGrams
from trivium.inference.protocol import Backend, Capabilities, Stats, collect
from trivium.inference.sampling import SAMPLING, Drawn, sample_places
from trivium.models.cache import Int8Cache, KVCache
from trivium.models.memory import free_bytes
from trivium.models.packed import packed
from trivium.models.protocol import CausalLM
from trivium.types import Request, TokenEvent

__all__ = ["GROWTH", "NativeBackend", "collect"]


class Pass(NamedTuple):
    """Neighbouring rows that the model reads at once: the last `counts[i]` of row i's ids and drafts, of which the last
    `wanted[i]` are where tokens are drawn after."""

    rows: list[Row]
    first: int
    counts: list[int]
    wanted: list[int]


class NativeBackend(Backend):
    """Decodes in the precision of the weights, in eval mode, and puts the model's mode back."""

    def __init__(
        self, config: NativeConfig, model: CausalLM, tokenizer: Tokenizer | None = None, draft: CausalLM | None = None
    ) -> None:
        """tokenizer: for constraints, which are about text. draft: the model of speculate=draft."""
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self._stats = Stats()
        self._number = 0
        self._parameters = list(model.parameters())
        self._made: Scheduler | None = None
        self._state = self._weights()
        self._copy: CausalLM | None = None
        self._grammars = Grammars(tokenizer, model.vocab_size) if tokenizer is not None and installed() else None
        self._guesser: Guesser | None = None
        if config.speculate == "ngram":
            self._guesser = NGrams()
        elif config.speculate == "draft":
            if draft is None or draft.vocab_size != model.vocab_size:
                has = "none was given" if draft is None else f"that has {draft.vocab_size} tokens"
                raise BackendError(f"speculate=draft needs a model of the same {model.vocab_size} tokens; {has}")
            self._guesser = Draft(draft.eval())
        elif config.speculate == "self":
            self._guesser = self._own()
        if config.compile:
            self._copy = self.reader  # now, and not while the first request waits

    @property
    def scheduler(self) -> Scheduler:
        """Rows and their memory; made when first needed."""
        if self._made is None:
            c = self.config
            paged = c.memory == "paged" or (c.memory == "auto" and self._device.type != "cpu")
            slots = max(c.slots or self._room(), c.page)
            kept = c.prefix_slots or slots // 4
            kind: type[Memory] = Paged if paged else Slab
            memory = kind(self._new_cache, self.model.context, slots, c.page, kept if c.prefix_cache else 0)
            self._made = Scheduler(memory, c.max_batch, prefix_cache=c.prefix_cache)
        return self._made

    def _new_cache(self, rows: int, length: int) -> KVCache:
        if self.config.cache == "int8":
            return Int8Cache(self.reader.new_cache(1, 1), rows, length)
        return self.reader.new_cache(rows, length)

    def _room(self) -> int:
        """Tokens whose keys and values a quarter of the free memory holds, but no more than can be used. What a draft
        model will hold of its own is not free."""
        size, free = self._new_cache(1, 1).nbytes, free_bytes()
        if isinstance(self._guesser, Draft):
            draft = self._guesser.model
            free -= self.config.draft_rows * draft.context * draft.new_cache(1, 1).nbytes
        return max(1, min(self.config.max_batch * self.model.context, free // 4 // size))

    @property
    def reader(self) -> CausalLM:
        """What decodes: the model itself, or a copy of it in fewer bits, made anew when its weights have changed."""
        if self.config.weights == "same":
            return self.model
        if self._copy is None:
            self._copy = packed(self.model, self.config.weights, compiled=self.config.compile)
        return self._copy

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def capabilities(self) -> Capabilities:
        return Capabilities(
            context=self.model.context,
            vocab_size=self.model.vocab_size,
            sampling=SAMPLING if self._grammars else SAMPLING - CONSTRAINTS,
            shares_weights=self.config.weights == "same",
            generates=self.model.score is None,
            embeds=True,
            rewards=self.model.score is not None,
        )

    def stats(self) -> Stats:
        scheduler, memory = self.scheduler, self.scheduler.memory
        return replace(
            self._stats,
            preempted=scheduler.preempted,
            running=len(scheduler.lanes),
            waiting=len(scheduler.waiting),
            slots=memory.slots,
            used_slots=memory.used,
            cached_slots=memory.kept,
        )

    @property
    def busy(self) -> bool:
        return self._made is not None and bool(self._made.lanes or self._made.waiting)

    def check(self, request: Request) -> None:
        super().check(request)
        self._constraint(request)

    def _constraint(self, request: Request) -> Grammar | None:
        try:
            return self._grammars.constraint(request.params) if self._grammars else None
        except BackendError as error:
            raise BackendError(f"request {request.id}: {error}") from error

    def add(self, request: Request) -> None:
        self.check(request)
        scheduler = self.scheduler
        if scheduler.find(request.id) is not None:
            raise BackendError(f"two requests have the id {request.id!r}")
        row = Row.of(request, self._number, self._constraint(request))
        if row.most > scheduler.memory.slots:
            raise BackendError(
                f"request {request.id}: {row.prompt} prompt tokens and max_tokens={request.params.max_tokens} need "
                f"{row.most} cache slots, there are {scheduler.memory.slots}; raise inference.slots"
            )
        if not self.busy:
            self._follow()
        self._number += 1
        scheduler.waiting.append(row)
        self._count(requests=1, prompt_tokens=row.prompt)

    def drop(self, request_id: str) -> None:
        row = self.scheduler.find(request_id)
        if row is not None:
            self.scheduler.leave(row)

    def update_weights(self, version: int) -> None:
        if self.busy:
            raise BackendError("weights cannot change while requests are being answered")
        self._stats = replace(self._stats, weight_version=version)
        self._follow()

    def _weights(self) -> int:
        """Another number when a weight was changed, however that was done."""
        if not self.busy:  # walking through the modules takes as long as a layer: not while tokens are waited for
            self._parameters = list(self.model.parameters())
        return hash(tuple([(p.data_ptr(), p._version) for p in self._parameters]))

    def _follow(self) -> None:
        """Drop what was computed from other weights."""
        state = self._weights()
        if state == self._state:
            return
        if self._made is not None:
            if self._made.lanes:
                raise BackendError("the weights were changed while requests were being answered")
            self._made.memory.forget()
        self._state, self._copy = state, None
        if self.config.speculate == "self":
            self._guesser = None  # its memory is free before the next is made
            self._guesser = self._own()

    def _count(self, **more: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})

    @torch.no_grad()
    def step(self) -> list[TokenEvent]:
        started, was_training, scheduler = time.perf_counter(), self.model.training, self.scheduler
        self._follow()
        if was_training:
            self.model.eval()
        try:
            events = self._decode()
            budget = self.config.step_tokens - scheduler.decoding
            while budget > 0:
                scheduler.admit()
                count, length = scheduler.group(budget)
                if not count:
                    break
                events += self._read(count, length)
                budget -= count * length
        finally:
            if was_training:
                self.model.train()
            self._count(seconds=time.perf_counter() - started)
        return events

    def _decode(self) -> list[TokenEvent]:
        """The next token of every row whose prompt is read."""
        scheduler = self.scheduler
        self._guess(scheduler.lanes[: scheduler.decoding])
        while scheduler.decoding:
            rows = scheduler.lanes[: scheduler.decoding]
            counts = [1 + len(row.drafts) for row in rows]
            if scheduler.make_room(slice(0, len(rows)), [len(row.ids) + len(row.drafts) for row in rows]):
                return self._run(Pass(rows, 0, counts, counts))
        return []

    def _own(self) -> Draft:
        """The model's own weights in fewer bits as its draft."""
        return Draft(packed(self.model, self.config.draft_weights, compiled=self.config.compile))

    def _guess(self, rows: list[Row]) -> None:
        if self._guesser is not None and len(rows) <= self.config.draft_rows:
            most = self.config.draft_tokens
            counts = [0 if row.constraint else min(most, row.most - len(row.ids) - 1) for row in rows]
            try:
                self._guesser.guess(rows, counts)
            except Exception as error:  # a guess is never worth an answer
                self._guesser = None
                for row in rows:
                    row.drafts = []
                warnings.warn(f"no tokens are guessed any more: {error}", stacklevel=2)

    def _read(self, count: int, length: int) -> list[TokenEvent]:
        """The next `length` prompt tokens of each of the first `count` reading rows; of those then read, a token."""
        scheduler = self.scheduler
        first = scheduler.decoding
        rows = scheduler.reading[:count]
        counts = [min(length, row.unread) for row in rows]
        if not scheduler.make_room(
            slice(first, first + count), [row.read + n for row, n in zip(rows, counts, strict=True)]
        ):
            return []
        return self._run(Pass(rows, first, counts, [int(n == row.unread) for row, n in zip(rows, counts, strict=True)]))

    def _run(self, this: Pass) -> list[TokenEvent]:
        """Events of a pass. What fails together is tried again one by one, so that one request fails alone."""
        try:
            drawn = self._drawn(this)
        except Exception as error:
            if len(this.rows) == 1:
                return [self._fail(this.rows[0], error)]
            events = []
            for row, count, wanted in zip(this.rows, this.counts, this.wanted, strict=True):
                if row in self.scheduler.lanes:  # lanes move when a neighbour fails
                    events += self._run(Pass([row], self.scheduler.lanes.index(row), [count], [wanted]))
            return events
        scheduler, events, done = self.scheduler, [], []
        for row, count, found in zip(this.rows, this.counts, drawn, strict=True):
            row.read += count - len(row.drafts)
            if not found:
                continue
            if not row.began and scheduler.prefix_cache:
                scheduler.memory.keep(scheduler.lanes.index(row), row.ids[: row.read])
            mine, error = self._commit(row, found)
            events += mine
            if error is not None:
                events.append(self._fail(row, error))
            elif mine[-1].finish_reason is not None:
                done.append(row)
        scheduler.count_decoding()
        for row in done:
            scheduler.leave(row)
        return events

    def _fail(self, row: Row, error: Exception) -> TokenEvent:
        scheduler = self.scheduler
        scheduler.memory.wipe(scheduler.lanes.index(row))
        row.read = 0  # nothing of it is worth keeping
        scheduler.leave(row)
        return row.failed(error)

    def _commit(self, row: Row, found: list[Drawn | BackendError]) -> tuple[list[TokenEvent], BackendError | None]:
        """Take the drawn tokens into the row, up to the first that its draft did not foresee."""
        events: list[TokenEvent] = []
        drafts, row.drafts = row.drafts, []
        for number, one in enumerate(found):
            if isinstance(one, BackendError):
                return events, one
            row.ids.append(one.token)
            if row.constraint is not None:
                row.constraint.accept(one.token)
            reason = row.finish(one.token)
            cached = 0 if row.began else row.cached
            row.began = True
            self._count(cached_tokens=cached)
            events.append(
                TokenEvent(row.request.id, one.token, one.logprob, reason, one.drawn_logprob, one.kept, one.top, cached)
            )
            if reason is not None or number == len(drafts) or one.token != drafts[number]:
                break
        self._count(generated_tokens=len(events), accepted_tokens=len(events) - 1, drafted_tokens=len(drafts))
        row.read += len(events) - 1
        return events, None

    def _drawn(self, this: Pass) -> list[list[Drawn | BackendError]]:
        """Run the model over a pass and draw what it asks for."""
        longest, rows = max(this.counts), this.rows
        told = [[*row.ids[row.read :], *row.drafts][:n] for row, n in zip(rows, this.counts, strict=True)]
        tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in told], device=self._device)
        starts = torch.tensor([row.read for row in rows], device=self._device)
        positions = starts[:, None] + torch.arange(longest, device=self._device)
        lanes = slice(this.first, this.first + len(rows))
        length = max(row.read for row in rows) + longest
        hidden = self.reader(tokens, positions, cache=self.scheduler.memory.view(lanes, length))
        places = [
            (i, n - w + j) for i, (n, w) in enumerate(zip(this.counts, this.wanted, strict=True)) for j in range(w)
        ]
        if not places:
            return [[] for _ in rows]
        at = torch.tensor(places, device=self._device)
        logits = self.reader.head(hidden[at[:, 0], at[:, 1]]).float()
        drafted = [j for w in this.wanted for j in range(w)]
        found = sample_places(logits, [rows[i].place(j) for (i, _), j in zip(places, drafted, strict=True)])
        out, end = [], 0
        for wanted in this.wanted:
            out.append(found[end : end + wanted])
            end += wanted
        return out

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> list[float]:
        hidden = self._hidden(token_ids)
        logprobs = torch.log_softmax(self.reader.head(hidden).float(), -1)
        targets = torch.tensor(list(token_ids[1:]), device=hidden.device)
        return logprobs[:-1].gather(1, targets[:, None])[:, 0].tolist()

    @torch.no_grad()
    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        means = torch.stack([self._hidden(ids).float().mean(0) for ids in sequences]).cpu()
        return torch.nn.functional.normalize(means, dim=-1)

    @torch.no_grad()
    def reward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        if self.reader.score is None:
            return super().reward(sequences)
        return torch.stack([self.reader.score(self._hidden(ids)[-1])[0].float() for ids in sequences]).cpu()

    def _hidden(self, token_ids: Sequence[int]) -> Tensor:
        """(T, C) of one sequence, without the cache."""
        if len(token_ids) > self.model.context:
            raise BackendError(f"{len(token_ids)} tokens do not fit the model's context of {self.model.context}")
        was_training = self.model.training
        self.model.eval()
        try:
            tokens = torch.tensor([list(token_ids)], device=self._device)
            return self.reader(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None])[0]
        finally:
            self.model.train(was_training)
