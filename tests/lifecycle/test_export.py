"""Checkpoints come in and leave as Hugging Face folders; transformers is the independent reader on both sides."""

import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.helpers import FAMILIES, folder_of

from trivium.build import load_artifact
from trivium.compose import compose, run_config
from trivium.errors import ConfigError, TriviumError
from trivium.models.weights import weights_of
from trivium.phases.start import run
from trivium.phases.verified import verified_files
from trivium.plugin import discover

transformers = pytest.importorskip("transformers")

discover()
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(trained):
    return load_artifact(str(trained)).tokenizer


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_folder_of_transformers_is_read(family, shards, tokenizer, tmp_path):
    theirs = folder_of(family, tokenizer, tmp_path / "in", **({"max_shard_size": "40KB"} if shards else {}))
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1 if shards else True
    artifact = load_artifact(str(tmp_path / "in"))
    ours, record = artifact.model(None)
    assert record["name"] == family
    tokens = torch.randint(tokenizer.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    found = ours.eval().head(ours(tokens, torch.arange(20).expand(2, -1)))
    torch.testing.assert_close(found, theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_of_an_import_is_the_identity(family, tokenizer, main, tmp_path):
    """The same tensors, bit for bit, and the same settings after a second import; the gate has passed."""
    folder_of(family, tokenizer, tmp_path / "in")
    done = main("phase=export", f"init_from={tmp_path / 'in'}", f"runs={tmp_path}", "name=out")
    assert done.code == 0, done.err
    out = tmp_path / "out/hf"
    before, after = load_file(tmp_path / "in/model.safetensors"), load_file(out / "model.safetensors")
    before.pop("lm_head.weight", None) if "lm_head.weight" not in after else None
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    first, second = load_artifact(str(tmp_path / "in")), load_artifact(str(out))
    first.record["config"].pop("init_std"), second.record["config"].pop("init_std")
    assert first.record == second.record
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    found = json.loads((out / "VERIFIED.json").read_text())
    assert found["logits"] <= 1e-4 and found["greedy"] >= 1
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends == sorted(tokenizer.stop_ids) and len(ends) == 2


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stacked_experts_are_refused_by_name(family, tokenizer, tmp_path):
    """Published files, and those that transformers writes unless told otherwise, hold each expert for itself."""
    folder_of(family, tokenizer, tmp_path, save_original_format=False)
    with pytest.raises(TriviumError, match="has unknown model.layers.0.mlp.experts.down_proj"):
        load_artifact(str(tmp_path)).model(None)


def test_a_trained_run_leaves_and_goes_on(trained, main, tmp_path):
    """Trained here, exported, and tuned again from the exported folder; evaluation agrees to rounding."""
    done = main("phase=export", f"init_from={trained}", f"runs={tmp_path}", "name=out")
    assert done.code == 0, done.err
    assert re.search("transformers .* reads it; logits differ by at most", done.out.replace("\n", " "))
    original, _ = load_artifact(str(trained)).model(None)
    again, _ = load_artifact(str(tmp_path / "out/hf")).model(None)
    ours, theirs = weights_of(original), weights_of(again)
    assert all(ours[name].equal(theirs[name]) for name in ours)
    tuned = main(
        "phase=sft",
        f"init_from={tmp_path / 'out/hf'}",
        f"runs={tmp_path}",
        "name=tuned",
        "data.parts=[tasks]",
        "data.num_tasks=60",
        "trainer.max_steps=1",
        "batch.size=2",
        "batch.micro_size=2",
        "batch.length=64",
        "validation.every_steps=0",
        "samples.every_steps=0",
    )
    assert tuned.code == 0, tuned.err


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"
BROKEN = {
    "unknown family": (lambda f: change_config(f, model_type="mamba"), "model_type='mamba' is not one of"),
    "another activation": (lambda f: change_config(f, hidden_act="relu"), "hidden_act='relu' is not supported"),
    "biases": (lambda f: change_config(f, attention_bias=True), "attention_bias=True is not supported"),
    "unknown rope": (
        lambda f: change_config(f, rope_parameters=None, rope_scaling={"type": "longrope", "factor": 2}),
        "rope_type='longrope' is not one of",
    ),
    "quantised": (lambda f: change_config(f, quantization_config={"bits": 4}), "is quantised"),
    "no size": (lambda f: change_config(f, hidden_size=None), "has no hidden_size"),
    "absurd depth": (lambda f: change_config(f, num_hidden_layers=10**9), "claims 1000000000 layers of"),
    "absurd width": (lambda f: change_config(f, hidden_size=10**30), "hidden_size=.* is no size of a model"),
    "text for a number": (
        lambda f: change_config(f, intermediate_size="wide"),
        "intermediate_size='wide' is not a",
    ),
    "another width": (lambda f: change_config(f, intermediate_size=64), "is of another size"),
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(NORM)), f"lacks {NORM}"),
    "unknown tensor": (
        lambda f: change_tensors(f, lambda t: t.update({"model.extra": torch.ones(1)})),
        "has unknown model.extra",
    ),
    "not finite": (lambda f: change_tensors(f, lambda t: t[NORM].view(-1)[0].fill_(torch.nan)), "not finite"),
    "another head": (
        lambda f: change_tensors(f, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "lm_head.weight differs from the embedding",
    ),
    "cut file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "cannot be read as safetensors",
    ),
    "pickle only": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin can run code when it is read",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_by_name(case, tokenizer, tmp_path):
    folder_of("llama", tokenizer, tmp_path)
    change, sentence = BROKEN[case]
    change(tmp_path)
    with pytest.raises(TriviumError, match=sentence):
        load_artifact(str(tmp_path)).model(None)


def test_shards_that_disagree_with_their_index_are_refused(tokenizer, tmp_path):
    folder_of("llama", tokenizer, tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    original = dict(content["weight_map"])
    content["weight_map"].pop(NORM)
    index.write_text(json.dumps(content))
    with pytest.raises(TriviumError, match=f"disagree about {NORM}"):
        load_artifact(str(tmp_path))
    first, *_, last = sorted(set(original.values()))
    tensors = load_file(tmp_path / first) | load_file(tmp_path / last)
    save_file(tensors, tmp_path / first)
    index.write_text(json.dumps({"weight_map": original}))
    with pytest.raises(TriviumError, match="twice"):
        load_artifact(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {**original, NORM: "../x.safetensors"}}))
    with pytest.raises(TriviumError, match="is no file of its folder"):
        load_artifact(str(tmp_path))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda m: m.embed.weight.data.mul_(1.01), "logits of transformers differ"),
        (lambda m: None, None),
    ],
    ids=["weights", "sound"],
)
def test_the_gate_can_fail(spoil, sentence, trained, tmp_path):
    """What was written from one model is compared with another: refused, unless they are the same."""
    from trivium.phases.export import verify_folder, write_folder

    artifact = load_artifact(str(trained))
    model, record = artifact.model(None)
    write_folder(model.eval(), record["name"], artifact.tokenizer, tmp_path)
    spoil(model)
    if sentence is None:
        assert verify_folder(model, artifact.tokenizer, tmp_path, transformers)["logits"] < 1e-4
        return
    with pytest.raises(TriviumError, match=sentence):
        verify_folder(model, artifact.tokenizer, tmp_path, transformers)


