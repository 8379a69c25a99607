"""What training data holds of what is held out: planted leaks are found, with both ids, and shared phrases are not."""

import numpy as np
import pytest
from helpers import Listed

from trivium.data import contamination
from trivium.data.contamination import Hasher, Overlap, copied, find_overlap, overlap, shared_grams
from trivium_plugins.primer.config import PrimerConfig
from trivium_plugins.primer.source import Primer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))


def texts(*said, name="t"):
    return Listed([{"id": f"{name}{i}", "text": text} for i, text in enumerate(said)])


def chats(*said, name="t"):
    return Listed(
        [
            {"id": f"{name}{i}", "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for i, (q, a) in enumerate(said)
        ]
    )


def numbered(first, count):
    return " ".join(f"w{i}" for i in range(first, first + count))


def test_thirteen_words_in_a_row_are_shared_and_twelve_are_not():
    """Words 5 to 17 stand in both, in other case and punctuation; of 20 words there are 8 n-grams."""
    held = texts(numbered(0, 20), name="h")
    thirteen = f"before, {numbered(5, 13).upper().replace(' ', ', ')}. After"
    found = find_overlap(texts("other words", thirteen), held, 13)
    assert (found.examples, found.contaminated, found.share) == (1, 1, 1.0)
    (worst,) = found.worst
    assert (worst.held_out, worst.train, worst.shared, worst.of) == ("h0", "t1", 1, 8)
    assert find_overlap(texts(f"before {numbered(5, 12)} after"), held, 13) == Overlap(1, 0, ())


def test_short_texts_are_compared_whole_and_with_their_signs():
    """3 + 5 is not 3 - 5, and a short text inside a longer one is a phrase."""
    held = texts("What is 3 - 5?", "A heron", "", name="h")
    found = find_overlap(texts("What is 3 + 5?", "a  HERON", "A heron flew"), held, 13)
    assert [(f.held_out, f.train) for f in found.worst] == [("h1", "t1")]
    assert (found.examples, found.contaminated) == (3, 1)


def test_a_text_is_found_by_a_fifth_that_several_examples_have_together():
    """22 words have 10 n-grams. One has the first, another the last: two of ten; either alone is one of ten."""
    held = texts(numbered(0, 22), name="h")
    first, last = numbered(0, 13), numbered(9, 13)
    both = find_overlap(texts(first, "x", last), held, 13, 0.2)
    assert (both.contaminated, both.touched) == (1, 1)
    (worst,) = both.worst
    assert (worst.train, worst.shared, worst.of) == ("t0", 1, 10)
    for one in (first, last):
        found = find_overlap(texts(one), held, 13, 0.2)
        assert (found.contaminated, found.touched) == (0, 1)
        assert find_overlap(texts(one), held, 13, 0.0).contaminated == 1
    assert copied([{"id": "a", "text": first}, {"id": "b", "text": last}], [held[0]]) == {"h0"}
    assert copied([{"id": "a", "text": first}], [held[0]]) == set()


def test_whole_examples_and_prompts_are_compared_whatever_n_is(monkeypatch):
    """By content and not by id; a prompt only where the answer is another; the first training example is named."""
    monkeypatch.setattr(contamination, "BATCH", 2)
    train = chats(("a?", "b."), ("a?", "b."), ("c?", "d."), ("a?", "e."))
    held = chats(("c?", "d."), ("a?", "b."), ("a?", "x."), ("a? ", "b."), ("c?", "d."), name="h")
    found = find_overlap(train, held, 0)
    assert (found.same.count, found.same.told) == (3, (("h0", "t2"), ("h1", "t0"), ("h4", "t2")))
    assert (found.prompts.count, found.prompts.told) == (1, (("h2", "t0"),))
    assert (found.contaminated, found.touched, found.worst) == (0, 0, ())


def test_a_conversation_is_found_by_nine_tenths_of_its_ngrams():
    """22 words have 10 n-grams: one training example with 9 of them is a copy, with 8 it is a phrase they share."""
    held = chats((numbered(0, 10), numbered(10, 12)), name="h")
    for first, shared in ((1, 9), (2, 8)):
        train = chats(("x", numbered(first, 22 - first)))
        found = find_overlap(train, held, 13)
        assert found.contaminated == (shared == 9)
    halves = chats(("x", numbered(0, 17)), ("y", numbered(5, 17)))  # all ten between them, five each
    assert find_overlap(halves, held, 13).contaminated == 0
    (worst,) = find_overlap(texts(f"{numbered(0, 10)}! {numbered(10, 12)}"), held, 13).worst  # in a page of text
    assert (worst.shared, worst.of) == (10, 10)


def test_the_training_example_that_has_most_is_named():
    held = texts(numbered(0, 30), numbered(100, 30), name="h")
    train = texts(numbered(0, 14), numbered(0, 20), numbered(0, 20), numbered(100, 15))
    found = find_overlap(train, held, 13)
    assert [(f.held_out, f.train, f.shared) for f in found.worst] == [("h0", "t1", 8), ("h1", "t3", 3)]


def test_planted_leaks_are_all_found_and_only_they(monkeypatch):
    """Of 40 held-out texts of books ten are put into the training data, each with a passage of its middle."""
    monkeypatch.setattr(contamination, "BATCH", 64)
    held, train = (Primer(PrimerConfig(parts=["books"], split=split)) for split in ("validation", "train"))
    assert len(held) == 40
    given = [train[i] for i in range(300)]
    for k in range(10):
        passage = " ".join(contamination.WORD.findall(held[k * 4]["text"])[50 : 50 + 13 + k])
        given[k * 29] = {"id": f"leak{k}", "text": f"{given[k * 29]['text']}\n\n{passage}"}
    found = find_overlap(Listed(given), held, 13)
    assert found.contaminated == 10
    assert {(f.held_out, f.train, f.shared) for f in found.worst} == {
        (held[k * 4]["id"], f"leak{k}", k + 1) for k in range(10)
    }


@pytest.mark.parametrize(
    "parts",
    [
        {"parts": ["books"]},
        {"parts": ["definitions", "chats"]},
        {"parts": ["tasks"], "num_tasks": 3000},
        {"parts": ["pairs"], "num_pairs": 1200},
    ],
)
def test_the_primer_holds_none_of_what_it_holds_out(parts):
    """Templates, small talk and spelled words (`article`, `particle`) are no leaks."""
    train, held = (Primer(PrimerConfig(split=split, **parts)) for split in ("train", "validation"))
    found = find_overlap(train, held, 13)
    assert (found.examples, found.contaminated) == (len(held), 0)


def test_other_forms_are_compared_with_their_right_answer():
    """A pair by its chosen side, a completion with its prompt."""
    train = Listed([
        {"id": "p", "prompt": numbered(0, 8), "chosen": numbered(8, 8), "rejected": "bad"},
        {"id": "c", "prompt": numbered(50, 8), "completion": numbered(58, 8)},
    ])  # fmt: skip
    held = texts(numbered(0, 16), numbered(50, 16), name="h")
    assert {(f.held_out, f.train, f.shared) for f in find_overlap(train, held, 13).worst} == {
        ("h0", "p", 4),
        ("h1", "c", 4),
    }


def test_pieces_give_what_the_whole_gives(monkeypatch):
    """Everything shares everything: 30 x 30 examples of one text, in pieces of 50 pairs."""
    train, held = texts(*[numbered(0, 20)] * 30), texts(*[numbered(0, 20)] * 30, name="h")
    whole = find_overlap(train, held, 13)
    assert (whole.contaminated, whole.worst[0].shared, {f.train for f in whole.worst}) == (30, 8, {"t0"})
    monkeypatch.setattr(contamination, "PAIRS", 50)
    assert find_overlap(train, held, 13) == whole
    hashes, whose = Hasher(13)([train[i] for i in range(3)])
    order = np.argsort(hashes, kind="stable")
    pieces = list(shared_grams(hashes[order], whose[order], hashes, whose))
    assert len(pieces) == 2  # 8 n-grams x 3 held-out = 24 pairs an example: two fit 50


def test_hashes_do_not_run_across_examples():
    one, other = {"id": "1", "text": numbered(0, 13)}, {"id": "2", "text": numbered(20, 14)}
    hashes, whose = Hasher(13)([one, {"id": "0", "text": "short"}, other])
    assert whose.tolist() == [1, 0, 2, 2] and len(set(hashes.tolist())) == 4
    assert Hasher(13)([other])[0].tolist() == hashes[2:].tolist()


def test_nothing_held_out_and_nothing_to_train_on():
    assert find_overlap(texts("a"), Listed([]), 13) == Overlap(0, 0, ())
    assert find_overlap(Listed([]), texts("a"), 13) == Overlap(1, 0, ())
    assert Overlap(0, 0, ()).share == 0.0


def test_result_is_cached_by_both_sources_and_n(monkeypatch):
    made = []
    monkeypatch.setattr(contamination, "find_overlap", lambda *a: made.append(1) or find_overlap(*a))
    train, held = texts(numbered(0, 20)), texts(numbered(0, 20), name="h")
    assert overlap(train, held) == overlap(train, held) == find_overlap(train, held, 13)
    assert len(made) == 1
    overlap(train, held, 5)
    overlap(texts(numbered(0, 21)), held)
    overlap(train, texts(numbered(0, 21)))
    assert len(made) == 4
