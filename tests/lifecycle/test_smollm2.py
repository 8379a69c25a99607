"""The real model, from fetch to answer, tuned, exported and read again. Skipped, loudly, where it cannot be fetched."""

import json

import pytest
import torch
import torch.nn.functional as F
from tests.helpers import smollm2_path

from trivium.build import load_artifact
from trivium.models.cache import Int8Cache
from trivium.models.huggingface import fingerprint
from trivium.models.packed import packed
from trivium.plugin import discover
from trivium_plugins.primer.texts import BOOKS, PAGE, read

discover()
PERPLEXITY = 29.67  # so says transformers, too, of its own reading of the file


@pytest.fixture(scope="module", autouse=True)
def fetched():
    return smollm2_path()


def test_it_knows_the_capital_of_france(main, tmp_path):
    done = main("phase=generate", "model=smollm2_135m", f"runs={tmp_path}", "name=asked",
                "prompt=What is the capital of France?", "inference.sampling.max_tokens=16",
                "inference.sampling.temperature=0")  # fmt: skip
    assert done.code == 0, done.err
    assert "The capital of France is Paris." in done.out.replace("\n", " ")


def test_the_copy_as_safetensors_is_the_file(monkeypatch, tmp_path):
    """Made once, bit for bit, under the file's own hash; a changed byte of it is noticed, and it is made anew."""
    monkeypatch.setattr("trivium.build.cache_folder", lambda: tmp_path)
    first = load_artifact("smollm2_135m")
    (folder,) = (path for path in (tmp_path / "models").iterdir() if path.is_dir())
    again = load_artifact("smollm2_135m")
    assert again.path == folder and first.path.suffix == ".gguf" and again.origin == first.origin == "smollm2_135m"
    assert again.sha256 == first.sha256 == fingerprint([first.path])
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint and again.form == first.form
    ours, theirs = first.tensors(), again.tensors()
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    anew = load_artifact("smollm2_135m")
    assert anew.path.suffix == ".gguf" and load_artifact("smollm2_135m").path == folder


@torch.no_grad()
def perplexity(model, tokenizer, cache=None):
    """Of the first 4 x 512 tokens of Sense and Sensibility."""
    text = read(BOOKS)[:12_000].replace(PAGE, "\n\n")
    ids = torch.tensor(tokenizer.encode(text)[: 4 * 512]).view(4, 512)
    logits = model.eval().head(model(ids, torch.arange(512).expand(4, -1), cache=cache)).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()


def test_perplexity_of_real_text_is_what_it_should_be():
    """Another rope, tokenizer or order of rows gives hundreds."""
    artifact = load_artifact("smollm2_135m")
    model, _ = artifact.model(None)
    assert model.num_parameters == 134_515_008
    assert artifact.tokenizer.num_tokens == 49_152
    assert perplexity(model, artifact.tokenizer) == pytest.approx(PERPLEXITY, rel=0.01)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "int8 cache"])
def test_what_fewer_bits_cost(kind):
    """Less than half a percent of perplexity each. (Four bits cost that little since the file itself has no more.)"""
    artifact = load_artifact("smollm2_135m")
    model, _ = artifact.model(None)
    if kind == "int8 cache":
        found = perplexity(model, artifact.tokenizer, Int8Cache(model.new_cache(1, 1), 4, 512))
    else:
        found = perplexity(packed(model, kind), artifact.tokenizer)
    assert PERPLEXITY < found < 1.005 * PERPLEXITY


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora", "qlora"])
def test_tuned_exported_and_read_again(adapter, main, tmp_path):
    """One step on the primer's chats, merged, then out as a folder that transformers reads and answers from."""
    done = main("phase=sft", "model=smollm2_135m", f"runs={tmp_path}", "name=tuned", "data.parts=[chats]",
                "trainer.max_steps=1", "batch.size=2", "batch.micro_size=2", "batch.length=128", f"adapter={adapter}",
                "optim.lr=1e-5",
                "validation.every_steps=0", "samples.every_steps=0", "precision=fp32")  # fmt: skip
    assert done.code == 0, done.err
    done = main("phase=export", f"init_from={tmp_path / 'tuned'}", f"runs={tmp_path}", "name=out")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out/hf/VERIFIED.json").read_text())
    assert found["logits"] < 1e-3 and found["greedy"] > 3
    done = main("phase=chat", f"init_from={tmp_path / 'out/hf'}", f"runs={tmp_path}", "name=said",
                "prompts=[What is the capital of France?]", "inference.sampling.temperature=0",
                "inference.sampling.max_tokens=24")  # fmt: skip
    assert done.code == 0 and "Paris" in done.out


@pytest.mark.parametrize(
    ("changes", "warned"),
    [(("adapter=lora",), True), (("adapter=qlora", "optim.lr=2e-4"), False)],
    ids=lambda changes: str(changes),
)
def test_a_rate_that_ruins_it_is_warned_of(changes, warned, main, tmp_path):
    """The primer's recipe has 3e-3. One step, of one row."""
    done = main("phase=sft", "model=smollm2_135m", f"runs={tmp_path}", "name=tuned", "data.parts=[chats]",
                "trainer.max_steps=1", "batch.size=1", "batch.micro_size=1", "batch.length=128", "precision=fp32",
                "validation.every_steps=0", "samples.every_steps=0", "data.num_chats=40", *changes)  # fmt: skip
    assert done.code == 0, done.err
    assert ("ruins what it knows" in done.out.replace("\n", " ")) == warned, done.out


@pytest.mark.gpu
def test_qlora_tunes_on_a_gpu_by_the_same_command(main, tmp_path):
    done = main("phase=sft", "model=smollm2_135m", f"runs={tmp_path}", "name=tuned", "data.parts=[chats]",
                "trainer.max_steps=4", "batch.size=2", "batch.micro_size=2", "batch.length=128", "optim.lr=2e-4",
                "validation.every_steps=0", "samples.every_steps=0", "adapter=qlora", "optim=paged_adamw8bit",
                "trainer.accelerator=gpu")  # fmt: skip
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] < 3
