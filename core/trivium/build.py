"""The only file where a name becomes an object."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.compose import Component, component, compose, data_option, options, run_config
from trivium.data.cleaning import Cleaned
from trivium.data.config import BPEConfig, CleaningConfig, MixtureConfig
from trivium.data.fetch import CATALOGUE, fetch, fetch_folder
from trivium.data.gguf_tokenizer import tokenizer_of
from trivium.data.mixture import Mixture
from trivium.data.packing import said_in
from trivium.data.position import key_of, permute
from trivium.data.source import Source
from trivium.data.tokenizer import Tokenizer
from trivium.data.vocabularies import load_tokenizer
from trivium.disk import cache_folder, lock_folder, make_folder, replace_file, sweep
from trivium.errors import CheckpointError, ConfigError, DataError, TriviumError
from trivium.inference.protocol import Backend
from trivium.lineage import manifest
from trivium.lineage.pointer import is_pointer, read_pointer
from trivium.models import adapters, peft
from trivium.models.config import ROPE_KINDS, RopeScaling
from trivium.models.gguf import read_gguf
from trivium.models.gguf_write import write_gguf
from trivium.models.huggingface import Reader, Renamed, Tensors, fingerprint, read_json
from trivium.models.protocol import CausalLM
from trivium.models.sizes import sized
from trivium.models.weights import (
    family_of,
    fill_weights,
    hf_tensors,
    keep_layers,
    load_weights,
    read_tensors,
    spread_layers,
)
from trivium.objectives.protocol import Objective
from trivium.registry import BACKENDS, MODELS, OBJECTIVES, SOURCES, Registry, extra, load, near_misses
from trivium.schema import EncoderSettings, RunConfig
from trivium.training.checkpoint import MODEL, RECORD, CheckpointStore, model_tensors, read_checkpoint_json, verify
from trivium.training.schedule import Schedule
from trivium.training.tensorfile import write_tensors


def build(registry: Registry, chosen: Component, *args: Any, **kwargs: Any) -> Any:
    """The object that `chosen` names, built from its typed settings."""
    return registry.load(chosen.name)(chosen.config, *args, **kwargs)


def build_source(chosen: Component | None, phase: str, split: str | None = None) -> Source:
    """A source, checked to feed `phase`; split replaces the configured one."""
    if chosen is None:
        raise ConfigError(f"phase={phase} needs data; choose data= or domain=")
    if isinstance(chosen.config, MixtureConfig) and (chosen.config.split != "train" or chosen.config.seed):
        raise ConfigError("data.split and data.seed are of a mixture's parts: set data.parts.NAME.split, or .seed")
    if split:
        chosen = Component(chosen.name, dataclasses.replace(chosen.config, split=split))
    if isinstance(chosen.config, MixtureConfig):
        parts = {name: build_source(_part(chosen.config, name, phase), phase, split) for name in chosen.config.parts}
        return SOURCES.load(chosen.name)(chosen.config, parts)
    source = build(SOURCES, chosen)
    if phase not in source.phases:
        raise ConfigError(
            f"data={chosen.name} does not feed phase={phase}; it feeds {', '.join(sorted(source.phases))}"
        )
    return Cleaned(source) if source.config.clean else source


def build_held_out(path: str) -> Source:
    """A file, folder or glob of `data.held_out`: every row of it."""
    settings = SOURCES.config("files")(path=path, validation_share=0.0)
    try:
        return build(SOURCES, Component("files", settings))
    except DataError as error:
        raise DataError(f"data.held_out={path}: {error}") from error


def evaluation_data(config: RunConfig) -> Component | None:
    """What phase=evaluate reads of a run's domain, with the settings of its data that the run itself changes; None
    where the domain says nothing of it, or the run's data is of another source."""
    if config.data is None or f"{config.domain}/evaluate" not in options("data"):
        return None
    usual, judged = (data_option(f"{config.domain}/{phase}") for phase in (config.phase, "evaluate"))
    if judged.name != config.data.name:
        return None
    changed = {
        f.name: mine
        for f in dataclasses.fields(config.data.config)
        if (mine := getattr(config.data.config, f.name)) != (said := getattr(usual.config, f.name))
        and getattr(judged.config, f.name) == said
    }
    return Component(judged.name, dataclasses.replace(judged.config, **changed))


