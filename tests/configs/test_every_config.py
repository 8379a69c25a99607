"""Every shipped config composes, becomes typed settings and real objects; every field can be set; files hold deltas."""

import dataclasses
import functools
import importlib.util
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from tests.inference.encoders import minilm

from trivium.build import (
    build,
    build_backend,
    build_encoder,
    build_model,
    build_objective,
    build_optimizer,
    build_schedule,
    build_source,
    train_tokenizer,
)
from trivium.compose import Component, compose, file_groups, groups, node_type, options, run_config
from trivium.data.config import BPEConfig
from trivium.data.tokenizer import train_bpe
from trivium.errors import ConfigError, DataError
from trivium.explain import owner_of
from trivium.models.adapters import parts
from trivium.phases.start import STARTS_MODEL
from trivium.plugin import conf_folders
from trivium.registry import extra
from trivium.schema import PHASES, TRAINING_PHASES, RunConfig
from trivium.types import IGNORE

TINY_MODEL = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn_dim": 64, "context": 64}
NO_SIZES = ("smollm2_135m", "hf")  # models that are somebody's checkpoint
PLAIN_GROUPS = {g for g in file_groups() if g not in groups()}
CHOICES = [(g, o) for g in file_groups() for o in options(g) if g not in ("data", "recipe")]
FILES = [(owner, folder, path) for owner, folder in conf_folders() for path in sorted(folder.rglob("*.yaml"))]


@functools.cache
def choose(*overrides):
    return run_config(compose(overrides))


def of_phase(group, option):
    """The phase in which an option can be chosen: objectives name theirs, everything else takes any."""
    if group == "adapter" and option != "none":
        return ["phase=sft", "init_from=r"]
    if group == "domain":
        return [f"phase={next(p for p in PHASES if f'{option}/{p}' in options('data'))}"]
    if (group, option) == ("phase", "search"):  # the one phase that the default domain has no data for
        return ["domain=files"]
    if group == "data" and option in groups()[group]:
        return [f"phase={next(p for p in PHASES if p in groups()[group].load(option).phases)}"]
    if group != "objective":
        return []
    registered = option if option in groups()[group] else "dpo"  # the one objective that files make options of
    phases = groups()[group].load(registered).phases
    return [f"phase={next(p for p in PHASES if p in phases)}"]


@pytest.mark.parametrize("domain", options("domain"))
@pytest.mark.parametrize("phase", options("phase"))
def test_phase_on_domain_composes(phase, domain):
    """A phase on a domain is typed settings, or one sentence with the phases that the domain has."""
    has = [o.split("/")[1] for o in options("data") if o.startswith(f"{domain}/")]
    assert has, f"{domain} has no data at all"
    if phase in ("tokenizer", "evaluate", "search", *TRAINING_PHASES) and phase not in has:
        sentence = f"domain={domain} has no data for phase={phase}; it has {', '.join(has)}"
        with pytest.raises(ConfigError, match=sentence):
            choose(f"phase={phase}", f"domain={domain}")
        return
    config = choose(f"phase={phase}", f"domain={domain}")
    assert (config.phase, config.domain) == (phase, domain)
    assert (config.data is None) == (phase not in has)
    if config.data is not None:
        assert type(config.data.config) is groups()["data"].config(config.data.name)
    assert type(config.optim.config) is groups()["optim"].config("adamw")
    assert (config.model is not None) == (phase in STARTS_MODEL), "all others take the model of their start"


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=lambda v: str(v))
def test_option_composes(group, option):
    phase = ["phase=evaluate"] if group == "domain" else []  # the one phase that every domain has
    config = choose(*of_phase(group, option), *phase, f"{group}={option}")
    chosen = getattr(config, group, None)
    if (group, option) == ("model", "smollm2_135m"):  # no sizes: a checkpoint that has its own
        assert chosen is None and config.init_from == option
    elif (group, option) == ("adapter", "none"):
        assert chosen is None
    elif group in groups():
        assert isinstance(chosen, Component) and chosen.name in groups()[group]
        assert type(chosen.config) is groups()[group].config(chosen.name)
    elif group in ("phase", "domain"):
        assert chosen == option


def test_every_phase_has_an_option():
    assert sorted(options("phase")) == sorted(PHASES)


