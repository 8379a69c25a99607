"""Runs that train an adapter: what they keep, what they start from, what they are held to, and how they leave."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from trivium.build import load_artifact
from trivium.models import peft
from trivium.models.adapters import Adapters, parts
from trivium.plugin import discover

discover()

SHORT = ("trainer.max_steps=4", "checkpoint.every_steps=2", "batch.length=128")


@pytest.fixture(scope="module")
def tuning_on(tuned, tuning):
    """tuning_on(runs, name, *changes) -> the overrides of a tiny tuning run with an adapter on `tuned`."""

    def overrides(runs, name, *changes):
        own = ("adapter=lora", "data.tasks=[count]", "optim.lr=1e-2", f"init_from={tuned}")
        if "adapter=none" not in changes:
            own += ("adapter.rank=4",)
        return [o for o in tuning(runs, name, *SHORT, *own, *changes) if not o.startswith("model")]

    return overrides


@pytest.fixture(scope="module")
def adapted(fork, tuning_on, tmp_path_factory):
    """A finished adapter of 4 steps on `tuned`, never to be changed."""
    runs = tmp_path_factory.mktemp("adapted")
    done = fork(*tuning_on(runs, "lora")).done()
    assert done.returncode == 0, done.err
    return runs / "lora"


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(folder):
    found = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    return torch.cat([t.flatten().double() for t in found])


def test_a_checkpoint_is_the_adapter_in_peft_s_form(adapted, tuned):
    """No weight of the base; 14 layers x (A, B), in a hundredth of the size; it names its base and its hash."""
    checkpoint = adapted / "checkpoints/step-4"
    assert not (checkpoint / "model.safetensors").exists()
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    assert len(tensors) == 28 and tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].shape == (4, 32)
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 32.0, "LORA")
    base = load_artifact(str(tuned))
    assert json.loads((checkpoint / "model.json").read_text())["adapter"]["base"] == {
        "path": str(tuned / "checkpoints/step-120"),
        "sha256": base.sha256,
        "family": "llama",
    }
    state = load_file(checkpoint / "optimizer.safetensors")
    assert all(".lora.default." in name for name in state)


def test_peft_reads_a_checkpoint_as_it_is(adapted, tuned, main, tmp_path):
    """On the exported base, with transformers and peft: the logits that the run's own model has."""
    theirs, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    done = main("phase=export", f"init_from={tuned}", f"runs={tmp_path}", "name=out")
    assert done.code == 0, done.err
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/hf").float()
    theirs = theirs.PeftModel.from_pretrained(base, adapted / "checkpoints/step-4").eval()
    ours, _ = load_artifact(str(adapted)).model(None)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        wanted = ours.eval().head(ours(tokens, torch.arange(20).expand(2, -1)))
        torch.testing.assert_close(theirs(tokens).logits, wanted, rtol=0, atol=1e-4)
        base, _ = load_artifact(str(tuned)).model(None)
        assert (base.eval().head(base(tokens, torch.arange(20).expand(2, -1))) - wanted).abs().max() > 0.1


def test_a_resumed_adapter_is_the_unbroken_one(adapted, fork, tuning_on, tmp_path):
    """Two steps, then two more: every loss and every bit of weights and optimizer state."""
    first = fork(*tuning_on(tmp_path, "lora", "trainer.max_steps=2", "schedule=constant")).done()
    assert first.returncode == 0, first.err
    again = fork(*tuning_on(tmp_path, "lora", "schedule=constant")).done()
    assert again.returncode == 0 and "continues from" in again.out, again.err
    whole = fork(*tuning_on(tmp_path, "whole", "schedule=constant")).done()
    assert whole.returncode == 0, whole.err
    loss = [[row["train/loss"] for row in rows(tmp_path / name)] for name in ("lora", "whole")]
    assert loss[0] == loss[1] and len(loss[0]) == 4
    one, other = (figures(tmp_path / f"{name}/checkpoints/step-4") for name in ("lora", "whole"))
    assert one.equal(other)


