"""average=: the mean of weights, by hand-worked numbers; what cannot be averaged is refused by name."""

import dataclasses
import json
import shutil

import pytest
import torch
from tests.helpers import folder_of

from trivium.build import load_artifact
from trivium.errors import TriviumError
from trivium.models.weights import weights_of
from trivium.phases.average import average_into
from trivium.plugin import discover

pytest.importorskip("transformers")
discover()


@pytest.fixture(scope="module")
def tokenizer(trained):
    return load_artifact(str(trained)).tokenizer


def shifted(folder, tokenizer, where, change):
    """The folder's model with each weight changed, as a folder of its own."""
    from trivium.phases.export import write_folder

    artifact = load_artifact(str(folder))
    model, record = artifact.model(None)
    with torch.no_grad():
        for parameter in model.parameters():
            change(parameter)
    where.mkdir()
    write_folder(model, record["name"], tokenizer, where)
    return where


def test_the_mean_of_three(tokenizer, main, tmp_path):
    """w, 4 w and w + 3: their mean is 2 w + 1, to fp32 rounding; a weight of 0.5 becomes 2 exactly."""
    base = tmp_path / "base"
    folder_of("llama", tokenizer, base)
    one = shifted(base, tokenizer, tmp_path / "one", lambda p: p.view(-1)[0].fill_(0.5))
    four = shifted(one, tokenizer, tmp_path / "four", lambda p: p.mul_(4))
    more = shifted(one, tokenizer, tmp_path / "more", lambda p: p.add_(3))
    done = main("phase=export", f"init_from={one}", f"average=[{four},{more}]", f"runs={tmp_path}", "name=out")
    assert done.code == 0, done.err
    assert "the mean of 3 models' weights" in done.out
    before = weights_of(load_artifact(str(one)).model(None)[0])
    after = weights_of(load_artifact(str(tmp_path / "out/hf")).model(None)[0])
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], 2 * tensor + 1, rtol=1e-6, atol=1e-6)
        assert after[name].view(-1)[0] == 2
    parents = json.loads((tmp_path / "out/MANIFEST.json").read_text())["parents"]
    assert [p["role"] for p in parents] == ["init_from", "average", "average"]
    assert [p["path"] for p in parents] == [str(one), str(four), str(more)]


def test_the_mean_with_a_run_itself_is_that_run(trained, main, tmp_path):
    done = main("phase=export", f"init_from={trained}", f"average=[{trained}]", f"runs={tmp_path}", "name=out")
    assert done.code == 0, done.err
    before = weights_of(load_artifact(str(trained)).model(None)[0])
    after = weights_of(load_artifact(str(tmp_path / "out/hf")).model(None)[0])
    assert all(before[name].equal(after[name]) for name in before)


def test_an_adapter_counts_with_what_it_makes_of_its_base(tuned, preferring, main, tmp_path):
    """The mean of a base W and an adapter on it is W + (merged - W) / 2."""
    done = main(*preferring(tmp_path, "adapter", "adapter=lora", "trainer.max_steps=2", "optim.lr=1e-2"))
    assert done.code == 0, done.err
    base, adapter = load_artifact(str(tuned)), load_artifact(str(tmp_path / "adapter"))
    model, _ = base.model(None)
    ours = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    merged = weights_of(adapter.merged(None)[0])
    average_into(model, base, [adapter])
    moved = 0
    for name, tensor in weights_of(model).items():
        torch.testing.assert_close(tensor, (ours[name] + merged[name]) / 2, rtol=1e-6, atol=1e-7)
        moved += not ours[name].equal(merged[name])
    assert moved > 0


def test_an_adapter_to_average_finds_its_base_where_base_says(tuned, preferring, main, tmp_path):
    """An adapter whose base has moved away from where it says."""
    base, away = tmp_path / "base", tmp_path / "away"
    shutil.copytree(tuned, base)
    done = main(*preferring(tmp_path, "adapter", "adapter=lora", "trainer.max_steps=1", f"init_from={base}"))
    assert done.code == 0, done.err
    start = ("phase=export", f"init_from={tuned}", f"average=[{tmp_path}/adapter]", f"runs={tmp_path}")
    assert main(*start, "name=before").code == 0
    base.rename(away)
    done = main(*start, "name=lost")
    assert done.code == 1 and "say where it is in base=" in done.err, done.err
    assert main(*start, "name=found", f"base={away}").code == 0
    one, two = ((tmp_path / name / "hf/model.safetensors").read_bytes() for name in ("before", "found"))
    assert one == two
    done = main("phase=export", f"init_from={tuned}", f"average=[{tuned}]", f"base={away}", f"runs={tmp_path}")
    assert done.code == 2 and f"base={away} is for an adapter" in done.err


@pytest.mark.parametrize(
    ("family", "settings", "sentence"),
    [
        ("qwen3", {}, "model=qwen3 there and llama in"),
        ("llama", {"intermediate_size": 64}, "ffn_dim=64 there and 48 in"),
        ("llama", {"rope_theta": 500.0}, "rope_theta=500.0 there and 10000.0 in"),
    ],
)
def test_another_architecture_is_refused(family, settings, sentence, tokenizer, main, tmp_path):
    folder_of("llama", tokenizer, tmp_path / "a")
    folder_of(family, tokenizer, tmp_path / "b", settings)
    done = main("phase=export", f"init_from={tmp_path}/a", f"average=[{tmp_path}/b]", f"runs={tmp_path}", "name=out")
    assert done.code == 1, done.out
    assert f"average={tmp_path}/b cannot be averaged with" in done.err and sentence in done.err
    assert not (tmp_path / "out/hf").exists()


def test_another_vocabulary_or_tokenizer_is_refused(tokenizer, tmp_path):
    folder_of("llama", tokenizer, tmp_path / "a")
    folder_of("llama", tokenizer, tmp_path / "b", {"vocab_size": tokenizer.num_tokens + 5})
    one, other = (load_artifact(str(tmp_path / name)) for name in "ab")
    model, _ = one.model(None)
    with pytest.raises(TriviumError, match=f"vocab_size={tokenizer.num_tokens + 5} there and {tokenizer.num_tokens}"):
        average_into(model, one, [other])
    strange = dataclasses.replace(one, tokenizer=tokenizer.add_tokens(["<new>"]))
    with pytest.raises(TriviumError, match="it has another tokenizer than"):
        average_into(model, one, [strange])


def test_average_is_for_export(trained, main, tmp_path):
    done = main("phase=generate", f"init_from={trained}", f"average=[{trained}]", "prompt=a", f"runs={tmp_path}")
    assert done.code == 2 and "is for phase=export, not for phase=generate" in done.err
