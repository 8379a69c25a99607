"""Each phase by itself: what it starts from, what it refuses, and what a resume holds it to."""

import hashlib
import json
import math
import re
import shutil

import pytest
import torch

from trivium.models.weights import read_tensors

PHASES = {
    "preference": "preferring",
    "kto": "judging",
    "reward": "rewarding",
    "rlhf": "rolling",
    "distill": "distilling",
}
"""By phase (or objective), the fixture that has its overrides."""


@pytest.fixture
def overrides(request):
    """overrides(name, runs, run, *changes) -> the overrides of that tiny run."""

    def of(name, *args):
        return request.getfixturevalue(PHASES.get(name, name))(*args)

    return of


@pytest.fixture(scope="session")
def scorer(fork, rewarding, tmp_path_factory):
    """A finished reward model, never to be changed."""
    runs = tmp_path_factory.mktemp("scorer")
    assert fork(*rewarding(runs, "scorer")).done().returncode == 0
    return runs / "scorer"


@pytest.fixture(scope="session")
def student(fork, distilling, tmp_path_factory):
    """A finished student of `tuned`, never to be changed."""
    runs = tmp_path_factory.mktemp("student")
    assert fork(*distilling(runs, "student", "optim.lr=1e-2")).done().returncode == 0
    return runs / "student"


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with one file of each form: text.txt, chats.jsonl, pairs.jsonl, labels.jsonl."""
    folder = tmp_path_factory.mktemp("forms")
    (folder / "text.txt").write_text("\n\n".join(f"{i} some words here and there" for i in range(900)))

    def asked(i, said):
        return [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": said}]

    rows = {
        "chats": [{"messages": asked(i, str(i))} for i in range(80)],
        "pairs": [{"chosen": asked(i, str(i)), "rejected": asked(i, str(i + 1))} for i in range(80)],
        "labels": [{"messages": asked(i, str(i + i % 2)), "label": i % 2 == 0} for i in range(80)],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    return folder


@pytest.fixture
def places(request, tmp_path):
    """places("init_from={scorer}") -> the same with the folders that it names by fixture."""

    def filled(text):
        names = re.findall(r"{(\w+)}", text)
        return text.format(**{n: tmp_path if n == "tmp" else request.getfixturevalue(n) for n in names})

    return filled


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run):
    return [(r["step"], r["train/loss"].hex(), r.get("val/loss", 0.0).hex()) for r in rows_of(run)]


def contents(run):
    """SHA-256 of every file of a run but log.txt, which has a line for each attempt."""
    files = (f for f in run.rglob("*") if f.is_file() and f.name != "log.txt")
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def weights(run):
    newest = run / "checkpoints" / (run / "checkpoints/LATEST").read_text()
    return read_tensors(newest / "model.safetensors")


def told(done, code, *parts):
    """Check the exit code, one sentence on stderr with `parts` in it, and that nothing is blamed on the program."""
    assert done.code == code, (done.code, done.err)
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and len(done.err) < 500, done.err
    assert "Traceback" not in done.err + done.out and "fault of the program" not in done.err
    assert len(re.split(r"[.?] ", done.err.strip())) <= 3, done.err
    for part in parts:
        assert part in done.err


# ---- what a phase starts from


@pytest.mark.parametrize("name", PHASES)
def test_phase_starts_from_a_run_or_one_of_its_checkpoints(name, main, overrides, tuned, tmp_path):
    """The newest checkpoint of a run, or the one that is named; as start, or as the distillation's teacher."""
    role = "teacher" if name == "distill" else "init_from"
    key = "teacher.init_from" if name == "distill" else "init_from"
    first = []
    for run, place, step in (("a", tuned, 120), ("b", tuned / "checkpoints/step-100", 100)):
        done = main(*overrides(name, tmp_path, run, f"{key}={place}", "trainer.max_steps=2"))
        assert done.code == 0, done.err
        facts = json.loads((tmp_path / run / "MANIFEST.json").read_text())
        parent = {p["role"]: p for p in facts["parents"]}[role]
        checkpoint = tuned / f"checkpoints/step-{step}"
        assert parent["path"] == str(checkpoint)
        assert parent["sha256"] == hashlib.sha256((checkpoint / "CHECKPOINT.json").read_bytes()).hexdigest()
        assert (facts["status"], facts["steps"]) == ("done", 2)
        before, after = read_tensors(checkpoint / "model.safetensors"), weights(tmp_path / run)
        if name == "distill":
            assert after["embed.weight"].shape[1] == 16 != before["embed.weight"].shape[1]
        else:
            assert ("score.weight" in after) == (name == "reward")
            for tensor in before:  # two small steps away from where it started, and only two
                assert torch.allclose(before[tensor], after[tensor], atol=0.02), tensor
        first.append(rows_of(tmp_path / run)[0]["grad_norm"])
    assert first[0] != first[1]


