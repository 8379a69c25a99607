"""The real model, from fetch to answer, tuned, exported and read again. Skipped, loudly, where it cannot be fetched."""

import json

import pytest
import torch
from tests.helpers import smollm2_path


@pytest.fixture(scope="module", autouse=True)
def fetched():
    return smollm2_path()


def test_it_knows_the_capital_of_france(main, tmp_path):
    done = main("phase=generate", "model=smollm2_135m", f"runs={tmp_path}", "name=asked",
                "prompt=What is the capital of France?", "inference.sampling.max_tokens=16",
                "inference.sampling.temperature=0")  # fmt: skip
    assert done.code == 0, done.err
    assert "The capital of France is Paris." in done.out.replace("\n", " ")


@torch.no_grad()
def test_perplexity_of_real_text_is_what_it_should_be():
    """English documentation: between 2 and 30, where a wrong rope or tokenizer gives hundreds."""
    from trivium.build import load_artifact

    artifact = load_artifact("smollm2_135m")
    model, record = artifact.model(None)
    assert model.num_parameters == 134_515_008
    assert artifact.tokenizer.num_tokens == 49_152
    text = str(__import__("email").__doc__) + str(__import__("argparse").__doc__) + str(__import__("json").__doc__)
    ids = torch.tensor([artifact.tokenizer.encode(text)[:512]])
    logits = model.eval().head(model(ids, torch.arange(ids.shape[1])[None]))
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert 2 < torch.tensor(loss).exp().item() < 30


@pytest.mark.slow
def test_tuned_exported_and_read_again(main, tmp_path):
    """One step of tuning on the primer's chats, then out as a folder that transformers reads and answers from."""
    done = main("phase=sft", "model=smollm2_135m", f"runs={tmp_path}", "name=tuned", "data.parts=[chats]",
                "trainer.max_steps=1", "batch.size=2", "batch.micro_size=2", "batch.length=128", "optim.lr=1e-5",
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