def _part(config: MixtureConfig, name: str, phase: str) -> Component:
    """What a part of a mixture reads: its domain's data for the phase, with the part's own settings."""
    part = config.part(name)
    composed = compose([f"phase={phase}", f"domain={part.domain}"])
    chosen = run_config(composed).data
    assert chosen is not None and part.domain in options("domain")
    known = ("domain", "weight", "epochs", "tokens", *(f.name for f in dataclasses.fields(chosen.config)))
    if unknown := [key for key, _ in part.settings if key not in known]:
        raise ConfigError(f"data.parts.{name} has {unknown[0]!r}, which is no setting.{near_misses(unknown[0], known)}")
    if whole := [key for key, _ in part.settings if key == "held_out" or key.startswith("contamination")]:
        raise ConfigError(f"data.parts.{name} has {whole[0]}, which is of the whole mixture: set data.{whole[0]}")
    own = dict(part.settings)
    usual, told = dataclasses.asdict(CleaningConfig()), dataclasses.asdict(config.cleaning)
    told = {key: value for key, value in told.items() if value != usual[key]}
    settings = {
        "name": chosen.name,
        **dataclasses.asdict(chosen.config),
        **({"clean": config.clean} if config.clean else {}),
    }
    settings["cleaning"] = {**settings["cleaning"], **told, **(own.pop("cleaning", None) or {})}
    settings |= own
    found = component("data", settings)
    assert found is not None
    if isinstance(found.config, MixtureConfig):
        raise ConfigError(f"data.parts.{name}: a mixture is no part of a mixture; name its domains")
    return found


def build_objective(chosen: Component, phase: str) -> Objective:
    """An objective, checked to train in `phase`."""
    objective = build(OBJECTIVES, chosen)
    if phase not in objective.phases:
        raise ConfigError(
            f"objective={chosen.name} is not for phase={phase}; it is for {', '.join(sorted(objective.phases))}"
        )
    return objective


def sized_for(chosen: Component, vocab_size: int) -> Component:
    """The model with the sizes that `model.size` asks for, with this vocabulary."""

    def count(config: Any) -> int:
        return _without_memory(Component(chosen.name, config), vocab_size, "model.size").num_parameters

    return Component(chosen.name, sized(chosen.config, count))


def build_model(chosen: Component, vocab_size: int, seed: int) -> CausalLM:
    """A freshly initialised model."""
    model: CausalLM = build(MODELS, chosen, vocab_size)
    model.init_weights(seed)
    model.confirm()
    return model


def build_backend(
    chosen: Component,
    model: CausalLM,
    tokenizer: Tokenizer,
    accelerator: str = "auto",
    artifact: Artifact | None = None,
) -> Backend:
    """An inference backend over a model's own weights, on the accelerator's device.

    One that reads files (its settings have a `path`, of a `form`: "gguf" or "folder") reads the artifact's own where
    that has the form, else the model as it is written for others; what is written goes with the backend. Raises
    ConfigError for a draft model with another tokenizer: its guesses would be of other text.
    """
    if getattr(chosen.config, "alone", False):
        raise ConfigError(
            f"inference={chosen.name} is a model of its own that makes vectors of texts and writes none; it is for "
            "phase=serve, and phase=search has search.encoder"
        )
    device, more = device_of(accelerator), {}
    if named := getattr(chosen.config, "draft", ""):
        draft = load_artifact(named)
        if draft.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ConfigError(f"inference.draft={named} has another tokenizer than the model; take one with the same")
        more["draft"] = draft.model(None)[0].to(device)
    form, written = getattr(chosen.config, "form", ""), None
    if form and not chosen.config.path:
        own = _readable(form, artifact)
        if not own:
            written = tempfile.TemporaryDirectory(prefix="trivium-")
            own = str(_written(form, model, tokenizer, Path(written.name)))
        chosen = Component(chosen.name, dataclasses.replace(chosen.config, path=own))
    backend = build(BACKENDS, chosen, model.to(device), tokenizer, **more)
    if written is not None:
        backend.reads = written  # while it is there
    return backend


def build_encoder(settings: EncoderSettings, accelerator: str = "auto", say: Callable[[str], None] = print) -> Any:
    """The encoder of a folder, or one that is fetched by its name, on the accelerator's device."""
    path = settings.path
    if not Path(path).exists():
        known = [name for name, entry in CATALOGUE.items() if entry.folder]
        if path not in known:
            raise CheckpointError(
                f"the encoder {path} is neither a folder nor one that can be fetched ({', '.join(known)})."
                f"{near_misses(path, known)}"
            )
        settings = dataclasses.replace(settings, path=str(fetch_folder(path, say)))
    return BACKENDS.load("encoder")(settings, device=device_of(accelerator))