def test_student_continues_from_its_own_weights(main, distilling, student, tuned, tmp_path):
    """phase=distill brings a new student; a trained one in init_from= brings itself, unless a model is named.

    A rate of 1e-9 leaves every weight where it was, to 1e-6. The teacher as its own student is 0 nats from itself.
    """
    settings = [o for o in distilling(tmp_path, "more", f"init_from={student}") if not o.startswith("model.")]
    done = main(*settings, "optim.lr=1e-9", "optim.weight_decay=0")
    assert done.code == 0, done.err
    assert f"starts from {student}/checkpoints/step-6" in done.out.replace("\n", "")
    before, after = weights(student), weights(tmp_path / "more")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    fresh = main(*distilling(tmp_path, "fresh", "optim.lr=1e-9"))
    assert fresh.code == 0
    losses = [rows_of(tmp_path / run)[0]["train/divergence"] for run in ("more", "fresh")]
    assert losses[0] < losses[1] - 0.05
    done = main(*distilling(tmp_path, "other", f"init_from={student}", "model=primer_half", "model.dim=32"))
    told(done, 1, "is of another architecture", "Leave model= away")
    itself = [o for o in distilling(tmp_path, "itself", f"init_from={tuned}") if not o.startswith("model.")]
    assert main(*itself, "trainer.max_steps=1", "precision=fp32").code == 0  # and its first loss is known: see at_start


def test_reference_is_what_the_run_starts_from_unless_another_is_named(main, preferring, tuned, tmp_path):
    """A model that stands still has a held-out loss of ln 2 from where it starts, and another from elsewhere."""
    standing = ("trainer.max_steps=1", "optim.lr=1e-9", "validation.every_steps=1", "objective.beta=5")
    for run, more in (("own", ()), ("other", (f"reference.init_from={tuned}/checkpoints/step-100",))):
        done = main(*preferring(tmp_path, run, *standing, *more))
        assert done.code == 0, done.err
    away = {run: abs(rows_of(tmp_path / run)[0]["val/loss"] - math.log(2)) for run in ("own", "other")}
    assert away["own"] < 1e-4 and away["other"] > 1e-3
    roles = [p["role"] for p in json.loads((tmp_path / "other/MANIFEST.json").read_text())["parents"]]
    assert roles == ["init_from", "reference"]


def test_reward_model_goes_on_from_a_reward_model(main, rewarding, scorer, tmp_path):
    done = main(*rewarding(tmp_path, "more", f"init_from={scorer}", "optim.lr=1e-9", "trainer.max_steps=1"))
    assert done.code == 0, done.err
    assert torch.allclose(weights(tmp_path / "more")["score.weight"], weights(scorer)["score.weight"], atol=1e-6)
    assert weights(scorer)["score.weight"].abs().max() > 0


# ---- what is refused