@pytest.mark.parametrize(
    "changes",
    [
        ("adapter=dora",),
        ("adapter=rslora", "adapter.also=[embed,norm]"),
        ("adapter=qlora", "adapter.dropout=0.1"),
        ("adapter=qlora", "adapter.quant_type=int8"),
        ("adapter=lora", "trainer.average=0.9", "optim=adamw8bit"),
        ("adapter=lora", "trainer.recompute=1", "optim=muon"),
    ],
    ids=lambda changes: " ".join(changes),
)
def test_every_kind_trains_resumes_and_answers(changes, fork, main, tuning_on, tmp_path):
    """The loss falls; a resume gives the last steps again; what is loaded has the tensors that were saved."""
    steps = ("trainer.max_steps=8", "schedule=constant", "checkpoint.every_steps=4")
    done = fork(*tuning_on(tmp_path, "run", *steps, *changes)).done()
    assert done.returncode == 0, done.err
    before = [row["train/loss"] for row in rows(tmp_path / "run")]
    assert sum(before[-3:]) < sum(before[:3])
    kept = load_file(tmp_path / "run/checkpoints/step-8/adapter_model.safetensors")
    shutil.rmtree(tmp_path / "run/checkpoints/step-8")
    again = fork(*tuning_on(tmp_path, "run", *steps, *changes)).done()
    assert again.returncode == 0, again.err
    assert [row["train/loss"] for row in rows(tmp_path / "run")] == before
    found = load_file(tmp_path / "run/checkpoints/step-8/adapter_model.safetensors")
    assert found.keys() == kept.keys() and all(found[name].equal(kept[name]) for name in kept)
    model, _ = load_artifact(str(tmp_path / "run")).model(None)
    held = peft.to_peft(model, {name: p.detach() for name, p in parts(model).items()})
    assert held.keys() == kept.keys() and all(held[name].equal(kept[name]) for name in kept)
    said = main("phase=generate", f"init_from={tmp_path / 'run'}", "prompt=How many", f"runs={tmp_path}", "name=said")
    assert said.code == 0, said.err


def test_an_adapter_is_trained_on_by_itself_or_merged_under_a_new_one(adapted, fork, tuning_on, tmp_path):
    """Without adapter=, its own is trained on; with one, a new one stands on the two together."""
    done = fork(*tuning_on(tmp_path, "on", "adapter=none", f"init_from={adapted}")).done()
    assert done.returncode == 0, done.err
    tensors = load_file(tmp_path / "on/checkpoints/step-4/adapter_model.safetensors")
    before = load_file(adapted / "checkpoints/step-4/adapter_model.safetensors")
    assert tensors.keys() == before.keys() and not all(tensors[n].equal(before[n]) for n in tensors)
    new = fork(*tuning_on(tmp_path, "new", f"init_from={adapted}", "adapter.rank=2")).done()
    assert new.returncode == 0 and "step-4, its adapter merged" in new.out, new.err
    artifact = load_artifact(str(tmp_path / "new"))
    assert artifact.base.base is not None and artifact.base.sha256 == load_artifact(str(adapted)).sha256
    model, _ = artifact.model(None)
    under, _ = load_artifact(str(adapted)).merged(None)
    assert model.blocks[0].attn.q.weight.equal(under.blocks[0].attn.q.weight)
    assert sum(isinstance(m, Adapters) for m in model.modules()) == 14


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_a_preference_starts_from_the_adapter_off_as_reference(kind, fork, main, monkeypatch, preferring, tmp_path):
    """With dropout on, and on a base of 4 bits, the first loss is ln 2 when it is checked without dropout: the
    reference is that very base. The whole model in fp32 is another; its log-probabilities are in the cache by then."""
    short = ("trainer.max_steps=1", "adapter.dropout=0.3", "adapter.rank=4")
    whole = fork(*preferring(tmp_path, "whole", "trainer.max_steps=1")).done()
    assert whole.returncode == 0, whole.err
    done = fork(*preferring(tmp_path, "run", f"adapter={kind}", *short)).done()
    assert done.returncode == 0, done.err
    assert rows(tmp_path / "run")[0]["train/loss"] == pytest.approx(0.693, abs=0.02)
    if kind == "qlora":
        monkeypatch.setattr("trivium.phases.train._is_base", lambda this, artifact: False)
        wrong = main(*preferring(tmp_path, "wrong", f"adapter={kind}", *short))
        assert wrong.code == 1 and "step 0: loss is 0.6" in wrong.err, wrong.err