def _readable(form: str, artifact: Artifact | None) -> str:
    """The artifact's path, if it has a form that others read."""
    if artifact is None or artifact.base is not None:
        return ""
    file = artifact.path.suffix == ".gguf" and artifact.path.is_file()
    folder = artifact.checkpoint == artifact.path and (artifact.path / "config.json").is_file()
    return str(artifact.path) if {"gguf": file, "folder": folder}[form] else ""


def _written(form: str, model: CausalLM, tokenizer: Tokenizer, folder: Path) -> Path:
    """The model in a form that others read."""
    family = family_of(model)
    if model.adapters is not None:
        raise ConfigError(
            "the model has an adapter, and only the native engine answers with one; export it merged first"
        )
    if form == "folder":
        write_folder(model, family, tokenizer, folder)
        return folder
    file = folder / "model.gguf"
    config = {"model_type": family, **model.hf_config()}
    write_gguf(file, config, hf_tensors(model), tokenizer.gguf_keys(model.vocab_size))
    return file


def build_optimizer(chosen: Component, model: CausalLM) -> torch.optim.Optimizer:
    """The one optimizer of a run."""
    return build(extra("optimizers"), chosen, model)


def build_schedule(chosen: Component, max_steps: int) -> Schedule:
    """The learning-rate factor as a function of the step."""
    return build(extra("schedules"), chosen, max_steps)


def device_of(accelerator: str) -> torch.device:
    """The device of trainer.accelerator; "auto" is CUDA, then Apple's GPU, then the CPU."""
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    wanted = {"gpu": ("cuda", "mps"), "auto": ("cuda", "mps", "cpu")}.get(accelerator, (accelerator,))
    found = next((name for name in wanted if here.get(name)), None)
    if found is None:
        raise ConfigError(
            f"trainer.accelerator={accelerator}: there is none here, but {', '.join(k for k in here if here[k])}"
        )
    return torch.device(found)


def cached_tokenizer(chosen: Component, source: Source) -> tuple[Tokenizer, str]:
    """The tokenizer of these settings for this data, and how it was had: loaded, trained, or trained earlier."""
    settings: BPEConfig = chosen.config
    found, how = _cached_tokenizer(chosen, source)
    return found.extended(settings.add_tokens, settings.chat_template), how


def _cached_tokenizer(chosen: Component, source: Source) -> tuple[Tokenizer, str]:
    settings: BPEConfig = chosen.config
    if settings.path:
        return load_tokenizer(settings.path, settings.encoding), f"tokenizer from {settings.path}"
    aside = ("encoding", "add_tokens", "chat_template")
    trained = {k: v for k, v in dataclasses.asdict(settings).items() if k not in aside}
    key = manifest.digest_of([chosen.name, trained, source.fingerprint])
    folder = cache_folder() / "tokenizers" / key
    if (folder / "tokenizer_config.json").is_file():  # written last
        return Tokenizer.load(folder), f"tokenizer trained earlier on this data ({folder})"
    tokenizer = train_tokenizer(chosen, source)
    tokenizer.save(make_folder(folder))
    return tokenizer, f"tokenizer trained on this data: {tokenizer.vocab_size:,} tokens ({folder})"


def train_tokenizer(chosen: Component, source: Source) -> Tokenizer:
    """Train on everything a source says, up to a limit: of a mixture on some of each part."""
    numbers = range(len(source))
    if isinstance(source, Mixture):
        numbers = permute(np.arange(len(source)), len(source), key_of("tokenizer", source.fingerprint)).tolist()
    return build(extra("tokenizers"), chosen, (said_in(source[i]) for i in numbers))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Loading makes many objects and no garbage; each time so many are new, Python's collector goes through the million
    that the libraries made when they were imported (0.2 s)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass
