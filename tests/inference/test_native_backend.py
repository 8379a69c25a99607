"""The native engine against a loop without cache or batch, against transformers, and against itself in company."""

import itertools

import pytest
import torch

from trivium.errors import BackendError
from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import GROWTH, NativeBackend, collect
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.types import Request, SamplingParams

VOCAB, CONTEXT = 61, 160
# init_std 0.3: logits of order 1 to 10, so the largest is apart from the next by far more than fp32's rounding
CONFIG = LlamaConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, context=CONTEXT, tied=False, init_std=0.3)
PROMPTS = [(5, 6, 7), (1,), tuple(range(1, 30)), (9, 9, 0, 0, 2), (0,), (33, 4)]  # the pad id is a token like any other


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    model = Llama(CONFIG, VOCAB)
    model.init_weights(seed=2)
    return model.eval()


@pytest.fixture
def backend(model):
    return NativeBackend(NativeConfig(), model)


def requests_of(prompts=PROMPTS, **params):
    return [Request(str(i), tuple(p), SamplingParams(**params)) for i, p in enumerate(prompts)]


def ids_of(events):
    return {name: [e.token_id for e in one] for name, one in events.items()}


@torch.no_grad()
def naive_greedy(model, prompt, count):
    """The whole sequence anew for each token: ids and their log-probabilities."""
    ids, logprobs = list(prompt), []
    for _ in range(count):
        tokens = torch.tensor([ids])
        logits = model.head(model(tokens, torch.arange(len(ids))[None]))[0, -1]
        ids.append(int(logits.argmax()))
        logprobs.append(logits.log_softmax(-1)[ids[-1]].item())
    return ids[len(prompt) :], logprobs


@pytest.fixture(scope="module")
def expected(model):
    return [naive_greedy(model, p, 20) for p in PROMPTS]


# ---- greedy


def test_greedy_alone_equals_the_naive_loop(backend, expected):
    for i, prompt in enumerate(PROMPTS):
        events = collect(backend, [Request("x", prompt, SamplingParams(max_tokens=20))])["x"]
        assert [e.token_id for e in events] == expected[i][0]


def test_greedy_among_ragged_neighbours_equals_the_naive_loop(backend, expected):
    """Prompts of 1 to 29 tokens in one batch; log-probabilities to 1e-4 (sums of 32 products, in other orders)."""
    events = collect(backend, requests_of(max_tokens=20))
    for i, (ids, logprobs) in enumerate(expected):
        assert [e.token_id for e in events[str(i)]] == ids
        assert [e.logprob for e in events[str(i)]] == pytest.approx(logprobs, abs=1e-4)
    assert len({tuple(ids) for ids, _ in expected}) == len(PROMPTS)  # the answers differ, so a swap would be seen


@pytest.mark.parametrize("max_batch", [1, 2, 4])
def test_max_batch_changes_no_answer(model, expected, max_batch):
    events = collect(NativeBackend(NativeConfig(max_batch=max_batch), model), requests_of(max_tokens=20))
    assert ids_of(events) == {str(i): ids for i, (ids, _) in enumerate(expected)}


def test_cache_grows_past_its_first_slots(backend, model):
    """A prompt of 3 has 3 + 64 slots; 150 more tokens need two rounds of growth, the last cut at the context of 160."""
    assert GROWTH == 64
    events = collect(backend, requests_of([(5, 6, 7), (9,) * 10], max_tokens=150))
    assert ids_of(events) == {"0": naive_greedy(model, (5, 6, 7), 150)[0], "1": naive_greedy(model, (9,) * 10, 150)[0]}


