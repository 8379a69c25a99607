"""Mixtures: which rows a step reads, by hand-worked counts; limits, curricula, restoring at every element."""

import itertools
import json
import pickle
import random
from fractions import Fraction

import numpy as np
import pytest
from helpers import Listed

from trivium.build import build_source
from trivium.compose import component
from trivium.data.config import BPEConfig, MixtureConfig
from trivium.data.datamodule import StepDataset
from trivium.data.mixture import MixedOrder, Mixture, Share, document_ends, shares_of
from trivium.data.packing import tokenise
from trivium.data.tokenizer import train_bpe
from trivium.errors import ConfigError, DataError
from trivium.plugin import discover
from trivium.types import Score

discover()


def order(shares, size=8, seed=3):
    return MixedOrder([Share(n, rows, weights, *most) for n, rows, weights, *most in shares], size, seed, "f")


def taken(mixed, steps):
    return [(mixed.read_before(k + 1) - mixed.read_before(k)).tolist() for k in range(steps)]


def always(weight):
    return ((0, float(weight)),)


def test_counts_by_hand():
    """3 : 1 of 8 is 6 and 2. 2 : 1 of 4 is 2.67 and 1.33: the odd row goes where more is owed."""
    assert taken(order([("a", 50, always(3)), ("b", 5, always(1))]), 3) == [[6, 2]] * 3
    assert taken(order([("a", 50, always(2)), ("b", 5, always(1))], size=4), 6) == [[3, 1], [2, 2], [3, 1]] * 2
    assert taken(order([("a", 9, always(1)), ("b", 9, always(1)), ("c", 9, always(1))], size=1), 6) == [
        [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1],
    ]  # fmt: skip


def test_shares_are_kept_to_within_a_row():
    weights = [0.61803, 0.27, 0.11197]
    mixed = order([(n, 1000, always(w)) for n, w in zip("abc", weights, strict=True)], size=7)
    for step in range(0, 3000):
        assert np.abs(mixed.read_before(step) - np.array(weights) * 7 * step).max() < 1


def test_a_curriculum_is_linear_between_its_steps():
    """All of a at first, a half at step 10, none from step 20: of 1,000 rows a step."""
    fading = ((0, 1.0), (20, 0.0))
    coming = ((0, 0.0), (20, 1.0))
    mixed = order([("a", 10**6, fading), ("b", 10**6, coming)], size=1000)
    found = taken(mixed, 25)
    assert found[0] == [1000, 0] and found[10] == [500, 500] and found[5] == [750, 250]
    assert found[20:] == [[0, 1000]] * 5


def test_a_part_that_has_given_its_most_leaves_its_share_to_the_others():
    """b has 5 rows and may be read twice: 10 rows at 2 a step are five steps."""
    mixed = order([("a", 50, always(3)), ("b", 5, always(1), 10.0)])
    assert taken(mixed, 7) == [[6, 2]] * 5 + [[8, 0]] * 2
    read = mixed.rows(0, 56)
    b = read[read >= 50] - 50
    assert sorted(b.tolist()) == sorted([*range(5), *range(5)]), "each row twice"
    assert sorted(b[:5].tolist()) == [0, 1, 2, 3, 4]


