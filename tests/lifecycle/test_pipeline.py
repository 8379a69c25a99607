"""Pipelines: which stage starts from what, what is left out, a user's own, and what a kill or a rerun leaves."""

import functools
import hashlib
import json
import random
import signal
import time

import pytest

from trivium.build import load_artifact
from trivium.compose import compose, run_config
from trivium.errors import ConfigError
from trivium.pipeline import plan_stages

SMALL = ("model.dim=32", "model.layers=3", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=32")
TRAIN = ("tokenizer.vocab_size=300", "batch.size=4", "batch.micro_size=4", "batch.length=64", "trainer.max_steps=6")


@functools.cache
def plan(*overrides):
    overrides = ["pipeline=three_phases", "runs=r", *overrides]
    return plan_stages(overrides, run_config(compose(overrides)), "x")


def told(done, code, *parts):
    assert done.code == code, (done.code, done.err)
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and len(done.err) < 500, done.err
    assert "Traceback" not in done.err + done.out and "fault of the program" not in done.err
    for part in parts:
        assert part in done.err


def manifest(run):
    return json.loads((run / "MANIFEST.json").read_text())


# ---- the plan of the main job


def test_stages_of_the_main_job_start_from_what_they_should():
    """By stage: the folder it starts from, and its teacher."""
    found = plan()
    trained = {s.entry["name"]: s.config for s in found.stages if "of" not in s.entry}
    starts = {name: c.init_from.removeprefix("r/x/") for name, c in trained.items()}
    assert starts == {
        "tokenizer": "",
        "pretrain": "tokenizer",
        "sft": "pretrain",
        "preference": "sft",
        "reward": "sft",
        "rlhf": "preference",
        "student_alone": "rlhf",
        "distill": "rlhf",
    }
    assert {name: c.teacher.init_from for name, c in trained.items() if c.teacher.init_from} == {
        "distill": "r/x/rlhf"  # the student alone has none: its evaluation does
    }
    assert all(not c.reference.init_from for c in trained.values())  # each one's start is its reference
    assert {name for name, c in trained.items() if c.model} == {"pretrain"}  # all others have their start's
    assert {name: c.keep_layers for name, c in trained.items() if c.keep_layers} == {"student_alone": 2, "distill": 2}
    assert (found.result, found.left_out) == ("rlhf", [])
    assert all(c.name == f"x/{name}" and c.runs == "r" for name, c in trained.items())


def test_what_follows_every_training_stage_of_the_main_job():
    """Evaluation and prompts on what the stage made; nothing but an evaluation of what cannot write."""
    stages = plan().stages
    after = {s.entry["name"]: (s.entry["of"], s.config) for s in stages if "of" in s.entry}
    trained = ("pretrain", "sft", "preference", "reward", "rlhf", "student_alone", "distill")
    names = {f"{phase}_{s}" for s in trained for phase in ("evaluate", "generate")} - {"generate_reward"} | {"chat"}
    assert after.keys() == names
    for name, (of, config) in after.items():
        assert config.init_from == f"r/x/{of}"
        assert name == "chat" or name == f"{config.phase}_{of}"
        judged = config.phase == "evaluate" and of in ("student_alone", "distill")
        assert config.teacher.init_from == ("r/x/rlhf" if judged else ""), name
    order = [s.entry["name"] for s in stages]
    assert all(order.index(f"evaluate_{s}") == order.index(s) + 1 for s in trained)
    assert {s.entry["name"]: s.entry["versus"] for s in stages if "versus" in s.entry} == {"distill": "student_alone"}
    assert after["chat"][0] == "rlhf"


def test_stage_that_is_skipped_passes_on_what_it_would_have_started_from():
    found = plan("pipeline.skip=[preference,distill]", "pipeline.after=[]")
    starts = {s.entry["name"]: s.config.init_from.removeprefix("r/x/") for s in found.stages}
    assert starts["rlhf"] == "sft" and not {"preference", "distill"} & starts.keys()
    assert [(s["name"], s["why"]) for s in found.left_out] == [
        ("preference", "pipeline.skip names it"),
        ("distill", "pipeline.skip names it"),
    ]
    assert found.result == "rlhf"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["pipeline.skip=[preferences]"], r"pipeline.skip=preferences is no stage. Did you mean preference\? Stages"),
        (["pipeline.result=final"], "pipeline.result=final is no stage. Stages: tokenizer, pretrain, sft"),
        (["pipeline.after=[evalute]"], "unknown phase=evalute. Did you mean evaluate"),
        (["init_from=r/y"], "starts from nothing, with a tokenizer of its own; leave init_from= away"),
        (["optim.lrr=1"], "unknown option 'optim.lrr'"),
        (["trainer.max_steps=25"], "trainer.max_steps=25 must be a multiple of rollout.updates=2"),
        (["inference.sampling.top_k=5"], "top_k=5"),
    ],
)
def test_wrong_setting_of_the_main_job_is_told_before_anything_starts(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        plan(*overrides)


def test_settings_reach_the_stages_they_are_for():
    """A held-out loss is for stages that have one; sampling is rlhf's and chat's, evaluations stay greedy."""
    given = ("validation.every_steps=3", "stop.patience=2", "inference.sampling.temperature=0.7", "system=Be kind.")
    stages = {s.entry["name"]: s.config for s in plan(*given).stages}
    assert {n for n, c in stages.items() if c.validation.every_steps == 3} == {
        "pretrain", "sft", "preference", "reward", "student_alone", "distill",
    }  # fmt: skip
    assert (
        stages["sft"].stop.patience == 2 and stages["rlhf"].stop.patience == stages["rlhf"].validation.every_steps == 0
    )
    heat = {n: c.inference.config.sampling.temperature for n, c in stages.items()}
    assert heat["rlhf"] == heat["chat"] == 0.7 and heat["evaluate_rlhf"] == 0.0
    assert stages["chat"].system == "Be kind." and stages["evaluate_rlhf"].system == ""


# ---- a user's own


@pytest.fixture
def own(main, corpus, tmp_path):
    """own(text, *changes) -> what `pipeline=my.yaml` with that text did, on the corpus, in tmp_path / "mine"."""

    def run(text, *changes):
        path = tmp_path / "my.yaml"
        path.write_text(text)
        data = ("domain=files", f"data.path={corpus}", "data.validation_share=0.2", f"runs={tmp_path}", "name=mine")
        return main(f"pipeline={path}", *data, *SMALL, *TRAIN, "trainer.max_steps=2", *changes)

    return run


def test_list_of_stages_in_a_file_runs(own, tmp_path):
    """Strings are stages; a second pretraining continues the first; the command line beats a stage's own overrides."""
    text = (
        "[pretrain, {phase: pretrain, name: more, overrides: [optim.lr=0.5, seed=7]},"
        " {phase: evaluate, teacher: pretrain}]"
    )
    done = own(text, "optim.lr=1e-3")
    assert done.code == 0, done.err
    facts = manifest(tmp_path / "mine")
    stages = [(s["name"], s["phase"], s.get("of")) for s in facts["stages"]]
    assert stages == [("pretrain", "pretrain", None), ("more", "pretrain", None), ("evaluate", "evaluate", "more")]
    assert (facts["status"], facts["result"], facts["left_out"]) == ("done", "more", [])
    more = manifest(tmp_path / "mine/more")
    assert [p["path"] for p in more["parents"]] == [str(tmp_path / "mine/pretrain/checkpoints/step-2")]
    assert (more["config"]["optim"]["lr"], more["config"]["seed"]) == (1e-3, 7)
    first = str(tmp_path / "mine/pretrain/checkpoints/step-2")
    judged = {p["role"]: p["path"] for p in manifest(tmp_path / "mine/evaluate")["parents"]}
    assert judged == {"init_from": str(tmp_path / "mine/more/checkpoints/step-2"), "teacher": first}
    again = own(text, "optim.lr=1e-3")
    assert again.code == 0, again.err
    assert again.out.count("done already") == 3


def test_mapping_in_a_file_runs_and_the_command_line_beats_it(own, tmp_path):
    text = (
        "name: two\nafter: [evaluate]\nresult: first\nskip: [tokenizer]\n"
        "stages:\n  - tokenizer\n  - {phase: pretrain, name: first}\n  - {phase: pretrain, name: second}\n"
    )
    done = own(text, "prompt=abc", "inference.sampling.max_tokens=3", "pipeline.after=[generate]")
    assert done.code == 0, done.err
    facts = manifest(tmp_path / "mine")
    assert [s["name"] for s in facts["stages"]] == ["first", "generate_first", "second", "generate_second"]
    assert facts["result"] == "first" and [s["name"] for s in facts["left_out"]] == ["tokenizer"]
    changes = ("name=other", "pipeline.after=[generate]", "pipeline.result=second", "pipeline.skip=[]")
    done = own(text, *changes)
    assert done.code == 0, done.err
    facts = manifest(tmp_path / "other")
    assert [s["name"] for s in facts["stages"]] == ["tokenizer", "first", "second"]  # no prompts, nothing to generate
    assert (facts["result"], facts["left_out"]) == ("second", [])


def test_stage_that_continues_a_student_takes_its_shape(own, tmp_path):
    """phase=distill brings primer_half; the student of an earlier stage is of another shape, and not made yet."""
    student = ", ".join(SMALL).replace("dim=32", "dim=16", 1)
    text = (
        "- pretrain\n"
        f"- {{phase: distill, teacher: pretrain, overrides: [{student}, 'data.forms=[text]']}}\n"
        "- {phase: distill, name: more, init_from: distill, teacher: pretrain, overrides: ['data.forms=[text]']}\n"
    )
    for _ in range(2):
        done = own(text)
        assert done.code == 0, done.err
    assert done.out.count("done already") == 3
    assert manifest(tmp_path / "mine/more")["model"] == manifest(tmp_path / "mine/distill")["model"]


MALFORMED = {
    "nothing": ("", "is no pipeline: it has no stages"),
    "a number": ("5", "cannot be read: Invalid loaded object type: int"),
    "no stages": ("name: x\nstages: []", "is no pipeline: it has no stages"),
    "a bracket left open": ("- {phase: sft\n- sft", "is no pipeline: line 2: expected ',' or '}'"),
    "a key twice": ("- {phase: sft, phase: rlhf}", "is no pipeline: line 1: found duplicate key phase"),
    "a word for stages": ("stages: pretrain", "is no pipeline: stages must be a list"),
    "a stage that is nothing": ("[null]", "is no pipeline: Invalid type assigned"),
    "a word for overrides": ("- {phase: sft, overrides: 'seed=1'}", "is no pipeline: Invalid value assigned"),
    "unknown phase": ("[pretrain, pretrian]", "is no pipeline: phase 'pretrian' is not one of tokenizer, pretrain"),
    "unknown phase after": ("stages: [pretrain]\nafter: [evalute]", "is no pipeline: phase 'evalute' is not one of"),
    "unknown key": ("- {phase: sft, overides: [seed=1]}", "is no pipeline: Key 'overides' not in 'StageConfig'"),
    "unknown key above": ("stages: [sft]\nthen: [chat]", "is no pipeline: Key 'then' not in 'PipelineConfig'"),
    "unknown setting": ("- {phase: pretrain, overrides: [optim.lrr=1]}", "unknown option 'optim.lrr'"),
    "a name twice": ("[pretrain, pretrain]", "two stages are called pretrain; give one another name"),
    "a name that is a path": ("- {phase: pretrain, name: ../x}", "a stage cannot be called '../x'"),
    "a later start": ("- {phase: pretrain, init_from: sft}\n- sft", "pretrain: init_from=sft is no earlier stage"),
    "itself as teacher": (
        "- pretrain\n- {phase: distill, teacher: distill}",
        "stage distill: teacher=distill is no earlier stage.  Earlier: pretrain",
    ),
    "no teacher": ("- pretrain\n- distill", "stage distill: phase=distill needs a teacher"),
    "a teacher that is a tokenizer": (
        "stages: [tokenizer, pretrain, {phase: distill, teacher: pretrain}]\nskip: [pretrain]",
        "stage distill: phase=distill needs a teacher",
    ),
    "unknown versus": ("- {phase: pretrain, versus: base}", "stage pretrain: versus=base is no earlier stage"),
    "unknown skip": ("stages: [pretrain]\nskip: [sft]", "pipeline.skip=sft is no stage. Stages: pretrain"),
    "unknown result": ("stages: [pretrain]\nresult: sft", "pipeline.result=sft is no stage. Stages: pretrain"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pipeline_is_told_in_one_sentence_and_makes_no_folder(case, own, tmp_path):
    text, sentence = MALFORMED[case]
    told(own(text), 2, sentence.replace("  ", " "))
    assert {p.name for p in tmp_path.iterdir()} == {"my.yaml"}


def test_pipeline_file_that_is_not_there(main, tmp_path):
    told(main(f"pipeline={tmp_path}/my.yaml", f"runs={tmp_path}"), 2, "my.yaml cannot be read: No such file")
    (tmp_path / "my.yaml").write_bytes(b"\xff\xfe\x00")
    told(main(f"pipeline={tmp_path}/my.yaml", f"runs={tmp_path}"), 2, "is no pipeline: 'utf-8' codec can't decode")


# ---- the main job on a user's own files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, conversations and pairs of a made language: all that domain=files can feed."""
    draw, place = random.Random(1), tmp_path_factory.mktemp("folder")
    words = ["".join(draw.choices("abcdefgh", k=3)) for _ in range(60)]

    def ask():
        return {"role": "user", "content": " ".join(draw.choices(words, k=2))}

    def say():
        return {"role": "assistant", "content": draw.choice(words)}

    def pair():
        asked = ask()
        return {"chosen": [asked, {"role": "assistant", "content": "yes"}], "rejected": [asked, say()]}

    (place / "text.txt").write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(300)))
    rows = {"chats": [{"messages": [ask(), say()]} for _ in range(90)], "pairs": [pair() for _ in range(90)]}
    for name, some in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    return place


@pytest.fixture(scope="module")
def job(folder, overridden):
    """job(runs, *changes) -> the command line of the main job on the folder, tiny, in runs / "job"."""
    fixed = ("pipeline=three_phases", "domain=files", f"data.path={folder}", "data.validation_share=0.3", "name=job")
    rest = ("evaluation.resamples=20", "evaluation.max_texts=3", "evaluation.max_pairs=12", "evaluation.max_chats=12")
    rest += ("pipeline.after=[evaluate]", "checkpoint.every_steps=4")  # own files bring no prompts to generate from
    return lambda runs, *changes: overridden(fixed, SMALL, TRAIN, rest, (f"runs={runs}",), changes)


@pytest.fixture(scope="module")
def whole(fork, job, tmp_path_factory):
    """The finished main job, never to be changed, and what it said."""
    runs = tmp_path_factory.mktemp("whole")
    done = fork(*job(runs)).done()
    assert done.returncode == 0, done.err
    return runs / "job", " ".join(done.out.split())


def weights(run):
    """SHA-256 of the final weights of each training stage."""
    found = {}
    for path in sorted(run.glob("*/checkpoints/LATEST")):
        data = (path.parent / path.read_text() / "model.safetensors").read_bytes()
        found[path.parents[1].name] = hashlib.sha256(data).hexdigest()
    return found


def test_main_job_on_own_files_leaves_rlhf_out_loudly(whole):
    """Own files have no answers to score: the next stage, the teacher and the result fall back to preference."""
    run, said = whole
    facts = manifest(run)
    [left] = facts["left_out"]
    assert (left["name"], left["phase"]) == ("rlhf", "rlhf")
    assert "; data.forms=[answers] reads messages with an answer to score against: name a file of" in left["why"]
    assert f"left out: rlhf: {left['why']}" in said
    assert (facts["status"], facts["result"]) == ("done", "preference")
    assert "rlhf" not in {s["phase"] for s in facts["stages"]} and not (run / "rlhf").exists()
    parents = {s["name"]: {p["role"]: p["path"] for p in manifest(run / s["path"])["parents"]} for s in facts["stages"]}
    tuned = f"{run}/preference/checkpoints/step-6"
    assert parents["distill"] == {"init_from": tuned, "teacher": tuned}
    assert parents["student_alone"] == {"init_from": tuned}
    assert parents["evaluate_distill"] == {"init_from": f"{run}/distill/checkpoints/step-6", "teacher": tuned}
    assert parents["evaluate_student_alone"]["teacher"] == tuned
    assert parents["chat"] == {"init_from": tuned}
    assert parents["preference"] == {"init_from": f"{run}/sft/checkpoints/step-6"}
    assert {manifest(run / s["path"])["status"] for s in facts["stages"]} == {"done"}
    assert set(weights(run)) == {"pretrain", "sft", "preference", "reward", "student_alone", "distill"}
    assert len(set(weights(run).values())) == 6
    results = {s["name"]: manifest(run / s["path"])["results"] for s in facts["stages"] if s["phase"] == "evaluate"}
    assert all("bits_per_byte" in found for name, found in results.items() if name != "evaluate_reward")
    assert "kl_to_teacher" in results["evaluate_distill"] and "bits_per_byte" not in results["evaluate_reward"]
    assert all(f"init_from={run}/preference" in command for command in facts["next_commands"])
    assert (run / "report.html").is_file()


def test_finished_pipeline_ends_at_once(whole, main, job):
    """Every stage says so, and no file of theirs changes but the logs."""
    run, _ = whole

    def files():
        kept = (f for f in run.glob("*/**/*") if f.is_file() and f.name not in ("log.txt", "lock", ".lock"))
        return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in kept}

    before = files()
    again = main(*job(run.parent))
    assert again.code == 0, again.err
    assert again.out.count("done already; the same settings and inputs") == len(manifest(run)["stages"])
    assert files() == before