def test_greedy_equals_transformers_generate(backend, model):
    """The independent implementation, on the same weights, prompt by prompt."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=CONFIG.dim,
        intermediate_size=CONFIG.ffn_dim,
        num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads,
        num_key_value_heads=CONFIG.kv_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=CONFIG.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config).float().eval()
    theirs.load_state_dict({model.hf_names()[n]: p for n, p in model.named_parameters()})
    found = ids_of(collect(backend, requests_of(max_tokens=20)))
    for i, prompt in enumerate(PROMPTS):
        tokens = torch.tensor([prompt])
        out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False)
        assert found[str(i)] == out[0, len(prompt) :].tolist()


def test_score_equals_the_naive_loop(backend, expected):
    for prompt, (ids, logprobs) in zip(PROMPTS, expected, strict=True):
        scores = backend.score([*prompt, *ids])
        assert len(scores) == len(prompt) + len(ids) - 1
        assert scores[len(prompt) - 1 :] == pytest.approx(logprobs, abs=1e-4)
        assert scores == pytest.approx(backend.score([*prompt, *ids, 3])[:-1], abs=1e-4)  # blind to what follows


def test_sampled_logprob_is_of_the_unmodified_distribution(backend):
    """Temperature 0.5 and top-k 3 choose the token; its log-probability is the model's own, as `score` gives it."""
    events = collect(backend, requests_of(max_tokens=10, temperature=0.5, top_k=3))
    for i, prompt in enumerate(PROMPTS):
        ids = [e.token_id for e in events[str(i)]]
        scores = backend.score([*prompt, *ids])[len(prompt) - 1 :]
        assert [e.logprob for e in events[str(i)]] == pytest.approx(scores, abs=1e-4)


# ---- how requests end


def test_stop_ids_end_a_request_with_that_token(backend, expected):
    """Every request stops at the first of its own 3rd and 6th greedy tokens; neighbours go on to their own ends."""
    requests = []
    for i, (ids, _) in enumerate(expected):
        requests.append(Request(str(i), PROMPTS[i], SamplingParams(max_tokens=20, stop_ids=(ids[2 + i], ids[5 + i]))))
    events = collect(backend, requests)
    lengths = set()
    for i, (ids, _) in enumerate(expected):
        end = min(ids.index(ids[2 + i]), ids.index(ids[5 + i]))
        assert [e.token_id for e in events[str(i)]] == ids[: end + 1]
        assert [e.finish_reason for e in events[str(i)]] == [None] * end + ["stop"]
        lengths.add(end)
    assert len(lengths) > 2  # rows left at different steps


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_ends_a_request_for_length(backend, expected, max_tokens):
    events = collect(backend, requests_of(max_tokens=max_tokens))
    for i, (ids, _) in enumerate(expected):
        assert [e.token_id for e in events[str(i)]] == ids[:max_tokens]
        assert [e.finish_reason for e in events[str(i)]] == [None] * (max_tokens - 1) + ["length"]


def test_stop_on_the_last_allowed_token_is_a_stop(backend, expected):
    params = SamplingParams(max_tokens=1, stop_ids=(expected[0][0][0],))
    assert collect(backend, [Request("x", PROMPTS[0], params)])["x"][0].finish_reason == "stop"


def test_request_may_fill_the_context_exactly(backend):
    events = collect(backend, [Request("x", (1,) * (CONTEXT - 3), SamplingParams(max_tokens=3))])["x"]
    assert [e.finish_reason for e in events] == [None, None, "length"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Request("bad", (1,) * 158, SamplingParams(max_tokens=3)), "request bad: 158 prompt tokens.*need 161.*160"),
        (Request("bad", ()), "request bad: the prompt is empty"),
        (Request("bad", (1, VOCAB)), f"request bad: token ids must be below {VOCAB}"),
        (Request("bad", (-1,)), f"request bad: token ids must be below {VOCAB}"),
        (Request("0", (1,)), "two requests have the id '0'"),
    ],
)
def test_request_that_cannot_be_served_is_refused_before_any_event(backend, bad, message):
    """It comes last, behind good ones; not one token is made for those."""
    with pytest.raises(BackendError, match=message):
        next(iter(backend.generate([*requests_of(max_tokens=2), bad])))
    assert backend.stats().generated_tokens == 0


def test_score_refuses_more_than_the_context(backend):
    assert len(backend.score([1] * CONTEXT)) == CONTEXT - 1
    with pytest.raises(BackendError, match="161 tokens do not fit"):
        backend.score([1] * (CONTEXT + 1))


# ---- sampling


def test_sampled_answer_is_the_same_alone_in_company_and_in_any_order(model):
    """A row's randomness is (seed, id, position): neither neighbours, nor order, nor the batch size change it."""
    requests = requests_of(max_tokens=15, temperature=1.0, top_p=0.9, seed=4)
    backend = NativeBackend(NativeConfig(), model)
    together = ids_of(collect(backend, requests))
    assert ids_of(collect(backend, requests[::-1])) == together
    assert ids_of(collect(NativeBackend(NativeConfig(max_batch=4), model), requests)) == together
    for request in requests:
        assert ids_of(collect(backend, [request])) == {request.id: together[request.id]}
    greedy = ids_of(collect(backend, requests_of(max_tokens=15)))
    assert all(together[name] != greedy[name] for name in together)