class Artifact:
    """What `init_from` named: a model with its tokenizer, or a tokenizer alone.

    record: what its model is (`model_record`); None of a tokenizer alone. tensors: reads its weights, by our names, or
    those of an adapter, by peft's. base: what an adapter stands on. digest: waits for its hash.
    """

    path: Path
    digest: Callable[[], str]
    tokenizer: Tokenizer
    checkpoint: Path | None = None
    guard: dict[str, Any] = dataclasses.field(default_factory=dict)
    form: str = "text"
    """What its model was last trained on: "chat" or "text" (which prompt and completion are, too)."""
    record: dict[str, Any] | None = None
    tensors: Callable[[], Mapping[str, torch.Tensor]] = dict
    base: Artifact | None = None
    origin: str = ""
    """Where others find it again: the path, or the name that it was fetched by."""

    def __post_init__(self) -> None:
        self.origin = self.origin or str(self.checkpoint or self.path)

    @cached_property
    def sha256(self) -> str:
        """Of the files that hold it."""
        return self.digest()

    @property
    def scores(self) -> bool:
        """Whether it is a reward model."""
        return self.record is not None and bool(self.record.get("scores"))

    @_uncollected()
    def model(self, wanted: Component | None, kept_layers: int = 0) -> tuple[CausalLM, dict[str, Any]]:
        """The checkpoint's model, and its record.

        wanted: refuse it unless its architecture is this one. kept_layers: only so many of its layers (0 is all).
        """
        if self.base is not None:
            if kept_layers:
                raise ConfigError(f"keep_layers={kept_layers}: {self.origin} is an adapter; export it merged first")
            return self._with_adapter(wanted, self.base)
        return self._plain(wanted, kept_layers)

    @_uncollected()
    def merged(self, wanted: Component | None, quantiser: Any = None) -> tuple[CausalLM, dict[str, Any]]:
        """The model with its adapter, if it has one, in its weights; quantiser: then hold them in few bits."""
        if self.base is None:
            return self._plain(wanted, quantiser=quantiser)
        model, record = self.model(wanted)
        adapters.dequantise(model)
        adapters.merge(model)
        adapters.detach(model)
        if quantiser is not None:
            adapters.quantise(model, quantiser)
        return model, {key: value for key, value in record.items() if key != "adapter"}

    def adapted(self, wanted: Component | None, chosen: Component, seed: int) -> tuple[CausalLM, dict[str, Any]]:
        """The model with a new adapter on it, and the record of both. An adapter that it has is merged first."""
        quantiser = quantiser_of(chosen)
        if self.base is not None and quantiser is not None:
            raise ConfigError(
                f"adapter={chosen.name}: {self.origin} is an adapter already, and merged weights that are rounded to a "
                "few bits answer otherwise than what was tuned. Leave adapter= away to train its own adapter on, or "
                "choose adapter=lora"
            )
        model, record = self.merged(wanted, quantiser)
        build(extra("adapters"), chosen, model, seed)
        return model, {**record, "adapter": adapter_record(chosen, self)}

    def stretched(self, context: int, kind: str, wanted: Component | None = None) -> Artifact:
        """The same weights, to be built with a longer context; kind: of RoPE scaling, from the first context on.

        wanted: refuse it unless its architecture is this one before it is stretched.
        """
        if kind not in ROPE_KINDS:
            raise ConfigError(
                f"stretch_by={kind!r} is not one of {', '.join(ROPE_KINDS)}.{near_misses(kind, ROPE_KINDS)}"
            )
        if self.base is not None:
            raise ConfigError(f"stretch_context={context}: {self.origin} is an adapter; export it merged first")
        if self.record is None:
            raise ConfigError(f"stretch_context={context}: {self.origin} has no model")
        here = _described(self.record)
        if wanted is not None:
            here = self._agreeing(sized_for(wanted, self.record["vocab_size"]), here)
        scaling: RopeScaling | None = getattr(here.config, "rope_scaling", None)
        if scaling is None:
            raise ConfigError(f"stretch_context={context}: model={here.name} has no rotary positions to stretch")
        if context <= here.config.context:
            raise ConfigError(
                f"stretch_context={context} must be more than the context of {self.origin}, {here.config.context}"
            )
        if kind == "none":  # what it has stays
            scaling = dataclasses.replace(scaling, original_context=scaling.original_context or here.config.context)
        else:
            first = scaling.original_context or here.config.context
            scaling = RopeScaling(kind=kind, factor=context / first, original_context=first)
        config = dataclasses.replace(here.config, context=context, rope_scaling=scaling)
        record = {**self.record, "config": dataclasses.asdict(config)}
        return dataclasses.replace(self, record=record)

    def _with_adapter(self, wanted: Component | None, base: Artifact) -> tuple[CausalLM, dict[str, Any]]:
        record = self.record or {}
        settings = dict(record["adapter"])
        settings.pop("base")
        empty = base._empty() if "peft" in settings else None
        if empty is not None:  # somebody else's: its file says which layers it stands on
            settings = peft.settings_of(settings["peft"], self.tensors(), empty, str(self.path))
        chosen = component("adapter", settings)
        assert chosen is not None
        model, plain = base.merged(wanted, quantiser_of(chosen))
        if record.get("scores") and model.score is None:
            model.add_score_head()
        build(extra("adapters"), chosen, model)
        adapters.load_parts(model, peft.from_peft(model, self.tensors(), self.origin), self.origin)
        return model, {**plain, "adapter": adapter_record(chosen, base)}

    def _empty(self) -> CausalLM:
        """Its model with names and shapes and no values."""
        if self.base is not None:
            return self.base._empty()
        assert self.record is not None
        return _without_memory(_described(self.record), self.record["vocab_size"], self.origin)

    def _plain(
        self, wanted: Component | None, kept_layers: int = 0, quantiser: Any = None
    ) -> tuple[CausalLM, dict[str, Any]]:
        record = self.record
        if record is None:
            raise CheckpointError(f"{self.path} holds a tokenizer and no model; name a trained run in init_from=")
        here = _described(record)
        if wanted is not None:
            here = self._agreeing(sized_for(wanted, record["vocab_size"]), here)
        tensors = self.tensors()
        if kept_layers:
            layers = getattr(here.config, "layers", 0)
            if kept_layers > layers:
                raise ConfigError(f"keep_layers={kept_layers}: {self.checkpoint} has {layers} layers to keep some of")
            here = Component(here.name, dataclasses.replace(here.config, layers=kept_layers))
            tensors = keep_layers(tensors, spread_layers(layers, kept_layers))
        plain = model_record(here, record["vocab_size"])
        said = {**plain, "scores": record.get("scores")}
        return model_of(said, tensors, str(self.checkpoint), quantiser), plain

    def _agreeing(self, wanted: Component, here: Component) -> Component:
        free = getattr(type(here.config), "runtime_fields", ())
        ours, theirs = dataclasses.asdict(wanted.config), dataclasses.asdict(here.config)
        unset = [k for k in ours if ours[k] == ""]  # the checkpoint's own
        differ = [k for k in ours if k not in (*free, *unset) and ours[k] != theirs.get(k)]
        if wanted.name != here.name or differ:
            shown = ", ".join(f"{k}={theirs.get(k)} there and {ours[k]} here" for k in differ[:4])
            raise CheckpointError(
                f"{self.checkpoint} is of another architecture: model={here.name} there, model={wanted.name} here"
                f"{'; ' + shown if shown else ''}. Leave model= away to take the checkpoint's own"
            )
        own = {k: getattr(here.config, k) for k in unset}
        return Component(wanted.name, dataclasses.replace(wanted.config, **own))


