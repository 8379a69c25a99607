"""Families that have no file here, through transformers: the same logits, packed, cached, tuned, exported."""

import json

import pytest
import torch

from trivium.build import build_model, load_artifact
from trivium.compose import component
from trivium.errors import CheckpointError, ConfigError
from trivium.models import peft as form
from trivium.models.adapters import attach, detach, merge
from trivium.models.config import HFConfig, LoraConfig
from trivium.models.weights import weights_of
from trivium.plugin import discover

transformers = pytest.importorskip("transformers")
discover()

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
MORE = {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "phi3": COMMON | MORE | {"pad_token_id": 0},
    "olmo2": COMMON | MORE,
    "gpt_neox": COMMON | {"intermediate_size": 48},
    "stablelm": COMMON | MORE,
    "starcoder2": COMMON | MORE,
    "gemma3_text": COMMON | MORE | {"head_dim": 8, "sliding_window": 7},
    "llama": COMMON | MORE | {"tie_word_embeddings": True},
}
VOCAB = 331


def settings(family, **more):
    return json.dumps({"model_type": family, "vocab_size": VOCAB, **FAMILIES.get(family, {}), **more})


def made(family, seed=0):
    torch.manual_seed(0)
    return build_model(component("model", {"name": "hf", "settings": settings(family)}), VOCAB, seed)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers_own(family):
    """24 tokens, longer than the window of those that have one: in one pass, packed, and one by one in ragged rows."""
    model = made(family).eval()
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    places = torch.arange(24).expand(2, -1)
    wanted = model.inner(tokens, use_cache=False).logits
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(model.head(model(tokens, places)), wanted, **close)
    packed = model(tokens.view(1, 48), places.reshape(1, 48), torch.tensor([[1] * 24 + [2] * 24]))
    torch.testing.assert_close(model.head(packed).view(2, 24, -1), wanted, **close)
    cache = model.new_cache(2, 30)
    found = [[], []]
    at = torch.tensor([0, -3])  # the second row begins three steps later; until then it reads its first token
    for _ in range(27):
        here = at.clamp(0, 23)
        hidden = model(tokens[torch.arange(2), here][:, None], here[:, None], cache=cache)
        for row in range(2):
            if 0 <= at[row] < 24:
                found[row].append(model.head(hidden[row, 0]))
        at += 1
    torch.testing.assert_close(torch.stack([torch.stack(f) for f in found]), wanted, **close)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_names_and_draws(family):
    """Our names begin with blocks, embed, head; theirs are transformers'; the same seed draws the same."""
    first, second, other = made(family), made(family), made(family, seed=1)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert (
        not first.blocks[0]
        .get_parameter(next(n for n, _ in first.blocks[0].named_parameters() if "mlp" in n))
        .equal(other.blocks[0].get_parameter(next(n for n, _ in first.blocks[0].named_parameters() if "mlp" in n)))
    )
    names = first.hf_names()
    assert set(names) == {name for name, _ in first.named_parameters()}
    assert set(names.values()) == {name for name, _ in first.inner.named_parameters()}
    assert {"embed.weight", "head.weight"} <= set(names) and sum(n.startswith("blocks.") for n in names) > 8


