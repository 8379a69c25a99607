"""What each stage of the main job gained and cost, over several seeds, as the Markdown table in README.

    for seed in 0 1 2; do python launch.py seed=$seed name=seed$seed; done
    python benchmarks/main_job.py runs/seed0 runs/seed1 runs/seed2

Reads only the manifests that the runs leave behind.
"""

import json
import sys
from pathlib import Path

TASK = "accuracy/reverse"
"""The kind of task that the primer's rlhf is trained on."""
ROWS = (  # what, measure, digits, scale, stages in order
    ("DPO: chosen over rejected", "preference", 0, 100, ("sft", "preference")),
    ("DPO: bits per byte", "bits_per_byte", 3, 1, ("sft", "preference")),
    ("reward model: chosen over rejected", "preference", 0, 100, ("reward",)),
    ("GRPO: greedy accuracy on its task", TASK, 0, 100, ("preference", "rlhf")),
    ("GRPO: bits per byte", "bits_per_byte", 3, 1, ("preference", "rlhf")),
    ("student alone, taught: KL to the teacher", "kl_to_teacher", 3, 1, ("student_alone", "distill")),
    ("student alone, taught: bits per byte", "bits_per_byte", 3, 1, ("student_alone", "distill")),
    ("student alone, taught: mean accuracy", "accuracy", 0, 100, ("student_alone", "distill")),
)


def cell(run: Path, measure: str, digits: int, scale: float, stages: tuple[str, ...]) -> str:
    """The figure after each stage, each with its interval."""
    shown = []
    for stage in stages:
        e = json.loads((run / f"evaluate_{stage}" / "MANIFEST.json").read_text())["results"][measure]
        value, low, high = (f"{scale * e[k]:.{digits}f}" for k in ("value", "low", "high"))
        shown.append(f"{value} [{low}, {high}]")
    return " → ".join(shown)


def main(runs: list[Path]) -> None:
    """Print the table, and how long each run took."""
    print(f"| | {' | '.join(r.name for r in runs)} |\n| --- |{' --- |' * len(runs)}")
    for what, *how in ROWS:
        print(f"| {what} | {' | '.join(cell(r, *how) for r in runs)} |")
    seconds = [json.loads((r / "MANIFEST.json").read_text())["seconds"] for r in runs]
    print(f"| minutes | {' | '.join(f'{s / 60:.1f}' for s in seconds)} |")


if __name__ == "__main__":
    main([Path(a) for a in sys.argv[1:]])