def model_record(chosen: Component, vocab_size: int) -> dict[str, Any]:
    """What a checkpoint says of its model; with "scores" it has a score head besides."""
    return {"name": chosen.name, "config": dataclasses.asdict(chosen.config), "vocab_size": vocab_size}


def _described(record: Mapping[str, Any]) -> Component:
    """The inverse of `model_record`."""
    found = component("model", {"name": record["name"], **record["config"]})
    assert found is not None
    return found


def adapter_record(chosen: Component, base: Artifact) -> dict[str, Any]:
    """What a checkpoint says of its adapter, and of what that stands on."""
    on = {"path": base.origin, "sha256": base.sha256, "family": (base.record or {}).get("name", "")}
    if base.base is not None:
        on["base"] = base.base.origin
    return {"name": chosen.name, **dataclasses.asdict(chosen.config), "base": on}


def quantiser_of(chosen: Component) -> Callable[[torch.nn.Linear], torch.nn.Module] | None:
    """What puts a base into few bits, where an adapter wants it so."""
    if not hasattr(chosen.config, "quant_type"):
        return None
    return load("trivium.models.quantised:quantiser")(chosen.config.quant_type, chosen.config.double_quant)


def model_of(
    record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], origin: str = "a model", quantiser: Any = None
) -> CausalLM:
    """The model that a record describes, with these weights. quantiser: of the linear layers in blocks, one by one."""
    chosen = _described(record)
    model = _without_memory(chosen, record["vocab_size"], origin)
    made = any(True for _ in model.buffers())  # values that no file holds: the constructor must make them
    if made:
        model = build(MODELS, chosen, record["vocab_size"])
    if record.get("scores"):
        model.add_score_head()
    if "adapter" in record:
        settings = {key: value for key, value in record["adapter"].items() if key != "base"}
        adapter = component("adapter", settings)
        assert adapter is not None
        build(extra("adapters"), adapter, model)
    if made:
        load_weights(model, tensors, origin)
        if quantiser is not None:
            adapters.quantise(model, quantiser)
    else:
        fill_weights(model, tensors, origin, quantiser)
    model.confirm()
    return model


