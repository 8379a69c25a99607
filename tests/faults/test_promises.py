"""Real runs, killed, filled, flipped and signalled: every promise of docs/reliability.md, by `selftest faults` itself.

Here a part of every kind; all of them, which takes as long as the verb, with `-m slow`. Each prints its row.
"""

import random

import pytest

from trivium.selftest.harness import Bench
from trivium.selftest.verb import parts

SEED = random.randrange(10**6)
QUICK, WHOLE = parts(True, SEED), parts(False, SEED)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("faults"))
    yield bench
    bench.close()


def kept(row):
    print(row)
    if row.skipped:
        pytest.skip(row.worst)
    assert row.ok, f"seed {SEED}: {row}\n" + "\n".join(row.faults)


@pytest.mark.parametrize("name", QUICK)
def test_promise_is_kept_in_a_few_cases(name, bench):
    kept(QUICK[name](bench))


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_promise_is_kept(name, bench):
    kept(WHOLE[name](bench))
