"""What every source, model, objective and backend promises, as pytest classes. Our own parts run through the same."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch

from trivium.data.source import Source, form_of, prompt_of
from trivium.errors import BackendError
from trivium.inference.protocol import Backend
from trivium.models.protocol import CausalLM
from trivium.objectives.protocol import Objective
from trivium.types import Request, SamplingParams, TokenBatch

FORMS = {
    "text": ({"text"},),
    "chat": ({"messages"}, {"prompt", "completion"}),
    "answers": ({"messages", "answer"},),
    "pairs": ({"chosen", "rejected"},),
    "labels": ({"messages", "label"}, {"prompt", "completion", "label"}),
    "steps": ({"prompt", "completions", "labels"},),
}
"""The keys that an example of each form has, beside its id."""


class SourceContract:
    """Define `make() -> Source`, a fresh one at each call."""

    def make(self) -> Source:
        raise NotImplementedError

    def test_ids_are_unique_strings(self) -> None:
        source = self.make()
        ids = [source[i]["id"] for i in range(len(source))]
        assert ids and all(isinstance(i, str) for i in ids)
        assert len(set(ids)) == len(ids)

    def test_examples_have_a_known_form(self) -> None:
        source = self.make()
        for i in range(len(source)):
            keys = set(source[i])
            assert any(needed <= keys for needed in FORMS[form_of(source[i])]), f"{source[i]['id']} has {sorted(keys)}"

    def test_pairs_are_two_answers_to_one_prompt(self) -> None:
        source = self.make()
        for pair in (e for e in (source[i] for i in range(len(source))) if form_of(e) == "pairs"):
            prompt, sides = prompt_of(pair), (pair["chosen"], pair["rejected"])
            assert prompt and sides[0] != sides[1], pair
            if "prompt" in pair:
                assert all(isinstance(said, str) and said for said in (prompt, *sides)), pair
                continue
            answers = [said[len(prompt) :] for said in sides]
            assert all(a and a[0]["role"] == a[-1]["role"] == "assistant" for a in answers), pair

    def test_labels_are_verdicts_on_a_last_turn(self) -> None:
        source = self.make()
        for example in (e for e in (source[i] for i in range(len(source))) if form_of(e) == "labels"):
            assert isinstance(example["label"], bool) and prompt_of(example), example
            assert "messages" not in example or example["messages"][-1]["role"] == "assistant", example

    def test_examples_are_the_same_at_every_call_in_any_order(self) -> None:
        first, second = self.make(), self.make()
        backwards = [second[i] for i in reversed(range(len(second)))][::-1]
        assert [first[i] for i in range(len(first))] == backwards

    def test_fingerprint_is_of_the_content(self) -> None:
        assert self.make().fingerprint == self.make().fingerprint
        assert len(self.make().fingerprint) == 64

    def test_the_right_answer_scores_and_nonsense_does_not(self) -> None:
        source = self.make()
        verifiable = [e for e in (source[i] for i in range(min(len(source), 200))) if "answer" in e]
        for example in verifiable:
            assert source.score(example, example["messages"][-1]["content"]).correct, example
            assert not source.score(example, "").correct, example

    def test_says_which_phases_it_feeds(self) -> None:
        assert self.make().phases


class ModelContract:
    """Define `make() -> CausalLM`: a tiny one, in fp32 on the CPU, weights initialised, dropout 0."""

    tolerance = 1e-5  # fp32 rounding through a few layers

    def make(self) -> CausalLM:
        raise NotImplementedError

    def _tokens(self, model: CausalLM, rows: int = 2, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(0, model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
        return tokens, torch.arange(length).expand(rows, -1)

    def test_hidden_and_head_have_the_promised_shapes(self) -> None:
        model = self.make().eval()
        hidden = model(*self._tokens(model))
        assert hidden.shape[:2] == (2, 12)
        assert model.head(hidden).shape == (2, 12, model.vocab_size)

    def test_later_tokens_never_change_earlier_states(self) -> None:
        model = self.make().eval()
        tokens, positions = self._tokens(model)
        changed = tokens.clone()
        changed[:, 8:] = (changed[:, 8:] + 1) % model.vocab_size
        before, after = model(tokens, positions), model(changed, positions)
        torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=self.tolerance)
        assert (before[:, 8:] - after[:, 8:]).abs().max() > 10 * self.tolerance

    def test_packed_documents_never_see_each_other(self) -> None:
        model = self.make().eval()
        if not model.supports_packing:
            pytest.skip("the model declares no packing")
        tokens, _ = self._tokens(model, rows=1)
        positions = torch.tensor([[*range(5), *range(7)]])
        segments = torch.tensor([[1] * 5 + [2] * 7])
        packed = model(tokens, positions, segments)
        for part in (slice(0, 5), slice(5, 12)):
            alone = model(tokens[:, part], positions[:, part])
            torch.testing.assert_close(packed[:, part], alone, rtol=0, atol=self.tolerance)

    def test_cached_steps_equal_the_full_forward(self) -> None:
        model = self.make().eval()
        tokens, positions = self._tokens(model)
        cache = model.new_cache(2, 12)
        parts = [slice(0, 5), *(slice(t, t + 1) for t in range(5, 12))]
        stepped = torch.cat([model(tokens[:, p], positions[:, p], cache=cache) for p in parts], dim=1)
        torch.testing.assert_close(stepped, model(tokens, positions), rtol=0, atol=self.tolerance)

    def test_initial_weights_depend_on_the_seed_alone(self) -> None:
        first, second = self.make(), self.make()
        torch.manual_seed(99)
        first.init_weights(3)
        second.init_weights(3)
        for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b), name
        second.init_weights(4)
        assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

    def test_builds_on_the_meta_device(self) -> None:
        model = self.make()
        with torch.device("meta"):
            empty = type(model)(model.config, model.vocab_size)
        filled = empty.to_empty(device="cpu")
        filled.init_weights(3)
        model.init_weights(3)
        tokens, positions = self._tokens(model)
        assert torch.equal(model.eval()(tokens, positions), filled.eval()(tokens, positions))


class ObjectiveContract:
    """Define `make() -> (objective, model, batch)`, two rows or more; `companions` where it needs any."""

    tolerance = 1e-4  # relative, of fp32 sums in another order

    def make(self) -> tuple[Objective, CausalLM, Any]:
        raise NotImplementedError

    def companions(self) -> dict[str, CausalLM]:
        """Fresh frozen models by name, for `consult`."""
        return {}

    def rows(self, batch: TokenBatch, part: slice) -> TokenBatch:
        """Some rows of a batch: every tensor of it has the rows first."""
        held = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        cut = {k: v[part] for k, v in held.items() if isinstance(v, torch.Tensor) and v.dim()}
        return dataclasses.replace(batch, **cut)

    def consulted(self, objective: Objective, model: CausalLM, batches: list[Any]) -> None:
        """What a training step does before the losses of its micro-batches."""
        model.eval()
        with torch.no_grad():
            for batch in batches:
                objective.consult(batch, {**self.companions(), "policy": model})
            objective.prepare(model, batches, lambda value: value)

    def test_loss_is_a_sum_over_rows_and_so_is_the_count(self) -> None:
        objective, model, batch = self.make()
        parts = [self.rows(batch, slice(0, 1)), self.rows(batch, slice(1, None))]
        self.consulted(objective, model, [batch])
        self.consulted(objective, model, parts)
        whole = objective(model, batch).loss_sum
        split = sum(objective(model, p).loss_sum for p in parts)
        torch.testing.assert_close(whole, split, rtol=self.tolerance, atol=0)
        assert objective.count(batch) == sum(objective.count(p) for p in parts)

    def test_gradients_reach_the_model(self) -> None:
        objective, model, batch = self.make()
        self.consulted(objective, model, [batch])
        objective(model, batch).loss_sum.backward()
        assert sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None) > 0

    def test_metrics_carry_their_own_counts(self) -> None:
        objective, model, batch = self.make()
        self.consulted(objective, model, [batch])
        for name, metric in objective(model, batch).metrics.items():
            assert metric.count > 0 and not metric.total.requires_grad, name


class BackendContract:
    """Define `make() -> (backend, vocab_size)`: a tiny model with a context of at least 48 tokens. One that declares
    generates=False is held to what is left: it refuses every request, and embeds."""

    def make(self) -> tuple[Backend, int]:
        raise NotImplementedError

    def _writing(self) -> tuple[Backend, int]:
        backend, vocab = self.make()
        if not backend.capabilities().generates:
            pytest.skip("the backend declares that it writes nothing")
        return backend, vocab

    def _run(self, backend: Backend, requests: list[Request]) -> dict[str, list[int]]:
        out: dict[str, list[int]] = {r.id: [] for r in requests}
        for event in backend.generate(requests):
            out[event.request_id].append(event.token_id)
        return out

    def test_neighbours_never_change_an_answer(self) -> None:
        backend, vocab = self._writing()
        greedy = SamplingParams(max_tokens=8)
        sampled = SamplingParams(max_tokens=8, temperature=1.0, top_k=20, top_p=0.9, seed=5)
        requests = [
            Request("a", tuple(i % vocab for i in range(3, 9)), greedy),
            Request("b", (1, 2), sampled),
            Request("c", tuple(i % vocab for i in range(20)), SamplingParams(max_tokens=3)),
        ]
        together = self._run(backend, requests)
        assert together == {r.id: self._run(backend, [r])[r.id] for r in requests}
        assert [len(together[r.id]) for r in requests] == [8, 8, 3]

    def test_log_probabilities_are_those_of_the_score(self) -> None:
        backend, _ = self._writing()
        prompt = (1, 2, 3, 4)
        events = list(backend.generate([Request("a", prompt, SamplingParams(max_tokens=6))]))
        scored = backend.score([*prompt, *(e.token_id for e in events)])[len(prompt) - 1 :]
        assert [e.logprob for e in events] == pytest.approx(scored, abs=1e-4)

    def test_stops_with_a_reason(self) -> None:
        backend, _ = self._writing()
        free = list(backend.generate([Request("a", (1, 2, 3), SamplingParams(max_tokens=4))]))
        assert [e.finish_reason for e in free] == [None, None, None, "length"]
        stopped = SamplingParams(max_tokens=4, stop_ids=(free[0].token_id,))
        assert [e.finish_reason for e in backend.generate([Request("a", (1, 2, 3), stopped)])] == ["stop"]

    def test_refuses_what_cannot_fit_before_the_first_token(self) -> None:
        backend, _ = self._writing()
        room = backend.capabilities().context
        good = Request("good", (1,), SamplingParams(max_tokens=1))
        with pytest.raises(BackendError, match="bad"):
            next(iter(backend.generate([good, Request("bad", (1, 2), SamplingParams(max_tokens=room))])))
        assert backend.health()

    def test_what_it_does_not_declare_is_refused_by_name(self) -> None:
        backend, _ = self._writing()
        others = {
            "temperature": 0.5, "top_k": 3, "top_p": 0.5, "seed": 4, "stop_ids": (1,), "min_p": 0.1,
            "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": ((1, 1.0),),
            "min_tokens": 2, "top_logprobs": 2, "json_schema": "{}", "regex": "a*",
        }  # fmt: skip
        declared = backend.capabilities().sampling
        assert {"max_tokens", *others} == {f.name for f in dataclasses.fields(SamplingParams)} >= declared
        assert "max_tokens" in declared
        for name, value in others.items():
            request = Request("it", (1, 2), SamplingParams(max_tokens=3, **{name: value}))  # type: ignore[arg-type]
            if name in declared:
                assert self._run(backend, [request])["it"], name
                continue
            for take in (backend.check, backend.add, lambda one: next(iter(backend.generate([one])))):
                with pytest.raises(BackendError, match=f"it.*{name}="):
                    take(request)
        assert not backend.busy

    def test_events_are_well_formed(self) -> None:
        """Tokens of the vocabulary, log-probabilities, one finish_reason, on each request's last event."""
        backend, vocab = self._writing()
        count = 3 if "top_logprobs" in backend.capabilities().sampling else 0
        params = SamplingParams(max_tokens=5, temperature=1.0, top_k=9, top_logprobs=count)
        events = list(backend.generate([Request(name, (1, 2, 3), params) for name in "abc"]))
        for name in "abc":
            mine = [e for e in events if e.request_id == name]
            assert [e.finish_reason for e in mine] == [None] * 4 + ["length"]
            for event in mine:
                assert 0 <= event.token_id < vocab and event.logprob <= 0 and not event.error
                assert event.drawn_logprob is None or event.drawn_logprob <= 1e-9
                assert 0 < event.kept <= 1 + 1e-6
                told = [logprob for _, logprob in event.top]
                assert len(told) == count and told == sorted(told, reverse=True)
                assert event.logprob <= (told or [0.0])[0] + 1e-6
                assert dict(event.top).get(event.token_id, event.logprob) == pytest.approx(event.logprob, abs=1e-6)

    def test_likeliest_tokens_are_those_of_the_score(self) -> None:
        backend, _ = self._writing()
        if "top_logprobs" not in backend.capabilities().sampling:
            pytest.skip("the backend declares no top_logprobs")
        prompt = (1, 2, 3, 4)
        (event,) = backend.generate([Request("a", prompt, SamplingParams(max_tokens=1, top_logprobs=3))])
        assert [logprob for _, logprob in event.top] == pytest.approx(
            [backend.score([*prompt, token])[-1] for token, _ in event.top], abs=1e-4
        )

    def test_abort_frees_what_was_held(self) -> None:
        backend, _ = self._writing()
        params = SamplingParams(max_tokens=20)
        requests = [Request(name, (1, 2, 3), params) for name in "abc"]
        seen: dict[str, int] = {"a": 0, "b": 0, "c": 0}
        whole = len(self._run(backend, [Request("alone", (1, 2, 3), params)])["alone"])
        for event in backend.generate(requests):
            seen[event.request_id] += 1
            if event.request_id == "a" and seen["a"] == 3:
                backend.abort("a")
                backend.abort("b")
        assert seen["a"] == 3 and seen["b"] <= 3 and seen["c"] == whole
        assert self._idle(backend)
        with contextlib.closing(backend.generate(requests)) as events:  # type: ignore[type-var]
            next(events)  # and the reader leaves
        assert self._idle(backend)
        backend.abort("nobody")
        assert self._run(backend, requests[:1])["a"]

    def _idle(self, backend: Backend) -> bool:
        stats = backend.stats()
        return not backend.busy and (stats.running, stats.waiting, stats.used_slots) == (0, 0, 0)

    def test_counters_count(self) -> None:
        backend, _ = self._writing()
        before = backend.stats()
        params = SamplingParams(max_tokens=4)
        self._run(backend, [Request("a", (1, 2, 3), params), Request("b", (1,), params)])
        after = backend.stats()
        counted = [getattr(after, n) - getattr(before, n) for n in ("requests", "prompt_tokens", "generated_tokens")]
        assert counted == [2, 4, 8] and after.seconds > before.seconds

    def test_one_that_writes_nothing_refuses_every_request(self) -> None:
        backend, _ = self.make()
        if backend.capabilities().generates:
            pytest.skip("the backend declares that it writes")
        request = Request("it", (1, 2), SamplingParams(max_tokens=1))
        for take in (backend.check, backend.add, lambda one: next(iter(backend.generate([one])))):
            with pytest.raises(BackendError, match="request it: "):
                take(request)
        assert self._idle(backend) and backend.step() == [] and backend.health()
        backend.abort("nobody")
        has = backend.capabilities()
        assert has.embeds or has.rewards, "it does nothing at all"

    def test_rewards_where_they_are_declared(self) -> None:
        backend, _ = self.make()
        sequences = [(1, 2, 3), (4, 5), (1, 2, 3, 6, 7)]
        if not backend.capabilities().rewards:
            with pytest.raises(BackendError, match="rewards"):
                backend.reward(sequences)
            return
        found = backend.reward(sequences)
        assert found.dtype == torch.float32 and found.shape == (3,)
        alone = torch.cat([backend.reward([ids]) for ids in sequences])
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
        assert (found[0] - found[1]).abs() > 1e-6

    def test_embeddings_where_they_are_declared(self) -> None:
        backend, _ = self.make()
        sequences = [(1, 2, 3), (4, 5), (1, 2, 3, 6, 7)]
        if not backend.capabilities().embeds:
            with pytest.raises(BackendError, match="embeddings"):
                backend.embed(sequences)
            return
        found = backend.embed(sequences)
        assert found.dtype == torch.float32 and found.shape[0] == 3
        if backend.capabilities().unit:
            torch.testing.assert_close(found.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-5)
        alone = torch.cat([backend.embed([ids]) for ids in sequences])
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
        assert (found[0] - found[1]).abs().max() > 1e-3

    def test_weights_do_not_change_under_a_request(self) -> None:
        backend, _ = self._writing()
        events = backend.generate([Request("a", (1, 2, 3), SamplingParams(max_tokens=4))])
        next(events)
        with pytest.raises(BackendError):
            backend.update_weights(1)
        assert len(list(events)) == 3