def test_result_stands_for_the_whole(whole, main, tmp_path):
    """init_from= of a pipeline's run is its result's model, not the last one that was trained."""
    run, _ = whole
    assert load_artifact(str(run)).checkpoint == run / "preference/checkpoints/step-6"
    spoken = main("phase=generate", "domain=files", f"init_from={run}", f"runs={tmp_path}", "prompt=abc")
    assert spoken.code == 0, spoken.err
    assert manifest(tmp_path / "generate-job")["parents"][0]["path"] == str(run / "preference/checkpoints/step-6")


def begun(process, stage):
    """Wait for the first step of a stage. The process must be alive then."""
    log, deadline = stage / "metrics.jsonl", time.monotonic() + 90
    while not log.is_file() or not log.read_text().strip():
        assert process.poll() is None and time.monotonic() < deadline, process.err
        time.sleep(0.001)
    assert process.poll() is None


def test_pipeline_killed_in_a_stage_continues_to_the_same_weights(whole, fork, job, tmp_path):
    """kill -9 in the midst of the preference stage: what was done is left, the stage goes on, the rest follows."""
    run, stage = tmp_path / "job", tmp_path / "job/preference"
    command = job(tmp_path, "pipeline.after=[]", "pipeline.skip=[reward,student_alone,chat]")
    process = fork(*command)
    begun(process, stage)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    steps = len((stage / "metrics.jsonl").read_text().splitlines())
    assert steps < 6 and not (stage / "checkpoints/step-6").exists(), "killed too late"
    assert manifest(run)["status"] == manifest(stage)["status"] == "running"
    assert [s["name"] for s in manifest(run)["stages"]] == ["tokenizer", "pretrain", "sft", "preference"]
    before = {f: f.stat().st_mtime_ns for f in run.glob("*/checkpoints/**/*") if stage not in f.parents}
    rest = fork(*command).done()
    assert rest.returncode == 0, rest.err
    assert rest.out.count("done already; the same settings and inputs") == 3
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert weights(run) == {k: w for k, w in weights(whole[0]).items() if k not in ("reward", "student_alone")}
    assert manifest(run)["status"] == "done"


def test_stage_that_is_stopped_stops_the_pipeline(fork, job, tmp_path):
    """SIGTERM in a stage: 143, the stage is saved, nothing after it has begun; the same command goes on."""
    (tmp_path / "my.yaml").write_text("[tokenizer, pretrain, sft]")
    command = job(tmp_path, f"pipeline={tmp_path}/my.yaml", "pipeline.after=[]", "trainer.max_steps=40")
    process = fork(*command)
    begun(process, tmp_path / "job/pretrain")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143 and not process.err
    facts = manifest(tmp_path / "job")
    assert (facts["status"], [s["name"] for s in facts["stages"]]) == ("stopped", ["tokenizer", "pretrain"])
    stage = manifest(tmp_path / "job/pretrain")
    assert stage["status"] == "stopped" and (tmp_path / f"job/pretrain/checkpoints/step-{stage['steps']}").is_dir()
    rest = fork(*command).done()
    assert rest.returncode == 0, rest.err
    assert manifest(tmp_path / "job")["status"] == manifest(tmp_path / "job/sft")["status"] == "done"