REFUSED = {
    "dpo from nothing": ("preferring", ["init_from="], 2, "objective=dpo needs a reference: set reference.init_from="),
    "dpo from a new model": ("preferring", ["init_from=", "model=primer"], 2, "objective=dpo needs a reference"),
    "kto from nothing": ("judging", ["init_from="], 2, "objective=kto needs a reference: set reference.init_from="),
    "reward from nothing": ("rewarding", ["init_from="], 2, "phase=reward needs a model: set init_from=runs/..."),
    "rlhf from nothing": ("rolling", ["init_from="], 2, "objective=grpo needs a reference: set reference.init_from="),
    "rlhf without reference from nothing": (
        "rolling", ["init_from=", "objective.kl_weight=0"], 2, "phase=rlhf needs a model: set init_from=runs/..."),
    "distill without teacher": (
        "distilling", ["teacher.init_from="], 2, "objective=distill needs a teacher: set teacher.init_from=runs/..."),
    "teacher that is not there": (
        "distilling", ["teacher.init_from={tuned}x"], 1, "tunedx does not exist"),
    "teacher of another tokenizer": (
        "distilling", ["init_from={tuned}/checkpoints/step-120/tokenizer", "teacher.init_from={trained}"], 2,
        "teacher.init_from={trained} has another tokenizer than this run"),
    "reference of another tokenizer": (
        "preferring", ["reference.init_from={trained}"], 2,
        "reference.init_from={trained} has another tokenizer than this run"),
    "teacher that scores": (
        "distilling", ["teacher.init_from={scorer}"], 2,
        "teacher.init_from={scorer} is a reward model; a teacher must be a language model"),
    "reference that scores": (
        "preferring", ["reference.init_from={scorer}"], 2,
        "reference.init_from={scorer} is a reward model; a reference must be a language model"),
    "rlhf reference that scores": (
        "rolling", ["reference.init_from={scorer}"], 2, "reference.init_from={scorer} is a reward model"),
    "sft from a reward model": (
        "tuning", ["init_from={scorer}"], 2, "init_from={scorer} is a reward model; phase=sft trains a language model"),
    "dpo from a reward model": (
        "preferring", ["init_from={scorer}", "reference.init_from={tuned}"], 2,
        "init_from={scorer} is a reward model; phase=preference trains a language model"),
    "rlhf from a reward model": (
        "rolling", ["init_from={scorer}", "reference.init_from={tuned}"], 2, "init_from={scorer} is a reward model"),
    "generate from a reward model": (
        "speaking", ["phase=generate", "init_from={scorer}", "prompt=a"], 1,
        "{scorer} is a reward model: it scores answers and writes none"),
    "chat with a reward model": (
        "speaking", ["phase=chat", "init_from={scorer}", "prompts=[a]"], 1, "{scorer} is a reward model"),
    "reference for sft": (
        "tuning", ["reference.init_from={tuned}"], 2,
        "objective=sft has no reference; leave reference.init_from away"),
    "teacher for dpo": (
        "preferring", ["teacher.init_from={tuned}"], 2, "objective=dpo has no teacher; leave teacher.init_from away"),
    "reference for distill": ("distilling", ["reference.init_from={tuned}"], 2, "objective=distill has no reference"),
    "dpo in sft": ("tuning", ["objective=dpo"], 2, "objective=dpo is not for phase=sft; it is for preference"),
    "grpo in preference": (
        "preferring", ["objective=grpo"], 2, "objective=grpo is not for phase=preference; it is for rlhf"),
    "pairs for sft": (
        "sft_files", ["data.path={files}/pairs.jsonl"], 1,
        "pairs.jsonl holds pairs (chosen and rejected)", "data.forms=[chat, answers] reads", "phase=preference"),
    "text for sft": ("sft_files", ["data.path={files}/text.txt"], 1, "text.txt holds text (text)"),
    "labels for sft": (
        "sft_files", ["data.path={files}/labels.jsonl"], 1, "labels.jsonl holds labels (a completion with a label)"),
    "chats for dpo": (
        "judging", ["objective=dpo", "data.path={files}/chats.jsonl"], 1,
        "chats.jsonl holds chat (messages, or prompt and completion)", "phase=sft"),
    "labels with dpo": (
        "judging", ["objective=dpo"], 2, "the data holds verdicts (label), not pairs; choose objective=kto"),
    "pairs with kto": ("judging", ["data.path={files}/pairs.jsonl"], 1, "objective needs a completion with a label"),
    "labels for reward": (
        "judging", ["phase=reward", "objective=reward", "data.path={files}/labels.jsonl"], 1,
        "labels.jsonl holds labels", "data.forms=[pairs]"),
    "pairs for distill": (
        "judging", ["phase=distill", "objective=distill", "data.path={files}/pairs.jsonl", "teacher.init_from={tuned}"],
        1, "data.forms=[chat, answers, text] reads messages, or prompt and completion, or messages with"),
    "tasks for dpo": ("preferring", ["data.parts=[tasks]"], 1, "phase=preference needs chosen and rejected"),
    "books for rlhf": ("rolling", ["data.parts=[books]"], 1, "phase=rlhf needs messages with an answer to score"),
    "a pair of rows too long": (
        "preferring", ["batch.length=514"], 2, "batch.length=514 is longer than the model's context of 256",
        "2 documents share a row, so 512 is the most"),
    "a row too long for the student": (
        "distilling", ["model.context=32"], 2, "batch.length=64 is longer than the model's context of 32"),
    "a row too long for the teacher": (
        "distilling", ["batch.length=512", "model.context=512"], 2,
        "the teacher's context of 256 is shorter than this run's 512 tokens"),
    "more layers than there are": (
        "sft_files", ["data.path={files}/chats.jsonl", "keep_layers=3"], 2, "keep_layers=3", "has 2 layers"),
    "layers of a tokenizer": (
        "distilling", ["init_from={tuned}/checkpoints/step-120/tokenizer", "keep_layers=1"], 2, "keep_layers=1",
        "has no model"),
    "layers of nothing": ("distilling", ["keep_layers=1"], 2, "keep_layers=1 takes layers of a trained model"),
    "rlhf at temperature 0": (
        "rolling", ["inference.sampling.temperature=0"], 2, "inference.sampling.temperature=0", "greater than 0"),
    "rlhf with top_k": ("rolling", ["inference.sampling.top_k=5"], 2, "top_k=5 and top_p=1.0 off"),
    "rlhf with top_p": ("rolling", ["inference.sampling.top_p=0.9"], 2, "top_k=0 and top_p=0.9 off"),
    "one sample": ("rolling", ["rollout.samples=1"], 2, "rollout.samples=1 leaves nothing to compare an answer with"),
    "steps that are no whole rollouts": (
        "rolling", ["trainer.max_steps=7"], 2, "trainer.max_steps=7 must be a multiple of rollout.updates=2"),
    "prompts that cannot be shared out": (
        "rolling", ["rollout.updates=3"], 2, "rollout.prompts=4 must be a multiple of rollout.updates=3"),
    "validation in rlhf": (
        "rolling", ["validation.every_steps=2"], 2, "phase=rlhf has no held-out loss: set validation.every_steps=0"),
    "an answer too long for the row": (
        "rolling", ["inference.sampling.max_tokens=60"], 2, "and inference.sampling.max_tokens=60 do not fit 64 tokens",
        "batch.length=64"),
    "an answer too long for the context": (
        "rolling", ["inference.sampling.max_tokens=250", "batch.length=512"], 2, "do not fit 256 tokens",
        "the model's context 256"),
    "verdicts for rlhf": (
        "judging", ["phase=rlhf", "objective=grpo"], 1, "verdicts.jsonl holds labels (a completion with a label)",
        "data.forms=[answers] reads messages with an answer to score against", "choose phase=preference"),
}  # fmt: skip
"""By case: the fixture with a tiny run's overrides, what is changed, the exit code, and what the sentence says."""