def test_greedy_row_beside_sampled_ones_is_greedy(backend, expected):
    requests = requests_of(max_tokens=20, temperature=1.0)
    requests[2] = Request("2", PROMPTS[2], SamplingParams(max_tokens=20))
    assert ids_of(collect(backend, requests))["2"] == expected[2][0]


def test_seed_decides_the_answer(backend):
    def draw(seed):
        return ids_of(collect(backend, requests_of(max_tokens=10, temperature=1.0, seed=seed)))

    assert draw(1) == draw(1)
    assert all(draw(1)[name] != draw(2)[name] for name in draw(1))


def test_group_of_one_prompt_and_seed_is_not_copies(backend):
    """Eight samples of one prompt with one seed, told apart by their ids. (Samplers that share a seed: a known bug.)"""
    answers = ids_of(collect(backend, requests_of([(5, 6, 7)] * 8, max_tokens=10, temperature=1.0)))
    assert len({tuple(a) for a in answers.values()}) == 8


# ---- abort, stats, mode


def test_abort_ends_a_request_and_leaves_its_neighbours_alone(backend, expected):
    seen = {str(i): [] for i in range(len(PROMPTS))}
    for event in backend.generate(requests_of(max_tokens=20)):
        seen[event.request_id].append(event.token_id)
        if event.request_id == "2" and len(seen["2"]) == 5:
            backend.abort("1")  # came before it in the batch
            backend.abort("3")  # comes after it: not even this step's token
    for i, (ids, _) in enumerate(expected):
        assert seen[str(i)] == ids[: {1: 5, 3: 4}.get(i, 20)]


def test_abort_of_everything_ends_the_stream(backend):
    events = backend.generate(requests_of(max_tokens=20))
    next(events)
    for i in range(len(PROMPTS)):
        backend.abort(str(i))
    assert list(events) == []


def test_abort_does_not_outlive_its_request(backend, expected):
    """Ids are used again ("turn-1" of the next conversation): an old abort must not silence the new request."""
    events = backend.generate([Request("turn-1", PROMPTS[0], SamplingParams(max_tokens=20))])
    next(events)
    backend.abort("turn-1")
    assert list(events) == []
    again = collect(backend, [Request("turn-1", PROMPTS[0], SamplingParams(max_tokens=20))])
    assert ids_of(again)["turn-1"] == expected[0][0]


def test_stats_count_every_request_and_prompt_token(backend):
    """6 prompts of 3 + 1 + 29 + 5 + 1 + 2 = 41 tokens, pad ids among them; requests end at different steps:
    2 tokens each for 0, 2, 4 and 5 each for 1, 3, 5 make 21."""
    requests = [Request(str(i), p, SamplingParams(max_tokens=2 if i % 2 == 0 else 5)) for i, p in enumerate(PROMPTS)]
    collect(backend, requests)
    stats = backend.stats()
    assert (stats.requests, stats.prompt_tokens, stats.generated_tokens) == (6, 41, 21)
    assert stats.seconds > 0
    collect(backend, requests)
    assert (backend.stats().requests, backend.stats().prompt_tokens) == (12, 82)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["to the end", "given up", "score"])
def test_model_mode_is_put_back(training, how):
    """With dropout 0.5, answers are those of eval mode; the model is left as it was, even by an unfinished stream."""
    config = LlamaConfig(**{**CONFIG.__dict__, "dropout": 0.5})
    model = Llama(config, VOCAB)
    model.init_weights(seed=2)
    wanted = naive_greedy(model.eval(), PROMPTS[0], 8)[0]
    backend = NativeBackend(NativeConfig(), model.train(training))
    if how == "to the end":
        assert ids_of(collect(backend, requests_of(PROMPTS[:1], max_tokens=8))) == {"0": wanted}
    elif how == "given up":
        events = backend.generate(requests_of(PROMPTS[:1], max_tokens=8))
        assert [e.token_id for e in itertools.islice(events, 3)] == wanted[:3]
        events.close()
    else:
        assert backend.score(PROMPTS[2]) == backend.score(PROMPTS[2])
    assert model.training is training
    assert all(module.training is training for module in model.modules())


