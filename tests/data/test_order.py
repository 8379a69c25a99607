"""Data order: a keyed permutation, and an endless sequence that can be taken up at any element."""

import numpy as np
import pytest

from trivium.data.position import Order, key_of, permute

SIZES = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    33,
    63,
    64,
    65,
    127,
    129,
    255,
    256,
    257,
    1023,
    1024,
    1025,
    4097,
    10_000,
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_of_one_index_equals_its_place_in_the_whole():
    """A pure function of the index: asking for one, or for some in any order, gives what asking for all gives."""
    whole = permute(np.arange(1000), 1000, key=5)
    some = np.array([999, 0, 17, 17, 500])
    assert np.array_equal(permute(some, 1000, key=5), whole[some])
    assert [permute(np.array([i]), 1000, key=5)[0] for i in some] == whole[some].tolist()


def test_permute_depends_on_the_key():
    """Two random orders of 1,000 agree in about one place; five keys give five orders."""
    orders = [permute(np.arange(1000), 1000, key) for key in range(5)]
    for i, one in enumerate(orders):
        assert (one == np.arange(1000)).sum() < 10
        for other in orders[:i]:
            assert (one == other).sum() < 10


def test_permute_reaches_every_order_of_three():
    """Three elements have six orders; 300 keys reach each, none more than twice its share of 50."""
    orders = [tuple(permute(np.arange(3), 3, key)) for key in range(300)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and max(counts) < 100


def test_permute_sends_each_index_everywhere():
    """Index 0 of 8 under 800 keys: each place about 100 times (standard deviation 9.4; five of them allowed)."""
    places = np.bincount([permute(np.array([0]), 8, key)[0] for key in range(800)], minlength=8)
    assert places.min() > 53 and places.max() < 147


def test_permute_leaves_its_argument_alone():
    indices = np.arange(10)
    permute(indices, 10, key=1)
    assert np.array_equal(indices, np.arange(10))


def test_key_of_keeps_parts_apart():
    """("ab", "c") and ("a", "bc") are two keys; a key is 8 bytes of SHA-256 (sha256sum says feffaf69...)."""
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of(1, "x") == key_of(1, "x")
    assert key_of("trivium") == int.from_bytes(bytes.fromhex("feffaf690f8b65c5"), "little")


@pytest.mark.parametrize("num_rows", [1, 2, 7, 10])
def test_order_restores_at_every_element(num_rows):
    """Three epochs and a bit: from each start, the rest is the rest of the whole, whatever the count."""
    order = Order(num_rows, seed=3, fingerprint="f")
    total = 3 * num_rows + 2
    whole = order.rows(0, total)
    for start in range(total):
        again = Order(num_rows, seed=3, fingerprint="f")
        for count in {1, 2, total - start}:
            if start + count <= total:
                assert np.array_equal(again.rows(start, count), whole[start : start + count])


def test_order_reads_every_row_once_an_epoch_in_another_order():
    order = Order(100, seed=0, fingerprint="f")
    epochs = [order.rows(100 * e, 100) for e in range(4)]
    for i, one in enumerate(epochs):
        assert np.array_equal(np.sort(one), np.arange(100))
        for other in epochs[:i]:
            assert (one == other).sum() < 10


def test_order_depends_on_seed_and_fingerprint():
    base = Order(100, seed=0, fingerprint="f").rows(0, 100)
    for other in (Order(100, seed=1, fingerprint="f"), Order(100, seed=0, fingerprint="g")):
        assert (other.rows(0, 100) == base).sum() < 10