@pytest.mark.parametrize("option", options("pipeline"))
def test_stages_of_pipeline_compose(option):
    pipeline = choose(f"pipeline={option}").pipeline
    assert pipeline.name == option and pipeline.stages
    for stage in pipeline.stages:
        start = ["init_from=r"] if stage.init_from else []
        assert choose(f"phase={stage.phase}", *start, *stage.overrides).phase == stage.phase


@pytest.mark.parametrize("option", options("profile"))
@pytest.mark.parametrize("domain", options("domain"))
def test_profile_composes_and_the_command_line_beats_it(domain, option):
    """In every phase that the domain has; a recipe of the profile goes over the domain's own."""
    phases = [o.split("/")[1] for o in options("data") if o.startswith(f"{domain}/")]
    for phase in phases:
        config = choose(f"domain={domain}", f"phase={phase}", f"profile={option}", "trainer.max_steps=7778")
        assert (config.phase, config.trainer.max_steps) == (phase, 7778)


def test_quick_profile_is_shorter_and_changes_nothing_else_of_a_recipe():
    """Each quick recipe of the primer has fewer steps than the full one, and its batches and rates."""
    quick = [o.removeprefix("primer/quick/") for o in options("recipe") if o.startswith("primer/quick/")]
    assert set(quick) == set(TRAINING_PHASES)
    for phase in quick:
        full, short = choose(f"phase={phase}"), choose(f"phase={phase}", "profile=quick")
        assert short.trainer.max_steps < full.trainer.max_steps, phase
        assert (short.batch, short.optim, short.rollout) == (full.batch, full.optim, full.rollout), phase
    full, short = choose("phase=evaluate"), choose("phase=evaluate", "profile=quick")
    assert short.evaluation.max_tasks < full.evaluation.max_tasks


def test_half_of_a_primer_is_under_half():
    """The student of phase=distill against the model of phase=pretrain, with the vocabulary of both."""
    sizes = [build_model(choose(f"phase={p}").model, 4096, 0).num_parameters for p in ("distill", "pretrain")]
    assert sizes[0] < sizes[1] / 2


@pytest.mark.parametrize(
    ("phase", "objective"),
    [
        *(("pretrain", "next_token"), ("sft", "sft"), ("preference", "dpo"), ("reward", "reward")),
        *(("rlhf", "grpo"), ("distill", "distill")),
    ],
)
def test_phase_chooses_its_objective(phase, objective):
    config = choose(f"phase={phase}")
    assert config.objective.name == objective
    assert phase in groups()["objective"].load(objective).phases


def test_answers_are_sampled_in_rlhf_and_greedy_elsewhere():
    """A policy learns nothing from one answer given eight times."""
    temperatures = {p: choose(f"phase={p}").inference.config.sampling.temperature for p in TRAINING_PHASES}
    assert temperatures == {**dict.fromkeys(TRAINING_PHASES, 0.0), "rlhf": 1.0}


# ---- every component becomes a real object


