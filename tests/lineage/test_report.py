"""The report and the terminal table, on small run folders written by hand."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from urllib.parse import urlparse

import pytest
from rich.console import Console
from rich.table import Table

from trivium.errors import DataError
from trivium.lineage.curves import draw_curves, smooth
from trivium.lineage.report import summary_table, write_report
from trivium.lineage.runs import Interval, load_run


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
def pipeline(tmp_path: Path, put: Callable[..., None]) -> Path:
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
    tuned = {"role": "init_from", "path": "elsewhere/small/sft", "sha256": "0123456789abcdef"}
    put(run / "third", {**facts, "phase": "sft", "parents": [tuned]}, steps(1.0, 0.5))
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


def changes_of(html: str) -> list[tuple[str, str, str]]:
    """Tone, compared stage and text of every gain and cost in the table of results."""
    table = html[html.index("<caption>what each stage reached") :]
    table = table[: table.index("</table>")]
    return re.findall(r'<span class="change (\w+)" title="against (\w+)">([^<]*)</span>', table)


def terminal(folder: Path, width: int = 80) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(summary_table(folder))
    return console.export_text()


def test_page_says_what_each_stage_gained_and_cost(pipeline):
    """Bits 2.300 -> 2.425 is a cost of 0.125; accuracy 15% -> 66% gains 51 points.

    The third stage's intervals (2.39-2.43 against 2.40-2.45, 58-69% against 60-70%) overlap: grey.
    """
    assert changes_of(page(pipeline)) == [
        ("cost", "pretrain", "cost 0.125"),
        ("gained", "pretrain", "gained 51.0 points"),
        ("faint", "sft", "gained 0.015"),
        ("faint", "sft", "cost 1.0 points"),
    ]


def test_page_shows_header_figures_and_tasks(pipeline):
    seen = text_of(page(pipeline))
    assert "pretrain → sft → sft on primer · llama · 2026-11-24 09:30 UTC · 5m 52s" in seen
    assert "parameters 2.57M tokens trained on 800 bits per byte 2.300 → 2.410 cost 0.110" in seen
    assert "accuracy 15.0% → 65.0% gained 50.0 points" in seen
    assert "pretrain 2.300 2.250–2.350 15.0% 10.0–20.0" in seen
    assert "pretrain 2.57M 4 400 1m 15s 200 4.250 4.500" in seen
    assert "add 5.0% 5.0–5.0 75.0% 75.0–75.0 75.0% 75.0–75.0 mean of tasks 15.0%" in seen


def test_completions_are_escaped(pipeline):
    html = page(pipeline)
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert "<b>Clara" not in html and "I am <b>Clara</b>." in text_of(html)
    assert "five ?" in html  # a lone surrogate has no UTF-8


def test_prompts_stand_side_by_side(pipeline):
    seen = text_of(page(pipeline))
    assert "What is 2 + 3? pretrain <script>alert('x')</script> sft five ? third (nothing)" in seen
    assert "While pretrain trained Once step 0 upon 0 step 2 upon 2 step 4 upon 4" in seen
    assert "Chat with third I am <b>Clara</b>. Hello!" in seen


def test_lineage_nests_stages_and_shortens_hashes(pipeline):
    """sft's parent is a checkpoint inside pretrain, and the run was moved since: run and stage name still decide."""
    html = page(pipeline)
    tree = html[html.index('<ul class="tree">') : html.index("Resolved config")]
    assert "sft 2.57M parameters from init_from pretrain ee55ff66ee tokenizer aa11bb22cc" in text_of(tree)
    opened = {name: before.count("<ul") - before.count("</ul") for before, name in _names(tree)}
    assert opened == {
        "tokenizer": 1,
        **{"pretrain": 2, "evaluate_pretrain": 3, "generate_pretrain": 3},
        **{"sft": 3, "evaluate_sft": 4, "generate_sft": 4},
        **{"third": 4, "evaluate_third": 5, "generate_third": 5, "chat": 5},
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


def test_tables_have_the_same_figures_in_80_characters(pipeline):
    lines = [line.split() for line in terminal(pipeline).splitlines()]
    assert ["pretrain", "2.57M", "4", "400", "1m", "15s", "200", "4.250", "4.500"] in lines
    assert ["pretrain", "2.300", "15.0%"] in lines
    assert ["2.250–2.350", "10.0–20.0"] in lines
    assert ["cost", "0.125", "gained", "51.0"] in lines
    training, results = headings_of(pipeline)
    assert training == ["stage", "parameters", "steps", "tokens", "time", "tokens/s", "train loss", "val loss"]
    assert results == ["stage", "bits per byte", "accuracy"]


def headings_of(folder: Path) -> list[list[str]]:
    """The headings of each table for the terminal."""
    return [[c.header for c in t.columns] for t in summary_table(folder).renderables if isinstance(t, Table)]


def test_running_stage_skips_half_lines_and_empty_columns(tmp_path, put):
    """The manifest is missing and the last line is cut amid a character; loss is that of the last whole line.

    Time falls back to the steps' own: 3 x 0.5 s. Without validation or evaluation there are no such columns.
    """
    put(tmp_path, metrics=steps(3.0, 2.5, 2.0))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 4, "train/loss": 1.0, "note": "é'.encode()[:-1])
    assert headings_of(tmp_path) == [["stage", "steps", "tokens", "time", "tokens/s", "train loss"]]
    (table,) = summary_table(tmp_path).renderables
    assert [str(next(iter(c.cells))) for c in table.columns] == [tmp_path.name, "3", "300", "1.5s", "200", "2.000"]
    html = page(tmp_path)
    assert html.count("<svg") == 1
    headings = re.findall(r"<h2>([^<]*)</h2>", html)
    assert headings == ["Training", "Lineage"]


def test_resumed_steps_count_once(tmp_path, put):
    """A run that stopped at 3 and resumed from 1 logs 2 again: the later line is of the step the weights took."""
    again = [{"step": 2, "train/loss": 2.25, "tokens": 200}]
    put(tmp_path, {"phase": "pretrain"}, [*steps(3.0, 9.0), *again, {"step": 3, "train/loss": float("nan")}])
    stage = load_run(tmp_path).stages[0]
    assert stage.curve("train/loss") == [(1, 3.0), (2, 2.25)]
    assert "running" in page(tmp_path)


def test_pipeline_that_just_started_shows_what_there_is(tmp_path, put):
    stages = [{"name": "pretrain", "phase": "pretrain", "path": "pretrain"}]
    put(tmp_path, {"phase": "pipeline", "name": "new", "status": "running", "stages": stages})
    assert "new running pretrain pretrain waiting" in text_of(page(tmp_path))
    assert terminal(tmp_path).strip() == ""


def test_lone_evaluation_and_generation_are_shown(tmp_path, put):
    put(tmp_path / "e", {"phase": "evaluate", "results": measured((2.0, 2.05, 2.1), (0.4, 0.5, 0.6))})
    assert "2.050" in terminal(tmp_path / "e") and "40.0–60.0" in terminal(tmp_path / "e")
    put(tmp_path / "g", {"phase": "generate"}, samples=[{"prompt": "a", "completion": "b"}, {"prompt": "a"}, 7])
    assert "a g b" in text_of(page(tmp_path / "g"))


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


def test_stages_are_compared_with_where_they_started_or_with_versus(three_phases):
    """rlhf started from preference, not from the reward model above it; distill is put against the untaught student.

    rlhf: bits 2.201 -> 2.214 costs 0.013 (2.140-2.262 and 2.152-2.276 overlap), accuracy 57.1 -> 68.8 gains 11.7 (up to
    61.5, from 64.7). distill: KL 0.484 -> 0.121 gains 0.363. student_alone came from a tokenizer: nothing is said.
    """
    html = page(three_phases())
    assert changes_of(html) == [
        *[("cost", "pretrain", "cost 0.392"), ("gained", "pretrain", "gained 54.4 points")],
        *[("gained", "pretrain", "gained 9.2 points"), ("gained", "pretrain", "gained 0.391")],
        *[("faint", "sft", "cost 0.018"), ("faint", "sft", "gained 2.3 points")],
        *[("gained", "sft", "gained 26.2 points"), ("faint", "sft", "gained 0.025")],
        ("gained", "sft", "gained 30.8 points"),
        *[("faint", "preference", "cost 0.013"), ("gained", "preference", "gained 11.7 points")],
        *[("faint", "preference", "gained 0.5 points"), ("gained", "preference", "gained 0.225")],
        *[("gained", "student_alone", "gained 0.298"), ("gained", "student_alone", "gained 12.1 points")],
        *[("gained", "student_alone", "gained 19.6 points"), ("gained", "student_alone", "gained 0.148")],
        ("gained", "student_alone", "gained 0.363"),
    ]
    # where it is not the row above, the other side is written out
    assert re.findall(r'<span class="versus">vs (\w+)</span>', html) == ["sft"] + ["preference"] * 4


def test_an_ancestor_without_the_figure_is_stepped_over(three_phases):
    """preference was not evaluated: rlhf is put against sft, accuracy 54.8 -> 68.8."""
    run = three_phases()
    (run / "evaluate_preference" / "MANIFEST.json").unlink()
    assert ("gained", "sft", "gained 14.0 points") in changes_of(page(run))
    assert not [change for change in changes_of(page(run)) if change[1] == "preference"]


@pytest.mark.parametrize("soft_wrap", [False, True])
def test_terminal_shows_the_main_job_in_80_columns(three_phases, soft_wrap):
    """Every column of both tables, with nothing cut; the pipeline prints on a console that wraps softly."""
    console = Console(width=80, record=True, file=StringIO(), soft_wrap=soft_wrap)
    console.print(summary_table(three_phases()))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    lines = [line.split() for line in text.splitlines()]
    assert ["student_alone", "1.18M", "300", "614.4k", "1m", "00s"] == lines[8][:6] and lines[8][7:9] == ["1.2", "GB"]
    assert ["distill", "3.104", "45.2%", "74.8%", "0.391", "0.121"] in lines
    assert ["3.019–3.189", "40.8–49.6", "71.0–78.6", "0.358–0.424", "0.112–0.130"] in lines
    assert "gained 0.298 gained 12.1 gained 19.6 gained 0.148 gained 0.363" in text
    assert ["vs", "preference", "2.152–2.276", "64.7–72.9", "84.2–90.0", "0.632–0.692"] in lines
    assert headings_of(three_phases()) == [
        *[["stage", "parameters", "steps", "tokens", "time", "tokens/s", "memory", "train loss", "val loss"]],
        *[["stage", "bits per byte", "accuracy", "chosen over rejected", "reward", "KL to teacher"]],
    ]


def test_terminal_colours_what_is_clear(three_phases):
    """sft's cost in bits is clear, so red; rlhf's may be chance, so dim."""
    console = Console(width=80, record=True, file=StringIO(), force_terminal=True, color_system="standard")
    console.print(summary_table(three_phases()))
    text = console.export_text(styles=True)
    assert "\x1b[31mcost 0.392" in text and "\x1b[2mcost 0.013" in text and "\x1b[32mgained 54.4" in text


def test_rewards_may_be_negative(tmp_path, put):
    """A dash before a minus sign would read as two dashes."""
    put(tmp_path, {"phase": "evaluate", "results": {"reward": {"value": -1.5, "low": -2.0, "high": -1.0}}})
    assert "-2.000 to -1.000" in terminal(tmp_path) and "-2.000 to -1.000" in page(tmp_path)


def test_measures_of_plugins_are_shown(tmp_path, put):
    found = {"toxicity": {"value": 0.25, "low": 0.2, "high": 0.3}, "accuracy": {"value": 0.5}}
    put(tmp_path, {"name": "mine", "phase": "evaluate", "results": found})
    seen = text_of(page(tmp_path))
    assert "measure mine toxicity 0.250 0.200–0.300" in seen and "mine evaluate 50.0%" in seen


def test_first_figures_follow_the_line_to_the_result(three_phases):
    """From pretrain to rlhf, past the reward model and the students: 2048 tokens in 520 + 620 + 120 + 80 steps."""
    seen = text_of(page(three_phases()))
    assert "pretrain → sft → preference → rlhf on primer · llama" in seen
    assert (
        "parameters 2.57M tokens trained on 2.74M bits per byte 1.791 → 2.214 cost 0.423 accuracy 0.4% → 68.8% "
        "gained 68.4 points chosen over rejected 51.2% → 87.1% gained 35.9 points reward 0.021 → 0.662" in seen
    )
    assert "distill: 1.18M parameters, 46% of the size of its teacher rlhf" in seen
    assert "KL to teacher 0.484 → 0.121 gained 0.363" in seen


def test_curves_show_what_each_phase_learns_by(three_phases):
    drawn = {s.name: draw_curves(s) for s in load_run(three_phases()).models}
    assert {name: drawing.title for name, drawing in drawn.items()} == {
        **dict.fromkeys(("pretrain", "sft", "student_alone", "distill"), "loss and tokens/s"),
        **dict.fromkeys(("preference", "reward"), "loss and accuracy"),
        "rlhf": "reward and length of its answers",
    }
    assert ">reward</text>" in drawn["rlhf"].svg and ">loss</text>" not in drawn["rlhf"].svg
    assert re.fullmatch(r"reward of rlhf: 0\.\d+ at step 1, 0\.\d+ at step 80", drawn["rlhf"].text)


def test_answers_that_did_not_change_are_marked(three_phases):
    """preference answered five prompts as sft did; rlhf is put beside preference, and gave four of its answers."""
    html = page(three_phases())
    same = re.findall(r'<div class="unchanged"><dt>(\w+) <small>same', html)
    assert same.count("preference") == 5 and same.count("rlhf") == 4 and set(same) == {"preference", "rlhf"}


def test_lineage_names_references_teachers_and_sizes(three_phases):
    run = three_phases()
    seen = text_of(page(run))
    assert re.search(r"distill 1.18M parameters from init_from tokenizer \w{10} teacher rlhf \w{10}", seen)
    assert re.search(r"rlhf 2.57M parameters from init_from preference \w{10} reference preference", seen)
    renamed = run.parent / "copy"
    shutil.copytree(run, renamed)  # the manifests still name the old folder
    assert changes_of(page(renamed)) == changes_of(page(run))


def test_stages_that_were_left_out_are_said_with_their_reason(three_phases):
    run = three_phases()
    manifest = json.loads((run / "MANIFEST.json").read_text())
    left = [{"name": "preference", "phase": "preference", "why": "domain=<mine> has no data for phase=preference"}]
    (run / "MANIFEST.json").write_text(json.dumps(manifest | {"left_out": left}))
    html = page(run)
    assert "left out: preference, because domain=<mine> has no data for phase=preference" in text_of(html)
    assert "<mine>" not in html


@pytest.mark.parametrize("keep", [1, 2, 3, 9, 12, 13, 14, 19, 20])
def test_a_main_job_that_is_still_going_has_a_page(three_phases, keep):
    """After every stage: no figure of a stage that is not there, and the line ends at the newest that trained."""
    run = three_phases(keep)
    seen = text_of(page(run))
    assert "three_phases-primer running" in seen
    assert max(map(len, terminal(run).splitlines()), default=0) <= 80
    assert ("gained 68.4 points" in seen) == (keep >= 14)  # evaluate_rlhf is the 14th
    assert ("KL to teacher 0.484 → 0.121" in seen) == (keep >= 20)
    assert ("pretrain → sft → preference on primer" in seen) == (9 <= keep < 13)  # the reward model is on no line


def test_a_failed_stage_says_why(three_phases, put):
    run = three_phases(11)
    put(run / "reward", {"phase": "reward", "status": "failed", "error": "DataError: no <pairs> in mine.jsonl"})
    (run / "reward" / "metrics.jsonl").unlink()
    (run / "evaluate_preference" / "MANIFEST.json").write_text('{"results": {"accu')
    html = page(run)
    assert "reward failed: DataError: no <pairs> in mine.jsonl" in text_of(html) and "<pairs>" not in html
    assert '<li class="failed" title="failed"><span>reward</span> <small>failed</small>' in html
    assert ["sft", "2.183", "54.8%", "60.4%", "0.412"] in [line.split() for line in terminal(run).splitlines()]


def test_odd_files_do_no_harm(tmp_path, put):
    """Facts of the wrong type, numbers that are none, two stages that each claim to come from the other."""
    later, earlier = ({"role": "init_from", "path": f"x/{name}"} for name in "ba")
    odd = {"phase": "sft", "name": "x/a", "parents": [later, "no parent"], "model": [], "peak_memory": "much"}
    put(tmp_path / "a", odd, steps(2.0, float("inf")))
    put(tmp_path / "b", {"phase": "sft", "name": "x/b", "parents": [earlier], "results": [1]}, steps(2.0))
    put(tmp_path / "c", {"phase": "sft", "name": 7, "parents": 3}, steps(3.0))
    stages = [{"name": "a"}, {"name": "b"}, {"name": "c", "versus": "nobody"}, {"name": "d", "of": "b"}, 9]
    facts = {"name": "x", "result": "b", "left_out": [3, {}], "next_commands": None}
    put(tmp_path, facts | {"stages": stages})
    assert "x running sft → sft" in text_of(page(tmp_path))
    assert ["c", "1", "100", "0.5s", "200", "3.000"] in [line.split() for line in terminal(tmp_path).splitlines()]


def test_skipped_steps_are_gaps_and_mfu_is_a_column(tmp_path, put):
    """Losses 4, null, 2 and a NaN that json wrote: the curve has the two that are numbers, the page no NaN."""
    rows = steps(4.0, 3.0, 2.0, 1.0, mfu=0.4, **{"grad_norm/attn": 0.5, "time/data": 0.1, "memory": 5})
    rows[1] |= {"train/loss": None, "skipped": 1, "mfu": 0.2}
    rows[3]["train/loss"] = float("nan")
    manifest = {"phase": "pretrain", "status": "done", "results": {"train/loss": None}}
    put(tmp_path / "run", manifest, rows)
    (stage,) = load_run(tmp_path / "run").stages
    assert stage.curve("train/loss") == [(1, 4.0), (3, 2.0)]
    assert draw_curves(stage).text == "loss of run: 4.000 at step 1, 2.000 at step 3"
    html = page(tmp_path / "run")
    assert "40.0%" in text_of(html) and "MFU" in text_of(html)
    assert "nan" not in html.lower().replace("lightning-ai/nan", "") and "None" not in text_of(html)
    assert not any(key in html for key in ("grad_norm/attn", "time/data"))
