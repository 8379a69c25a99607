"""A stretched context: the same weights, the frequencies that the settings of a model made anew would have."""

import json
import re

import pytest
import torch

from trivium.build import load_artifact
from trivium.compose import compose, run_config
from trivium.models.config import LlamaConfig, RopeScaling
from trivium.models.llama import Llama
from trivium.plugin import discover

discover()
COMMAND = ("phase=sft", "data.parts=[tasks]", "data.num_tasks=60", "trainer.max_steps=1", "batch.size=2",
           "batch.micro_size=2", "batch.length=128", "validation.every_steps=0", "samples.every_steps=0",
           "optim.lr=1e-12", "optim.weight_decay=0", "precision=fp32")  # fmt: skip


def test_it_is_the_model_that_its_settings_say(trained):
    """Context 256 made 1,024 by YaRN: factor 4 from 256; logits equal those of a model made so, with these weights."""
    parent = load_artifact(str(trained))
    old, _ = parent.model(None)
    longer, record = parent.stretched(1024, "yarn").model(None)
    assert longer.context == 1024 and old.context == 256
    scaling = record["config"]["rope_scaling"]
    assert (scaling["kind"], scaling["factor"], scaling["original_context"]) == ("yarn", 4.0, 256)
    config = LlamaConfig(dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=64, context=1024,
                         rope_scaling=RopeScaling("yarn", 4.0, 256))  # fmt: skip
    made = Llama(config, old.vocab_size)
    made.load_state_dict(old.state_dict())
    tokens = torch.arange(600)[None] % old.vocab_size
    positions = torch.arange(600)[None]
    assert torch.equal(longer.eval()(tokens, positions), made.eval()(tokens, positions))
    assert not torch.allclose(longer(tokens, positions)[0, 99], old.eval()(tokens[:, :100], positions[:, :100])[0, 99])
    plain, record = parent.stretched(1024, "none").model(None)
    assert plain.context == 1024 and record["config"]["rope_scaling"]["kind"] == "none"
    assert torch.equal(plain.eval()(tokens[:, :100], positions[:, :100]), old(tokens[:, :100], positions[:, :100]))


def test_a_stretched_run_stays_stretched(main, trained, tmp_path):
    """Its checkpoint says so to whoever starts from it; a second stretch counts from the first: 2,048 / 256 = 8."""
    done = main(*COMMAND, f"init_from={trained}", "stretch_context=512", f"runs={tmp_path}", "name=long")
    assert done.code == 0, done.err
    assert "its context made 512 by yarn" in done.out.replace("\n", " ")
    said = json.loads((tmp_path / "long/checkpoints/step-1/model.json").read_text())["config"]
    assert said["context"] == 512 and said["rope_scaling"]["factor"] == 2.0
    again = load_artifact(str(tmp_path / "long")).stretched(2048, "linear")
    assert again.record is not None
    assert again.record["config"]["rope_scaling"]["factor"] == 8.0
    assert again.record["config"]["rope_scaling"]["original_context"] == 256


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stretch_context=256"], "must be more than the context of .*, 256"),
        (["stretch_context=512", "stretch_by=yarm"], "stretch_by='yarm' is not one of .* Did you mean yarn"),
        (["stretch_context=512", "adapter=lora"], "changes the base that adapter=lora stands on"),
        (["stretch_context=-1"], "makes the context of a trained model longer"),
    ],
)
def test_what_cannot_be_stretched_is_refused(main, trained, tmp_path, overrides, sentence):
    done = main(*COMMAND, f"init_from={trained}", f"runs={tmp_path}", *overrides)
    assert done.code == 2
    assert re.search(sentence, done.err.replace("\n", " "))


def test_only_training_stretches(main, trained, tmp_path):
    done = main("phase=generate", f"init_from={trained}", "prompt=x", "stretch_context=512", f"runs={tmp_path}")
    assert done.code == 2 and "for phases that train" in done.err


def test_the_experiment_of_a_long_context_is_run(main, trained, corpus, tmp_path):
    """As it stands, but for its start, data and number of steps: 256 tokens become 1,024, and a step is four rows."""
    stands = run_config(compose(["phase=pretrain", "experiment=long_context"]))
    before = run_config(compose(["phase=pretrain"]))  # the first command of its page
    assert stands.init_from == f"runs/{before.phase}-{before.domain}"
    done = main("phase=pretrain", "experiment=long_context", f"init_from={trained}", "domain=files",
                f"data.path={corpus}", "data.validation_share=0.2", f"runs={tmp_path}", "trainer.max_steps=2",
                "precision=fp32")  # fmt: skip
    assert done.code == 0, done.err
    folder = tmp_path / "long_context"
    said = json.loads((folder / "checkpoints/step-2/model.json").read_text())["config"]
    scaling = said["rope_scaling"]
    assert said["context"] == 1024
    assert (scaling["kind"], scaling["factor"], scaling["original_context"]) == ("yarn", 4.0, 256)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["tokens"]) for r in rows] == [(1, 4 * 1024), (2, 8 * 1024)] and rows[-1]["val/loss"] > 0
