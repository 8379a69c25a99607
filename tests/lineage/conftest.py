"""Run folders written by hand: the main job as it would leave them, small enough to know every figure."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

BIG, HALF = 2_570_304, 1_182_592
PROMPTS = ("It was a dark night, and", "Define the word river.", "What is 23 + 45?", "Reverse: r i v e r",
           "Which is larger, 41 or 14?", "My name is Alice. What is my name?")  # fmt: skip
ANSWERS = {
    "pretrain": (
        "the old man had been obliged to remain in the house for a moment before he could speak to her again, "
        "and when he had done so she looked at him with an air of great surprise and said nothing at all.",
        "It was not long before the party returned to the drawing-room.",
        "“I have no doubt of it,” said she.",
        "and the river was very wide, and the boat was very small, and",
        "“Yes, sir.”",
        "<i>Alice</i> & the Queen",
    ),
    "sft": ("the wind was high.", "A large stream of water.", "67", "r e v i r", "41", "Alice."),
    "preference": ("the wind was high.", "A large natural stream of water.", "67", "r e v i r", "41", "Alice."),
    "rlhf": ("the wind was high.", "A large natural stream of water.", "68", "r e v i r", "41", "Your name is Alice."),
    "student_alone": ("and and the", "A thing that is a thing.", "5", "r i v r", "14", ""),
    "distill": ("the wind was.", "A stream of water.", "58", "r e v i r", "41", "Your name is Anne."),
}
# value and half the interval of: bits per byte, accuracy, chosen over rejected, reward, KL to the teacher
MEASURED = {
    "pretrain": ((1.791, 0.036), (0.004, 0.004), (0.512, 0.044), (0.021, 0.008), None),
    "sft": ((2.183, 0.060), (0.548, 0.044), (0.604, 0.043), (0.412, 0.033), None),
    "preference": ((2.201, 0.061), (0.571, 0.044), (0.866, 0.030), (0.437, 0.033), None),
    "reward": (None, None, (0.912, 0.025), None, None),
    "rlhf": ((2.214, 0.062), (0.688, 0.041), (0.871, 0.029), (0.662, 0.030), None),
    "student_alone": ((3.402, 0.090), (0.331, 0.041), (0.552, 0.044), (0.243, 0.030), (0.484, 0.021)),
    "distill": ((3.104, 0.085), (0.452, 0.044), (0.748, 0.038), (0.391, 0.033), (0.121, 0.009)),
}
MEASURES = ("bits_per_byte", "accuracy", "preference", "reward", "kl_to_teacher")
TASKS = {"add": -0.35, "compare": 0.1, "copy": 0.25, "count": 0.2, "reverse": 0.1, "subtract": -0.3}


def write(folder: Path, manifest: dict | None = None, metrics: list | None = None, samples: list | None = None) -> None:
    """Write the files of one stage; those that are None are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    if manifest is not None:
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    for name, lines in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        if lines is not None:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def put() -> Callable[..., None]:
    return write


def estimate(value: float, around: float, least: float = -math.inf, most: float = math.inf) -> dict:
    return {"value": value, "low": max(least, value - around), "high": min(most, value + around), "count": 504}


def results_of(name: str) -> dict:
    made = {}
    for measure, entry in zip(MEASURES, MEASURED[name], strict=True):
        if entry is None:
            continue
        share = (0, 1) if measure in ("accuracy", "preference") else ()
        made[measure] = estimate(*entry, *share)
        if share and name != "pretrain":
            for task, shift in TASKS.items():
                made[f"{measure}/{task}"] = estimate(min(1.0, max(0.0, entry[0] + shift)), 0.08, 0, 1)
    return made