def test_an_end_of_turn_that_is_lost_fails_the_gate(trained, tmp_path):
    from trivium.phases.export import verify_folder, write_folder

    artifact = load_artifact(str(trained))
    model, record = artifact.model(None)
    write_folder(model.eval(), record["name"], artifact.tokenizer, tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [artifact.tokenizer.eos_id]}))
    with pytest.raises(TriviumError, match="transformers (stops at|answers)"):
        verify_folder(model, artifact.tokenizer, tmp_path, transformers)


def test_memory_of_loading_is_the_weights_and_one_tensor(tmp_path):
    """A file of 96 MB in fp32, the largest tensor 24 MB: what loading adds at its peak is at most 1.1 of the file.

    The peak is the kernel's for this process alone: getrusage begins with what the parent held, which hid all of it.
    """
    import subprocess
    import sys

    code = """
import re, sys, torch
from trivium.plugin import discover; discover()
from trivium.build import model_of, model_record
from trivium.compose import component
from trivium.models.weights import weights_of, read_tensors
from safetensors.torch import save_file
sizes = dict(dim=512, layers=4, heads=8, kv_heads=8, ffn_dim=2048)
chosen = component("model", {"name": "llama", **sizes})
record = model_record(chosen, 12000)
if sys.argv[2] == "make":
    from trivium.build import build_model
    save_file(weights_of(build_model(chosen, 12000, 0)), sys.argv[1])
else:
    peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    before = peak()
    model = model_of(record, read_tensors(sys.argv[1]))
    for parameter in model.parameters():
        parameter.sum()
    print((peak() - before) / 1024)
"""
    file = tmp_path / "w.safetensors"
    run = [sys.executable, "-c", code, str(file)]
    subprocess.run([*run, "make"], check=True)
    size = file.stat().st_size / 2**20
    added = float(subprocess.run([*run, "read"], check=True, capture_output=True, text=True).stdout)
    assert 80 < size < 120
    assert 0.9 * size < added < 1.1 * size


