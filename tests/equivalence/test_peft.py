"""Adapters are peft's, both ways, on every family: what one writes the other reads, and says the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trivium.build import load_artifact
from trivium.errors import CheckpointError
from trivium.models import peft as form
from trivium.models.adapters import attach, detach, load_parts, merge, parts
from trivium.models.config import DoraConfig, LoraConfig, RsLoraConfig

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
families = pytest.importorskip("equivalence.test_families_hf")

KINDS = {"lora": LoraConfig, "rslora": RsLoraConfig, "dora": DoraConfig}
FAMILIES = ("llama tied grouped", "mistral", "qwen2", "qwen3", "gemma2", "gpt2")
CASES = [(case, kind, []) for case in FAMILIES for kind in KINDS]
CASES += [("llama tied grouped", "lora", ["embed"]), ("llama untied full", "lora", ["head", "embed"])]
CASES += [("gpt2", "lora", ["blocks.0.out", "blocks.1.up"]), ("gpt2", "dora", ["norm", "embed"])]
TOKENS = torch.randint(families.VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))


def stirred(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parts(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def said(model):
    return model.head(model(TOKENS, torch.arange(16).expand(2, -1)))


def read_by_peft(ours, theirs, folder):
    """peft's model, from our adapter's files, on `theirs`; it says what ours says."""
    save_file(form.to_peft(ours, {n: p.detach().clone() for n, p in parts(ours).items()}), folder / form.WEIGHTS)
    (folder / form.CONFIG).write_text(json.dumps(form.peft_config(ours, "somewhere")))
    wrapped = peft.PeftModel.from_pretrained(theirs, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(TOKENS).logits, said(ours), rtol=0, atol=2e-5)
    return wrapped


@pytest.mark.parametrize(("case", "kind", "also"), CASES, ids=lambda v: str(v))
def test_peft_reads_ours_and_we_read_peft_s(case, kind, also, tmp_path):
    family, config = families.CONFIGS[case]
    ours, theirs = families.both(family, config)
    attach(KINDS[kind](rank=4, alpha=12.0, also=also), ours)
    wrapped = read_by_peft(stirred(ours), theirs, tmp_path)
    # and back: peft's own file, on the same base
    wrapped.save_pretrained(tmp_path / "theirs")
    settings, tensors = form.read_peft(tmp_path / "theirs")
    again, _ = families.both(family, config)
    chosen = form.settings_of(settings, tensors, again, "there")
    name = chosen.pop("name")
    assert name == kind and (chosen["rank"], chosen["alpha"]) == (4, 12.0)
    attach(KINDS[name](**chosen), again)
    load_parts(again, form.from_peft(again, tensors, "there"), "there")
    assert said(again).equal(said(ours))
    with torch.no_grad():  # merged there and here
        merged = wrapped.merge_and_unload()(TOKENS).logits
    merge(ours)
    detach(ours)
    torch.testing.assert_close(merged, said(ours), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_peft_reads_adapters_of_experts(case, kind, tmp_path):
    """Transformers holds all experts of a layer as one tensor, and peft puts their adapters together: with twice the
    rank, so that a scale by its root would be another. What peft saves then is refused here by name."""
    family, config = families.CONFIGS[case]
    ours, theirs = families.both(family, config)
    attach(KINDS[kind](rank=4, alpha=12.0), ours)
    wrapped = read_by_peft(stirred(ours), theirs, tmp_path)
    wrapped.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="uses what is not known here: .*target_parameters"):
        form.read_peft(tmp_path / "theirs")


@pytest.fixture
def adapter(tmp_path):
    """An adapter that peft itself has made, and the folder of its base, which it does not name."""
    family, config = families.CONFIGS["llama tied grouped"]
    _, theirs = families.both(family, config)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; only LORA is known here"),
        ({"bias": "all"}, "uses what is not known here: bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern={'q_proj': 8}"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"brand_new": True}, "brand_new=True"),
    ],
)
def test_options_that_change_more_are_refused(adapter, change, told):
    path = adapter / form.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match="adapter_config.json") as refused:
        form.read_peft(adapter)
    assert told in str(refused.value)


def test_an_adapter_without_its_base_says_what_to_set(adapter):
    with pytest.raises(CheckpointError, match="is not there; say where it is in base="):
        load_artifact(str(adapter))


def test_tensors_that_are_missing_unknown_or_misshapen_are_refused(adapter):
    ours, _ = families.both(*families.CONFIGS["llama tied grouped"])
    said_, tensors = form.read_peft(adapter)
    settings = form.settings_of(said_, tensors, ours, "there")
    attach(LoraConfig(**{k: v for k, v in settings.items() if k != "name"}), ours)
    name = next(n for n in tensors if n.endswith("lora_B.weight"))
    for changed, told in (
        ({n: t for n, t in tensors.items() if n != name}, "lacks blocks.0"),
        (tensors | {"base_model.model.lm_head.lora_A.weight": tensors[name]}, "unknown base_model.model.lm_head"),
        (tensors | {name: tensors[name][:3]}, "is of another size"),
        (tensors | {name: tensors[name] * float("nan")}, "not finite"),
    ):
        with pytest.raises(CheckpointError, match=told):
            load_parts(ours, form.from_peft(ours, changed, "there"), "there")


def test_a_file_without_an_adapter_is_refused(adapter):
    save_file({"x": torch.zeros(2)}, adapter / form.WEIGHTS)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        form.read_peft(adapter)
    assert load_file(adapter / form.WEIGHTS)["x"].tolist() == [0, 0]
