"""Two runs on the same data share one tokenised table, whatever they are called and wherever they lie."""

import pytest

from trivium.data import cache


def tables(folder):
    """Every file of the tokenised tables: its size, its place on the disk, when it was written."""
    return {p: (s.st_size, s.st_ino, s.st_mtime_ns) for p in (folder / "tables").glob("*/*") for s in [p.stat()]}


@pytest.mark.parametrize("phase", ["pretraining", "tuning"])
def test_a_second_run_tokenises_nothing(phase, main, request, tmp_path, monkeypatch):
    """Training and held-out data. Another seed orders the same rows otherwise; another length is other documents."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    made = []
    for name in ("_write_table", "_write_plan"):
        real = getattr(cache, name)
        monkeypatch.setattr(cache, name, lambda *a, name=name, real=real: (made.append(name), real(*a))[1])
    overrides = request.getfixturevalue(phase)
    settings = ("trainer.max_steps=2", "validation.every_steps=2")

    def run(runs, name, *more):
        made.clear()
        done = main(*overrides(tmp_path / runs, name, *settings, *more))
        assert done.code == 0, done.err
        return tables(tmp_path / "cache")

    before = run("here", "first")
    assert made == ["_write_table", "_write_plan", "_write_table"] and len({p.parent for p in before}) == 2
    assert run("there", "second", "trainer.max_steps=3", "optim.lr=1e-3") == before and made == []
    assert run("there", "third", "seed=7") == before and made == ["_write_plan"]
    after = run("there", "fourth", "batch.length=48")
    assert made == ["_write_table", "_write_plan", "_write_table"] and before.items() < after.items()