def test_rl_asks_its_policy_with_the_adapter_off(main, monkeypatch, rolling, tmp_path):
    """No second model is loaded; with neither dropout, the KL to the reference is 0 before the first step (checked)."""
    monkeypatch.setattr("trivium.phases.train.build_companion", None)
    steps = ("adapter=lora", "adapter.rank=4", "trainer.max_steps=4", "optim.lr=1e-2")
    done = main(*rolling(tmp_path, "run", *steps))
    assert done.code == 0, done.err
    assert len(rows(tmp_path / "run")) == 4 and rows(tmp_path / "run")[-1]["train/kl"] > 1e-6


def test_a_merged_export_passes_its_gate(adapted, main, tmp_path):
    pytest.importorskip("transformers")
    done = main("phase=export", f"init_from={adapted}", f"runs={tmp_path}", "name=out")
    assert done.code == 0, done.err
    merged, _ = load_artifact(str(adapted)).merged(None)
    live, _ = load_artifact(str(adapted)).model(None)
    tokens, places = torch.arange(40).reshape(2, 20), torch.arange(20).expand(2, -1)
    wanted = live.eval().head(live(tokens, places))
    torch.testing.assert_close(merged.eval().head(merged(tokens, places)), wanted, rtol=0, atol=1e-4)
    again, _ = load_artifact(str(tmp_path / "out/hf")).model(None)
    assert again.blocks[1].ffn.up.weight.equal(merged.blocks[1].ffn.up.weight)
    assert not (tmp_path / "out/hf/adapter_config.json").exists()


def test_a_base_that_moved_or_changed_is_noticed(fork, main, tuning_on, tuned, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tuned, base)
    done = fork(*tuning_on(tmp_path, "run", f"init_from={base}")).done()
    assert done.returncode == 0, done.err
    base.rename(tmp_path / "moved")
    ask = ("phase=generate", f"init_from={tmp_path / 'run'}", "prompt=x", f"runs={tmp_path}", "name=said")
    lost = main(*ask)
    assert lost.code == 1 and "say where it is in base=" in lost.err
    found = main(*ask, f"base={tmp_path / 'moved'}")
    assert found.code == 0, found.err
    wrong = main(*ask, f"base={tmp_path / 'moved/checkpoints/step-100'}")
    assert wrong.code == 1 and "holds other weights" in wrong.err


def alone(adapted, where, base=""):
    """The adapter as a folder of its own, as peft has it; `base` is what it says it stands on."""
    where.mkdir()
    for file in (peft.CONFIG, peft.WEIGHTS):
        shutil.copy(adapted / "checkpoints/step-4" / file, where / file)
    said = json.loads((where / peft.CONFIG).read_text()) | {"base_model_name_or_path": base}
    (where / peft.CONFIG).write_text(json.dumps(said))
    return where


def test_a_folder_of_peft_is_another_with_another_base(adapted, tuned, fork, main, tuning_on, tmp_path):
    """What it says depends on both: a run on the one is not continued on the other, and nothing is taken for done."""
    folder, other = alone(adapted, tmp_path / "pf"), tuned / "checkpoints/step-100"
    on, off = (load_artifact(str(folder), str(base)) for base in (tuned, other))
    assert on.sha256 != off.sha256
    ours, _ = load_artifact(str(adapted)).model(None)
    theirs, _ = on.model(None)
    assert all(theirs.get_parameter(n).equal(p) for n, p in ours.named_parameters())
    tune = [*tuning_on(tmp_path, "run", "adapter=none", f"init_from={folder}"), "schedule=constant"]
    first = fork(*tune, f"base={tuned}", "trainer.max_steps=2").done()
    assert first.returncode == 0, first.err
    wrong = main(*tune, f"base={other}")
    assert wrong.code == 1 and "holds another run: parent was" in wrong.err
    unnamed = main(*tune)
    assert unnamed.code == 1 and "say where it is in base=" in unnamed.err


