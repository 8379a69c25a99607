"""The doctor on every shipped pack, in each phase that trains on it: nothing is found, so nothing is a false alarm."""

import pickle

import pytest

from trivium.build import build_source
from trivium.compose import compose, options, run_config
from trivium.errors import DataError
from trivium.phases.doctor import doctor
from trivium.plugin import discover
from trivium.schema import TRAINING_PHASES

SAMPLED = ("books", "chat", "preferences", "code", "finance", "legal", "medical", "translate")
"""Packs that ship a few examples of what they fetch; the others make theirs, or read them from this very Python."""
MORE = {
    "code/rlhf": ["data.run_code=true"],
    "medical/sft": ["data.parts=[codes]"],  # definitions may not be shipped
}
OWN = ("files", "hub", "mixture")

discover()
CASES = [o for o in options("data") if o.partition("/")[2] in TRAINING_PHASES and o.partition("/")[0] not in OWN]


def test_every_pack_is_asked():
    assert {case.partition("/")[0] for case in CASES} == {*SAMPLED, "primer", "passkey", "reasoning", "summarise"}
    assert len(CASES) >= 33


@pytest.mark.parametrize("case", sorted({case.partition("/")[0]: case for case in reversed(CASES)}.values()))
def test_every_pack_can_be_given_to_processes_that_make_tokens_of_it(case):
    """What cannot is read by one process, which nobody would notice."""
    domain, _, phase = case.partition("/")
    settings = [f"phase={phase}", f"domain={domain}", *["data.sample=true"] * (domain in SAMPLED), *MORE.get(case, [])]
    try:
        source = build_source(run_config(compose(settings)).data, phase)
    except DataError as error:
        pytest.skip(f"NOT TESTED ON {domain.upper()}: {error}")
    there = pickle.loads(pickle.dumps(source, protocol=5))
    assert [there[i] for i in range(3)] == [source[i] for i in range(3)]


@pytest.mark.slow  # minutes in all
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_found_in_what_is_shipped(case, tmp_path_factory, monkeypatch, capsys):
    """In rows of the pack's recipe, with the tokenizer that would be trained: all rules, and what is told of rows."""
    if case.startswith("reasoning"):
        pytest.importorskip("reasoning_gym", reason="NOT TESTED ON REASONING: pip install reasoning-gym")
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path_factory.getbasetemp() / "packs"))
    domain, _, phase = case.partition("/")
    settings = [f"phase={phase}", f"domain={domain}"]
    settings += ["batch.size=1", "batch.micro_size=1"]  # what a step takes is not asked here
    settings += ["data.sample=true"] * (domain in SAMPLED) + MORE.get(case, [])
    code = doctor([*settings, "--show", "5", "--rules"])
    told = capsys.readouterr().out
    assert code == 0 and ", 0 broken" in told and told.rstrip().endswith(": clean"), told[-3000:]
    assert told.count("\nexample ") >= 1  # some samples are smaller than five
