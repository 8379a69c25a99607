"""The engine against transformers' own `generate`, for every native family and setting: the same greedy ids and
log-probabilities, alone and among neighbours of other lengths, with contiguous memory and with pages."""

import itertools

import pytest
import torch

from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import NativeBackend, collect
from trivium.types import Request, SamplingParams

pytest.importorskip("transformers")
families = pytest.importorskip("equivalence.test_families_hf")

NEW = 16
PROMPTS = [(5, 6, 7), (1,), tuple(range(30, 59)), (9, 9, 0, 0, 2)]
"""Answers go beyond windows of 5 and 7, and beyond the contexts of 16 that are stretched."""
CLOSE = 1e-4  # of log-probabilities in fp32: the two sum in other orders


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=families.CONFIGS)
def pair(request):
    """Our model, and for each prompt what transformers says: ids and their log-probabilities."""
    ours, theirs = families.both(*families.CONFIGS[request.param])
    told = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        out = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        ids = out.sequences[0, len(prompt) :].tolist()
        logprobs = [row[0].log_softmax(-1)[token].item() for row, token in zip(out.logits, ids, strict=True)]
        told.append((ids, logprobs))
    firsts = sorted(logprobs[0] for _, logprobs in told)
    assert all(b - a > 10 * CLOSE for a, b in itertools.pairwise(firsts))  # a swap of rows would be seen
    return ours, told


@pytest.mark.parametrize("how", ["alone", "in pieces", "together", "few at a time"])
@pytest.mark.parametrize("memory", ["slab", "paged"])
def test_greedy_answers_equal_transformers_generate(pair, memory, how):
    """In pieces: prompts read 7 tokens a step. Few at a time: rows come and go, and prefixes are found again."""
    ours, told = pair
    settings = {"in pieces": {"step_tokens": 7}, "few at a time": {"max_batch": 2, "slots": 512, "prefix_slots": 256}}
    settings = settings.get(how, {})
    backend = NativeBackend(NativeConfig(memory=memory, page=4, **settings), ours)
    requests = [Request(str(i), prompt, SamplingParams(max_tokens=NEW)) for i, prompt in enumerate(PROMPTS)]
    if how == "alone":
        found = {r.id: collect(backend, [r])[r.id] for r in requests}
    else:
        found = collect(backend, requests)
    if how == "few at a time":
        again = collect(backend, requests)
        assert sum(events[0].cached for events in again.values()) >= 28  # seven pages of the longest, and others
        found = again
    for i, (ids, logprobs) in enumerate(told):
        assert [e.token_id for e in found[str(i)]] == ids
        assert [e.logprob for e in found[str(i)]] == pytest.approx(logprobs, abs=CLOSE)
