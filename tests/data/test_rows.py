"""From documents to rows to batches: packing, collation, and the pure function from step to batches."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import Listed

from trivium.data import packing
from trivium.data.collate import collate
from trivium.data.config import BPEConfig
from trivium.data.datamodule import StepDataset, validation_batches
from trivium.data.loader import StepLoader
from trivium.data.packing import WINDOW, pack, plan, tokenise
from trivium.data.table import TokenTable
from trivium.data.tokenizer import train_bpe
from trivium.errors import DataError


def table_of(documents, trained=None):
    """A TokenTable of lists of ids, named "0", "1", ..."""
    flat = [i for d in documents for i in d]
    mask = [True] * len(flat) if trained is None else [t for d in trained for t in d]
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    return TokenTable(np.array(flat, np.int32), np.array(mask, bool), offsets, [str(i) for i in range(len(documents))])


def random_table(num, longest, seed=0):
    generator = np.random.default_rng(seed)
    return table_of([generator.integers(10, 99, n).tolist() for n in generator.integers(2, longest + 1, num)])


# ---- pack


def test_pack_by_hand():
    """Capacity 10. Downwards: 7 opens A (3 left); 6 opens B (4 left); 4 fits B exactly; 3 fits A exactly; 3 opens C
    (7 left); 2 goes to C, its only room."""
    lengths = np.array([3, 7, 2, 6, 3, 4])
    assert pack(lengths, 10) == [[1, 0], [3, 5], [4, 2]]


def test_pack_takes_the_tightest_room():
    """Capacity 10: 8 leaves 2, 7 leaves 3, and 2 goes where 2 are left, though both rows have room."""
    assert pack(np.array([7, 8, 2]), 10) == [[1, 2], [0]]


def naive_best_fit_decreasing(lengths, capacity):
    """The textbook's loop: look at every row for the one with the least room that is enough."""
    rooms = []
    for d in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        fitting = [r for r in range(len(rooms)) if rooms[r] >= lengths[d]]
        if fitting:
            best = min(fitting, key=lambda r: rooms[r])
            rooms[best] -= lengths[d]
        else:
            rooms.append(capacity - lengths[d])
    return sorted(capacity - room for room in rooms)


@pytest.mark.parametrize("seed", range(10))
def test_pack_equals_the_textbook_loop(seed):
    """Which of two rows with equal room is taken is free, and changes no later room: the rows' sums are compared."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 33, 200)
    rows = pack(lengths, 32)
    assert sorted(d for row in rows for d in row) == list(range(200))
    assert max(int(lengths[row].sum()) for row in rows) <= 32
    assert sorted(int(lengths[row].sum()) for row in rows) == naive_best_fit_decreasing(lengths.tolist(), 32)


def fewest_rows(lengths, capacity):
    """The optimum by trying every partition (restricted growth strings)."""
    best = len(lengths)

    def place(i, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(lengths):
            best = len(rooms)
            return
        for r in range(len(rooms)):
            if rooms[r] >= lengths[i]:
                place(i + 1, [*rooms[:r], rooms[r] - lengths[i], *rooms[r + 1 :]])
        place(i + 1, [*rooms, capacity - lengths[i]])

    place(0, [])
    return best


@pytest.mark.parametrize("seed", range(20))
def test_pack_is_near_the_optimum(seed):
    """Never below the brute-force optimum, and within best-fit-decreasing's bound, 11/9 of it (+ 1 for rounding)."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 20, 9)
    optimum, found = fewest_rows(lengths.tolist(), 20), len(pack(lengths, 20))
    assert math.ceil(lengths.sum() / 20) <= optimum <= found <= 11 / 9 * optimum + 1


@pytest.mark.parametrize(
    ("lengths", "rows"), [([], []), ([5], [[0]]), ([5, 5], [[0], [1]]), ([1] * 5, [[0, 1, 2, 3, 4]])]
)
def test_pack_of_edge_cases(lengths, rows):
    assert pack(np.array(lengths, dtype=np.int64), 5) == rows


# ---- plan


def test_plan_holds_every_document_once_within_capacity():
    """More documents than one window, so the window's border is crossed."""
    table = random_table(WINDOW + 500, 12)
    rows = plan(table, 16, seed=0)
    assert sorted(d for row in rows for d in row) == list(range(WINDOW + 500))
    assert max(int(table.lengths[row].sum()) for row in rows) <= 16
    assert table.lengths.sum() / (16 * len(rows)) > 0.95  # what the packing is for


