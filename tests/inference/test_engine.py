"""The same answers whatever the engine does to give them: pieces, pages, prefixes, preemption, guesses; and nothing is
left over when it is idle."""

import random

import pytest
import torch

from trivium.errors import BackendError
from trivium.inference.config import NativeConfig
from trivium.inference.native.blocks import Blocks
from trivium.inference.native.engine import NativeBackend, collect
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.types import Request, SamplingParams

VOCAB, CONTEXT = 61, 160
CONFIG = LlamaConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, context=CONTEXT, tied=False, init_std=0.3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(seed=2, **changed):
    model = Llama(LlamaConfig(**{**CONFIG.__dict__, **changed}), VOCAB)
    model.init_weights(seed=seed)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return model_of()


def mixed(count=14, seed=0):
    """Greedy and sampled, short and long, some with common beginnings, penalties, a bias, stops."""
    rng = random.Random(seed)
    common = tuple(rng.randrange(VOCAB) for _ in range(40))
    ways = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.8},
        {"temperature": 1.2, "min_p": 0.05, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"repetition_penalty": 1.3, "logit_bias": ((3, 2.0), (7, -5.0))},
        {"temperature": 1.0, "stop_ids": (4, 9, 11, 30), "min_tokens": 3},
    ]
    requests = []
    for i in range(count):
        own = tuple(rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 17, 33])))
        prompt = common[: rng.choice([16, 33, 40])] + own if i % 3 == 0 else own
        params = SamplingParams(max_tokens=rng.choice([1, 7, 20, 45]), seed=i % 4, **ways[i % len(ways)])
        if params.min_tokens > params.max_tokens:
            params = SamplingParams(**{**params.__dict__, "max_tokens": 20})
        requests.append(Request(f"r{i}", prompt, params))
    return requests


def answers(backend, requests):
    events = collect(backend, requests)
    assert all([e.finish_reason is None for e in es[:-1]] == [True] * (len(es) - 1) for es in events.values())
    return {name: [e.token_id for e in es] + [es[-1].finish_reason] for name, es in events.items()}


@pytest.fixture(scope="module")
def alone(model):
    """Each by itself, at once, without a prefix cache."""
    found = {}
    for request in mixed():
        found |= answers(NativeBackend(NativeConfig(prefix_cache=False, step_tokens=10_000), model), [request])
    return found


def idle(backend):
    """Nothing is held: every page is free or kept."""
    stats, blocks = backend.stats(), backend.scheduler.memory.blocks
    assert (stats.running, stats.waiting, stats.used_slots, blocks.held) == (0, 0, 0, 0)
    assert blocks.free + blocks.kept == blocks.total
    return stats


@pytest.mark.parametrize("memory", ["slab", "paged"])
@pytest.mark.parametrize("step_tokens", [1, 5, 32, 512])
def test_pieces_of_any_size(model, alone, memory, step_tokens):
    backend = NativeBackend(NativeConfig(memory=memory, step_tokens=step_tokens), model)
    assert answers(backend, mixed()) == alone
    idle(backend)


@pytest.mark.parametrize("memory", ["slab", "paged"])
@pytest.mark.parametrize("page", [1, 3, 16, 64])
def test_pages_of_any_size(model, alone, memory, page):
    backend = NativeBackend(NativeConfig(memory=memory, page=page), model)
    assert answers(backend, mixed()) == alone
    idle(backend)


