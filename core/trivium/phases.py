"""What each phase does: from a typed RunConfig to a finished run folder."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console

from trivium.build import (
    Artifact,
    build_backend,
    build_model,
    build_objective,
    build_optimizer,
    build_schedule,
    build_source,
    cached_tokenizer,
    load_artifact,
    model_record,
    train_tokenizer,
)
from trivium.compose import as_dict
from trivium.data.chat import Chat
from trivium.data.datamodule import StepDataset, validation_batches
from trivium.data.packing import TokenTable, tokenise
from trivium.data.source import Source
from trivium.data.tokenizer import Tokenizer
from trivium.disk import lock_folder, make_folder, replace_file
from trivium.errors import ConfigError, DataError
from trivium.evaluation.generation import complete
from trivium.evaluation.perplexity import bits_per_byte
from trivium.evaluation.probes import accuracy, answer_tasks
from trivium.inference.chat import HELP, Conversation, sampling_params, talk
from trivium.inference.config import SamplingConfig
from trivium.lineage.manifest import Manifest, digest_of, masked
from trivium.lineage.manifest import read as read_manifest
from trivium.lineage.report import write_report
from trivium.models.protocol import CausalLM
from trivium.schema import DATA_PHASES, TRAINING_PHASES, RunConfig
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.training.stop import EXIT_CODE
from trivium.training.trainer import Job, autocast_dtype, fit

ASIDE = ("name", "runs", "debug", "pipeline", "init_from")
"""Settings that change no result: init_from is replaced by the hash of what it named."""
RESULTS_OF = {
    "tokenizer": ("data", "tokenizer", "phase", "domain"),
    "evaluate": ("data", "evaluation", "inference", "system", "phase", "domain"),
    "generate": ("prompt", "prompts", "prompt_format", "system", "inference", "phase"),
    "chat": ("prompts", "system", "inference", "phase"),
}
UNGUARDED = (
    *("checkpoint", "validation", "samples", "logger", "stop", "inference", "evaluation", "prompt", "prompts"),
    *("prompt_format", "system", "trainer.accelerator", "trainer.threads", "trainer.compile", *ASIDE),
)
"""Settings that may change between the starts of one training run, since no weight depends on them."""


class Run:
    """One run's folder, manifest, parent and console: what every phase needs."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        speaks = config.phase in ("evaluate", "generate", "chat") and config.init_from
        self.name = config.name or f"{config.phase}-{Path(config.init_from).name if speaks else config.domain}"
        self.config = config = dataclasses.replace(config, name=self.name)
        self.console = console
        self._sources: dict[str | None, Source] = {}
        self.parent = load_artifact(config.init_from) if config.init_from else None  # a wrong one leaves no folder
        self.folder = make_folder(Path(config.runs) / self.name)
        there = read_manifest(self.folder).get("phase", config.phase)
        if there != config.phase:
            raise ConfigError(f"{self.folder} holds a run of phase={there}; choose another name=")
        plain = as_dict(config)
        keys = RESULTS_OF.get(config.phase, tuple(plain))
        key = digest_of(
            [{k: plain[k] for k in keys if k not in ASIDE}, self.parent.sha256 if self.parent else "", config.seed]
        )
        parents = []
        if self.parent is not None:
            parents = [
                {
                    "role": "init_from",
                    "path": str(self.parent.checkpoint or self.parent.path),
                    "sha256": self.parent.sha256,
                }
            ]
        self.manifest = Manifest(
            self.folder, key, name=self.name, phase=config.phase, domain=config.domain, seed=config.seed,
            config=masked(plain), parents=parents,
        )  # fmt: skip

    def begin(self, **facts: Any) -> None:
        """Make the folder this run's own. Training waits until its checkpoints are known to be this run's."""
        text = OmegaConf.to_yaml(OmegaConf.create(self.manifest.facts["config"]))
        replace_file(self.folder / "config.yaml", text.encode())
        self.manifest.update("running", **facts)

    def say(self, text: str) -> None:
        """A line under the phase's header, on the console and in log.txt."""
        self.console.print(f"  {text}", highlight=False, markup=False)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as f:
            f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def source(self, split: str | None = None) -> Source:
        """The run's data, built once for each split."""
        if split not in self._sources:
            self._sources[split] = build_source(self.config.data, self.config.phase, split)
        return self._sources[split]

    def same_content(self) -> bool:
        """Whether the data holds what it held when the run was done."""
        if self.config.phase not in DATA_PHASES:
            return True
        return self.manifest.facts.get("source") == self.source().fingerprint

    def needs_parent(self) -> Artifact:
        """The parent of a phase that cannot start from nothing."""
        if self.parent is None:
            raise ConfigError(f"phase={self.config.phase} needs a trained model: set init_from=runs/...")
        return self.parent

    def write_samples(self, rows: Sequence[dict]) -> None:
        """samples.jsonl, whole."""
        replace_file(
            self.folder / "samples.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
        )


