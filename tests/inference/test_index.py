"""The index of vectors finds what comparing with every vector finds, and what is damaged is never used."""

import numpy as np
import pytest

from trivium.data.passages import Passage
from trivium.inference.index import Entry, VectorIndex, read_entry, write_entry

pytest.importorskip("faiss", reason="NOT TESTED: an index needs faiss")
COUNT, WIDTH = 2000, 64


@pytest.fixture(scope="module")
def vectors():
    """2,000 of lengths from 1 to 3, in 100 groups, as texts are: random ones have no neighbours."""
    draw = np.random.default_rng(0)
    groups = draw.normal(size=(100, WIDTH))
    found = groups[draw.integers(0, 100, COUNT)] + 0.7 * draw.normal(size=(COUNT, WIDTH))
    found *= draw.uniform(1, 3, size=(COUNT, 1)) / np.linalg.norm(found, axis=1, keepdims=True)
    return found.astype(np.float32)


def brute_force(vectors, query, similarity, count=10):
    """In double precision, every one."""
    v, q = vectors.astype(float), query.astype(float)
    scores = v @ q if similarity == "dot" else v @ q / np.linalg.norm(v, axis=1) / np.linalg.norm(q)
    order = np.argsort(-scores)[:count]
    return order.tolist(), scores[order]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_exact_is_what_comparing_with_all_finds(vectors, similarity):
    index = VectorIndex.of(vectors, "exact", similarity)
    for query in np.random.default_rng(1).normal(size=(50, WIDTH)).astype(np.float32):
        found = index.nearest(query, 10)
        order, scores = brute_force(vectors, query, similarity)
        assert [hit.number for hit in found] == order
        assert [hit.score for hit in found] == pytest.approx(scores, abs=1e-5)


def test_cosine_and_dot_differ_on_these_vectors(vectors):
    """Else the test above could not see one taken for the other."""
    query = vectors[0]
    assert brute_force(vectors, query, "cosine")[0] != brute_force(vectors, query, "dot")[0]


def test_a_graph_finds_99_of_100(vectors):
    index = VectorIndex.of(vectors, "hnsw", "cosine")
    queries = np.random.default_rng(1).normal(size=(100, WIDTH)).astype(np.float32)
    found = sum(
        len({hit.number for hit in index.nearest(q, 10)} & set(brute_force(vectors, q, "cosine")[0])) for q in queries
    )
    print(f"recall@10 {found / 1000:.3f}")
    assert found >= 990


def test_fewer_than_asked_for_are_all(vectors):
    assert len(VectorIndex.of(vectors[:3], "exact", "cosine").nearest(vectors[0], 10)) == 3


def test_what_was_kept_comes_back_or_not_at_all(vectors, tmp_path):
    """Every 997th byte flipped in turn: never another answer, always None."""
    path, index = tmp_path / "index.bin", VectorIndex.of(vectors[:40], "exact", "cosine")
    index.save(path, "of 40")
    loaded = VectorIndex.load(path, "cosine", "of 40")
    assert loaded is not None and loaded.nearest(vectors[7], 5) == index.nearest(vectors[7], 5)
    assert VectorIndex.load(path, "cosine", "of 41") is None and VectorIndex.load(path, "cosine", "of 4") is None
    entry = tmp_path / "entry.bin"
    passages = [Passage(1, 2, "é\nb"), Passage(3, 3, "c", "row")]
    write_entry(entry, Entry(passages, vectors[:2]))
    found = read_entry(entry, WIDTH)
    assert found is not None and found.passages == passages and np.array_equal(found.vectors, vectors[:2])
    for file, load in (
        (path, lambda: VectorIndex.load(path, "cosine", "of 40")),
        (entry, lambda: read_entry(entry, WIDTH)),
    ):
        sound = file.read_bytes()
        for at in range(0, len(sound), 997):
            file.write_bytes(sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :])
            assert load() is None
        file.write_bytes(sound[:-3])
        assert load() is None
        file.unlink()
        assert load() is None