def curve(phase: str, steps: int) -> list[dict]:
    """A metrics.jsonl as the phase writes it: a falling loss with noise, and what else it logs."""
    draw = random.Random(phase)
    first, last = {"preference": (0.69, 0.31), "reward": (0.69, 0.22), "distill": (1.9, 0.15)}.get(phase, (7.6, 4.45))
    lines = []
    for step in range(1, steps + 1):
        way = 1 - math.exp(-4 * step / steps)
        line = {"step": step, "train/loss": first + (last - first) * way + draw.gauss(0, 0.08) * first / 4}
        line |= {"tokens": 2048 * step, "step_seconds": 0.2, "tokens_per_second": draw.gauss(10_000, 300)}
        if phase in ("preference", "reward"):
            line["train/accuracy"] = min(1.0, 0.5 + 0.4 * way + draw.gauss(0, 0.06))
        if phase == "rlhf":
            line |= {"train/loss": draw.gauss(0, 0.01), "rollout/reward": 0.43 + 0.23 * way + draw.gauss(0, 0.05)}
            line |= {"rollout/length": 9 - 3 * way + draw.gauss(0, 0.4), "rollout/kl": 0.02 * way}
        elif step % max(1, steps // 6) == 0:
            line["val/loss"] = first + (last - first) * way + 0.1 * first / 4
        lines.append(line)
    return lines


def write_three_phases(run: Path, keep: int | None = None) -> Path:
    """The main job's folder, done; with `keep`, that many of its stages are there and the run is still going."""
    stages: list[dict] = []

    def parent(role: str, name: str) -> dict:
        path = f"runs/three_phases-primer/{name}" + ("" if name == "tokenizer" else "/checkpoints/step-300")
        return {"role": role, "path": path, "sha256": f"{hash_of(name):064x}"}

    def add(name: str, phase: str, facts: dict, metrics: list | None = None, samples: list | None = None) -> None:
        of, versus = facts.pop("of", None), facts.pop("versus", None)
        stages.append({"name": name, "phase": phase, "path": name}
                      | ({"of": of} if of else {}) | ({"versus": versus} if versus else {}))  # fmt: skip
        if keep is None or len(stages) <= keep:
            manifest = {"name": f"three_phases-primer/{name}", "phase": phase, "domain": "primer", "status": "done"}
            write(run / name, {**manifest, "seconds": 4.0, "peak_memory": 1_050_000_000, **facts}, metrics, samples)

    add("tokenizer", "tokenizer", {"results": {"vocab_size": 4096}})
    plan = [
        ("pretrain", "pretrain", ("tokenizer", None), 520), ("sft", "sft", ("pretrain", None), 620),
        ("preference", "preference", ("sft", None), 120), ("reward", "reward", ("sft", None), 100),
        ("rlhf", "rlhf", ("preference", None), 80), ("student_alone", "sft", ("tokenizer", None), 300),
        ("distill", "distill", ("tokenizer", "rlhf"), 300),
    ]  # fmt: skip
    for name, phase, (origin, teacher), steps in plan:
        model = {"name": "llama", "parameters": HALF if name in ("student_alone", "distill") else BIG}
        parents = [parent("init_from", origin)]
        parents += [parent("reference", origin)] if phase in ("preference", "rlhf") else []
        parents += [parent("teacher", teacher)] if teacher else []
        facts = {"model": model, "parents": parents, "steps": steps, "tokens_seen": 2048 * steps, "seconds": steps / 5}
        facts |= {"peak_memory": 1_234_567_890, "config": {"phase": phase, "optim": {"lr": 0.001}}}
        facts |= {"versus": "student_alone"} if name == "distill" else {}
        said = [{"step": s, "prompt": "It was a", "completion": f"{'very ' * (s // 200)}dark night"}
                for s in (0, 260, 520)]  # fmt: skip
        add(name, phase, facts, curve(phase, steps), said if name == "pretrain" else None)
        add(f"evaluate_{name}", "evaluate", {"of": name, "results": results_of(name)})
        if name in ANSWERS:
            lines = [{"kind": "generate", "prompt": p, "completion": a}
                     for p, a in zip(PROMPTS, ANSWERS[name], strict=True)]  # fmt: skip
            add(f"generate_{name}", "generate", {"of": name}, samples=lines)
    talk = [("My name is Alice.", "Hello, Alice!"), ("What is my name?", "Your name is Alice.")]
    turns = [{"kind": "chat", "prompt": p, "completion": a} for p, a in talk]
    add("chat", "chat", {"of": "rlhf"}, samples=turns)
    shown = stages if keep is None else stages[:keep]
    facts = {"name": "three_phases-primer", "phase": "pipeline", "domain": "primer", "stages": shown, "result": "rlhf"}
    facts |= {"status": "done" if keep is None else "running", "seconds": 312.0, "left_out": []}
    facts |= {"started": "2026-11-24T10:30:00+00:00", "versions": {"python": "3.11.7", "torch": "2.13.0"}}
    folder = "runs/three_phases-primer/rlhf"
    commands = [f"python launch.py phase=chat init_from={folder}",
                f"python launch.py phase=generate init_from={folder} prompt='Reverse: r i v e r'"]  # fmt: skip
    write(run, facts | {"next_commands": commands if keep is None else []})
    return run


def hash_of(name: str) -> int:
    return random.Random(name).getrandbits(250)


@pytest.fixture
def three_phases(tmp_path: Path) -> Callable[..., Path]:
    """Writes the main job's folder; see `write_three_phases`."""
    return lambda keep=None: write_three_phases(tmp_path / "runs" / "three_phases-primer", keep)
