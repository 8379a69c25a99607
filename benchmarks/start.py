"""How soon training begins on 100 MB of text whose tokens are in the cache.

    python benchmarks/start.py [MEGABYTES]

The primer's novels, again and again with other words in front, as one .txt file, `phase=pretrain domain=files`. The
first run fills the cache; then rounds, each a process and a run of its own. The clock starts when the process is up:
torch and all that a training run imports are loaded, and `run` is about to be called with the composed settings. It
stops where the first step's forward pass begins, its batches being there. What imports took is told beside it.
"""

import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenising import write_text

MEGABYTES, ROUNDS = 100.0, 5


def begin(folder: Path, name: str, profiled: bool) -> None:
    """One run of a single step; prints its seconds as JSON."""
    from rich.console import Console

    from trivium.compose import compose, run_config
    from trivium.phases.start import run
    from trivium.training.objective_module import ObjectiveModule

    settings = ["phase=pretrain", "domain=files", f"data.path={folder / 'text.txt'}", f"runs={folder}", f"name={name}"]
    settings += ["trainer.max_steps=1", "samples.every_steps=0", "data.contamination=warn"]  # the novels come again
    imported = time.process_time()
    began, worked = time.perf_counter(), time.process_time()
    found, profile, real = {}, cProfile.Profile(), ObjectiveModule.take_step

    def take_step(self, micro_batches):
        if not found:
            profile.disable()
            found.update(seconds=time.perf_counter() - began, cpu=time.process_time() - worked)
        return real(self, micro_batches)

    ObjectiveModule.take_step = take_step
    if profiled:
        profile.enable()
    run(run_config(compose(settings)), Console(quiet=True))
    if profiled:
        pstats.Stats(profile).sort_stats("cumtime").print_stats(60)
    print(json.dumps({**found, "imports": imported}))


def measure(folder: Path, name: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "run", str(folder), name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(megabytes: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TRIVIUM_CACHE"] = str(folder / "cache")
        write_text(folder / "text.txt", megabytes)
        first = measure(folder, "first")
        rounds = [measure(folder, f"run{number}") for number in range(ROUNDS)]
        middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        every = ", ".join(f"{r['seconds']:.2f}" for r in rounds)
        print(f"{megabytes:.0f} MB of text: {first['seconds']:.1f} s to the first step while nothing is cached,")
        print(
            f"then {middle['seconds']:.2f} s ({every}), {middle['cpu']:.2f} s of CPU; imports {middle['imports']:.2f} s"
        )


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("run", "profile"):
        begin(Path(sys.argv[2]), sys.argv[3], sys.argv[1] == "profile")
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else MEGABYTES)
