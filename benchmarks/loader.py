"""How long training waits for its data: the primer's pretraining, some steps, without data workers and with two.

    python benchmarks/loader.py [STEPS]

`time/data` of a row in metrics.jsonl is what a step waited until its batches were there; without workers that is the
whole time of making them. The first step is told apart: workers start beside it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS, WORKERS = 60, (0, 2)
ROOT = Path(__file__).resolve().parents[1]


def rows_of(folder: Path, steps: int, workers: int) -> list[dict]:
    name = f"workers{workers}"
    settings = ["phase=pretrain", f"runs={folder}", f"name={name}", f"trainer.max_steps={steps}"]
    settings += [f"trainer.workers={workers}", "validation.every_steps=0", "samples.every_steps=0"]
    done = subprocess.run([sys.executable, str(ROOT / "launch.py"), *settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def main(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for workers in WORKERS:
            rows = rows_of(Path(folder), steps, workers)
            shares = [
                sum(r["time/data"] for r in some) / sum(r["step_seconds"] for r in some) for some in (rows, rows[1:])
            ]
            longest = max(r["time/data"] for r in rows[1:])
            print(
                f"trainer.workers={workers}: {shares[0]:.2%} of {len(rows)} steps is waiting for data "
                f"({rows[0]['time/data']:.2f} s of it in the first), {shares[1]:.2%} from the second on, "
                f"{longest * 1000:.0f} ms at most; a step takes {rows[-1]['step_seconds']:.2f} s"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