def test_a_chain_finds_its_way_when_the_lowest_has_moved(adapted, tuned, fork, main, tuning_on, tmp_path):
    """base, an adapter on it, an adapter on that: `base=` may name the lowest; a base named at training is kept."""
    base = tmp_path / "base"
    shutil.copytree(tuned, base)
    for name, start in (("one", base), ("two", tmp_path / "one")):
        done = fork(*tuning_on(tmp_path, name, f"init_from={start}", "trainer.max_steps=2")).done()
        assert done.returncode == 0, done.err
    wanted = load_artifact(str(tmp_path / "two")).model(None)[0]
    base.rename(tmp_path / "moved")
    ask = ("phase=generate", f"init_from={tmp_path / 'two'}", "prompt=x", f"runs={tmp_path}", "name=said")
    assert main(*ask).code == 1
    assert main(*ask, f"base={tmp_path / 'moved'}").code == 0
    found = load_artifact(str(tmp_path / "two"), str(tmp_path / "moved")).model(None)[0]
    assert all(found.get_parameter(n).equal(p) for n, p in wanted.named_parameters())
    folder = alone(adapted, tmp_path / "pf")
    on = fork(*tuning_on(tmp_path, "onpf", f"init_from={folder}", f"base={tuned}", "trainer.max_steps=2")).done()
    assert on.returncode == 0, on.err
    assert load_artifact(str(tmp_path / "onpf")).model(None)[0].adapters is not None


def test_a_rollback_of_a_preference_under_fsdp_asks_a_whole_reference(fork, preferring, tmp_path):
    more = ("adapter=lora", "adapter.also=[embed]", "batch.micro_size=2", "trainer.devices=2", "trainer.strategy=fsdp",
            "trainer.accelerator=cpu", "checkpoint.every_steps=2", "trainer.max_steps=6", "guard.policy=rollback",
            "guard.spike_sigma=1e-4", "guard.window=3", "guard.patience=100")  # fmt: skip
    done = fork(*preferring(tmp_path, "run", *more)).done()
    assert done.returncode in (0, 1) and "fault of the program" not in done.err, done.err
    assert "back to step-" in done.out


def test_settings_beside_a_new_template_are_not_blamed_on_the_reference(main, preferring, tmp_path):
    """A template without new tokens writes otherwise, in the same tokens: the start is still its own reference."""
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    done = main(*preferring(tmp_path, "run", f"tokenizer.chat_template={path}", "trainer.max_steps=1"))
    assert done.code == 0, done.err
    new = main(*preferring(tmp_path, "new", "tokenizer.chat_template=chatml", "trainer.max_steps=1"))
    assert new.code == 2 and "knows no tokenizer.add_tokens; tune a model with them first" in new.err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("init_from=",), "adapter=lora stands on a trained model, which stays as it is; name it in init_from="),
        (("keep_layers=1",), "stands on a whole model"),
        (("adapter.rank=0",), "adapter.rank=0 must be greater than 0"),
        (("adapter.targets=[nothing]",), "'nothing' matches no linear layer; there are blocks.0.attn.k"),
        (("base=runs/x",), "base=runs/x is for an adapter"),
        (("trainer.devices=2", "trainer.strategy=fsdp", "adapter=qlora"), "not proven with trainer.strategy=fsdp"),
        (("trainer.devices=2", "trainer.strategy=fsdp", "trainer.tensor_parallel=2"), "trainer.tensor_parallel=2"),
        (("adapter=lra",), "unknown adapter=lra. Did you mean lora"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(changes, told, main, tuning_on, overridden, tmp_path):
    done = main(*overridden(tuning_on(tmp_path, "run"), changes))
    assert done.code == 2 and told in " ".join(done.err.split()), done.err
    assert not (tmp_path / "run/checkpoints").exists()


def test_phases_that_do_not_train_take_the_adapter_there_is(main, adapted, tmp_path):
    done = main("phase=chat", "adapter=lora", f"init_from={adapted}", f"runs={tmp_path}")
    told = "adapter=lora is for phases that train; phase=chat takes the adapter that init_from= names"
    assert done.code == 2 and told in done.err


def test_an_adapter_on_an_adapter_is_not_put_into_few_bits(adapted, main, tuning_on, tmp_path):
    done = main(*tuning_on(tmp_path, "run", "adapter=qlora", f"init_from={adapted}"))
    assert done.code == 2 and "answer otherwise than what was tuned" in done.err


def test_changed_settings_of_an_adapter_are_refused_at_a_resume(fork, main, tuning_on, tmp_path):
    assert fork(*tuning_on(tmp_path, "run", "trainer.max_steps=2")).done().returncode == 0
    done = main(*tuning_on(tmp_path, "run", "adapter.alpha=8"))
    assert done.code == 1 and "adapter.alpha was 32.0, is 8" in done.err