def test_plan_depends_on_seed_and_content_alone():
    table = random_table(200, 12)
    assert plan(table, 16, seed=0) == plan(random_table(200, 12), 16, seed=0)
    assert plan(table, 16, seed=0) != plan(table, 16, seed=1)
    assert plan(table, 16, seed=0) != plan(random_table(200, 12, seed=1), 16, seed=0)


# ---- collate


def test_collate_by_hand():
    """Documents [11 12 13] (12 not trained), [21 22], [31 32 33 34] in rows (0, 1) and (2) of length 6, pad 9. First
    labels and padding are -100, positions restart, segments count from 1."""
    table = table_of([[11, 12, 13], [21, 22], [31, 32, 33, 34]], [[True, False, True], [True] * 2, [True] * 4])
    batch = collate(table, [[0, 1], [2]], 6, pad_id=9)
    x = -100
    assert batch.tokens.tolist() == [[11, 12, 13, 21, 22, 9], [31, 32, 33, 34, 9, 9]]
    assert batch.labels.tolist() == [[x, x, 13, x, 22, x], [x, 32, 33, 34, x, x]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]
    assert {t.dtype for t in (batch.tokens, batch.labels, batch.positions, batch.segments)} == {torch.int64}


def test_collate_of_whole_rows_needs_no_segments():
    """One full document a row is the fast path; one token short, or two documents, are not."""
    table = table_of([[1, 2, 3], [4, 5, 6], [7, 8], [9]])
    assert collate(table, [[0], [1]], 3, pad_id=0).segments is None
    assert collate(table, [[0], [2]], 3, pad_id=0).segments is not None
    assert collate(table, [[0], [2, 3]], 3, pad_id=0).segments.tolist() == [[1, 1, 1], [1, 1, 2]]


def test_collate_keeps_a_trained_token_that_is_spelled_like_the_pad():
    """Masks come from documents, never from token values: a trained pad id (pad == eos elsewhere) stays trained."""
    batch = collate(table_of([[5, 0, 0]]), [[0]], 4, pad_id=0)
    assert batch.labels.tolist() == [[-100, 0, 0, -100]]


# ---- steps


def steps_of(micro_size=4, size=4, seed=0, table=None):
    table = random_table(60, 12) if table is None else table
    return StepDataset(table, size=size, micro_size=micro_size, length=16, pad_id=0, seed=seed)


def stacked(batches):
    """All of a step's rows as plain lists; `segments` of the fast path written out as ones."""
    return [
        (t.tolist(), y.tolist(), p.tolist(), s.tolist())
        for b in batches
        for t, y, p, s in zip(
            b.tokens,
            b.labels,
            b.positions,
            torch.ones_like(b.tokens) if b.segments is None else b.segments,
            strict=True,
        )
    ]


def test_steps_are_a_pure_function_of_their_number():
    """In order, backwards, from a second instance: step k is step k, over more than three epochs."""
    one, other = steps_of(), steps_of()
    num = 3 * len(one.rows) // 4 + 3
    forwards = [stacked(one[k]) for k in range(num)]
    assert [stacked(other[k]) for k in reversed(range(num))] == forwards[::-1]
    assert len({str(step) for step in forwards}) > num - 3  # and the steps differ


