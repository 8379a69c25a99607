"""The bundled plugin `reasoning`: splits that never meet, and verdicts that no known weakness of a verifier changes."""

import threading

import pytest

from trivium.errors import ConfigError, DataError
from trivium.testing.contracts import SourceContract
from trivium_plugins.reasoning.config import DEFAULT_TASKS, ReasoningConfig
from trivium_plugins.reasoning.source import Reasoning

pytest.importorskip("reasoning_gym", reason="NOT TESTED: pip install 'trivium-llm[reasoning]'")
SPLITS = ("train", "validation", "test")


def reasoning(*tasks, **settings):
    return Reasoning(ReasoningConfig(**({"tasks": list(tasks)} if tasks else {}), **settings))


def scored(task, answer, completion, **settings):
    """The verdict on `completion` for the first problem of a task whose right answer is `answer`."""
    source = reasoning(task, **settings)
    example = next(e for e in (source[i] for i in range(3000)) if e["answer"] == answer)
    return source.score(example, completion)


class TestDefault(SourceContract):
    def make(self):
        return reasoning(num_examples=60)


class TestWorked(SourceContract):
    def make(self):
        return reasoning("gsm_symbolic", "countdown", num_examples=20, worked=True, split="test")


def test_tasks_take_turns():
    source = reasoning(num_examples=12)
    assert [source[i]["task"] for i in range(12)] == [*DEFAULT_TASKS, *DEFAULT_TASKS]


def test_splits_share_no_problem_whatever_the_seed():
    asked = {s: set() for s in SPLITS}
    for split in SPLITS:
        for seed in (0, 1):
            source = reasoning(num_examples=300, split=split, seed=seed)
            asked[split] |= {source[i]["messages"][0]["content"] for i in range(300)}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]
    assert not asked["test"] & asked["validation"]
    assert len(asked["train"]) > 450


def test_a_seed_and_a_setting_change_what_is_made():
    first = reasoning("chain_sum", num_examples=5)
    assert first[0] != reasoning("chain_sum", num_examples=5, seed=1)[0]
    small = reasoning("chain_sum", num_examples=40, settings=["chain_sum.max_terms=2", "chain_sum.max_digits=1"])
    assert all(-9 <= int(small[i]["answer"]) <= 18 for i in range(40))
    assert len({s.fingerprint for s in (first, small, reasoning("chain_sum", num_examples=5, split="test"))}) == 3


@pytest.mark.parametrize("task", ["basic_arithmetic", "chain_sum"])
def test_a_minus_sign_counts(task):
    """The default verifier gives "-3" half a point for 3; a "3" for -3 is as wrong."""
    assert scored(task, "-3", "-3").correct and scored(task, "-3", " -3.\n").correct
    for answer, given in (("3", "-3"), ("-3", "3"), ("3", "13"), ("3", "3 and 4"), ("3", "")):
        verdict = scored(task, answer, given, partial_credit=True)
        assert not verdict.correct and verdict.value == 0, (answer, given)


def test_gsm_symbolic_reads_the_sign_that_its_verifier_drops():
    """Its pattern finds 7 in "-7", so that the package itself gives -7 a full point for 7."""
    from reasoning_gym.factory import create_dataset

    source = reasoning("gsm_symbolic", num_examples=5)
    example = source[0]
    wrong = f"-{example['answer']}"
    made = create_dataset("gsm_symbolic", seed=0, size=100_000)
    assert made.score_answer(wrong, made[example["problem"]]) == 1.0
    assert not source.score(example, f"Some steps.\n#### {wrong}").correct
    assert source.score(example, f"Some steps.\n#### {example['answer']}").correct


def test_partial_credit_is_the_packages_own():
    """Spelling backward gives a share for each letter in its place: of "ylsuoremet", 9 of 10."""
    source = reasoning("spell_backward", num_examples=50, partial_credit=True)
    example = next(e for e in (source[i] for i in range(50)) if len(e["answer"]) == 10)
    nearly = example["answer"][:9] + ("x" if example["answer"][9] != "x" else "y")
    verdict = source.score(example, nearly)
    assert verdict.value == pytest.approx(0.9) and not verdict.correct
    assert reasoning("spell_backward", num_examples=50).score(example, nearly).value == 0.0


def test_a_verdict_is_the_same_on_another_thread():
    source = reasoning("countdown", "spell_backward", "gcd", num_examples=9)
    found = []
    judge = threading.Thread(target=lambda: found.extend(source.score(e, e["answer"]) for e in source))
    judge.start()
    judge.join()
    assert [s.value for s in found] == [1.0] * 9


def test_a_verifier_that_refuses_its_own_answer_is_refused(monkeypatch):
    """As one does that needs the main thread and says 0 elsewhere."""
    source = reasoning("spell_backward", num_examples=3)
    gym = source._gyms["spell_backward"]
    main = threading.main_thread()
    true = gym._made.score_answer
    monkeypatch.setattr(
        gym._made, "score_answer", lambda a, e: true(a, e) if threading.current_thread() is main else 0.0
    )
    assert source.score(source[0], source[0]["answer"]).correct
    caught = []

    def judge():
        try:
            source.score(source[0], source[0]["answer"])
        except DataError as error:
            caught.append(str(error))

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert len(caught) == 1 and "gives its own right answer 0.0 instead of 1" in caught[0]


def test_worked_solutions_end_in_the_answer():
    source = reasoning("gsm_symbolic", num_examples=4, worked=True)
    for example in source:
        assert example["messages"][-1]["content"].endswith(f"\n#### {example['answer']}")
    assert reasoning("gsm_symbolic", num_examples=4)[0]["messages"][-1]["content"] == source[0]["answer"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tasks": ["chain_sums"]}, "Did you mean chain_sum"),
        ({"tasks": ["boxnet"]}, "gives no right answer"),
        ({"tasks": ["composite"]}, "does not make with its own settings"),
        ({"tasks": ["gcd"], "settings": ["gcd.size_of=3"]}, "does not make with"),
        ({"tasks": ["gcd"], "settings": ["chain_sum.max_terms=3"]}, "is not TASK.NAME=VALUE of one of gcd"),
        ({"tasks": []}, "at least one task"),
    ],
)
def test_what_cannot_be_made_is_refused(settings, sentence):
    with pytest.raises((ConfigError, DataError), match=sentence):
        Reasoning(ReasoningConfig(**settings))
