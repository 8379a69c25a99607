"""The report and the terminal table, on small run folders written by hand."""

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from urllib.parse import urlparse

import pytest
from rich.console import Console

from trivium.errors import DataError
from trivium.lineage.report import Interval, load_run, smooth, summary_table, write_report


def put(folder: Path, manifest: dict | None = None, metrics: list | None = None, samples: list | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if manifest is not None:
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    for name, lines in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        if lines is not None:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def steps(*losses: float, **extra: float) -> list[dict]:
    """Steps of 100 tokens in half a second, 200 tokens/s."""
    made = {"tokens_per_second": 200.0, "step_seconds": 0.5}
    return [{"step": i, "train/loss": x, "tokens": 100 * i, **made, **extra} for i, x in enumerate(losses, 1)]


def measured(bits: tuple, accuracy: tuple, **tasks: float) -> dict:
    def entry(low: float, value: float, high: float) -> dict:
        return {"value": value, "low": low, "high": high, "count": 100}

    by_task = {f"accuracy/{task}": entry(value, value, value) for task, value in tasks.items()}
    return {"bits_per_byte": entry(*bits), "accuracy": entry(*accuracy), **by_task}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Three trained stages: the second costs bits and gains accuracy clearly, the third changes both within chance."""
    run = tmp_path / "runs" / "small"
    model = {"name": "llama", "parameters": 2570304}
    put(run / "tokenizer", {"phase": "tokenizer", "status": "done", "seconds": 2.0})
    tokenizer = {"role": "tokenizer", "path": "runs/small/tokenizer", "sha256": "aa11bb22cc33dd44"}
    before = {"role": "init_from", "path": "elsewhere/small/pretrain/checkpoints/step-4", "sha256": "ee55ff66ee55ff66"}
    facts = {"status": "done", "seconds": 75.2, "model": model, "domain": "primer"}
    put(
        run / "pretrain",
        {**facts, "phase": "pretrain", "steps": 4, "parents": [tokenizer], "config": {"optim": {"lr": 0.001}}},
        [*steps(8.0, 6.0, 5.0, 4.25), {"step": 4, "val/loss": 4.5}],
        [{"step": s, "prompt": "Once", "completion": f" upon {s}"} for s in (0, 2, 4)],
    )
    put(run / "sft", {**facts, "phase": "sft", "parents": [before, tokenizer]}, steps(3.0, 2.0))
    put(run / "third", {**facts, "phase": "sft"}, steps(1.0, 0.5))
    results = {
        "pretrain": measured((2.25, 2.3, 2.35), (0.1, 0.15, 0.2), add=0.05),
        "sft": measured((2.4, 2.425, 2.45), (0.6, 0.66, 0.7), add=0.75),
        "third": measured((2.39, 2.41, 2.43), (0.58, 0.65, 0.69), add=0.75),
    }
    answers = {"pretrain": "<script>alert('x')</script>", "sft": "five \ud800", "third": ""}
    stages = [{"name": "tokenizer", "phase": "tokenizer", "path": "tokenizer"}]
    for name, found in results.items():
        put(run / f"evaluate_{name}", {"phase": "evaluate", "status": "done", "results": found})
        sample = {"prompt": "What is 2 + 3?", "completion": answers[name], "kind": "generate"}
        put(run / f"generate_{name}", {"phase": "generate", "status": "done"}, samples=[sample])
        stages.append({"name": name, "phase": "pretrain" if name == "pretrain" else "sft", "path": name})
        stages += [
            {"name": f"{p}_{name}", "phase": p, "of": name, "path": f"{p}_{name}"} for p in ("evaluate", "generate")
        ]
    put(
        run / "chat",
        {"phase": "chat"},
        samples=[{"prompt": "I am <b>Clara</b>.", "completion": "Hello!", "kind": "chat"}],
    )
    stages.append({"name": "chat", "phase": "chat", "of": "third", "path": "chat"})
    put(
        run,
        {
            "phase": "pipeline",
            "name": "small",
            "status": "done",
            "seconds": 352.0,
            "started": "2026-11-24T10:30:00+01:00",
            "stages": stages,
            "next_commands": ["python launch.py phase=chat init_from=runs/small/sft && echo 'done'"],
        },
    )
    return run


def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def text_of(html: str) -> str:
    """What a reader sees, spaces collapsed."""
    words: list[str] = []

    class Reader(HTMLParser):
        inside_style = False

        def handle_starttag(self, tag, attrs):
            self.inside_style = tag == "style"

        def handle_data(self, data):
            if not self.inside_style:
                words.append(data)

        def handle_endtag(self, tag):
            self.inside_style = False

    Reader().feed(html)
    return " ".join(" ".join(words).split())


def terminal(folder: Path, width: int = 80) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(summary_table(folder))
    return console.export_text()


def test_page_says_what_each_stage_gained_and_cost(pipeline):
    """Bits 2.300 -> 2.425 is a cost of 0.125; accuracy 15% -> 66% gains 51 points.

    The third stage's intervals (2.39-2.43 against 2.40-2.45, 58-69% against 60-70%) overlap: grey.
    """
    changes = re.findall(r'<span class="change (\w+)" title="against (\w+)">([^<]*)</span>', page(pipeline))
    assert changes == [
        ("cost", "pretrain", "cost 0.125"),
        ("gained", "pretrain", "gained 51.0 points"),
        ("faint", "sft", "gained 0.015"),
        ("faint", "sft", "cost 1.0 points"),
    ]


def test_page_shows_header_figures_and_tasks(pipeline):
    seen = text_of(page(pipeline))
    assert "pretrain → sft → sft on primer · llama · 2026-11-24 09:30 UTC · 5m 52s" in seen
    assert "parameters 2.57M tokens trained on 800 bits per byte 2.300 → 2.410 mean accuracy 15.0% → 65.0%" in seen
    assert "pretrain pretrain 4 400 1m 15s 200 4.250 4.500 2.300 2.250–2.350 15.0% 10.0–20.0" in seen
    assert "add 5.0% 5.0–5.0 75.0% 75.0–75.0 75.0% 75.0–75.0 mean of tasks 15.0%" in seen


def test_completions_are_escaped(pipeline):
    html = page(pipeline)
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert "<b>Clara" not in html and "I am <b>Clara</b>." in text_of(html)
    assert "five ?" in html  # a lone surrogate has no UTF-8


def test_prompts_stand_side_by_side(pipeline):
    seen = text_of(page(pipeline))
    assert "prompt pretrain sft third What is 2 + 3? <script>alert('x')</script> five ? (nothing)" in seen
    assert "While pretrain trained prompt step 0 step 2 step 4 Once upon 0 upon 2 upon 4" in seen
    assert "Chat with third I am <b>Clara</b>. Hello!" in seen


def test_lineage_nests_stages_and_shortens_hashes(pipeline):
    """sft's parent is a checkpoint inside pretrain, and the run was moved since: run and stage name still decide."""
    html = page(pipeline)
    tree = html[html.index('<ul class="tree">') : html.index("Resolved config")]
    assert "sft from init_from pretrain ee55ff66ee tokenizer aa11bb22cc" in text_of(tree)
    opened = {name: before.count("<ul") - before.count("</ul") for before, name in _names(tree)}
    # third names no parent, so it is a root
    assert opened == {
        "tokenizer": 1,
        **{"pretrain": 2, "evaluate_pretrain": 3, "generate_pretrain": 3},
        **{"sft": 3, "evaluate_sft": 4, "generate_sft": 4},
        **{"third": 1, "evaluate_third": 2, "generate_third": 2, "chat": 2},
    }


def _names(tree: str) -> list[tuple[str, str]]:
    return [(tree[: m.start()], m[1]) for m in re.finditer(r"<em>(\w+)</em>", tree)]


def test_page_stands_alone(pipeline):
    """No script, nothing loaded from outside; one curve a trained stage, in colours that follow the page."""
    html = page(pipeline)
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)|url\(([^)]+)\)|@import""", html)
    assert all(not urlparse("".join(link).strip("\"'")).netloc for link in links)
    assert html.count("<svg") == html.count("<figure") == 3
    assert "var(--train, " in html and "<!DOCTYPE svg" not in html and "<?xml" not in html
    assert "<summary>pretrain</summary><pre>{\n  &#34;optim&#34;" in html
    assert "python launch.py phase=chat init_from=runs/small/sft &amp;&amp; echo &#39;done&#39;</pre>" in html
    assert [p.name for p in pipeline.glob("*.html*")] == ["report.html"]
    assert not list(pipeline.glob(".report*"))


def test_same_run_gives_the_same_bytes(pipeline):
    assert page(pipeline) == page(pipeline)


def test_table_has_the_same_figures_in_80_characters(pipeline):
    lines = [line.split() for line in terminal(pipeline).splitlines()]
    assert ["pretrain", "pretrain", "4", "400", "1m", "15s", "200", "4.250", "4.500", "2.300", "15.0%"] in lines
    assert ["2.250–2.350", "10.0–20.0"] in lines
    assert [c.header for c in summary_table(pipeline).columns] == [
        *("stage", "phase", "steps", "tokens", "time", "tokens/s", "train loss", "val loss"),
        *("bits per byte", "mean accuracy"),
    ]


def test_running_stage_skips_half_lines_and_empty_columns(tmp_path):
    """The manifest is missing and the last line is cut amid a character; loss is that of the last whole line.

    Time falls back to the steps' own: 3 x 0.5 s. Without validation or evaluation there are no such columns.
    """
    put(tmp_path, metrics=steps(3.0, 2.5, 2.0))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 4, "train/loss": 1.0, "note": "é'.encode()[:-1])
    table = summary_table(tmp_path)
    assert [c.header for c in table.columns] == ["stage", "steps", "tokens", "time", "tokens/s", "train loss"]
    assert [str(next(iter(c.cells))) for c in table.columns] == [tmp_path.name, "3", "300", "1.5s", "200", "2.000"]
    html = page(tmp_path)
    assert html.count("<svg") == 1
    headings = re.findall(r"<h2>([^<]*)</h2>", html)
    assert headings == ["Figures", "Training", "Lineage"]


def test_resumed_steps_count_once(tmp_path):
    """A run that stopped at 3 and resumed from 1 logs 2 again: the later line is of the step the weights took."""
    again = [{"step": 2, "train/loss": 2.25, "tokens": 200}]
    put(tmp_path, {"phase": "pretrain"}, [*steps(3.0, 9.0), *again, {"step": 3, "train/loss": float("nan")}])
    stage = load_run(tmp_path).stages[0]
    assert stage.curve("train/loss") == [(1, 3.0), (2, 2.25)]
    assert "running" in page(tmp_path)


def test_pipeline_that_just_started_shows_what_there_is(tmp_path):
    stages = [{"name": "pretrain", "phase": "pretrain", "path": "pretrain"}]
    put(tmp_path, {"phase": "pipeline", "name": "new", "status": "running", "stages": stages})
    assert "new running pretrain pretrain waiting" in text_of(page(tmp_path))
    assert summary_table(tmp_path).row_count == 0


def test_lone_evaluation_and_generation_are_shown(tmp_path):
    put(tmp_path / "e", {"phase": "evaluate", "results": measured((2.0, 2.05, 2.1), (0.4, 0.5, 0.6))})
    assert "2.050" in terminal(tmp_path / "e") and "40.0–60.0" in terminal(tmp_path / "e")
    put(tmp_path / "g", {"phase": "generate"}, samples=[{"prompt": "a", "completion": "b"}, {"prompt": "a"}, 7])
    assert "prompt g a b" in text_of(page(tmp_path / "g"))


def test_folder_without_a_run_is_an_error_that_helps(tmp_path):
    with pytest.raises(DataError, match="no MANIFEST.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_overlap_needs_both_intervals():
    assert Interval(1.0, 0.9, 1.1).overlaps(Interval(1.2, 1.1, 1.3))
    assert not Interval(1.0, 0.9, 1.1).overlaps(Interval(1.2, 1.15, 1.3))
    assert not Interval(1.0).overlaps(Interval(1.0))


def test_smoothing_keeps_a_straight_line():
    """A centred mean of a line is the line: the smoothed loss neither lags nor leads."""
    line = [10 - 0.01 * i for i in range(400)]
    assert smooth(line) == pytest.approx(line, abs=1e-9)