@pytest.fixture
def speaking():
    return lambda runs, name, *changes: ["domain=files", f"runs={runs}", f"name={name}", *changes]


@pytest.fixture
def sft_files(tuned):
    fixed = ("phase=sft", "domain=files", f"init_from={tuned}", "trainer.max_steps=2")
    return lambda runs, name, *changes: [*fixed, f"runs={runs}", f"name={name}", *changes]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case, main, overrides, places, tmp_path):
    """What cannot be is told at once: nothing is trained, and a folder, if one was made, holds the reason alone."""
    fixture, changes, code, *parts = REFUSED[case]
    done = main(*overrides(fixture, tmp_path, "x", *map(places, changes)))
    told(done, code, *map(places, parts))
    run = tmp_path / "x"
    if run.exists():
        facts = json.loads((run / "MANIFEST.json").read_text())
        assert facts["status"] == "failed" and facts["error"].endswith(done.err.removeprefix("error: ").strip())
        assert {f.name for f in run.iterdir()} <= {"MANIFEST.json", "config.yaml", "log.txt", "lock", ".lock"}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("reference that scores", "preference"),
        ("reference of another tokenizer", "preference"),
        ("dpo from nothing", "preference"),
        ("labels with dpo", "kto"),
        ("an answer too long for the row", "rlhf"),
        ("rlhf at temperature 0", "rlhf"),
        ("teacher that scores", "distill"),
        ("distill without teacher", "distill"),
    ],
)
def test_refused_command_leaves_a_finished_run_alone(case, name, main, overrides, places, tmp_path, finished):
    """The same name with settings that cannot be: every file of the run that is there stays as it is."""
    shutil.copytree(finished(name), tmp_path / "x")
    before = contents(tmp_path / "x")
    fixture, changes, code, *parts = REFUSED[case]
    told(main(*overrides(fixture, tmp_path, "x", *map(places, changes))), code, *map(places, parts))
    assert contents(tmp_path / "x") == before


# ---- what a resume is held to