def by_the_rule(shares, size, steps):
    """Rows read before each step, in fractions without rounding: what the shares owe in whole rows, no more than a step
    or a part has, then row by row where most is owed."""
    read, owed, found = [0] * len(shares), [Fraction(0)] * len(shares), []
    for step in range(steps):
        found.append(read)
        weights = [level(named, step) * (n < max_) for (_, _, named, max_), n in zip(shares, read, strict=True)]
        owed = [o + Fraction(w * size, sum(weights)) if w else Fraction(0) for o, w in zip(owed, weights, strict=True)]
        taken = [min(max(0, o // 1), s[3] - n) for o, s, n in zip(owed, shares, read, strict=True)]
        while sum(taken) > size:
            most = max(range(len(shares)), key=lambda i: (taken[i], -i))
            taken[most] -= min(sum(taken) - size, taken[most])
        while sum(taken) < size:
            may = [i for i, (s, w) in enumerate(zip(shares, weights, strict=True)) if w and read[i] + taken[i] < s[3]]
            taken[max(may, key=lambda i: (owed[i] - taken[i], -i))] += 1
        read = [n + k for n, k in zip(read, taken, strict=True)]
        owed = [o - k for o, k in zip(owed, taken, strict=True)]
    return found


def level(named, step):
    """A weight at a step, between those that are named for some."""
    named = [(s, Fraction(w)) for s, w in named]
    for (start, low), (end, high) in itertools.pairwise(named):
        if start <= step <= end:
            return low + (high - low) * Fraction(step - start, end - start)
    return named[0][1] if step < named[0][0] else named[-1][1]


ENDLESS = 10**12
MIXTURES = {
    "thirds of one row": ([(n, 9, always(1), ENDLESS) for n in "abc"], 1),
    "small shares": ([("a", 9, always(7), ENDLESS), ("b", 9, always(2), ENDLESS), ("c", 9, always(0.25), ENDLESS)], 4),
    "many parts": ([(f"p{i}", 9, always(1 + i % 5), ENDLESS) for i in range(11)], 16),
    "limits": (
        [("a", 9, always(3), ENDLESS), ("b", 9, always(2), 5001), ("c", 9, always(3), 77), ("d", 9, always(1), 1)],
        8,
    ),
    "a curriculum": (
        [
            ("a", 9, ((0, 3.0), (900, 0.0), (2000, 0.0), (2500, 5.0)), ENDLESS),
            ("b", 9, ((300, 1.0), (1700, 4.0)), ENDLESS),
            ("c", 9, ((0, 0.0), (1000, 2.0)), 6000),
        ],
        7,
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_counts_are_what_the_rule_says_wherever_one_asks(name):
    """4,000 steps; asked for one by one, from the end backwards, at once and here and there."""
    shares, size = MIXTURES[name]
    wanted = np.array(by_the_rule(shares, size, 4000))
    forwards = order(shares, size)
    assert np.array_equal([forwards.read_before(k) for k in range(4000)], wanted)
    backwards = order(shares, size)
    for k in (3999, *range(3998, 0, -37), 0, 3999):
        assert np.array_equal(backwards.read_before(k), wanted[k])
    draw = random.Random(0)
    for _ in range(20):
        again = pickle.loads(pickle.dumps(order(shares, size)))
        for k in draw.sample(range(4000), 3):
            assert np.array_equal(again.read_before(k), wanted[k])


def test_what_is_held_of_an_order_does_not_grow_with_its_steps(monkeypatch):
    """Places are marked 256 steps apart, of 40,000 steps 1,024; from the nearest one any count is made again."""
    shares, size = MIXTURES["small shares"]
    mixed, take, taken, held = order(shares, size), MixedOrder._take, [], []
    for step in (5_000, *range(5_001, 7_001), 40_000):  # one by one, as a run that goes on does
        mixed.read_before(step)
        held.append(len(pickle.dumps(mixed)))
    assert max(held) < 40_000 and held[-1] < 2 * held[0], (held[0], max(held), held[-1])
    monkeypatch.setattr(MixedOrder, "_take", lambda self, place, due: taken.append(1) or take(self, place, due))
    for step in (39_990, 20_003, 20_004, 20_003, 1_000, 39_000):
        before = len(taken)
        mixed.read_before(step)
        assert len(taken) - before <= 1024


def test_when_nothing_is_left_a_sentence_says_so():
    mixed = order([("a", 4, always(3), 12.0), ("b", 5, always(1), 4.0)])
    assert taken(mixed, 2) == [[6, 2]] * 2
    for _ in range(2):
        with pytest.raises(DataError, match="nothing left at step 3"):
            mixed.rows(16, 8)
    assert taken(mixed, 2) == [[6, 2]] * 2
    with pytest.raises(DataError, match="too few rows left at step 2"):
        order([("a", 4, always(1), 9.0)]).rows(0, 16)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_it_restores_at_every_element(size):
    """Three parts over many epochs, one of which runs out: from each index the rest is the rest of the whole."""
    shares = [("a", 7, always(2)), ("b", 3, ((0, 1.0), (9, 3.0))), ("c", 2, always(1), 5.0)]
    whole = order(shares, size).rows(0, 90)
    assert set(whole.tolist()) == set(range(12)), "every row is read"
    for start in range(88):
        again = order(shares, size)
        for count in {1, 2, 90 - start}:
            assert np.array_equal(again.rows(start, count), whole[start : start + count])
    other = order(shares, size, seed=4).rows(0, 90)
    assert not np.array_equal(other, whole)
    assert np.array_equal(np.bincount(other, minlength=12)[:7] > 0, np.bincount(whole, minlength=12)[:7] > 0)


def test_an_epoch_of_a_part_is_every_row_of_it_once():
    mixed = order([("a", 30, always(1)), ("b", 10, always(1))], size=10)
    read = mixed.rows(0, 120)
    a, b = read[read < 30], read[read >= 30] - 30
    assert [sorted(a[i : i + 30].tolist()) for i in (0, 30)] == [list(range(30))] * 2
    epochs = [b[i : i + 10].tolist() for i in range(0, 60, 10)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and len({tuple(e) for e in epochs}) == 6


def test_temperature_by_hand():
    """8,100 and 100 rows: 81 : 1 by size, 9 : 1 at temperature 2, 3 : 1 at 4. A weight is a weight."""
    for temperature, ratio in ((1, 81), (2, 9), (4, 3)):
        config = MixtureConfig(parts={"a": {}, "b": None}, temperature=temperature)
        one, two = shares_of(config, {"a": 8100, "b": 100}, 64)
        assert one.weight(0) / two.weight(5) == pytest.approx(ratio)
    config = MixtureConfig(parts={"a": {"weight": 2, "epochs": 1.5}, "b": {"weight": {"10": 4, 0: 2}, "tokens": 700}})
    one, two = shares_of(config, {"a": 7, "b": 9}, 64)
    assert (one.most, two.most) == (10, 10)  # 10.5 rows; 700 tokens are 10 rows of 64
    assert (one.weight(99), two.weight(5), two.weight(10)) == (2, 3, 4)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({"weight": -1}, r"data.parts.a.weight=-1 must be a number, 0 or more"),
        ({"weight": "much"}, r"data.parts.a.weight='much' must be"),
        ({"weight": {"x": 1}}, r"must be a number, 0 or more, or such by step"),
        ({"epochs": -2}, r"data.parts.a.epochs=-2 must be a number"),
        ({"tokens": True}, r"data.parts.a.tokens=True must be"),
        ([1], r"data.parts.a=\[1\]: a part is NAME"),
    ],
)
def test_bad_parts_are_named(part, sentence):
    with pytest.raises(ConfigError, match=sentence):
        MixtureConfig(parts={"a": part})


def test_a_limit_that_leaves_no_row_is_refused():
    for limit in ({"tokens": 100}, {"epochs": 0.01}):
        config = MixtureConfig(parts={"a": {"weight": 1}, "b": {"weight": 1, **limit}})
        with pytest.raises(DataError, match=r"data.parts.b gives no row of 128 tokens: .*, and it has 50 rows"):
            shares_of(config, {"a": 50, "b": 50}, 128)


# ---- the source


class Scored(Listed):
    def score(self, example, completion):
        assert "/" not in example["id"]
        return Score(float(completion == example["answer"]), completion == example["answer"])


@pytest.fixture
def mixture():
    a = Listed([{"id": str(i), "text": "is odd " * (1 + i % 5)} for i in range(40)])
    ask = {"role": "user", "content": "?"}
    b = Scored([{"id": "q", "messages": [ask, {"role": "assistant", "content": "4"}], "answer": "4", "task": "t"}])
    c = Listed([{"id": f"x{i}", "text": "no yes " * 7} for i in range(9)])
    return Mixture(MixtureConfig(parts={"a": {}, "b": {}, "c": {}}), {"a": a, "b": b, "c": c})


def test_examples_are_its_parts(mixture):
    assert (len(mixture), mixture.ends) == (50, (40, 41, 50))
    assert [mixture[i]["id"] for i in (0, 39, 40, 41, 49)] == ["a/0", "a/39", "b/q", "c/x0", "c/x8"]
    assert [mixture.origin(mixture[i]) for i in (0, 40, 49)] == ["a", "b", "c"]
    assert mixture.score(mixture[40], "4").correct and not mixture.score(mixture[40], "5").correct
    with pytest.raises(IndexError):
        mixture[50]
    other = Mixture(MixtureConfig(parts={"a": {"weight": 9}, "b": {"weight": 1}, "c": {"weight": 1}}), mixture.parts)
    assert other.fingerprint == mixture.fingerprint, "shares are no content"
    fewer = Mixture(MixtureConfig(parts={"a": {}, "c": {}}), {k: v for k, v in mixture.parts.items() if k != "b"})
    assert fewer.fingerprint != mixture.fingerprint


def test_parts_are_packed_apart_and_rows_come_in_their_shares():
    tokenizer = train_bpe(BPEConfig(vocab_size=300), ["is odd yes no"] * 3)
    a = Listed([{"id": str(i), "text": "is odd " * (1 + i % 5)} for i in range(200)])
    c = Listed([{"id": f"x{i}", "text": "no yes " * 3} for i in range(60)])
    config = MixtureConfig(parts={"a": {"weight": 1}, "c": {"weight": 3}})
    source = Mixture(config, {"a": a, "c": c})
    table = tokenise(source, tokenizer, 32)
    assert table.origins == ("a", "c")
    table.ends = document_ends(source, table)
    assert table.ends[-1] == len(table.ids) and table.ids[table.ends[0]] == "c/x0"
    steps = StepDataset(table, size=4, micro_size=2, length=32, pad_id=0, seed=0, shares=config)
    for row in steps.rows:
        assert len({table.ids[d][0] for d in row}) == 1, "a row is of one part"
    for step in range(30):
        kinds = [table.ids[steps.rows[r][0]][0] for r in steps.order.rows(step * 4, 4)]
        assert sorted(kinds) == ["a", "c", "c", "c"]
        assert steps.sample_id(step)[0] == kinds[0]
    rows = dict(zip("ac", steps.rows.counts(table.ends), strict=True))
    assert sum(rows.values()) == len(steps.rows)
    read = steps.figures(20)
    assert read == {"data/a/epochs": round(20 / rows["a"], 4), "data/c/epochs": round(60 / rows["c"], 4),
                    "data/a/tokens": 640, "data/c/tokens": 1920}  # fmt: skip
    halves = [StepDataset(table, size=4, micro_size=2, length=32, pad_id=0, seed=0, shares=config, rank=r, world=2)
              for r in range(2)]  # fmt: skip
    whole = [b.tokens.tolist() for b in steps[7]]
    assert [half[7][0].tokens.tolist() for half in halves] == whole


def test_parts_are_domains_with_their_own_settings(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    parts = {"primer": {}, "mine": {"domain": "files", "path": str(tmp_path / "mine.jsonl"), "validation_share": 0.0}}
    chosen = component("data", {"name": "mixture", "parts": parts})
    source = build_source(chosen, "pretrain")
    assert list(source.parts) == ["primer", "mine"] and len(source.parts["mine"]) == 2
    assert source[len(source) - 1]["id"] == f"mine/{tmp_path}/mine.jsonl:2"
    held = build_source(component("data", {"name": "mixture", "parts": {"primer": {}}}), "pretrain", "validation")
    assert held.parts["primer"].config.split == "validation"


def test_split_and_seed_are_of_parts():
    for given in ({"split": "validation"}, {"seed": 7}):
        with pytest.raises(ConfigError, match="data.split and data.seed are of a mixture's parts"):
            build_source(component("data", {"name": "mixture", "parts": {"primer": {}}, **given}), "pretrain")


def test_cleaning_is_merged_and_notes_are_its_parts_own(tmp_path, monkeypatch):
    """The mixture's steps and settings, but for what a part says itself."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        rows = [{"text": f"{name}{i} " + "heron " * i} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": 1}]))

    def part(name, **more):
        return {
            "domain": "files",
            "path": f"{tmp_path}/{name}.jsonl",
            "validation_share": 0.0,
            "bad_rows": "skip",
            **more,
        }

    parts = {"a": part("a", cleaning={"max_chars": 50}), "b": part("b", clean=[])}
    whole = {"name": "mixture", "parts": parts, "clean": ["length"], "cleaning": {"min_chars": 21}}
    source = build_source(component("data", whole), "pretrain")
    # "aN " and N times "heron ": 3 of 20 letters or fewer, 21 or more and 50 or fewer from N=3 to N=7
    assert [len(part) for part in source.parts.values()] == [5, 20]
    assert source.notes["a rows"] == source.notes["b rows"] == 20
    assert source.notes["a skipped"] == {"does not fit the schema": 1}
    assert source.notes["a length removed"] == 15 and "b length removed" not in source.notes


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({}, r"needs data.parts="),
        ({"primmer": {}}, r"primmer.*primer"),
        ({"primer": {"wieght": 3}}, r"data.parts.primer has 'wieght', which is no setting. Did you mean weight"),
        ({"mixture": {}}, r"data.parts.mixture: a mixture is no part of a mixture"),
        ({"files": {"domain": "files"}}, r"needs data.path="),
        ({"primer": {"held_out": ["x"]}}, r"data.parts.primer has held_out, which is of the whole mixture"),
        ({"primer": {"weight": 1}, "finance": {}}, r"primer has a weight and finance has none; weigh all parts"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_told(parts, sentence):
    with pytest.raises((ConfigError, DataError), match=sentence) as told:
        build_source(component("data", {"name": "mixture", "parts": parts}), "pretrain")
    assert "\n" not in str(told.value)


def test_a_run_reads_its_parts_tells_how_much_and_continues_bit_for_bit(main, tmp_path, pretraining):
    """Per part: loss, tokens, epochs. Stopped in the middle and continued, the losses are those of the whole run."""
    (tmp_path / "mine.txt").write_text("\n\n".join(f"the heron number {i} is here" for i in range(900)))
    parts = (
        "data.parts={primer: {weight: 3}, mine: {domain: files, weight: {0: 1, 6: 3}, path: %s, validation_share: 0.4}}"
        % (tmp_path / "mine.txt")
    )
    plain = [o for o in pretraining(tmp_path, "x") if not o.startswith(("data", "domain", "name", "trainer.max"))]
    start = (*plain, "domain=mixture", parts, "validation.every_steps=3", "schedule=constant")

    def losses(name):
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert main(*start, "name=whole", "trainer.max_steps=6").code == 0
    assert main(*start, "name=parts", "trainer.max_steps=3").code == 0
    done = main(*start, "name=parts", "trainer.max_steps=6")
    assert done.code == 0, done.err
    whole = losses("whole")
    assert [r["train/loss"] for r in losses("parts")] == [r["train/loss"] for r in whole]
    last = [r for r in whole if "train/loss" in r][-1]
    assert {"train/loss/primer", "train/loss/mine", "data/primer/epochs", "data/mine/tokens"} <= last.keys()
    assert last["data/mine/tokens"] % 64 == 0 and last["data/mine/tokens"] > 0
    done = main(*start, "name=parts", "trainer.max_steps=7", "data.temperature=2")
    assert done.code == 1 and "data.temperature was 1.0, is 2.0" in done.err