def _without_memory(chosen: Component, vocab_size: int, origin: str) -> CausalLM:
    """The model with shapes and no values. Raises CheckpointError for sizes that no tensor can have."""
    try:
        with torch.device("meta"):
            return build(MODELS, chosen, vocab_size)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{origin}: no model={chosen.name} can have these sizes ({error})") from error


def same_tokenizer(role: str, companion: Artifact, tokenizer: Tokenizer) -> None:
    """Refuse a companion that reads text otherwise: the same ids would mean other words."""
    if companion.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"{role}.init_from={companion.path} has another tokenizer than this run "
            f"({companion.tokenizer.fingerprint[:10]} and {tokenizer.fingerprint[:10]}); log-probabilities compare "
            "only on the same tokens. Start from that run's tokenizer (init_from=) or choose another companion"
        )


def build_companion(role: str, companion: Artifact, tokenizer: Tokenizer, length: int) -> CausalLM:
    """A companion's language model, checked to read what this run reads."""
    same_tokenizer(role, companion, tokenizer)
    model, _ = companion.model(None)
    if model.score is not None:
        raise ConfigError(f"{role}.init_from={companion.path} is a reward model; a {role} must be a language model")
    if model.context < length:
        raise ConfigError(f"the {role}'s context of {model.context} is shorter than this run's {length} tokens")
    return model