@pytest.fixture(scope="module")
def finished(fork, request, tmp_path_factory):
    """finished(name) -> a tiny run of 6 steps with checkpoints 4 and 6, made once. Never to be changed."""
    runs, made = tmp_path_factory.mktemp("finished"), {}

    def of(name):
        if name not in made:
            overrides = request.getfixturevalue(PHASES[name])(runs, name, "checkpoint.every_steps=2")
            made[name] = fork(*overrides).done()
        assert made[name].returncode == 0, made[name].err
        return runs / name

    return of


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("preference", "reference.init_from={tuned}/checkpoints/step-100", "reference weights was "),
        ("kto", "reference.init_from={tuned}/checkpoints/step-100", "reference weights was "),
        ("rlhf", "reference.init_from={tuned}/checkpoints/step-100", "reference weights was "),
        ("distill", "teacher.init_from={tuned}/checkpoints/step-100", "teacher weights was "),
        ("reward", "init_from={tuned}/checkpoints/step-100", "parent was "),
        ("rlhf", "inference.sampling.temperature=0.7", "inference.sampling.temperature was 1.0, is 0.7"),
        ("rlhf", "inference.sampling.max_tokens=5", "inference.sampling.max_tokens was 4, is 5"),
        ("rlhf", "rollout.updates=1", "rollout.updates was 2, is 1"),
        ("preference", "objective.beta=0.3", "objective.beta was 0.1, is 0.3"),
        ("distill", "objective.beta=0.5", "objective.beta was 0.0, is 0.5"),
    ],
)
def test_another_companion_or_setting_is_refused_at_a_resume(
    name, change, named, main, overrides, places, finished, tmp_path
):
    """By name; and every file of the run stays as it is."""
    shutil.copytree(finished(name), tmp_path / name)
    before = contents(tmp_path / name)
    done = main(*overrides(name, tmp_path, name, "checkpoint.every_steps=2", places(change)))
    told(done, 1, f"{tmp_path / name} holds another run: ", named, "Choose another name=")
    assert contents(tmp_path / name) == before


def test_sampling_settings_may_change_where_nothing_is_learnt_from_samples(main, preferring, finished, tmp_path):
    shutil.copytree(finished("preference"), tmp_path / "preference")
    changed = ("checkpoint.every_steps=2", "inference.sampling.temperature=0.7")
    done = main(*preferring(tmp_path, "preference", *changed))
    assert done.code == 0 and "was done already" in done.out, done.err


@pytest.mark.parametrize("name", ["preference", "kto"])
def test_cached_reference_may_be_lost_between_a_stop_and_a_resume(name, main, overrides, finished, cache, tmp_path):
    """A run of 12 steps in two halves, without and with the cache's file: equal in every bit.

    The first half here is a finished run of 6 steps, given 12; its twin has its cache.
    """
    lost = []
    for run in ("kept", "lost"):
        shutil.copytree(finished(name), tmp_path / run)
        if run == "lost":
            lost = list((cache / "reference").glob("*.bin"))
            assert lost, "there was nothing to lose"
            for file in lost:
                file.unlink()
        more = ("checkpoint.every_steps=2", "trainer.max_steps=12", "validation.every_steps=4")
        done = main(*overrides(name, tmp_path, run, *more))
        assert done.code == 0, done.err
    assert curve(tmp_path / "kept") == curve(tmp_path / "lost") and len(curve(tmp_path / "lost")) == 12
    assert all(torch.equal(w, weights(tmp_path / "lost")[k]) for k, w in weights(tmp_path / "kept").items())
    assert len(list((cache / "reference").glob("*.bin"))) in range(1, len(lost) + 1)  # asked again, and kept again


def test_damaged_cached_reference_is_asked_again(main, preferring, cache, tmp_path):
    """Half a file, as a full disk may leave it, or one flipped bit: neither enters the loss."""
    settings = ("trainer.max_steps=3", "seed=5")
    assert main(*preferring(tmp_path, "whole", *settings)).code == 0
    newest = max((cache / "reference").glob("*.bin"), key=lambda p: p.stat().st_mtime_ns)
    sound = newest.read_bytes()
    for number, bad in enumerate((sound[: len(sound) // 2], bytes([*sound[:-1], sound[-1] ^ 64]))):
        newest.write_bytes(bad)
        done = main(*preferring(tmp_path, f"damaged{number}", *settings))
        assert done.code == 0 and "asks the reference about" in done.out, done.err
        assert curve(tmp_path / f"damaged{number}") == curve(tmp_path / "whole")
        assert newest.read_bytes() == sound
    assert "asks the reference" not in main(*preferring(tmp_path, "kept", *settings)).out  # nobody waits for it


def test_first_losses_are_what_they_must_be(finished):
    """ln 2 for DPO and for a reward model that knows nothing, 1/2 for KTO; dropout moves them a little."""
    first = {name: rows_of(finished(name))[0]["train/loss"] for name in ("preference", "reward", "kto")}
    assert first == {
        "preference": pytest.approx(math.log(2), abs=0.05),
        "reward": pytest.approx(math.log(2), abs=1e-6),
        "kto": pytest.approx(0.5, abs=0.05),
    }