def test_generation_follows_the_weights_that_are_trained(model):
    """Shared weights: after a change, answers are those of the new ones."""
    other = Llama(CONFIG, VOCAB)
    other.init_weights(seed=2)
    backend = NativeBackend(NativeConfig(), other)
    before = ids_of(collect(backend, requests_of(max_tokens=10)))
    other.init_weights(seed=5)
    backend.update_weights(version=1)
    after = ids_of(collect(backend, requests_of(max_tokens=10)))
    assert before != after == {str(i): naive_greedy(other, p, 10)[0] for i, p in enumerate(PROMPTS)}
    assert backend.stats().weight_version == 1 and backend.capabilities().shares_weights


# ---- a row that goes wrong


class Spoils(Llama):
    """Its hidden states are NaN from the token 60 on, and so are keys and values after the first layer: what a bad
    weight or an overflow does to one row."""

    def block(self, layer, hidden, *args, cache=None):
        out = super().block(layer, hidden, *args, cache=cache)
        return out.masked_fill(self.spoilt[:, :, None], torch.nan) if layer == 0 else out

    def forward(self, tokens, positions, segments=None, cache=None):
        self.spoilt = tokens == 60
        return super().forward(tokens, positions, segments, cache=cache)


@pytest.mark.parametrize("memory", ["slab", "paged"])
def test_row_of_nan_fails_alone_and_leaves_nothing_behind(model, memory):
    """One event with the error; neighbours' answers are bit for bit those they have without it; and requests that come
    into its slots afterwards, masked NaN times 0 being NaN, answer as ever."""
    spoils = Spoils(CONFIG, VOCAB)
    spoils.load_state_dict(model.state_dict())
    backend = NativeBackend(NativeConfig(memory=memory, page=4, prefix_cache=False), spoils.eval())
    good = requests_of([p for p in PROMPTS if 60 not in p], max_tokens=12, logit_bias=((60, -torch.inf),))
    wanted = ids_of(collect(backend, good))
    bad = Request("bad", (5, 60, 7, 8, 9, 10, 11), SamplingParams(max_tokens=12))
    for _ in range(2):
        for request in [good[0], bad, *good[1:]]:
            backend.add(request)
        events = {r.id: [] for r in [*good, bad]}
        while backend.busy:
            for event in backend.step():
                events[event.request_id].append(event)
        (failed,) = events.pop("bad")
        assert (failed.token_id, failed.finish_reason) == (-1, "error")
        assert failed.error == "the model's logits are not finite"
        assert ids_of(events) == wanted
        assert backend.stats().used_slots == backend.stats().running == 0
        memory_ = backend.scheduler.memory
        held = memory_.cache if memory == "slab" else memory_.pool.cache
        assert held.keys.isfinite().all() and held.values.isfinite().all()
    with pytest.raises(BackendError, match="request bad: the model's logits are not finite"):
        collect(backend, [bad])


def test_row_without_an_allowed_token_fails_alone(backend, expected):
    requests = requests_of(max_tokens=20)
    everything = tuple((t, -float("inf")) for t in range(VOCAB))
    backend.add(Request("bad", (1, 2), SamplingParams(logit_bias=everything)))
    for request in requests:
        backend.add(request)
    events = {r.id: [] for r in [*requests, Request("bad", (1,))]}
    while backend.busy:
        for event in backend.step():
            events[event.request_id].append(event)
    assert [(e.finish_reason, e.error) for e in events.pop("bad")] == [("error", "no token is allowed to come next")]
    assert ids_of(events) == {str(i): ids for i, (ids, _) in enumerate(expected)}


class Upright(torch.nn.Module):
    """A plugin's own block, which knows nothing of (B, C)."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args):
        rows, length, _ = x.shape
        return self.inner(x, *args).view(rows, length, -1)


@torch.no_grad()
def test_blocks_of_others_get_what_they_know(model):
    """One token a row comes as (B, 1, C) to a block that does not say it takes (B, C); the answers are the same."""
    other = Llama(CONFIG, VOCAB)
    other.load_state_dict(model.state_dict())
    other.blocks = torch.nn.ModuleList(Upright(block) for block in other.blocks)
    asked = requests_of(max_tokens=12)
    ours = ids_of(collect(NativeBackend(NativeConfig(), model), asked))
    assert ids_of(collect(NativeBackend(NativeConfig(), other.eval()), asked)) == ours