def test_steps_hold_the_same_rows_however_they_are_cut():
    for k in (0, 3, 11):
        whole = stacked(steps_of(micro_size=4)[k])
        for micro_size in (2, 1):
            batches = steps_of(micro_size=micro_size)[k]
            assert [len(b.tokens) for b in batches] == [micro_size] * (4 // micro_size)
            assert stacked(batches) == whole


def test_steps_of_an_epoch_read_every_document_once():
    """60 documents of distinct content: the real tokens of as many rows as the plan has are all documents', once."""
    steps = steps_of(size=1, micro_size=1)
    read = []
    for k in range(len(steps.rows)):
        for tokens, _, _, segments in stacked(steps[k]):
            for number in range(1, max(segments) + 1):
                read.append(tuple(t for t, s in zip(tokens, segments, strict=True) if s == number))
    assert sorted(read) == sorted(tuple(steps.table.document(d)[0].tolist()) for d in range(60))


def test_steps_sample_id_names_the_first_document():
    steps = steps_of()
    for k in (0, 5):
        document = steps.table.document(int(steps.sample_id(k)))[0].tolist()
        assert steps[k][0].tokens[0, : len(document)].tolist() == document


def test_steps_utilisation_by_hand():
    """Documents of 10, 6 and 9 tokens in rows of 16: two rows, 25 of 32 tokens are real."""
    table = table_of([list(range(10, 20)), list(range(6)), list(range(9))])
    assert steps_of(table=table).utilisation == 25 / 32


@pytest.mark.parametrize("start", [0, 3, 7])
def test_loader_feeds_the_steps_that_are_left(start):
    """Its length is known, so nothing is lost at a resume: steps start..7, each as the data set has it."""
    steps = steps_of(micro_size=2)
    loader = StepLoader(steps, range(start, 8))
    assert len(loader) == 8 - start
    assert [stacked(b) for b in loader] == [stacked(steps[k]) for k in range(start, 8)]


def test_validation_batches_are_the_same_rows_every_time():
    table = random_table(60, 12)
    one = validation_batches(table, max_rows=5, micro_size=2, length=16, pad_id=0)
    other = validation_batches(table, max_rows=5, micro_size=5, length=16, pad_id=0)
    assert [len(b.tokens) for b in one] == [2, 2, 1]
    assert stacked(one) == stacked(other)


# ---- tokenise: long documents


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(BPEConfig(vocab_size=300), ["one two three"])


def talk(number, question, answer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": str(number), "messages": turns}


def test_tokenise_splits_long_texts_and_every_token_is_a_target_once(tokenizer):
    """bos, ten digits, eos = 12 tokens; rows of 5 share one token: 0-4, 4-8, 8-11, so 4 + 4 + 3 = 11 targets."""
    table = tokenise(Listed([{"id": "a", "text": "0123456789"}]), tokenizer, 5, form="text")
    assert table.lengths.tolist() == [5, 5, 4]
    whole = [tokenizer.bos_id, *tokenizer.encode("0123456789"), tokenizer.eos_id]
    targets = [t for d in range(3) for t in table.document(d)[0][1:].tolist()]
    assert targets == whole[1:]
    assert table.trained.all() and table.ids == ["a"] * 3
    assert (table.num_bytes, table.truncated, table.lost_ends) == (10, 0, 0)


@pytest.mark.parametrize("digits", [2, 3, 6, 7])
def test_tokenise_never_leaves_a_tail_without_a_target(tokenizer, digits):
    """A tail of one token would have no target: the end of the text would never be learnt. Rows of 5."""
    table = tokenise(Listed([{"id": "a", "text": "7" * digits}]), tokenizer, 5, form="text")
    assert sum(table.lengths - 1) == digits + 1
    assert table.tokens[-1] == tokenizer.eos_id and min(table.lengths) >= 2


def test_tokenise_counts_truncated_conversations_and_lost_ends(tokenizer):
    """A talk of q and a digits is q + a + 5 tokens: bos, user, q, end, assistant, a, end. In 10 tokens:
    0: 2 + 3 fits exactly. 1: 2 + 4 loses its last end. 2: 5 + 3 keeps one digit of the answer, loses the end.
    3: 8 + 1 keeps nothing that is trained: it is left out, and counted with the others."""
    talks = [talk(0, "12", "345"), talk(1, "12", "3456"), talk(2, "12345", "789"), talk(3, "12345678", "9")]
    table = tokenise(Listed(talks), tokenizer, 10, form="chat")
    assert table.ids == ["0", "1", "2"] and table.lengths.tolist() == [10, 10, 10]
    assert [int(table.document(d)[1].sum()) for d in range(3)] == [4, 4, 1]
    assert table.document(0)[0][-1] == tokenizer.eot_id and table.document(1)[0][-1] == tokenizer.encode("6")[0]
    assert (table.truncated, table.lost_ends) == (3, 3)


def test_tokenise_of_a_truncated_end_of_text_counts_it_lost(tokenizer):
    """Prompt and completion: bos, 2, 3, eos is 7 tokens; in 6 the eos is lost."""
    example = {"id": "p", "prompt": "12", "completion": "345"}
    table = tokenise(Listed([example]), tokenizer, 6, form="chat")
    assert (table.truncated, table.lost_ends) == (1, 1)
    assert table.trained.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("examples", "form", "message"),
    [
        ([], "text", "the data set is empty"),
        ([{"id": "7", "text": "x"}], "chat", "example 7 has text; this objective needs messages, or prompt"),
        ([talk(8, "q", "a")], "text", "example 8 has messages; this objective needs text"),
        ([talk(9, "123456789", "a")], "chat", "no token of 1 examples would be trained on"),
    ],
)
def test_tokenise_refuses_what_cannot_be_trained_on(tokenizer, examples, form, message):
    with pytest.raises(DataError, match=message):
        tokenise(Listed(examples), tokenizer, 10, form=form)


def test_table_fingerprint_covers_tokens_masks_and_borders():
    base = table_of([[1, 2], [3, 4]])
    others = [
        table_of([[1, 2], [3, 5]]),
        table_of([[1, 2], [3, 4]], [[True, True], [True, False]]),
        table_of([[1, 2, 3], [4]]),
    ]
    assert base.fingerprint == table_of([[1, 2], [3, 4]]).fingerprint
    assert len({t.fingerprint for t in [base, *others]}) == 4
    assert all(a.fingerprint != b.fingerprint for a, b in itertools.combinations([base, *others], 2))


def test_mismatched_answer_comes_from_an_example_with_another_prompt(tokenizer):
    """Two verdicts on one prompt stand side by side: the other true answer to it is no mismatch (KTO's z0)."""
    rows = [("a", "1", True), ("a", "2", False), ("b", "3", True)]
    examples = [{"id": str(i), "prompt": p, "completion": c, "label": v} for i, (p, c, v) in enumerate(rows)]
    table = tokenise(Listed(examples), tokenizer, 64, form="labels")
    said = [tokenizer.decode(table.document(d)[0].tolist()) for d in range(6)]
    assert said == ["a1", "a3", "a2", "a3", "b3", "b2"]
    assert table.columns["desirable"].tolist() == [1, 1, 0, 0, 1, 1]
    with pytest.raises(DataError, match="all examples have one prompt"):
        tokenise(Listed(examples[:2]), tokenizer, 64, form="labels")


def test_examples_tokenised_some_at_a_time_make_the_same_table(monkeypatch):
    """Blocks of 3 of 10 examples, long ones cut among them, against all at once: the very same table."""
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["a"])
    texts = [{"id": f"t{i}", "text": "heron " * (3 + 9 * (i % 3)), "source": f"book {i % 2}"} for i in range(10)]
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a heron " * 4}]
    chats = [{"id": f"c{i}", "messages": turns[:1] * (1 + i % 4) + turns[1:], "task": "a"} for i in range(10)]
    pairs = [{"id": f"p{i}", "prompt": f"{i}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(10)]
    labels = [{"id": f"l{i}", "prompt": f"{i}?", "completion": f"yes {i}", "label": i % 3 == 0} for i in range(10)]
    for form, examples in (
        ("text", texts), ("chat", chats), ("any", texts + chats), ("pairs", pairs), ("labels", labels)
    ):  # fmt: skip
        tables = []
        for together in (3, 4096):
            monkeypatch.setattr(packing, "CHUNK", together)
            tables.append(packing.tokenise(Listed(examples), tokenizer, 40, form=form))
        small, whole = tables
        assert small.fingerprint == whole.fingerprint and small.ids == whole.ids
        for name in ("num_bytes", "truncated", "lost_ends", "group", "origins"):
            assert getattr(small, name) == getattr(whole, name), name
        assert (small.origin is None) == (whole.origin is None)
        assert small.origin is None or small.origin.tolist() == whole.origin.tolist()
        assert {k: v.tolist() for k, v in small.columns.items()} == {k: v.tolist() for k, v in whole.columns.items()}
        assert small.origin is not None or form in ("chat", "pairs", "labels")


def test_the_same_id_in_two_blocks_is_refused(monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 2)
    examples = [{"id": str(i % 4), "text": "a heron"} for i in range(5)]
    with pytest.raises(DataError, match="two examples have the id '0'"):
        packing.tokenise(examples, train_bpe(BPEConfig(vocab_size=300), ["a"]), 40)


def test_a_form_that_nothing_makes_tokens_of_is_refused():
    steps = [{"id": "s", "prompt": "a", "completions": ["b"], "labels": [True]}]
    with pytest.raises(
        DataError, match="reads a prompt, completions and a label for each, and nothing makes tokens of"
    ):
        packing.tokenise(steps, train_bpe(BPEConfig(vocab_size=300), ["a"]), 40, form="steps")
