"""The same folder with another setting: refused before anything is changed, by the name of what differs."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trivium.selftest.crashes import SETTINGS
from trivium.selftest.harness import Bench, Row, ensure, one_sentence, tally

MISMATCHES = (
    ("data fingerprint", "data.path={other}"),
    ("tokenizer fingerprint", "tokenizer.path={tokenizer}"),
    ("tokenizer fingerprint", "tokenizer.path={template}"),  # the same vocabulary with another chat template
    ("seed", "seed=1"),
    ("batch.size", "batch.size=8"),
    ("batch.length", "batch.length=32"),
    ("optim.lr", "optim.lr=2e-3"),
    ("optim.weight_decay", "optim.weight_decay=0"),
    ("schedule", "schedule=linear"),
    ("model.layers", "model.layers=1"),
    ("model.dropout", "model.dropout=0.2"),
    ("objective", "objective.z_loss=1e-4"),
    ("precision", "precision=bf16_true"),  # the only one that `auto` is on no machine
    ("trainer.grad_clip", "trainer.grad_clip=0.5"),
    ("guard.policy", "guard.policy=skip"),
    ("parent", "init_from={parent}"),
)
"""What must be named, and the setting that is another."""


def refuse(bench: Bench, count: int = len(MISMATCHES)) -> Row:
    """Each mismatch, on a finished run that would else go on to more steps."""
    run = bench.once("mismatched", lambda path: bench.finish(bench.command("pretrain", path, *SETTINGS)))
    own = run / "checkpoints/step-12/tokenizer"
    before = _bytes(run)

    def check(item: tuple[str, str]) -> str:
        named, change = item
        files = {}
        if "{parent}" in change:
            files["parent"] = bench.unbroken("pretrain", *SETTINGS, "seed=7")
        for name, make in (("other", _other), ("template", lambda p: _template(own, p)), ("tokenizer", vocabulary)):
            if f"{{{name}}}" in change:
                files[name] = bench.once(f"made/{name}", make)
        more = ("trainer.max_steps=14", change.format(**files))
        said = one_sentence(bench.fork(*bench.command("pretrain", run, *SETTINGS, *more)).done())
        ensure("holds another run" in said and f"{named} was" in said or f"{named}." in said, f"{named}: {said}")
        ensure(_bytes(run) == before, f"{named}: a refused start changed the run")
        return named

    def vocabulary(path: Path) -> None:
        """A tokenizer of another size on the same data."""
        settings = [o for o in bench.command("pretrain", path) if o.startswith(("data.", "domain"))]
        bench.finish(
            [*settings, "phase=tokenizer", "tokenizer.vocab_size=310", f"runs={path.parent}", f"name={path.name}"]
        )

    found = []
    for item in MISMATCHES[:count]:  # one after the other: the folder has one lock
        found += bench.each(check, [item])
    return tally("resume with another setting", found, lambda _: "refused by name; no byte changed")


def _bytes(run: Path) -> dict[str, str]:
    files = [p for p in run.rglob("*") if p.is_file() and p.name not in ("log.txt", ".lock")]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _other(path: Path) -> None:
    path.mkdir()
    for i in range(60):
        (path / f"{i}.txt").write_text(f"the heron number {i} stands in the river and waits " * 8)


def _template(tokenizer: Path, path: Path) -> None:
    path.mkdir()
    (path / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    config = (tokenizer / "tokenizer_config.json").read_text()
    changed = config.replace("<|end|>{% endfor %}", "<|end|> {% endfor %}")
    ensure(changed != config, "the template has another form than this test knows")
    (path / "tokenizer_config.json").write_text(changed)
