"""What a wrong command line is told: what was asked, what is possible; and that right values keep their types."""

import copy
import functools

import pytest
import yaml
from omegaconf import OmegaConf

from trivium.compose import as_dict, component, compose, groups, options, run_config
from trivium.errors import ConfigError
from trivium.schema import StageConfig


@functools.cache
def composed(*overrides):
    return compose(overrides)


def choose(*overrides):
    return run_config(compose(overrides))


def listed(group):
    return ", ".join(sorted(o for o in options(group) if "/" not in o))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["optim.lrr=1"], "unknown option 'optim.lrr'. Did you mean optim.lr"),
        (["modle.dim=3"], "unknown option 'modle.dim'. Did you mean model.dim"),
        (["trainer.max_step=3", "optim.lr=1"], "unknown option 'trainer.max_step'. Did you mean trainer.max_steps"),
        (["inference.sampling.temp=1"], "unknown option 'inference.sampling.temp'. Did you mean inference.sampling."),
        (["nonsense=1"], "unknown option 'nonsense'"),
        (["data.path=x"], "unknown option 'data.path'"),  # the primer has no files; `files` has
        (
            ["model=lama"],
            "unknown model=lama. Did you mean llama or llama3_8b or llama2_7b? Available: gemma2, gemma2_2b, ",
        ),
        (["optim=adan"], "unknown optim=adan. Did you mean adamw? Available: adafactor, adamw, adamw8bit, lion, muon"),
        (["schedule=cosin"], "unknown schedule=cosin. Did you mean cosine? Available: constant, cosine, cyclic, "),
        (["phase=pretrian"], "unknown phase=pretrian. Did you mean pretrain? Available: chat, distill, evaluate, "),
        (["domain=file"], f"unknown domain=file. Did you mean files? Available: {listed('domain')}"),
        (["pipeline=three"], "unknown pipeline=three."),
        (["experiment=x"], "unknown experiment=x. Available: long_context, primer_long_sft"),
        (["data=primr"], f"unknown data=primr. Did you mean primer? Available: {listed('data')}"),
        (["optim.lr=fast"], "optim.lr=fast is not a number"),
        (["optim.groups=[{match: '*', rate: 2}]"], "unknown option 'rate' in an entry of optim.groups"),
        (["optim.groups=[{match: '*', lr: fast}]"], "lr=fast is not a number"),
        (["optim.groups=[{lr: 2}]"], "optim.groups: each group needs a pattern, such as {match: "),
        (["optim.groups=[{match: '*', lr: 0}]"], "'*' has lr=0.0; a factor is greater than 0, and freeze=true "),
        (["trainer.max_steps=1.5"], "trainer.max_steps=1.5 is not a whole number"),
        (["seed=true"], "seed=True is not a whole number"),
        (["trainer.compile=maybe"], "trainer.compile=maybe"),
        (["name=null"], "name needs a value; it was given none"),
        (["optim.lr=null"], "optim.lr needs a value; it was given none"),
        (["prompt=null"], "prompt needs a value; it was given none"),
        (["model=null"], "unknown model=null. Available: gemma2, gemma2_2b, gemma2_9b, gpt2, "),
        (["optim.lr=1", "phase=null"], "unknown phase=null. Available: chat"),
        (["optim.lr"], "cannot read 'optim.lr'; write key=value"),
        (["optim.lr=1", "prompts=[a,b"], "cannot read 'prompts=[a,b'; write key=value, lists as key=[a,b]"),
    ],
)
def test_wrong_override_is_told(overrides, sentence):
    with pytest.raises(ConfigError) as told:
        choose(*overrides)
    assert sentence in str(told.value)
    assert len(str(told.value)) < 300 and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "override",
    [
        *("optim.lr=0", "optim.lr=-1", "optim.eps=0", "optim.beta1=1", "optim.weight_decay=-0.1"),
        *("batch.size=0", "batch.length=-3", "batch.micro_size=0", "batch.size=20"),
        *("trainer.max_steps=0", "trainer.grad_clip=-1", "trainer.threads=-1"),
        *("checkpoint.every_steps=0", "checkpoint.keep=0", "checkpoint.keep=1", "checkpoint.keep_best=train/loss"),
        *("validation.every_steps=-1", "validation.max_rows=0", "stop.patience=-1", "stop.min_delta=-0.1"),
        *("samples.every_steps=-1", "samples.max_tokens=0", "logger.wandb_mode=on"),
        *("evaluation.max_texts=0", "evaluation.stride=-1", "evaluation.confidence=1", "evaluation.resamples=0"),
        *("schedule.warmup_steps=-1", "schedule.warmup=1", "schedule.final=2", "precision=fp8", "prompt_format=xml"),
        *("model.dim=0", "model.heads=5", "model.kv_heads=4", "model.dropout=1", "tokenizer.vocab_size=200"),
        *("inference.max_batch=0", "inference.sampling.temperature=-1", "inference.sampling.top_p=0"),
        *("inference.sampling.top_k=-1", "inference.sampling.max_tokens=0"),
        *("data.num_tasks=0", "data.split=dev", "data.parts=[poems]"),
    ],
)
def test_value_out_of_range_is_told_by_name(override):
    key, _, value = override.partition("=")
    cfg = copy.deepcopy(composed("model=primer"))
    OmegaConf.update(cfg, key, yaml.safe_load(value))
    with pytest.raises(ConfigError) as told:
        run_config(cfg)
    assert key.rpartition(".")[2] in str(told.value) and value.strip("[]") in str(told.value)


def test_numbers_stay_numbers():
    """YAML 1.1 reads 1e-5 as a string; a command line and a file must give the float."""
    assert choose("optim.lr=1e-5").optim.config.lr == 1e-5
    assert choose("optim={lr: 2e-5, eps: 1e-9}").optim.config.eps == 1e-9
    assert isinstance(choose("optim.lr=1").optim.config.lr, float)
    assert choose("trainer.max_steps=7").trainer.max_steps == 7
    assert component("optim", {"name": "adamw", "lr": "1e-5"}).config.lr == 1e-5


def test_words_stay_words():
    """None, a number and a yes are text where text is asked for."""
    assert choose("prompt=None").prompt == "None"
    assert choose("name=3").name == "3"
    assert choose("prompt=1e-05").prompt == "1e-05"
    assert choose("prompts=[None,null_and_void,'a, b']").prompts == ["None", "null_and_void", "a, b"]
    assert choose("prompt=''").prompt == ""


def test_config_travels_as_plain_dataclasses_and_comes_back():
    """No OmegaConf object inside, and settings -> dict -> settings changes nothing."""
    config = choose("phase=sft", "optim.lr=1e-5", "data.parts=[tasks]")
    plain = as_dict(config)

    def types(value):
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return {type(value)}.union(*map(types, inner))

    assert types(plain) <= {dict, list, str, int, float, bool, type(None)}
    for group in groups():
        assert component(group, plain[group]) == getattr(config, group)
    assert type(choose("pipeline=three_phases").pipeline.stages[2]) is StageConfig


def test_component_without_a_name_is_told():
    with pytest.raises(ConfigError, match="optim has no name; choose one of adafactor, adamw, "):
        component("optim", {"lr": 1.0})