def run(config: RunConfig, console: Console, *, skip_done: bool = False) -> int:
    """Run one phase; returns the exit code. skip_done: a finished run with the same settings is left as it is."""
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    this = Run(config, console)
    config = this.config
    console.rule(f"[bold]{config.phase}[/] on {config.domain} -> {this.folder}", align="left", style="dim")
    if this.manifest.was_done and (skip_done or config.phase in ("tokenizer", "evaluate")) and this.same_content():
        this.say("done already; the same settings and inputs")
        return 0
    lock = lock_folder(this.folder)
    if lock is None:
        raise ConfigError(f"another process is at work in {this.folder}; wait for it, or choose another name=")
    if config.phase not in TRAINING_PHASES:
        this.begin()
    try:
        code = PHASES[config.phase](this)
    except BaseException as error:
        if not this.manifest.others:  # a refused command leaves the facts of the run that is there
            this.manifest.update("failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        lock.close()
    this.manifest.update("done" if code == 0 else "stopped")
    write_report(this.folder)
    return code


def run_tokenizer(this: Run) -> int:
    """Train a tokenizer on the domain's text."""
    if this.config.tokenizer.config.path:
        raise ConfigError("phase=tokenizer trains one; tokenizer.path= is for the phases that use one")
    source = this.source()
    tokenizer = train_tokenizer(this.config.tokenizer, source)
    tokenizer.save(this.folder)
    said = [source[i] for i in range(0, len(source), max(1, len(source) // 200))]
    texts = [e["text"] for e in said if "text" in e] or [m["content"] for e in said for m in e.get("messages", ())]
    per_token = sum(len(t.encode()) for t in texts) / max(1, sum(map(len, tokenizer.encode_batch(texts))))
    this.say(f"{tokenizer.vocab_size:,} tokens, {per_token:.2f} bytes a token")
    results = {"vocab_size": tokenizer.vocab_size, "bytes_per_token": round(per_token, 4)}
    this.manifest.update(tokenizer=tokenizer.fingerprint, source=source.fingerprint, results=results)
    return 0


def run_training(this: Run) -> int:
    """Pretraining and tuning: the same path, another objective."""
    config = this.config
    objective = build_objective(config.objective, config.phase)
    source = this.source()
    model, record, tokenizer = _model_and_tokenizer(this, source)
    if config.batch.length > model.context:
        raise ConfigError(f"batch.length={config.batch.length} is longer than the model's context of {model.context}")
    if model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab_size}")
    chats = config.phase != "pretrain"
    train_on = getattr(objective.config, "train_on", "all")

    def table_of(split_source: Source) -> TokenTable:
        return tokenise(split_source, tokenizer, config.batch.length, chats=chats, train_on=train_on)

    table = table_of(source)
    validation = []
    data = {"train": table.fingerprint}
    if config.validation.every_steps:
        held_out = table_of(this.source("validation"))
        data["validation"] = held_out.fingerprint
        validation = validation_batches(
            held_out, max_rows=config.validation.max_rows, micro_size=config.batch.micro_size,
            length=config.batch.length, pad_id=tokenizer.pad_id,
        )  # fmt: skip
    steps = StepDataset(
        table, size=config.batch.size, micro_size=config.batch.micro_size, length=config.batch.length,
        pad_id=tokenizer.pad_id, seed=config.seed,
    )  # fmt: skip
    dtype = autocast_dtype(config.precision, config.trainer.accelerator)
    module = ObjectiveModule(
        model,
        objective,
        lambda m: build_optimizer(config.optim, m),
        build_schedule(config.schedule, config.trainer.max_steps),
        StepSettings(config.trainer.grad_clip, config.seed, dtype),
    )
    if config.trainer.compile:
        module.compile_model()
    form = "chat" if "messages" in source[0] else "text"
    make_samples = _sampler(this, model, tokenizer, form)
    guard = _guard(this, table, tokenizer, dtype)
    _header(this, model, table, steps, dtype)
    facts = {
        "model": {"name": record["name"], "parameters": model.num_parameters},
        "data": data,
        "source": source.fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }
    job = Job(config, this.folder, module, steps, validation, tokenizer, record, guard,
              form, make_samples, lambda: this.begin(**facts), this.console)  # fmt: skip
    fitted = fit(job)
    results = {k: v for k, v in fitted.figures.items() if k in ("train/loss", "val/loss", "train/nll")}
    this.manifest.update(steps=fitted.steps, tokens_seen=fitted.tokens, results=results)
    if fitted.signal:
        this.say(f"stopped by signal {fitted.signal} after step {fitted.steps}, saved; the same command continues")
        return EXIT_CODE
    early = " (early: the validation loss no longer falls)" if fitted.stopped_early else ""
    held = f", val loss {fitted.figures['val/loss']:.3f}" if "val/loss" in fitted.figures else ""
    already = "was done already" if fitted.resumed_from == fitted.steps else "done"
    this.say(
        f"{already}: step {fitted.steps}{early}, train loss {fitted.figures.get('train/loss', float('nan')):.3f}{held}"
    )
    return 0


def _model_and_tokenizer(this: Run, source: Source) -> tuple[CausalLM, dict[str, Any], Tokenizer]:
    config, parent = this.config, this.parent
    if parent is not None and parent.checkpoint is not None:
        if (
            config.tokenizer.config.path
            and Tokenizer.load(Path(config.tokenizer.config.path)).fingerprint != parent.tokenizer.fingerprint
        ):
            raise ConfigError(
                f"tokenizer.path={config.tokenizer.config.path} is not the tokenizer of {parent.checkpoint}"
            )
        model, record = parent.model(config.model)
        this.say(f"starts from {parent.checkpoint}")
        return model, record, parent.tokenizer
    if config.model is None:
        raise ConfigError(
            f"phase={config.phase} needs a model: set init_from=runs/... to tune one, or model= to start anew"
        )
    if parent is not None:
        if config.tokenizer.config.path:
            raise ConfigError("init_from= names a tokenizer already; leave tokenizer.path= away")
        tokenizer = parent.tokenizer
        this.say(f"tokenizer from {parent.path}")
    else:
        tokenizer, how = cached_tokenizer(config.tokenizer, source)
        this.say(how)
    if config.phase != "pretrain":
        this.say("warning: tunes a model that starts from random weights; init_from=runs/... tunes a pretrained one")
    model = build_model(config.model, tokenizer.vocab_size, config.seed)
    return model, model_record(config.model, tokenizer.vocab_size), tokenizer


def _guard(this: Run, table: TokenTable, tokenizer: Tokenizer, dtype: torch.dtype | None) -> dict[str, Any]:
    """What must be the same when this run is continued: settings, data, tokenizer, parent."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if prefix in UNGUARDED:
            return
        if isinstance(value, dict):
            for k, v in value.items():
                walk(f"{prefix}.{k}" if prefix else k, v)
        else:
            flat[prefix] = value

    walk("", as_dict(this.config))
    flat |= {"data fingerprint": table.fingerprint, "tokenizer fingerprint": tokenizer.fingerprint}
    flat |= {"precision": str(dtype), "parent": this.parent.sha256 if this.parent else ""}
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


def _header(this: Run, model: CausalLM, table: TokenTable, steps: StepDataset, dtype: torch.dtype | None) -> None:
    config = this.config
    per_step = config.batch.size * config.batch.length
    total = per_step * config.trainer.max_steps
    epochs = total * steps.utilisation / max(1, len(table.tokens))
    # the libraries, weights with gradients and two moments, and about 40 fp32 values a layer, token and width
    held = config.batch.micro_size * config.batch.length * model.width_times_depth * 160
    memory = 0.6e9 + model.num_parameters * 16 + held
    this.say(
        f"{_count(model.num_parameters)} parameters, {'bf16' if dtype else 'fp32'}; "
        f"{config.trainer.max_steps} steps of {per_step:,} tokens ({epochs:.1f} epochs of {_count(len(table.tokens))})"
    )
    this.say(
        f"rows {steps.utilisation:.1%} full, about {memory / 1e9:.1f} GB of memory"
        + (
            f"; {table.truncated} conversations cut at {config.batch.length} tokens, "
            f"{table.lost_ends} of them without their end"
            if table.truncated
            else ""
        )
    )


def _sampler(this: Run, model: CausalLM, tokenizer: Tokenizer, form: str) -> Callable[[], list[dict]]:
    """A function that completes the run's sample prompts. What never fits is refused now, not at the first sample."""
    samples = this.config.samples
    backend = build_backend(this.config.inference, model, tokenizer.pad_id, this.config.trainer.accelerator)
    params = dataclasses.replace(
        sampling_params(SamplingConfig(), (tokenizer.eot_id, tokenizer.eos_id)), max_tokens=samples.max_tokens
    )
    prompts = _prompt_ids(this, tokenizer, samples.prompts, chat=form == "chat")
    longest = max(map(len, prompts), default=0)
    if samples.every_steps and longest + samples.max_tokens > model.context:
        raise ConfigError(
            f"samples.max_tokens={samples.max_tokens} after a prompt of {longest} tokens is more than the model's "
            f"context of {model.context}"
        )

    def make() -> list[dict]:
        texts = complete(backend, tokenizer, prompts, params)
        return [{"prompt": p, "completion": t} for p, t in zip(samples.prompts, texts, strict=True)]

    return make


def _prompt_ids(this: Run, tokenizer: Tokenizer, prompts: Sequence[str], *, chat: bool) -> list[list[int]]:
    if not chat:
        return [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts]
    system = [{"role": "system", "content": this.config.system}] if this.config.system else []
    talker = Chat(tokenizer)
    return [talker.prompt_ids([*system, {"role": "user", "content": p}]) for p in prompts]


def run_evaluate(this: Run) -> int:
    """Bits per byte on held-out text and accuracy on held-out tasks, each with an interval."""
    config, settings = this.config, this.config.evaluation
    parent = this.needs_parent()
    sampling = config.inference.config.sampling
    if config.system or dataclasses.replace(sampling, max_tokens=64) != SamplingConfig():
        raise ConfigError("phase=evaluate answers greedily and without a system message; only max_tokens may be set")
    source = this.source()
    _refuse_trained_text(this, parent)
    model, _ = parent.model(config.model)
    examples = [source[i] for i in range(len(source))]
    random.Random(0).shuffle(examples)  # a cap must not read one book or one task only
    texts = [e["text"] for e in examples if "text" in e][: settings.max_texts]
    tasks = _balanced([e for e in examples if "task" in e], settings.max_tasks)
    if not texts and not tasks:
        raise DataError(
            f"data={config.data.name if config.data else ''} has neither text nor verifiable tasks to evaluate on"
        )
    this.say(f"{len(texts)} texts and {len(tasks)} tasks of the {len(source)} held out")
    bootstrap = {"resamples": settings.resamples, "confidence": settings.confidence}
    found = {}
    backend = build_backend(config.inference, model, parent.tokenizer.pad_id, config.trainer.accelerator)
    if texts:
        found["bits_per_byte"] = bits_per_byte(model, parent.tokenizer, texts, stride=settings.stride, **bootstrap)
    if tasks:
        limit = min(config.inference.config.sampling.max_tokens, model.context // 4)
        answers = answer_tasks(backend, parent.tokenizer, source, tasks, max_tokens=limit)
        this.write_samples(
            [
                {
                    "kind": "evaluate",
                    "task": a.example["task"],
                    "prompt": a.example["messages"][-2]["content"],
                    "completion": a.completion,
                    "answer": a.example["answer"],
                    "correct": a.score.correct,
                }
                for a in answers
            ]  # fmt: skip
        )
        found |= accuracy(answers, **bootstrap)
    for name, e in found.items():
        this.say(f"{name:<20} {e.value:.3f}  [{e.low:.3f}, {e.high:.3f}]  n={e.count}")
    this.manifest.update(results={k: dataclasses.asdict(e) for k, e in found.items()}, source=source.fingerprint)
    return 0


def _refuse_trained_text(this: Run, parent: Artifact) -> None:
    """The same path cut another way than in training would call trained text held out."""
    ours = dataclasses.asdict(this.config.data.config) if this.config.data else {}
    theirs = {k.removeprefix("data."): v for k, v in parent.guard.items() if k.startswith("data.")}
    scored = ours.get("validation_path") or ours.get("path")
    if not scored or scored != theirs.get("path"):
        return
    differ = [k for k in ("validation_path", "validation_share") if ours.get(k) != theirs.get(k)]
    if differ:
        shown = ", ".join(f"data.{k}={theirs[k] or repr('')}" for k in differ)
        raise ConfigError(
            f"{parent.path} was trained on {scored} with {shown}; the same here, or other text in "
            "data.validation_path, keeps trained text out of the score"
        )


def _balanced(tasks: list, limit: int) -> list:
    """At most `limit` examples, as many of each task as can be."""
    by_task: dict[str, list] = {}
    for example in tasks:
        by_task.setdefault(example["task"], []).append(example)
    share = max(1, limit // max(1, len(by_task)))
    return [e for _, examples in sorted(by_task.items()) for e in examples[:share]]


def run_generate(this: Run) -> int:
    """Answer prompts."""
    config = this.config
    parent = this.needs_parent()
    prompts = [config.prompt] if config.prompt else config.prompts
    if not prompts:
        raise ConfigError("phase=generate needs prompt='...' or prompts=['...','...']")
    model, _ = parent.model(config.model)
    tokenizer = parent.tokenizer
    backend = build_backend(config.inference, model, tokenizer.pad_id, config.trainer.accelerator)
    chat = config.prompt_format == "chat" or (config.prompt_format == "auto" and parent.form == "chat")
    params = sampling_params(config.inference.config.sampling, (tokenizer.eot_id, tokenizer.eos_id))
    texts = complete(backend, tokenizer, _prompt_ids(this, tokenizer, prompts, chat=chat), params)
    for prompt, text in zip(prompts, texts, strict=True):
        this.console.print(f"  [bold]{_plain(prompt)}[/]{'' if not chat else ' ->'} {_plain(text)}", highlight=False)
    this.write_samples(
        [{"kind": "generate", "prompt": p, "completion": t} for p, t in zip(prompts, texts, strict=True)]
    )
    return 0


def _plain(text: str) -> str:
    return text.replace("[", r"\[").strip("\n")


def run_chat(this: Run) -> int:
    """Talk in the terminal, or hold the conversation that `prompts` scripts."""
    config = this.config
    parent = this.needs_parent()
    if parent.form != "chat":
        this.say("warning: this model was not tuned on conversations; expect its text to run on")
    model, _ = parent.model(config.model)
    backend = build_backend(config.inference, model, parent.tokenizer.pad_id, config.trainer.accelerator)
    conversation = Conversation(backend, parent.tokenizer, config.inference.config.sampling, config.system)
    script = iter(config.prompts)
    interactive = sys.stdin.isatty() and not config.prompts

    def read() -> str | None:
        if config.prompts:
            line = next(script, None)
            if line is not None:
                sys.stdout.write(f"  you: {line}\n  model: ")
            return line
        try:
            line = input("you: " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            return None
        return line.encode("utf-8", "replace").decode()  # a terminal may send bytes that are no UTF-8

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    if interactive:
        this.say(HELP)
    try:
        talk(conversation, read, write)
    finally:
        turns = [m["content"] for m in conversation.messages if m["role"] != "system"]
        pairs = zip(turns[::2], turns[1::2], strict=True)
        this.write_samples([{"kind": "chat", "prompt": q, "completion": a} for q, a in pairs])
    return 0


PHASES: dict[str, Callable[[Run], int]] = {
    "tokenizer": run_tokenizer,
    "evaluate": run_evaluate,
    "generate": run_generate,
    "chat": run_chat,
    **dict.fromkeys(TRAINING_PHASES, run_training),
}