@pytest.mark.parametrize("memory", ["slab", "paged"])
def test_prefix_hits_change_no_answer_and_are_counted(model, alone, memory):
    """The second time, whole pages of each prompt but its last token are in the cache: counted by hand."""
    backend = NativeBackend(NativeConfig(memory=memory), model)
    assert answers(backend, mixed()) == alone
    before = backend.stats().cached_tokens
    events = collect(backend, mixed())
    assert {n: [e.token_id for e in es] + [es[-1].finish_reason] for n, es in events.items()} == alone
    expected = {r.id: (len(r.prompt_ids) - 1) // 16 * 16 for r in mixed()}
    assert {name: es[0].cached for name, es in events.items()} == expected
    assert idle(backend).cached_tokens - before == sum(expected.values()) > 100


@pytest.mark.parametrize("memory", ["slab", "paged"])
def test_evicted_prefixes_change_no_answer(model, alone, memory):
    """Room for few pages: later prompts push out earlier ones'. Slots suffice for the largest request, 118 tokens."""
    backend = NativeBackend(NativeConfig(memory=memory, page=8, slots=160, prefix_slots=48, max_batch=2), model)
    for _ in range(2):
        assert answers(backend, mixed()) == alone
        stats = idle(backend)
        assert stats.cached_slots <= 160


def test_preempted_rows_begin_again_with_the_same_answers(model, alone):
    """Ten pages of 16 for fourteen requests: rows are let in by their prompts and collide as they grow."""
    backend = NativeBackend(NativeConfig(memory="paged", slots=160), model)
    assert answers(backend, mixed()) == alone
    assert idle(backend).preempted > 0


@pytest.mark.parametrize("memory", ["slab", "paged"])
@pytest.mark.parametrize("speculate", ["ngram", "draft", "good draft", "self"])
def test_guesses_change_no_answer(model, alone, memory, speculate):
    """The good draft is the model itself: in exact arithmetic each of its guesses is right."""
    draft = {"draft": model_of(seed=9), "good draft": model}.get(speculate)
    kind = speculate.split()[-1]
    config = NativeConfig(
        memory=memory,
        speculate=kind,
        draft="x" * (kind == "draft"),
        draft_weights="bf16",
        draft_rows=64,
        draft_tokens=3,
    )
    backend = NativeBackend(config, model, draft=draft)
    assert answers(backend, mixed()) == alone
    stats = idle(backend)
    assert stats.drafted_tokens > 30
    if speculate == "good draft":  # guesses beyond an answer's end are no mistakes
        assert stats.accepted_tokens > 0.9 * stats.drafted_tokens


def test_guesses_of_own_weights_follow_the_weights():
    """A draft of other weights would guess wrong: after an update nearly all guesses of the new ones are right."""
    ours = model_of(seed=2)
    asked = [Request("a", tuple(range(1, 20)), SamplingParams(max_tokens=40))]
    backend = NativeBackend(NativeConfig(speculate="self", draft_weights="bf16"), ours)
    collect(backend, asked)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), model_of(seed=8).parameters(), strict=True):
            p.copy_(q)
    before = backend.stats()
    events = collect(backend, asked)["a"]
    assert [e.token_id for e in events] == answers(NativeBackend(NativeConfig(), ours), asked)["a"][:-1]
    after = backend.stats()
    accepted, drafted = after.accepted_tokens - before.accepted_tokens, after.drafted_tokens - before.drafted_tokens
    assert accepted > 0.9 * drafted > 20


def test_a_failing_guess_costs_no_answer(model, alone):
    """The draft runs out of memory, say: answers go on without guesses, and a warning says so once."""
    draft = model_of(seed=9)
    backend = NativeBackend(NativeConfig(speculate="draft", draft="x", draft_rows=64), model, draft=draft)

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    draft.forward = broken
    with pytest.warns(UserWarning, match="no tokens are guessed any more: out of memory"):
        assert answers(backend, mixed()) == alone
    assert idle(backend).drafted_tokens == 0


def test_a_cache_can_be_written_with_gradients_on(model):
    """As people do who call a model by hand and forget no_grad; and again without."""
    tokens, places = torch.tensor([[3, 4, 5]]), torch.arange(3)[None]
    cache = model.new_cache(1, 4)
    first = model(tokens, places, cache=cache)
    with torch.no_grad():
        again = model(tokens, places, cache=model.new_cache(1, 4))
        model(tokens[:, :1], torch.tensor([[3]]), cache=cache)
    assert torch.allclose(first, again, atol=1e-5)