@_uncollected()
def load_artifact(init_from: str, base: str = "", family: str = "") -> Artifact:
    """Find and check what `init_from` names: a run, a pipeline's run, a checkpoint, a tokenizer's run, a Hugging Face
    folder, a GGUF file, an adapter, a pointer to one of these, or a model that is fetched by name.

    Of a run that kept its best checkpoint (checkpoint.keep_best) the best is taken, else the newest. base: where the
    model is that an adapter stands on, if it is not where the adapter says. family: "hf" reads a Hugging Face folder
    through transformers even where its family is native.
    """
    path = Path(init_from)
    if not path.exists() and init_from in CATALOGUE:
        return _by_name(init_from)
    if not path.exists():
        raise CheckpointError(f"init_from={init_from} does not exist{_runs_nearby(path)}")
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(path)
    if is_pointer(path):
        return _pointed(path, base, family)
    facts = manifest.read(path)
    if facts.get("phase") == "pipeline":
        if facts.get("rolled_back"):
            raise CheckpointError(
                f"{path} made a model that was rolled back ({facts['rolled_back'][0]}); name the incumbent, or a stage"
            )
        trained = [s for s in facts.get("stages", []) if (path / s["path"] / "checkpoints").is_dir()]
        if not trained:
            raise CheckpointError(f"{path} has no trained stage yet")
        speaks = [s for s in trained if s["phase"] != "reward"] or trained
        result = next((s for s in trained if s["name"] == facts.get("result")), speaks[-1])
        return load_artifact(str(path / result["path"]), base, family)
    store = CheckpointStore(path / "checkpoints")
    checkpoint = path if (path / RECORD).is_file() else store.best() or store.latest()
    if checkpoint is not None:
        verify(checkpoint)
        record = (checkpoint / RECORD).read_bytes()
        state, said = (read_checkpoint_json(checkpoint, name) for name in ("state.json", "model.json"))
        stands = said.get("adapter")
        return Artifact(
            path,
            lambda: hashlib.sha256(record).hexdigest(),
            Tokenizer.load(checkpoint / "tokenizer"),
            checkpoint,
            state["guard"],
            state["form"],
            said,
            lambda: read_tensors(checkpoint / peft.WEIGHTS) if stands else model_tensors(checkpoint),
            _base(stands["base"], base, checkpoint) if stands else None,
        )
    if (path / peft.CONFIG).is_file():
        return _peft(path, base, family)
    if (path / "config.json").is_file():
        return _folder(path, family)
    if (path / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(path)
        return Artifact(path, lambda: tokenizer.fingerprint, tokenizer)
    if (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path} has no complete checkpoint yet; run its phase again to continue it")
    raise CheckpointError(
        f"init_from={init_from} is neither a run nor a checkpoint: it has no checkpoints/ and no {RECORD}"
    )


def _pointed(path: Path, base: str, family: str) -> Artifact:
    """The model that a pointer names, which must be the very one that was promoted."""
    named = read_pointer(path)
    found = load_artifact(str(named.path), base, family)
    if found.sha256 != named.sha256:
        raise CheckpointError(
            f"{path} names {named.path} as it was then ({named.sha256[:10]}), and other weights are there now "
            f"({found.sha256[:10]})"
        )
    return found


def _base(said: Mapping[str, str], named: str, adapter: Path) -> Artifact:
    """What an adapter stands on.

    said: its path, the hash of the very model it was trained on where that is known, its family, and its own base if it
    is an adapter, too. named: where the user says that it, or what lies under it, is.
    """
    path, sha256, family = said["path"], said.get("sha256", ""), said.get("family", "")
    there = _found_from(path, adapter)
    tries = [(named, "")] if named else []
    if there:
        tries += [(there, named)] * bool(named) + [(there, said.get("base", ""))]
    found = None
    for where, under in tries:
        if not (Path(where).exists() or where in CATALOGUE):
            continue
        try:
            found = load_artifact(where, under, family)
        except CheckpointError:
            if (where, under) == tries[-1]:
                raise
            continue
        if found.record is not None and (not sha256 or found.sha256 == sha256):
            return found
    if found is None:
        raise CheckpointError(
            f"{adapter} is an adapter of {path or 'a model that it does not name'}"
            f"{f', and base={named}' if named else ', which'} is not there; say where it is in base="
        )
    if found.record is None:
        raise CheckpointError(f"{adapter} is an adapter, and {found.origin} holds no model for it to stand on")
    raise CheckpointError(
        f"{adapter} is an adapter of {path} as it was then ({sha256[:10]}), and {found.origin} holds other weights "
        f"({found.sha256[:10]}); say in base= where those are"
    )


def _found_from(path: str, adapter: Path) -> str:
    """Where a path that was written from another folder is: from here, or from one of the adapter's own folders."""
    if not path or Path(path).exists() or path in CATALOGUE:
        return path
    near = (parent / path for parent in adapter.resolve().parents)
    return next((str(p) for p in near if p.exists()), "")


def _peft(path: Path, base: str, family: str) -> Artifact:
    """An adapter that peft has written."""
    said, tensors = peft.read_peft(path)
    under = _base({"path": said.get("base_model_name_or_path") or "", "family": family}, base, path)
    tokenizer = Tokenizer.load(path) if (path / "tokenizer.json").is_file() else under.tokenizer
    files = _beside(lambda: fingerprint([path / peft.CONFIG, path / peft.WEIGHTS]))
    record = {**(under.record or {}), "adapter": {"peft": said, "base": {}}}
    form = "chat" if tokenizer.has_template else under.form

    def both() -> str:  # it says nothing without its base
        return manifest.digest_of([files(), under.sha256, tokenizer.fingerprint])

    return Artifact(path, both, tokenizer, path, {}, form, record, lambda: tensors, under)


def _folder(path: Path, family: str) -> Artifact:
    """A folder in Hugging Face's form."""
    reader = Reader(read_json(path / "config.json"), str(path / "config.json"))
    if reader.get("quantization_config", None):
        raise CheckpointError(f"{path} is quantised; take the checkpoint that it was made from")
    files = Tensors(path)
    hashed = _beside(lambda: fingerprint([path / "config.json", *files.paths]))
    tokenizer = Tokenizer.load(path)

    def digest() -> str:  # the same weights with another tokenizer answer otherwise
        return manifest.digest_of([hashed(), tokenizer.fingerprint])

    return _foreign(path, reader, files, digest, tokenizer, family)


def _gguf(path: Path) -> Artifact:
    """A GGUF file."""
    found = read_gguf(path)
    digest = _beside(lambda: fingerprint([path]))
    tokenizer = Tokenizer(*tokenizer_of(found.tokenizer))
    return _foreign(path, Reader(found.config, str(path)), found.tensors, digest, tokenizer, "")


def _by_name(name: str) -> Artifact:
    """A model that is fetched: from its own file the first time, then from a cache of it as safetensors (0.5 s, not 3).

    Its hash is that of the file, whichever is read. A copy of which a byte has changed is made anew.
    """
    if CATALOGUE[name].folder:
        raise CheckpointError(
            f"init_from={name} is an encoder, which writes no text: phase=serve inference=encoder "
            f"inference.path={name} serves it, and phase=search has search.encoder.path"
        )
    path, sha256 = fetch(name), CATALOGUE[name].sha256
    digest = hashlib.sha256(bytes.fromhex(sha256)).hexdigest()  # as `fingerprint` has it of one file
    folder = cache_folder() / "models" / sha256[:16]
    mark = folder / "SHA256"
    if mark.is_file():
        try:
            found = _folder(folder, "")
            sound = mark.read_bytes() == found.sha256.encode()
        except (CheckpointError, DataError, OSError):
            sound = False
        if sound:
            return dataclasses.replace(found, digest=lambda: digest, origin=name)
    shutil.rmtree(folder, ignore_errors=True)
    found = dataclasses.replace(_gguf(path), origin=name)
    model, record = found.model(None)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    lock = None
    try:
        if lock := lock_folder(make_folder(folder.parent)):  # else another process writes it
            sweep(folder.parent)  # what a killed one left
            write_folder(model, record["name"], found.tokenizer, make_folder(temporary))
            (temporary / mark.name).write_text(_folder(temporary, "").sha256)
            temporary.rename(folder)
    except (OSError, TriviumError):  # no room, a cache that may not be written: it works without
        shutil.rmtree(temporary, ignore_errors=True)
    finally:
        if lock:
            lock.close()
    return found


def write_folder(model: CausalLM, family: str, tokenizer: Tokenizer, folder: Path) -> list[str]:
    """safetensors, config.json, generation_config.json with every id that ends an answer, and the tokenizer.

    Returns the names of the files.
    """
    tensors = hf_tensors(model)
    ends = sorted(tokenizer.stop_ids)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config: dict[str, Any] = {"model_type": family, **model.hf_config(), **ids, "torch_dtype": dtype}
    write_tensors(folder / MODEL, tensors)
    written = tokenizer.save(folder)
    for name, content in (("generation_config.json", ids), ("config.json", config)):
        replace_file(folder / name, json.dumps(content, indent=1).encode())
        written.append(name)
    return [MODEL, *written]


def _beside(work: Callable[[], str]) -> Callable[[], str]:
    """Start hashing beside what follows (it holds no lock of Python's), and get what waits for it."""
    found: Future[str] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name="hash", daemon=True).start()
    return found.result


