"""Keys and values in 8 bits: what is held by hand, and that nothing else changes an answer (what it costs is in
tests/lifecycle/test_smollm2.py)."""

import pytest
import torch
from tests.inference.test_engine import answers, idle, mixed, model_of

from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import NativeBackend
from trivium.models.cache import Int8Cache, KVCache


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def alone(model):
    """Each by itself, at once."""
    config = NativeConfig(cache="int8", prefix_cache=False, step_tokens=10_000)
    return {name: ids for r in mixed() for name, ids in answers(NativeBackend(config, model), [r]).items()}


def cache_of(width=4, dtype=torch.float32):
    return Int8Cache(KVCache(1, 1, 1, 1, width, device="cpu", dtype=dtype), rows=1, length=3)


def test_codes_by_hand():
    """The largest, 2.54, is 127 times 0.02; the others are round(x / 0.02)."""
    cache = cache_of()
    held = cache.encoded(torch.tensor([[2.54, -1.0, 0.011, 0.0]]))
    assert held[0, :4].tolist() == [127, -50, 1, 0]
    assert held[0, 4:].view(torch.float32).item() == pytest.approx(0.02)
    assert cache.decoded(held)[0].tolist() == pytest.approx([2.54, -1.0, 0.02, 0.0])
    assert cache.decoded(cache.encoded(torch.zeros(1, 4))).tolist() == [[0.0] * 4]


def test_update_gives_what_slots_hold():
    """Two tokens at places 2 and 0; place 1 was never written."""
    cache = cache_of(dtype=torch.bfloat16)
    new = torch.randn(1, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    keys, values = cache.update(0, new, 2 * new, torch.tensor([[2, 0]]))
    assert keys.dtype == values.dtype == torch.bfloat16
    limit = new.abs().amax(-1, keepdim=True) / 254 + 2**-8 * new.abs()  # half a code, and bf16
    assert ((keys[:, :, [2, 0]].float() - new).abs() <= limit).all()
    assert ((values[:, :, [2, 0]].float() - 2 * new).abs() <= 2 * limit).all()
    assert keys[0, 0, 1].tolist() == [0.0] * 4


def test_memory_is_a_quarter():
    """Heads of 64: 68 bytes in place of 256. A budget of bytes holds 3.76 times as many tokens."""
    own = KVCache(2, 3, 4, 5, 64, device="cpu", dtype=torch.float32)
    small = Int8Cache(own, 3, 5)
    assert (own.keys.nbytes, small.keys.nbytes) == (2 * 3 * 4 * 5 * 256, 2 * 3 * 4 * 5 * 68)


@pytest.mark.parametrize("memory", ["slab", "paged"])
@pytest.mark.parametrize("more", [{"step_tokens": 5}, {"page": 3}, {"slots": 320}, {"speculate": "ngram"}], ids=str)
def test_pieces_pages_prefixes_and_guesses_change_no_answer(model, alone, memory, more):
    backend = NativeBackend(NativeConfig(memory=memory, cache="int8", **more), model)
    for _ in range(2):  # the second time prefixes are found
        assert answers(backend, mixed()) == alone
    assert idle(backend).cached_tokens > 100