def built(group, option, corpus):
    """A real object of `option`, tiny, and used once: its figures are checked where it has any."""
    config_of = groups()[group].config
    fields = {f.name for f in dataclasses.fields(config_of(option))} if option in groups()[group] else set()
    model_is = "model=primer" if group != "model" else f"model={option}"
    sizes = [f"model.{k}={v}" for k, v in TINY_MODEL.items() if k in model_fields(model_is)]
    choice = [] if group == "model" else [f"{group}={option}"]
    # what a source cannot do without; `datasets` takes each line of a text for a row, empty ones too
    place = {"path": corpus, "dataset": corpus.parent, "bad_rows": "skip"} if group == "data" else {}
    more = [f"{group}.{key}={value}" for key, value in place.items() if key in fields]
    more += ["data.parts.primer.weight=1"] if option == "mixture" else []
    config = choose(*of_phase(group, option), model_is, *sizes, *choice, *more)
    model = build_model(config.model, 300, seed=0)
    tokens, positions = torch.arange(12).view(2, 6), torch.arange(6).expand(2, -1)
    if group == "model":
        return model.head(model(tokens, positions)).shape == (2, 6, 300)
    if group == "adapter":
        if config.adapter is None:
            return True
        build(extra("adapters"), config.adapter, model)
        attached = sum(p.numel() for p in parts(model).values())
        return 0 < attached < model.num_parameters and all(p.requires_grad for p in parts(model).values())
    if group == "objective":
        return starts_where_it_must(build_objective(config.objective, config.phase), model)
    if group == "optim":
        if option.startswith("paged") and not torch.cuda.is_available():
            with pytest.raises(ConfigError, match="there is none here; choose optim=adamw8bit"):
                build_optimizer(config.optim, model)
            return True
        optimizer = build_optimizer(config.optim, model)
        model.head(model(tokens, positions)).logsumexp(-1).sum().backward()
        before = [p.clone() for p in model.parameters()]
        optimizer.step()
        return all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if group == "schedule":
        factors = [build_schedule(config.schedule, 100)(step) for step in range(100)]
        last = (5 / 99) ** 0.5 if option == "inverse_sqrt" else config.schedule.config.final
        return 0 < factors[0] < factors[5] == max(factors) == 1.0 and factors[99] == pytest.approx(last)
    if group == "inference":
        if getattr(config.inference.config, "alone", False):  # a model of its own, refused where this one would speak
            with pytest.raises(ConfigError, match=f"inference={option} is a model of its own"):
                build_backend(config.inference, model, None, "cpu")
            return build_encoder(dataclasses.replace(config.inference.config, path=str(minilm())), "cpu").width == 384
        rules = BPEConfig(vocab_size=300, rules="gguf")
        needs = {"llamacpp": "xllamacpp", "vllm": "vllm"}.get(option, "torch")
        if importlib.util.find_spec(needs) is None:
            pytest.skip(f"NOT BUILT: inference={option} needs {needs}")
        backend = build_backend(config.inference, model, train_bpe(rules, [corpus.read_text()]), "cpu")
        return backend.capabilities().context == TINY_MODEL["context"]
    if group == "data":
        try:
            source = build_source(config.data, config.phase)
        except DataError as error:
            if "could not be had" in str(error) or "could not fetch" in str(error) or "needs the package" in str(error):
                pytest.skip(f"NOT BUILT: {error}")
            raise
        return len(source) > 0 and source[0]["id"]
    if group == "tokenizer":
        source = build_source(choose("domain=files", f"data.path={corpus}").data, "pretrain")
        tokenizer = train_tokenizer(config.tokenizer, source)
        return tokenizer.decode(tokenizer.encode("heron 12")) == "heron 12"
    raise AssertionError(f"say here what an object of the group {group} must do")


def starts_where_it_must(objective, model):
    """Two rows of two documents, four and three tokens; the last two and the last one of them are trained.

    The model is its own reference and teacher, so `at_start` holds; an objective that promises nothing there is a
    cross-entropy on 6 targets, each near ln 300 = 5.7.
    """
    tokens = torch.arange(16).view(2, 8)
    labels = tokens.clone()
    labels[:, [0, 1, 4, 5, 7]] = IGNORE
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0]).expand(2, -1)
    segments = torch.tensor([1, 1, 1, 1, 2, 2, 2, 0]).expand(2, -1)
    facts = {"desirable": torch.tensor([[1.0, 1.0], [0.0, 0.0]]), "advantage": torch.tensor([[1.0, -1.0], [0.5, -0.5]])}
    known = {f.name for f in dataclasses.fields(objective.batch)}
    batch = objective.batch(tokens, labels, positions, segments, **{k: v for k, v in facts.items() if k in known})
    if objective.scores:
        model.add_score_head()
    model.eval()
    with torch.no_grad():
        objective.consult(batch, {"policy": model, **dict.fromkeys(objective.companions, model)})
        objective.prepare(model, [batch], lambda value: value)
        output = objective(model, batch)
    mean = (output.loss_sum / objective.count(batch)).item()
    if not objective.at_start:
        return 4 < mean < 8
    found = {"loss": mean, **{name: (m.total / m.count).item() for name, m in output.metrics.items()}}
    return {name: found[name] for name in objective.at_start} == pytest.approx(dict(objective.at_start), abs=1e-4)


def model_fields(choice):
    return {f.name for f in dataclasses.fields(choose(choice).model.config)}


@pytest.mark.parametrize(
    ("group", "option"),
    [(g, o) for g in groups() for o in options(g) if (g != "data" or "/" not in o) and o not in NO_SIZES],
)
def test_component_becomes_a_real_object(group, option, corpus, cache, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(cache))
    assert built(group, option, corpus)


# ---- every field can be set without a plus