def test_guesses_are_counted(model):
    """A greedy answer that repeats itself, by n-grams: drafted and accepted tokens add up to fewer passes."""
    passes = []
    backend = NativeBackend(NativeConfig(speculate="ngram", prefix_cache=False), model)
    backend.reader.register_forward_pre_hook(lambda *_: passes.append(1))
    prompt = (5, 6, 7, 8) * 6
    (events,) = collect(backend, [Request("a", prompt, SamplingParams(max_tokens=60))]).values()
    stats = backend.stats()
    assert len(events) == 60
    assert len(passes) == 60 - stats.accepted_tokens
    model._forward_pre_hooks.clear()


def test_after_an_update_no_prefix_is_stale(model):
    """Also where nobody said that weights changed."""
    prompt = tuple(range(1, 50))
    asked = [Request("a", prompt, SamplingParams(max_tokens=10))]
    for told in (True, False):
        ours = model_of(seed=2)
        backend = NativeBackend(NativeConfig(), ours)
        first = answers(backend, asked)
        assert collect(backend, asked)["a"][0].cached == 48
        with torch.no_grad():
            for p in ours.parameters():
                p.mul_(1.1)
        if told:
            backend.update_weights(1)
        events = collect(backend, asked)["a"]
        assert events[0].cached == 0
        fresh = answers(NativeBackend(NativeConfig(), ours), asked)
        assert [e.token_id for e in events] == fresh["a"][:-1] != first["a"][:-1]


def test_weights_that_change_under_running_requests_are_noticed():
    ours = model_of()
    backend = NativeBackend(NativeConfig(), ours)
    events = backend.generate([Request("a", (1, 2, 3), SamplingParams(max_tokens=10))])
    next(events)
    with pytest.raises(BackendError, match="while requests are being answered"):
        backend.update_weights(1)
    with torch.no_grad():
        ours.embed.weight.add_(0.1)
    with pytest.raises(BackendError, match="weights were changed while"):
        list(events)
    idle(backend)


@pytest.mark.parametrize("memory", ["slab", "paged"])
def test_abort_frees_what_a_request_held_at_once(model, alone, memory):
    """At every moment of its life, and neighbours go on."""
    requests = mixed()
    for after in (0, 1, 3, 9, 20):
        backend = NativeBackend(NativeConfig(memory=memory, step_tokens=40), model)
        seen = {r.id: [] for r in requests}
        for request in requests:
            backend.add(request)
        for number in range(1000):
            if number == after:
                held = backend.stats().used_slots
                for name in ("r0", "r4", "r13"):
                    backend.abort(name)
                stats = backend.stats()
                assert stats.running + stats.waiting <= len(requests) - 3
                assert stats.used_slots <= held
            if not backend.busy:
                break
            for event in backend.step():
                seen[event.request_id].append(event.token_id)
        idle(backend)
        for request in requests:
            whole = alone[request.id][:-1]
            assert seen[request.id] == whole or (
                request.id in ("r0", "r4", "r13") and len(seen[request.id]) < len(whole)
            )


class Touchy(Llama):
    """Fails when it reads token 60 at position 5, as a broken kernel might; is NaN from 59 there on, keys included."""

    def forward(self, tokens, positions, segments=None, cache=None):
        self.at = positions == 5
        if (tokens[self.at] == 60).any():
            raise RuntimeError("kernel 60 failed\nwith a long story")
        return super().forward(tokens, positions, segments, cache)

    def embedded(self, tokens):
        return super().embedded(tokens).masked_fill((self.at & (tokens == 59))[..., None], torch.nan)


