"""When a new model takes the incumbent's place: margins, verdicts and decisions worked out by hand."""

import numpy as np
import pytest
import torch
from tests.helpers import dense_logprobs, tiny_llama

from trivium.build import load_artifact
from trivium.data.chat import Chat
from trivium.evaluation.intervals import Estimate
from trivium.evaluation.promotion import answer_logprobs, objections, pair_wins, verdict_wins

HOW = {"resamples": 400, "confidence": 0.95}


def asked(text):
    return [{"role": "user", "content": text}]


def said(text):
    return {"role": "assistant", "content": text}


def pair(id, prompt):
    return {"id": id, "chosen": [*asked(prompt), said("yes")], "rejected": [*asked(prompt), said("no")]}


def test_wins_of_pairs_worked_out_by_hand():
    """Margins of the new model 2, -1, 0, 3 and of the old 1, 1, 0, -2.

    It wins where its margin is larger: 1, 0, a tie, 1 -> 2.5 of 4. Right are margins above 0: new 1, 0, half, 1 = 2.5,
    old 1, 1, half, 0 = 2.5; the gain by pair is 0, -1, 0, 1.
    """
    pairs = [pair(str(i), f"q{i}") for i in range(4)]
    new = {"0": [-1, -3], "1": [-3, -2], "2": [-2, -2], "3": [-1, -4]}
    old = {"0": [-2, -3], "1": [-2, -3], "2": [-5, -5], "3": [-4, -2]}
    found = pair_wins(new, old, pairs, **HOW)
    assert {k: (e.value, e.count) for k, e in found.items()} == {
        "win_rate": (0.625, 4), "accuracy_new": (0.625, 4), "accuracy_incumbent": (0.625, 4), "gain": (0.0, 4),
    }  # fmt: skip
    assert found["win_rate"].low < 0.5 < found["win_rate"].high


def test_a_model_equal_to_the_incumbent_wins_half_and_is_not_promoted():
    pairs = [pair(str(i), f"q{i}") for i in range(50)]
    same = {str(i): [-1.0 - i, -2.0] for i in range(50)}
    wins = pair_wins(same, same, pairs, **HOW)
    assert (wins["win_rate"].value, wins["win_rate"].low, wins["win_rate"].high) == (0.5, 0.5, 0.5)
    (why,) = objections(wins, 20, {}, {}, {})
    assert why == "on held-out feedback it wins 0.500 [0.500, 0.500] of the time, which is not surely more than half"


def test_intervals_resample_prompts_and_not_rows():
    """40 pairs of two prompts, one all won and one all lost: each resampling has 0, 1 or 2 of the won one."""
    pairs = [pair(str(i), "a" if i < 20 else "b") for i in range(40)]
    new = {str(i): [1.0 if i < 20 else -1.0, 0.0] for i in range(40)}
    wins = pair_wins(new, {str(i): [0.0, 0.0] for i in range(40)}, pairs, **HOW)["win_rate"]
    assert (wins.value, wins.low, wins.high, wins.count) == (0.5, 0.0, 1.0, 40)


def test_wins_of_verdicts_worked_out_by_hand():
    """Implicit rewards of liked answers 3, 1 and of disliked 2, 1: 3 beats both, 1 loses to 2 and ties 1: 2.5 of 4."""
    judged = [{"id": str(i), "messages": [*asked(f"q{i}"), said("a")], "label": i < 2} for i in range(4)]
    new, old = {"0": [-1], "1": [-2], "2": [-3], "3": [-4]}, {"0": [-4], "1": [-3], "2": [-5], "3": [-5]}
    found = verdict_wins(new, old, judged, **HOW)["win_rate"]
    assert (found.value, found.count) == (0.625, 4) and found.low < 0.5
    assert verdict_wins(new, old, judged[:2], **HOW) == {}  # nothing disliked to compare with


def test_log_probabilities_are_of_the_last_turn_alone(tuned):
    """Against a dense forward pass of each conversation by itself; an earlier answer is no part of the sum."""
    tokenizer = load_artifact(str(tuned)).tokenizer
    model = tiny_llama(tokenizer.vocab_size, context=128)
    more = [*asked("one"), said("two"), *asked("three")]
    pairs = [{"id": "a", "chosen": [*more, said("four")], "rejected": [*more, said("five six")]}]
    judged = [{"id": "b", "messages": [*more, said("four")], "label": True}]
    chat = Chat(tokenizer)
    sides = [{"id": "x", "messages": m} for m in (pairs[0]["chosen"], pairs[0]["rejected"])]
    with torch.no_grad():
        dense = [dense_logprobs(model, d).sum().item() for d in chat.encode(sides, "last_turn")]
    assert answer_logprobs(model, tokenizer, pairs) == {"a": pytest.approx(dense, rel=1e-5)}
    assert answer_logprobs(model, tokenizer, judged) == {"b": pytest.approx(dense[:1], rel=1e-5)}


def figure(value, low, high):
    return {"value": value, "low": low, "high": high, "count": 10}


@pytest.mark.parametrize(
    ("wins", "gain", "before", "after", "why"),
    [
        ((0.6, 0.55, 0.65, 30), (0.0, -0.1, 0.1, 30), {}, {}, []),
        ((0.9, 0.8, 0.95, 19), None, {}, {}, ["19 rows of held-out feedback are too few to judge by; 20 are needed"]),
        (None, None, {}, {}, ["0 rows of held-out feedback are too few"]),
        ((0.6, 0.5, 0.7, 30), None, {}, {}, ["wins 0.600 [0.500, 0.700] of the time, which is not surely more"]),
        ((0.6, 0.55, 0.7, 30), (-0.2, -0.3, -0.1, 30), {}, {}, ["less often than the incumbent"]),
        # accuracy: more is better; 0.30 to 0.39 lies wholly below 0.40 to 0.50
        ((0.6, 0.55, 0.7, 30), None, {"accuracy": figure(0.45, 0.40, 0.50)}, {"accuracy": figure(0.35, 0.30, 0.39)},
         ["accuracy went from 0.450 to 0.350, clearly for the worse"]),
        ((0.6, 0.55, 0.7, 30), None, {"accuracy": figure(0.45, 0.40, 0.50)}, {"accuracy": figure(0.35, 0.30, 0.41)},
         []),
        # bits per byte: less is better; a task's figure has the direction of its measure
        ((0.6, 0.55, 0.7, 30), None, {"bits_per_byte": figure(2.0, 1.9, 2.1)}, {"bits_per_byte": figure(2.5, 2.2, 2.6)},
         ["bits_per_byte went from 2.000 to 2.500, clearly for the worse"]),
        ((0.6, 0.55, 0.7, 30), None, {"bits_per_byte": figure(2.5, 2.2, 2.6)}, {"bits_per_byte": figure(2.0, 1.9, 2.1)},
         []),
        ((0.6, 0.55, 0.7, 30), None, {"accuracy/copy": figure(0.9, 0.8, 1.0)}, {"accuracy/copy": figure(0.1, 0, 0.2)},
         ["accuracy/copy went from 0.900 to 0.100"]),
    ],
)  # fmt: skip
def test_decision(wins, gain, before, after, why):
    held_out = {k: Estimate(*v) for k, v in (("win_rate", wins), ("gain", gain)) if v}
    found = objections(held_out, 20, before, after, {"accuracy": 1, "bits_per_byte": -1})
    assert len(found) == len(why) and all(part in text for part, text in zip(why, found, strict=True)), found


def test_ties_between_verdicts_count_half():
    from trivium.evaluation.promotion import area

    assert area(np.array([1.0, 1.0]), np.array([True, False])) == 0.5