def test_adapters_stand_on_it():
    model = made("olmo2").eval()
    tokens, places = torch.arange(20).view(2, 10), torch.arange(10).expand(2, -1)
    alone = model(tokens, places)
    attach(LoraConfig(rank=4, targets=["*.q_proj", "*.down_proj"]), model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    wanted = model(tokens, places)
    assert (wanted - alone).abs().max() > 1e-2
    merge(model)
    detach(model)
    torch.testing.assert_close(model(tokens, places), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.inner.base_model(tokens).last_hidden_state, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["phi3", "llama", "gpt_neox"])
def test_from_a_folder_to_a_tuned_exported_and_read_one(family, trained, main, tmp_path):
    """Also of a native family, where model=hf asks for it; packed tuning, resumed, generated from, exported."""
    tokenizer = load_artifact(str(trained)).tokenizer
    raw = FAMILIES[family] | {"vocab_size": tokenizer.num_tokens, "eos_token_id": tokenizer.eos_id}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **raw)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "in")
    tokenizer.save(tmp_path / "in")
    if family != "llama":
        with pytest.raises(CheckpointError, match=f"model_type='{family}' is not one of .*; model=hf runs it"):
            load_artifact(str(tmp_path / "in"))
    run = ["phase=sft", "data.parts=[tasks]", "data.num_tasks=40", f"runs={tmp_path}", "batch.size=2", "precision=fp32",
           "batch.micro_size=2", "batch.length=64", "validation.every_steps=0", "samples.every_steps=0"]  # fmt: skip
    tune = [*run, "name=tuned", f"init_from={tmp_path / 'in'}", "model=hf", "schedule=constant"]
    assert main(*tune, "trainer.max_steps=2").code == 0
    done = main(*tune, "trainer.max_steps=4", "trainer.recompute=1")
    assert done.code == 0 and "continues from" in done.out, done.err
    said = main("phase=generate", f"init_from={tmp_path / 'tuned'}", "prompt=heron", f"runs={tmp_path}", "name=said")
    assert said.code == 0, said.err
    out = main("phase=export", f"init_from={tmp_path / 'tuned'}", f"runs={tmp_path}", "name=out")
    assert out.code == 0, out.err
    assert json.loads((tmp_path / "out/hf/config.json").read_text())["model_type"] == family
    before, _ = load_artifact(str(tmp_path / "tuned")).model(None)
    after, _ = load_artifact(str(tmp_path / "out/hf"), family="hf").model(None)
    assert all(weights_of(before)[n].equal(t) for n, t in weights_of(after).items())


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("", "model=hf needs a model: init_from=FOLDER"),
        ("{", "is no JSON"),
        ("{}", "has no model_type"),
        (settings("phi3", auto_map={"AutoModel": "evil.py"}), "brings code of its own"),
        (settings("nothing_such"), "makes no causal model of 'nothing_such'"),
        (settings("mamba", hidden_size=32, num_hidden_layers=2), "no positions|layers"),
        (
            settings(
                "gpt_neo",
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                window_size=16,
                max_position_embeddings=64,
                attention_types=[[["global", "local"], 1]],
            ),
            "attention that no mask describes",
        ),
        (
            settings(
                "phi3",
                original_max_position_embeddings=16,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 16,
                },
            ),
            "positions of kind longrope",
        ),
        (
            settings("cohere", **COMMON, **MORE, logit_scale=0.5, pad_token_id=0, eos_token_id=1),
            "cannot be run here: in one pass",
        ),
    ],
    ids=[
        "empty",
        "no JSON",
        "no type",
        "code",
        "unknown",
        "no attention",
        "own windows",
        "own positions",
        "scaled logits",
    ],
)
def test_what_cannot_be_run_right_is_refused(said, told):
    with pytest.raises((ConfigError, CheckpointError), match=told):
        build_model(component("model", {"name": "hf", "settings": said}), VOCAB, 0)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_an_adapter_on_it_is_found_again_and_read_by_peft(kind, trained, main, tmp_path):
    """Of a family that is native, too: its base is read the same way again. Names are transformers' own."""
    peft = pytest.importorskip("peft")
    tokenizer = load_artifact(str(trained)).tokenizer
    torch.manual_seed(0)
    raw = FAMILIES["llama"] | {"vocab_size": tokenizer.num_tokens, "eos_token_id": tokenizer.eos_id}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **raw)).float()
    theirs.save_pretrained(tmp_path / "in")
    tokenizer.save(tmp_path / "in")
    done = main("phase=sft", "data.parts=[tasks]", "data.num_tasks=40", f"runs={tmp_path}", "batch.size=2", "name=run",
                "precision=fp32", "batch.micro_size=2", "batch.length=64", "validation.every_steps=0", "optim.lr=1e-2",
                "samples.every_steps=0", f"init_from={tmp_path / 'in'}", "model=hf", f"adapter={kind}",
                "adapter.targets=['*_proj']", "trainer.max_steps=2")  # fmt: skip
    assert done.code == 0, done.err
    model, record = load_artifact(str(tmp_path / "run")).model(None)
    assert record["name"] == "hf" and record["adapter"]["base"]["family"] == "hf"
    if kind == "lora":
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "run/checkpoints/step-2").eval()
        tokens = torch.arange(20).view(2, 10)
        with torch.no_grad():
            wanted = model.eval().head(model(tokens, torch.arange(10).expand(2, -1)))
            torch.testing.assert_close(wrapped(tokens).logits, wanted, rtol=0, atol=1e-5)
    names = form.peft_names(model).values()
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in names


def test_mixtures_are_not_trained_through_it():
    raw = {"num_local_experts": 4, "num_experts_per_tok": 2, **COMMON, **MORE}
    model = build_model(component("model", {"name": "hf", "settings": settings("mixtral", **raw)}), VOCAB, 0)
    assert "has experts, whose balance is not learnt through model=hf" in model.untrainable
    assert not made("phi3").untrainable


def test_it_is_not_compiled_and_recomputes_all_or_nothing():
    model = made("phi3")
    with pytest.raises(ConfigError, match=r"trainer\.compile=true is for native families"):
        model.compile_blocks()
    with pytest.raises(ConfigError, match=r"trainer\.recompute=2: model=hf recomputes every layer"):
        model.recompute = 2
    assert isinstance(model.config, HFConfig) and model.recompute == 0
    model.recompute = 1
    assert model.recompute == 1