def test_a_folder_with_another_tokenizer_is_another(tokenizer, tmp_path):
    """Its hash stands for what it answers: an evaluation of the one is not taken for the other's."""
    folder_of("llama", tokenizer, tmp_path / "in")
    before = load_artifact(str(tmp_path / "in")).sha256
    assert load_artifact(str(tmp_path / "in")).sha256 == before
    path = tmp_path / "in/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:5]
    path.write_text(json.dumps(content))
    assert load_artifact(str(tmp_path / "in")).sha256 != before


def test_a_full_disk_is_told_in_one_sentence_and_nothing_is_called_good(trained, tmp_path):
    """A limit on the size of files stands in for a disk that takes no more."""
    code = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); sys.argv[0] = 'launch.py'; "
    code += "runpy.run_path('launch.py', run_name='__main__')"
    asked = ["phase=export", f"init_from={trained}", f"runs={tmp_path}", "name=out"]
    done = subprocess.run([sys.executable, "-c", code, *asked], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "fault of the program" not in done.stderr, done.stderr
    assert "model.safetensors" in done.stderr and not (tmp_path / "out/hf/VERIFIED.json").exists()


def test_a_stage_that_exported_is_left_only_while_its_files_are_as_they_were(trained, tmp_path):
    """As a pipeline runs it: a second time nothing is done, unless a file has changed or push= is new."""
    start = [f"init_from={trained}", f"runs={tmp_path}", "name=out", "phase=export"]

    def again(*more):
        out = StringIO()
        assert run(run_config(compose([*start, *more])), Console(file=out, width=500), skip_done=True) == 0
        return "done already" in out.getvalue()

    assert [again(), again()] == [False, True]
    file = tmp_path / "out/hf/config.json"
    file.write_text(file.read_text().replace("}", ' ,"x": 1}', 1))
    assert [again(), again()] == [False, True]
    (tmp_path / "out/hf/tokenizer.json").unlink()
    assert [again(), again()] == [False, True]
    (tmp_path / "out/hf/VERIFIED.json").write_text("{}")
    assert [again(), again()] == [False, True]
    with pytest.raises(ConfigError, match="push=me/mine needs"):
        again("push=me/mine")


def test_a_refused_export_is_no_longer_called_good(trained, main, tmp_path, monkeypatch):
    start = ("phase=export", f"init_from={trained}", f"runs={tmp_path}", "name=out")
    assert main(*start).code == 0 and verified_files(tmp_path / "out/hf")
    monkeypatch.setattr("trivium.phases.export.TOLERANCE", -1.0)
    assert main(*start).code == 1
    assert not (tmp_path / "out/hf/VERIFIED.json").exists() and verified_files(tmp_path / "out/hf") == []