def other(value, hint):
    """A value of the same type that is not `value`."""
    if value is None:
        return hint() or 0.25
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.5 + 0.015625
    if isinstance(value, str):
        return f"{value}x"
    if get_origin(hint) is dict:
        return {"a": {"weight": 2}}
    assert get_origin(hint) is list, f"teach this test about {hint}"
    if get_args(hint)[0] in (int, float):
        return [get_args(hint)[0](3)]
    if dataclasses.is_dataclass(get_args(hint)[0]):
        return [{key: other(default, inner) for key, default, inner in leaves(get_args(hint)[0], "")}]
    return ["a b", "c"]


def leaves(type_, prefix):
    """(dotted key, default, type) of every field of a dataclass, nested ones included."""
    hints = get_type_hints(type_)
    for f in dataclasses.fields(type_):
        hint = hints[f.name]
        if get_origin(hint) in (Union, UnionType):
            hint = next(a for a in get_args(hint) if a is not type(None))
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{f.name}.")
        else:
            assert default is not dataclasses.MISSING, f"{prefix}{f.name} has no default"
            yield f"{prefix}{f.name}", default, hint


def written(value):
    """A value in Hydra's grammar."""
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{written(v)}" for k, v in value.items()) + "}"
    return f"'{value}'" if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)


def check_all_fields(fields, *choice):
    changed = {key: other(default, hint) for key, default, hint in fields}
    assert changed
    cfg = compose([*choice, *(f"{key}={written(value)}" for key, value in changed.items())])
    for key, value in changed.items():
        found = OmegaConf.select(cfg, key)
        found = OmegaConf.to_container(found) if isinstance(found, ListConfig | DictConfig) else found
        assert found == value and type(found) is type(value), key


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in groups() for o in groups()[g]])
def test_every_field_of_component_can_be_set(group, option):
    """Each field exists in the composed tree and takes another value of its type, without + and all at once."""
    fields = [f for f in leaves(node_type(group, option), f"{group}.") if f[0] != f"{group}.name"]
    check_all_fields(fields, f"{group}={option}")


def test_every_field_of_the_run_can_be_set():
    """All but phase and domain, which are choices of files, and the stages, which a pipeline's file holds."""
    aside = {"phase", "domain", "pipeline.stages", *groups()}
    check_all_fields([f for f in leaves(RunConfig, "") if f[0] not in aside])


# ---- files hold deltas


def delta(path):
    """(keys that a YAML file sets, what it sets them to), by the keys' full names."""
    text = path.read_text()
    content = yaml.safe_load(text) or {}
    content.pop("defaults", None)
    content.pop("hydra", None)
    header = text.splitlines()[0] if text.startswith("# @package") else "# @package _global_"
    package = header.removeprefix("# @package ").strip()
    flat = {}

    def walk(prefix, value):
        if isinstance(value, dict) and value:
            for k, v in value.items():
                walk(f"{prefix}{k}.", v)
        elif value != {}:
            flat[prefix.rstrip(".")] = value

    walk("" if package == "_global_" else f"{package}.", content)
    return flat


def context_of(relative):
    """The overrides under which a file takes part."""
    group, *rest = relative.with_suffix("").parts
    if group in ("data", "recipe"):
        domain, *profile, phase = rest
        return [f"domain={domain}", f"phase={phase}", *(f"profile={p}" for p in profile)]
    return [f"{group}={'/'.join(rest)}"] if rest else []


@pytest.mark.parametrize(("owner", "folder", "path"), FILES, ids=lambda v: v.name if isinstance(v, Path) else str(v))
def test_file_repeats_no_default(owner, folder, path):
    """A value equal to the dataclass's own default says nothing and goes stale; phase and domain name themselves."""
    relative = path.relative_to(folder)
    cfg = compose(context_of(relative))
    assert isinstance(cfg, DictConfig)
    for key, value in delta(path).items():
        if relative.parts[0] in ("phase", "domain") and key == relative.parts[0]:
            assert value == path.stem
            continue
        if key.startswith("pipeline.stages"):
            continue
        cls, field = owner_of(cfg, key)
        assert field is not None, f"{path} sets {key}, which no dataclass has"
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found = float(value) if isinstance(default, float) else value  # YAML reads 1e-3 as a string
        assert found != default, f"{path}: {key}={value} is {cls.__name__}'s own default"


def test_files_are_found():
    """The walk above must not pass by finding nothing: core's tree and the primer's, 20 files and more."""
    assert {owner for owner, _, _ in FILES} >= {"trivium", "primer"}
    assert len(FILES) >= 20
    assert {"phase", "logger", "pipeline", "recipe"} <= PLAIN_GROUPS