@pytest.mark.parametrize("memory", ["slab", "paged"])
@pytest.mark.parametrize(("token", "told"), [(60, "kernel 60 failed"), (59, "logits are not finite")])
def test_a_request_fails_alone(memory, token, told):
    """Its neighbours in the same pass, and who has its memory afterwards, are as without it."""
    touchy = Touchy(CONFIG, VOCAB)
    touchy.init_weights(seed=2)
    good = [Request(f"g{i}", tuple(range(i, i + 6)), SamplingParams(max_tokens=12)) for i in range(4)]
    bad = Request("bad", (1, 2, 3, 4, 5, token, 7), SamplingParams(max_tokens=12))
    wanted = answers(NativeBackend(NativeConfig(), touchy), good)
    backend = NativeBackend(NativeConfig(memory=memory), touchy)
    events = []
    for request in (good[0], good[1], bad, good[2], good[3]):
        backend.add(request)
    while backend.busy:
        events += backend.step()
    (failed,) = [e for e in events if e.request_id == "bad"]
    assert (failed.finish_reason, failed.token_id) == ("error", -1) and told in failed.error
    assert "\n" not in failed.error
    for request in good:
        assert [e.token_id for e in events if e.request_id == request.id] == wanted[request.id][:-1]
    idle(backend)
    assert answers(backend, good) == wanted
    with pytest.raises(BackendError, match=f"request bad: .*{told}"):
        list(backend.generate([bad]))
    idle(backend)


def test_one_of_many_that_begin_alike_is_read_and_the_others_find_it(model):
    """Eight prompts of 35 tokens, the same but for the last: 35 tokens are computed of the first, 3 of each other."""
    seen = []
    backend = NativeBackend(NativeConfig(), model)
    hook = backend.reader.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    requests = [Request(f"{i}", (*range(34), i), SamplingParams(max_tokens=1)) for i in range(8)]
    events = collect(backend, requests)
    hook.remove()
    assert [events[f"{i}"][0].cached for i in range(8)] == [0] + [32] * 7
    assert sum(seen) == 35 + 7 * 3
    alone = [answers(NativeBackend(NativeConfig(), model), [r])[r.id][0] for r in requests]
    assert [events[f"{i}"][0].token_id for i in range(8)] == alone


# ---- blocks


def test_blocks_by_hand():
    """Five pages of two tokens. A chain of two is found, a page with the same tokens elsewhere in the text is not."""
    blocks = Blocks(5, 2)
    pages = blocks.take(3)
    assert pages == [0, 1, 2] and blocks.take(3) is None
    blocks.publish(pages, [1, 2, 3, 4, 5])  # two whole pages; the third is not full
    assert blocks.match([3, 4]) == []
    assert blocks.match([1, 2, 3, 4, 9]) == [0, 1]
    blocks.release([0, 1])
    blocks.release(pages)
    assert (blocks.free, blocks.kept, blocks.held) == (3, 2, 0)
    assert blocks.take(4) == [2, 3, 4, 1]  # the end of the chain is given up first
    assert blocks.match([1, 2, 3, 4]) == [0]
    blocks.clear()
    assert blocks.match([1, 2]) == []
    blocks.release([0])
    assert (blocks.free, blocks.kept, blocks.held) == (1, 0, 4)


def test_blocks_hold_their_sum_in_any_order():
    """10,000 random operations: free + held + kept is the total, and a match is always of the very tokens."""
    rng, blocks, rows = random.Random(1), Blocks(24, 3), []
    written = {}
    for _ in range(10_000):
        if rng.random() < 0.5 or not rows:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
            pages = blocks.match(tokens)
            for number, page in enumerate(pages):
                assert written[page] == tokens[: 3 * number + 3]
            more = blocks.take(-(-len(tokens) // 3) - len(pages))
            if more is None:
                blocks.release(pages)
            else:
                for number, page in enumerate(more, len(pages)):
                    written[page] = tokens[: 3 * number + 3]
                rows.append(([*pages, *more], tokens))
        else:
            pages, tokens = rows.pop(rng.randrange(len(rows)))
            if rng.random() < 0.8:
                blocks.publish(pages, tokens)
            blocks.release(pages)
        assert blocks.free + blocks.held + blocks.kept == 24
