"""Training phases: data and models to a job, a job to a trained run. The tokenizer's training too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from trivium.build import (
    Artifact,
    build_backend,
    build_companion,
    build_model,
    build_objective,
    build_optimizer,
    build_schedule,
    cached_tokenizer,
    device_of,
    model_of,
    model_record,
    sized_for,
    train_tokenizer,
)
from trivium.compose import as_dict
from trivium.data.cache import cached_plan, cached_table
from trivium.data.datamodule import PromptDataset, StepDataset, Steps, validation_batches
from trivium.data.mixture import Mixture, document_ends
from trivium.data.source import Source
from trivium.data.table import TokenTable
from trivium.data.tokenizer import Tokenizer
from trivium.data.vocabularies import load_tokenizer
from trivium.errors import ConfigError
from trivium.evaluation.generation import complete
from trivium.inference.config import SamplingConfig
from trivium.inference.conversation import sampling_params
from trivium.inference.protocol import Backend
from trivium.lineage.manifest import masked
from trivium.models.adapters import has_adapter
from trivium.models.compiled import check_compiler
from trivium.models.protocol import CausalLM
from trivium.models.sizes import DERIVED
from trivium.models.weights import resize_vocabulary, weights_of
from trivium.objectives.protocol import Objective
from trivium.phases.estimates import memory_of
from trivium.phases.preflight import forked_words, preflight, reading_of
from trivium.phases.run import ASIDE, Run
from trivium.phases.speak import prompt_ids
from trivium.training.checkpoint import CheckpointStore, read_checkpoint_json
from trivium.training.companions import COLUMN, AdapterOff, note_reference
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.training.precision import Precision, precision_of
from trivium.training.probe import largest_micro_size
from trivium.training.rollout_module import RolloutModule, RolloutSettings
from trivium.training.shard import sharding
from trivium.training.stop import EXIT_CODE
from trivium.training.trainer import Job, fit
from trivium.types import TokenBatch

UNGUARDED = (
    *("checkpoint", "validation", "samples", "logger", "profiler", "stop", "inference", "evaluation", "prompt"),
    *("batch.auto", "prompts", "prompt_format", "system", "trainer.accelerator", "trainer.threads", "trainer.compile"),
    *("trainer.recompute", "trainer.devices", "trainer.nodes", "trainer.strategy"),
    "trainer.tensor_parallel",
    *("data.held_out", "data.contamination", "data.contamination_share", "data.contamination_words"),
    "data.contamination_text",
    *("trainer.workers", "trainer.prefetch", "trainer.loader_timeout"),
    *("feedback", "promote"),
    *ASIDE,
)
"""Settings that may change between the starts of one training run, since no weight depends on them."""


def run_tokenizer(this: Run) -> int:
    """Train a tokenizer on the domain's text."""
    if this.config.tokenizer.config.path:
        raise ConfigError("phase=tokenizer trains one; tokenizer.path= is for the phases that use one")
    source = this.source()
    settings = this.config.tokenizer.config
    tokenizer = train_tokenizer(this.config.tokenizer, source).extended(settings.add_tokens, settings.chat_template)
    tokenizer.save(this.folder)
    said = [source[i] for i in range(0, len(source), max(1, len(source) // 200))]
    texts = [e["text"] for e in said if "text" in e] or [m["content"] for e in said for m in e.get("messages", ())]
    per_token = sum(len(t.encode()) for t in texts) / max(1, sum(map(len, tokenizer.encode_batch(texts))))
    this.say(f"{tokenizer.vocab_size:,} tokens, {per_token:.2f} bytes a token")
    results = {"vocab_size": tokenizer.vocab_size, "bytes_per_token": round(per_token, 4)}
    this.manifest.update(tokenizer=tokenizer.fingerprint, source=source.fingerprint, results=results)
    return 0


def run_training(this: Run) -> int:
    """Every phase that trains: the same path with another objective, from data or from the policy's own samples."""
    config = this.config
    objective = build_objective(config.objective, config.phase)
    if config.trainer.compile:
        check_compiler(device_of(config.trainer.accelerator), "trainer.compile=true")
    companions = _companions(this, objective)
    source = this.source()
    source.expect(config.phase)
    if objective.reads == "pairs" and "label" in source[0]:
        raise ConfigError("the data holds verdicts (label), not pairs; choose objective=kto")
    model, record, tokenizer = _model_and_tokenizer(this, source, objective)
    if model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab_size}")
    _check_optimizer(this, model)
    looked, contamination = preflight(this, objective, source, tokenizer, model)
    precision = precision_of(config.precision, config.trainer.accelerator)
    fresh_head = objective.scores and not (this.parent and this.parent.scores)
    equal = not (config.keep_layers or config.stretch_context)
    equal &= all(this.parent is not None and c.sha256 == this.parent.sha256 for c in companions.values())
    parts = (
        model,
        objective,
        lambda m: build_optimizer(config.optim, m),
        build_schedule(config.schedule, config.trainer.max_steps),
        StepSettings(
            config.trainer.grad_clip,
            config.seed,
            precision,
            equal and (fresh_head or not objective.scores),
            config.guard,
            config.trainer.average,
            config.trainer.step_in_backward,
        ),
    )
    more = {"shard": sharding(config, this.world, device_of(config.trainer.accelerator))}
    prepare = _from_samples if objective.reads == "answers" else _from_data
    ready = prepare(this, parts, companions, source, tokenizer, precision, more)
    guard = _guard(this, ready.data["train"], tokenizer, precision, companions)
    make_samples = _sampler(this, ready.module, record, tokenizer, ready.form)
    _header(this, ready, precision)
    facts = {
        "model": {"name": record["name"], "parameters": model.num_parameters},
        "data": ready.data,
        "source": source.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "doctor": looked,
        "contamination": contamination,
    }
    job = Job(
        config, this.folder, ready.module, ready.steps, ready.validation, tokenizer, record, guard, ready.form,
        make_samples, lambda: this.begin(**facts), this.console, this.world, ready.foresee,
    )  # fmt: skip
    fitted = fit(job)
    kept = ("train/loss", "val/loss", "train/nll", "rollout/reward")
    results = {k: v for k, v in fitted.figures.items() if k in kept}
    this.manifest.update(steps=fitted.steps, tokens_seen=fitted.tokens, results=results)
    if fitted.signal:
        this.say(f"stopped by signal {fitted.signal} after step {fitted.steps}, saved; the same command continues")
        return EXIT_CODE
    early = " (early: the validation loss no longer falls)" if fitted.stopped_early else ""
    shown = {"val/loss": ", val loss {:.3f}", "rollout/reward": ", reward {:.3f}"}
    more = "".join(text.format(fitted.figures[k]) for k, text in shown.items() if k in fitted.figures)
    already = "was done already" if fitted.resumed_from == fitted.steps else "done"
    loss = fitted.figures.get("train/loss")
    shown_loss = ", the last step was skipped" if loss is None else f", train loss {loss:.3f}"
    this.say(f"{already}: step {fitted.steps}{early}{shown_loss}{more}")
    return 0


REAL = 5e7  # parameters from which on a checkpoint from elsewhere is taken for one that small models' rates ruin


def _check_optimizer(this: Run, model: CausalLM) -> None:
    """Say what was made for another optimizer or model: a recipe's rate, a second average, a falling rate."""
    optim, schedule = this.config.optim, this.config.schedule.name
    own = type(optim.config)()
    if not optim.name.endswith(("adamw", "adamw8bit")) and optim.config.lr != own.lr:
        this.say(
            f"optim={optim.name}: lr={optim.config.lr:g}, {own.lr:g} is its default (a recipe's is meant for adamw)"
        )
    highest = 1e-3 if has_adapter(model) else 1e-4
    foreign = this.parent is not None and not this.parent.guard and model.num_parameters > REAL
    if foreign and optim.name.endswith(("adamw", "adamw8bit")) and optim.config.lr > highest:
        this.say(
            f"warning: optim.lr={optim.config.lr:g} is a rate for small models that start here; one of "
            f"{_count(model.num_parameters)} parameters is tuned at {highest / 10:g} to {highest / 2:g}, and more "
            "ruins what it knows"
        )
    if not getattr(optim.config, "averages", False):
        return
    if this.config.trainer.average:
        raise ConfigError(f"optim={optim.name} keeps an average of the weights itself; leave trainer.average at 0")
    if schedule != "constant":
        this.say(f"warning: optim={optim.name} expects schedule=constant, its average does the rest; it is {schedule}")


@dataclasses.dataclass
class Ready:
    """What a training run is made of. form: "chat" or "text". data: fingerprints by split. about: for the header.

    foresee: see Job.
    """

    module: ObjectiveModule
    steps: Steps
    form: str
    data: dict[str, str]
    about: str
    validation: list[TokenBatch] = dataclasses.field(default_factory=list)
    foresee: Callable[[int], None] = lambda steps: None


def _companions(this: Run, objective: Objective) -> dict[str, Artifact]:
    """The objective's companions: those that were named, and as reference where none was, what the run starts from."""
    for name in this.companions.keys() - set(objective.companions):
        raise ConfigError(f"objective={this.config.objective.name} has no {name}; leave {name}.init_from away")
    found = {}
    for name in objective.companions:
        artifact = this.companions.get(name) or (this.parent if name == "reference" else None)
        if artifact is None or artifact.record is None:
            raise ConfigError(
                f"objective={this.config.objective.name} needs a {name}: set {name}.init_from=runs/..."
                + (", or init_from= of a tuned model, which then is the reference" if name == "reference" else "")
            )
        found[name] = artifact
    return found


def _companion(
    this: Run, role: str, artifact: Artifact, model: CausalLM, tokenizer: Tokenizer, longest: int
) -> CausalLM:
    """A companion's model: the trained one with its adapter off, where that is what the adapter stands on."""
    if role == COLUMN and _is_base(this, artifact):
        return AdapterOff(model)  # type: ignore[return-value]
    if this.parent is not None and artifact.sha256 == this.parent.sha256:
        if tokenizer.vocab_size > artifact.tokenizer.vocab_size:
            raise ConfigError(
                f"the {role} is what this run starts from, and knows no tokenizer.add_tokens; tune a model with them "
                "first, and start from that"
            )
        tokenizer = artifact.tokenizer  # another template writes otherwise, in the same tokens
    return build_companion(role, artifact, tokenizer, longest)


def _is_base(this: Run, artifact: Artifact) -> bool:
    """Whether a new adapter stands on this very model."""
    if this.config.adapter is None or this.parent is None or this.config.trainer.strategy == "fsdp":
        return False  # of weights that are shared out, one process alone could not ask
    return artifact.sha256 == this.parent.sha256


def _held_as(this: Run) -> str:
    """How an adapter's base is held; its answers differ with that."""
    config: Any = this.config.adapter.config if this.config.adapter else None
    return f" {config.quant_type} {config.double_quant}" if hasattr(config, "quant_type") else ""


def _from_data(
    this: Run, parts: tuple, companions: dict[str, Artifact], source: Source, tokenizer: Tokenizer,
    precision: Precision, more: dict[str, Any],
) -> Ready:  # fmt: skip
    """Packed rows of a data set."""
    config, length = this.config, this.config.batch.length
    model, objective = parts[:2]
    table = _table_of(this, objective, source, tokenizer)
    longest = _longest_document(length, model, table)
    sizes: dict[str, Any] = {"micro_size": config.batch.micro_size, "length": length, "pad_id": tokenizer.pad_id}
    place: dict[str, Any] = {"rank": this.world.share, "world": this.world.shares}
    mixture = source if isinstance(source, Mixture) else None
    if mixture:
        table.ends = document_ends(mixture, table)
    with this.world.first():
        rows = cached_plan(table, length, config.seed)
    steps = StepDataset(
        table, size=config.batch.size, seed=config.seed, batch=objective.batch, rows=rows,
        shares=mixture.config if mixture else None, **sizes, **place,
    )  # fmt: skip
    tables = {"train": table}
    if config.validation.every_steps:
        tables["validation"] = _table_of(this, objective, this.source("validation"), tokenizer)
    ask = _asking(this, companions, objective, model, tokenizer, precision, longest)
    planned = config.trainer.max_steps * steps.size
    ask(steps, planned)
    validation = []
    if "validation" in tables:
        most = config.validation.max_rows
        ask(StepDataset(tables["validation"], size=1, seed=0, batch=steps.batch, **sizes), most)
        validation = validation_batches(tables["validation"], max_rows=most, batch=objective.batch, **sizes)
    models = {name: artifact for name, artifact in companions.items() if name != COLUMN}
    loaded = {n: _companion(this, n, artifact, model, tokenizer, longest) for n, artifact in models.items()}
    module = ObjectiveModule(*parts, companions=loaded, **more)
    if config.batch.auto:
        steps.micro_size = _micro_size(this, module, steps)
        batch = dataclasses.replace(config.batch, auto=False, micro_size=steps.micro_size)
        this.config = dataclasses.replace(config, batch=batch)
    about = _about(this, steps, mixture, objective.unit, longest)
    data = {name: t.fingerprint for name, t in tables.items()}
    return Ready(module, steps, "chat" if table.talks else "text", data, about, validation,
                 foresee=lambda num_steps: ask(steps, num_steps * steps.size, planned))  # fmt: skip


def _table_of(this: Run, objective: Objective, source: Source, tokenizer: Tokenizer) -> TokenTable:
    with this.world.first():
        reading = reading_of(objective)
        return cached_table(source, tokenizer, this.config.batch.length, form=objective.reads, **reading)


def _longest_document(length: int, model: CausalLM, table: TokenTable) -> int:
    """Tokens of the longest document that a row may hold. Raises ConfigError where the model cannot read it."""
    if (longest := length // table.group) > model.context:
        most = f"; {table.group} documents share a row, so {table.group * model.context} is the most"
        raise ConfigError(
            f"batch.length={length} is longer than the model's context of {model.context}{most * (table.group > 1)}"
        )
    return longest


def _asking(
    this: Run, companions: dict[str, Artifact], objective: Objective, model: CausalLM, tokenizer: Tokenizer,
    precision: Precision, longest: int,
) -> Callable[..., None]:  # fmt: skip
    """A function that asks the reference, where there is one, about rows that are read."""

    def ask(split: StepDataset, count: int, known: int = 0) -> None:
        """About the first `count` rows; of the first `known` it is known."""
        if COLUMN not in companions:
            return
        rows = np.setdiff1d(split.first_rows(count), split.first_rows(known))
        if len(rows):
            reference = companions[COLUMN]

            def awaited() -> Any:
                this.say(f"asks the reference about {len(rows):,} rows before it reads them, and keeps what it says")
                return _companion(this, COLUMN, reference, model, tokenizer, longest)

            with this.world.first():
                note_reference(
                    objective,
                    awaited,
                    reference.sha256 + _held_as(this) * _is_base(this, reference),
                    split,
                    rows,
                    precision,
                    device_of(this.config.trainer.accelerator),
                )

    return ask


def _about(this: Run, steps: StepDataset, mixture: Mixture | None, unit: str, longest: int) -> str:
    """What the run reads, for its header."""
    config, table = this.config, steps.table
    per_step = config.batch.size * config.batch.length
    epochs = per_step * config.trainer.max_steps * steps.utilisation / max(1, len(table.tokens))
    units = f", {len(table.ids) // table.group:,} {unit}s" if table.group > 1 else ""
    about = (
        f"{config.trainer.max_steps} steps of {per_step:,} tokens ({epochs:.1f} epochs of {_count(len(table.tokens))}"
        f"{units}), rows {steps.utilisation:.1%} full"
    )
    if mixture:
        read = steps.figures(config.trainer.max_steps)
        about += "; " + ", ".join(f"{name} {read[f'data/{name}/epochs']:.2f} epochs" for name in mixture.parts)
    if table.forked:
        about += f"; {forked_words(table.forked, table.forks)}"
    if table.truncated:
        about += f"; {table.truncated} documents cut at {longest} tokens, {table.lost_ends} of them without their end"
    return about


def _micro_size(this: Run, module: ObjectiveModule, steps: StepDataset) -> int:
    """What batch.auto finds: of a run that is continued, what it found at first, since other cuts round otherwise."""
    latest = CheckpointStore(this.folder / "checkpoints").latest()
    if latest is not None:
        found = read_checkpoint_json(latest, "state.json")["guard"]["batch.micro_size"]
        this.say(f"batch.auto: micro_size={found}, as at this run's start")
        return found
    device = device_of(this.config.trainer.accelerator)
    module.model.recompute = this.config.trainer.recompute
    module.to(device)
    module.on_fit_start()
    weights = sum(p.numel() * p.element_size() for p in module.model.parameters())
    found = largest_micro_size(
        steps.size // this.world.shares,
        lambda rows: module.rehearse(steps.collated(steps.order.rows(0, rows))),
        weights,
    )
    found = -this.world.most(-found)  # what fits everywhere
    module.model.zero_grad(set_to_none=True)
    this.say(f"batch.auto: micro_size={found} of {steps.size} rows fit in memory")
    return found


def _from_samples(
    this: Run, parts: tuple, companions: dict[str, Artifact], source: Source, tokenizer: Tokenizer,
    precision: Precision, more: dict[str, Any],
) -> Ready:  # fmt: skip
    """Prompts, and a backend that answers them from the weights that are trained."""
    config, rollout, model = this.config, this.config.rollout, parts[0]
    sampling = config.inference.config.sampling
    steps = PromptDataset(source, tokenizer, size=rollout.prompts, updates=rollout.updates, seed=config.seed)
    longest = steps.longest + sampling.max_tokens
    room = min(config.batch.length, model.context)
    if longest > room:
        raise ConfigError(
            f"a prompt of {steps.longest} tokens and inference.sampling.max_tokens={sampling.max_tokens} do not fit "
            f"{room} tokens (batch.length={config.batch.length}, the model's context {model.context})"
        )
    backend = build_backend(config.inference, model, tokenizer, config.trainer.accelerator)
    if not backend.capabilities().shares_weights:
        raise ConfigError(
            f"inference={config.inference.name} does not sample from the weights being trained; phase=rlhf needs a "
            "backend that does, such as inference=native"
        )
    loaded = {n: _companion(this, n, artifact, model, tokenizer, longest) for n, artifact in companions.items()}
    settings = RolloutSettings(
        samples=rollout.samples,
        updates=rollout.updates,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        micro_size=config.batch.micro_size,
        length=config.batch.length,
    )
    module = RolloutModule(
        *parts, companions=loaded, backend=backend, source=source, tokenizer=tokenizer, rollouts=settings, **more
    )
    asked = config.trainer.max_steps // rollout.updates * rollout.prompts
    about = (
        f"{config.trainer.max_steps} steps on {rollout.samples} answers to each of {rollout.prompts} prompts "
        f"({asked / len(source):.1f} epochs of {_count(len(source))})"
    )
    return Ready(module, steps, "chat", {"train": source.fingerprint}, about)


def _model_and_tokenizer(this: Run, source: Source, objective: Objective) -> tuple[CausalLM, dict[str, Any], Tokenizer]:
    model, record, tokenizer = _start(this, source)
    if model.untrainable:
        raise ConfigError(f"phase={this.config.phase}: {model.untrainable}")
    if objective.scores:
        if model.score is None:
            model.add_score_head()
        if model.head.weight is not model.embed.weight:
            model.head.requires_grad_(False)  # not used: an optimizer that waits for its gradient has no state to save
        record["scores"] = True
    elif model.score is not None:
        raise ConfigError(
            f"init_from={this.config.init_from} is a reward model; phase={this.config.phase} trains a language model"
        )
    return model, record, tokenizer


def _start(this: Run, source: Source) -> tuple[CausalLM, dict[str, Any], Tokenizer]:
    config, parent = this.config, this.parent
    settings = config.tokenizer.config
    if parent is not None and parent.record is not None:
        if (
            config.tokenizer.config.path
            and load_tokenizer(config.tokenizer.config.path, config.tokenizer.config.encoding).fingerprint
            != parent.tokenizer.fingerprint
        ):
            raise ConfigError(
                f"tokenizer.path={config.tokenizer.config.path} is not the tokenizer of {parent.checkpoint}"
            )
        if config.adapter is not None:
            model, record = parent.adapted(config.model, config.adapter, config.seed)
        else:
            wanted = config.model
            if config.stretch_context:
                parent, wanted = parent.stretched(config.stretch_context, config.stretch_by, wanted), None
            model, record = parent.model(wanted, config.keep_layers)
        part = f"{config.keep_layers} layers of " * (config.keep_layers > 0)
        merged = ", its adapter merged" * (parent.base is not None and config.adapter is not None)
        by = "unscaled frequencies" if config.stretch_by == "none" else config.stretch_by
        longer = f", its context made {config.stretch_context} by {by}" * (config.stretch_context > 0)
        this.say(f"starts from {part}{parent.origin}{merged}{longer}")
        return model, record, _extended(this, parent.tokenizer, model, record)
    if config.adapter is not None:
        raise ConfigError(f"adapter={config.adapter.name} stands on a trained model, and {config.init_from} has none")
    if config.stretch_context:
        raise ConfigError(f"stretch_context={config.stretch_context}: init_from={config.init_from} has no model")
    if config.keep_layers:
        raise ConfigError(f"keep_layers={config.keep_layers}: init_from={config.init_from} has no model")
    if config.model is None:
        raise ConfigError(
            f"phase={config.phase} needs a model: set init_from=runs/... to tune one, or model= to start anew"
        )
    if parent is not None:
        if config.tokenizer.config.path:
            raise ConfigError("init_from= names a tokenizer already; leave tokenizer.path= away")
        tokenizer = parent.tokenizer.extended(settings.add_tokens, settings.chat_template)
        this.say(f"tokenizer from {parent.path}")
    elif this.companions and not config.tokenizer.config.path:
        companion = next(iter(this.companions.values()))
        tokenizer = companion.tokenizer.extended(settings.add_tokens, settings.chat_template)  # refused if it differs
        this.say(f"tokenizer from {companion.path}")
    else:
        with this.world.first():
            tokenizer, how = cached_tokenizer(config.tokenizer, source)
        this.say(how)
    if config.phase not in ("pretrain", "distill"):
        this.say("warning: tunes a model that starts from random weights; init_from=runs/... tunes a pretrained one")
    chosen = sized_for(config.model, tokenizer.vocab_size)
    if chosen != config.model:
        shape = dataclasses.asdict(chosen.config)
        told = ", ".join(f"{name}={shape[name]}" for name in DERIVED if name in shape)
        this.say(f"model.size={config.model.config.size}: {told}")
    model = build_model(chosen, tokenizer.vocab_size, config.seed)
    return model, model_record(chosen, tokenizer.vocab_size), tokenizer


def _extended(this: Run, tokenizer: Tokenizer, model: CausalLM, record: dict[str, Any]) -> Tokenizer:
    """The parent's tokenizer with the tokens that were asked for; the model and its record grow with it."""
    settings = this.config.tokenizer.config
    grown = tokenizer.extended(settings.add_tokens, settings.chat_template)
    added = grown.vocab_size - tokenizer.vocab_size
    if not added:
        return grown
    if has_adapter(model):
        raise ConfigError(
            f"{added} new tokens need rows of their own in the embedding, which an adapter leaves as it is; train with "
            "adapter=none first, or leave tokenizer.add_tokens and tokenizer.chat_template away"
        )
    size = max(model.vocab_size, grown.vocab_size)
    resize_vocabulary(model, size, used=min(model.vocab_size, tokenizer.vocab_size))
    record["vocab_size"] = size
    this.say(f"{added} new tokens, whose embeddings start as the mean of all others")
    return grown


def _guard(
    this: Run, data: str, tokenizer: Tokenizer, precision: Precision, companions: dict[str, Artifact]
) -> dict[str, Any]:
    """What must be the same when this run is continued: settings, data, tokenizer, parent and companions."""
    flat: dict[str, Any] = {}
    sampled = this.config.phase == "rlhf"  # there the weights depend on how answers are drawn

    def walk(prefix: str, value: Any) -> None:
        if prefix in UNGUARDED and not (sampled and prefix == "inference"):
            return
        if isinstance(value, dict):
            for k, v in value.items():
                walk(f"{prefix}.{k}" if prefix else k, v)
        else:
            flat[prefix] = value

    walk("", masked(as_dict(this.config)))  # it is written into every checkpoint
    flat |= {f"{name} weights": artifact.sha256 for name, artifact in companions.items()}
    flat |= {"data fingerprint": data, "tokenizer fingerprint": tokenizer.fingerprint}
    flat |= {"precision": precision.name, "parent": this.parent.sha256 if this.parent else ""}
    return flat


def _count(number: float) -> str:
    """1234567 -> 1.23 M.

    >>> _count(950), _count(24_600), _count(2_570_304)
    ('950', '24.6 k', '2.57 M')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _header(this: Run, ready: Ready, precision: Precision) -> None:
    model = ready.module.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = memory_of(model, this.config.batch, sum(c.num_parameters for c in ready.module.companions.values()))
    count = f"{_count(model.num_parameters)} parameters" + f", {_count(trained)} of them trained" * has_adapter(model)
    this.say(f"{count}, {precision.name}; {ready.about}")
    if precision.weights is not None:
        this.say(
            f"warning: precision={precision.name} keeps weights, gradients and optimizer state in 16 bits, so updates "
            "below about 1/256 of a weight are lost; precision=bf16 keeps them in 32"
        )
    this.say(f"about {memory / 1e9:.1f} GB of memory")


def _sampler(
    this: Run, module: ObjectiveModule, record: dict[str, Any], tokenizer: Tokenizer, form: str
) -> Callable[[], list[dict]]:
    """A function that completes the run's sample prompts. What never fits is refused now, not at the first sample.

    All processes call it and the first speaks; weights that are shared out it gathers into a model of its own.
    """
    samples, model, first = this.config.samples, module.model, this.world.is_first

    def backend_of(model: CausalLM) -> Backend:
        return build_backend(this.config.inference, model, tokenizer, this.config.trainer.accelerator)

    backend = backend_of(model)
    if samples.every_steps and not backend.capabilities().shares_weights:
        raise ConfigError(
            f"inference={this.config.inference.name} answers from a copy of the weights, which would stay as they are "
            "now; choose inference=native, or samples.every_steps=0"
        )
    params = dataclasses.replace(sampling_params(SamplingConfig(), tokenizer.stop_ids), max_tokens=samples.max_tokens)
    prompts = prompt_ids(this, tokenizer, samples.prompts, chat=form == "chat")
    longest = max(map(len, prompts), default=0)
    if samples.every_steps and longest + samples.max_tokens > model.context:
        raise ConfigError(
            f"samples.max_tokens={samples.max_tokens} after a prompt of {longest} tokens is more than the model's "
            f"context of {model.context}"
        )

    def make() -> list[dict]:
        weights = weights_of(model, keep=first) if module.shards else {}
        if not first:
            return []
        speaks = backend_of(model_of(record, weights)) if weights else backend
        texts = complete(speaks, tokenizer, prompts, params)
        return [{"prompt": p, "completion": t} for p, t in zip(samples.prompts, texts, strict=True)]

    return make