def _foreign(
    path: Path,
    reader: Reader,
    files: Mapping[str, torch.Tensor],
    digest: Callable[[], str],
    tokenizer: Tokenizer,
    chosen_family: str,
) -> Artifact:
    """Weights under Hugging Face's names: their family is the one that is registered under its model_type, or "hf"."""
    family, vocab_size = reader.get("model_type"), reader.count("vocab_size")
    if chosen_family == "hf":
        family = chosen_family
    if not isinstance(family, str) or family not in MODELS:
        native = ", ".join(name for name in MODELS if name != "hf")
        raise CheckpointError(
            f"{path}: model_type={family!r} is not one of {native}; model=hf runs it through transformers"
        )
    kind: type[CausalLM] = MODELS.load(family)
    try:
        chosen = component("model", {"name": family, **kind.settings_from_hf(reader)})
    except (ConfigError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{reader.origin}: {error}") from error
    assert chosen is not None

    def tensors() -> Mapping[str, torch.Tensor]:
        if family == "hf":  # its names in memory are not those of every file
            held = load("trivium.models.hf:read_folder")(path)
            return Renamed(held, _without_memory(chosen, vocab_size, reader.origin).hf_names(), str(path), kind)
        if getattr(chosen.config, "layers", 0) > len(files):  # before anything as large as it claims to be is built
            raise CheckpointError(f"{reader.origin} claims {chosen.config.layers} layers of {len(files)} tensors")
        return Renamed(files, _without_memory(chosen, vocab_size, reader.origin).hf_names(), str(path), kind)

    form = "chat" if tokenizer.has_template else "text"
    return Artifact(path, digest, tokenizer, path, {}, form, model_record(chosen, vocab_size), tensors)


def _runs_nearby(path: Path) -> str:
    parent = path.parent
    names = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    return f"; {parent} has {', '.join(names[:8])}" if names else ""
