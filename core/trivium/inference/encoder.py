"""An encoder: vectors of texts that stand near one another where the texts mean alike, for search.

The folder is one of sentence-transformers (Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084), and that
library computes it. What makes a vector of a text's states is read from the folder's own files and never guessed:
sentence-transformers itself takes the mean where they are missing. Nothing of a folder is executed, and only
safetensors are read.

In a text that people bring, "[SEP]" is five characters and no special token, as everywhere here; sentence-transformers
reads it as one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.data.hf_folder import read_core
from trivium.data.tokenizer import Tokenizer
from trivium.errors import BackendError, CheckpointError, ConfigError, DataError
from trivium.inference.config import EncoderConfig
from trivium.inference.hf import quiet_transformers
from trivium.inference.protocol import Backend, Capabilities, Stats
from trivium.models.huggingface import Tensors, fingerprint, read_json
from trivium.schema import EncoderSettings
from trivium.types import Request, TokenEvent

MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
"""Parts of an encoder that are read, as the last words of their types in modules.json."""
READ = ("config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""Files that change what it computes, beside the tokenizer, the weights and each part's config.json."""
INSTALL = 'an encoder needs sentence-transformers: pip install "trivium-llm[search]"'
ONLY = "it makes vectors of texts (/v1/embeddings, /v1/rerank, phase=search)"


class EncoderTokenizer(Tokenizer):
    """Texts as an encoder reads them: with its special tokens around them, and no longer than it takes.

    most: tokens, those around it included. cut: keep the beginning of a longer text, and count it in `num_cut`.
    """

    def __init__(self, path: Path, most: int, cut: bool) -> None:
        core = read_core(path)
        core.no_truncation()
        core.no_padding()
        whole, bare = (core.encode("a", add_special_tokens=special).ids for special in (True, False))
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
        if at is None or not bare:
            raise DataError(f"{path} does not put its special tokens around a text, so no text can be cut to a length")
        self.before, self.after = whole[:at], whole[at + len(bare) :]
        special = sorted(i for i, token in core.get_added_tokens_decoder().items() if token.special)
        ends = [*self.after[-1:], *special]
        if not ends:
            raise DataError(f"{path} has no special token")
        super().__init__(core, {"eos_token": core.id_to_token(ends[0])})
        self.most, self.cut, self.num_cut = most, cut, 0

    @property
    def room(self) -> int:
        """Tokens that a text may have."""
        return self.most - len(self.before) - len(self.after)

    @property
    def longest(self) -> int:
        """Without bound: spaces make no token, and a long word that is not known makes one."""
        return sys.maxsize

    def input_ids(self, text: str) -> list[int]:
        """Ids of a text with its special tokens. Raises DataError for one that is too long, unless it may be cut."""
        ids = self.encode(text)
        if len(ids) > self.room:
            if not self.cut:
                raise DataError(
                    f"a text has {len(ids) + self.most - self.room:,} tokens and the encoder reads {self.most:,}; "
                    "shorten it, or have its beginning read with too_long=cut"
                )
            self.num_cut += 1
            ids = ids[: self.room]
        return [*self.before, *ids, *self.after]


class EncoderBackend(Backend):
    """`config.path` is what is read. Padded neighbours change a vector by rounding alone."""

    def __init__(
        self, config: EncoderSettings, model: None = None, tokenizer: None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.path = config, Path(config.path)
        modules = _modules(self.path, config)
        said = read_json(self.path / READ[3]) if (self.path / READ[3]).is_file() else {}
        self.model = _loaded(self.path, config, modules).to(device).eval()
        self.tokenizer = EncoderTokenizer(self.path / "tokenizer.json", self._context(), config.too_long == "cut")
        if self.tokenizer.room < 1:
            raise ConfigError(f"max_length={config.max_length} leaves no token of a text beside the special ones")
        self._prompts(said)
        self.similarity = said.get("similarity_fn_name") or "cosine"
        if self.similarity not in ("cosine", "dot"):
            raise CheckpointError(
                f"{self.path / READ[3]}: similarity_fn_name={self.similarity!r} is not supported, only cosine and dot "
                "are"
            )
        self.unit = modules[-1] == "Normalize" if modules else config.normalize == "unit"
        self.sha256 = _digest(self.path, config)
        self._stats = Stats()
        embedding = self.model[0].auto_model.get_input_embeddings()
        self._vocab_size = embedding.num_embeddings
        if self.tokenizer.vocab_size > self._vocab_size:
            raise CheckpointError(
                f"{self.path}: the tokenizer has {self.tokenizer.vocab_size:,} ids and the model {self._vocab_size:,}"
            )
        pad = self.model[0].auto_model.config.pad_token_id
        self._pad = pad if isinstance(pad, int) else 0
        self.width = int(self.embed([self.tokenizer.input_ids("")]).shape[1])
        self._stats = Stats()

    def _context(self) -> int:
        """Tokens of a text: max_length, else what the folder says, which a model's table of positions may bound."""
        model = self.model[0].auto_model
        said, places = self.model.max_seq_length, getattr(model.config, "max_position_embeddings", 0)
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        if (pad := getattr(table, "padding_idx", None)) is not None:  # RoBERTa counts positions from behind it
            places -= pad + 1
        own = min((n for n in (said, places) if n and n > 0), default=0)
        if not own:
            raise ConfigError(f"{self.path} does not say how long a text may be; set the encoder's max_length")
        if self.config.max_length > own:
            raise ConfigError(
                f"max_length={self.config.max_length} is more than the {own} tokens that {self.path} reads"
            )
        return self.config.max_length or own

    def _prompts(self, said: Mapping[str, Any]) -> None:
        prompts = said.get("prompts") or {}
        if not isinstance(prompts, Mapping) or not all(isinstance(p, str) for p in prompts.values()):
            raise CheckpointError(f"{self.path / READ[3]}: prompts is no mapping of names to texts")
        usual = prompts.get(said.get("default_prompt_name") or "", "")
        tokenizer, config = self.tokenizer, self.config
        tokenizer.text_prompt = usual
        tokenizer.query_prompt = config.query_prompt or prompts.get("query") or usual
        tokenizer.passage_prompt = config.passage_prompt or prompts.get("document") or prompts.get("passage") or usual
        if any(getattr(module, "include_prompt", True) is False for module in self.model):
            raise CheckpointError(
                f"{self.path} leaves prompts out of its pooling (include_prompt=false), which is not read"
            )

    def capabilities(self) -> Capabilities:
        return Capabilities(
            context=self.tokenizer.most,
            vocab_size=self._vocab_size,
            sampling=frozenset(),
            generates=False,
            embeds=True,
            similarity=self.similarity,
            unit=self.unit,
        )

    def stats(self) -> Stats:
        return replace(self._stats, cut_texts=self.tokenizer.num_cut)

    @property
    def busy(self) -> bool:
        return False

    def add(self, request: Request) -> None:
        self.check(request)

    def step(self) -> list[TokenEvent]:
        return []

    def drop(self, request_id: str) -> None:
        pass

    def score(self, token_ids: Sequence[int]) -> list[float]:
        raise BackendError(f"inference=encoder gives tokens no probabilities: {ONLY}")

    def update_weights(self, version: int) -> None:
        raise BackendError("inference=encoder reads its weights from a folder, which does not change")

    @torch.no_grad()
    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        began, most = time.perf_counter(), self.tokenizer.most
        for ids in sequences:
            if not ids or len(ids) > most:
                raise BackendError(f"{len(ids)} tokens do not fit the encoder's {most}")
            if not 0 <= min(ids) <= max(ids) < self._vocab_size:
                raise BackendError(f"token ids must be below {self._vocab_size}")
        # those of about the same length together: padding costs as much as text
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        found: list[Tensor] = [torch.empty(0)] * len(sequences)
        for start in range(0, len(order), self.config.batch):
            mine = order[start : start + self.config.batch]
            for i, vector in zip(mine, self._vectors([sequences[i] for i in mine]), strict=True):
                found[i] = vector
        self._stats = replace(
            self._stats,
            requests=self._stats.requests + len(sequences),
            prompt_tokens=self._stats.prompt_tokens + sum(map(len, sequences)),
            seconds=self._stats.seconds + time.perf_counter() - began,
        )
        return torch.stack(found) if found else torch.empty(0, self.width)

    def _vectors(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, sequences))
        rows = [[*ids, *[self._pad] * (longest - len(ids))] for ids in sequences]
        mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences]
        device = next(self.model.parameters()).device
        features = {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(mask, device=device)}
        vectors = self.model(features)["sentence_embedding"].float().cpu()
        if not vectors.isfinite().all():
            raise BackendError(f"{self.path} makes vectors that are not finite")
        return vectors


def _modules(folder: Path, config: EncoderSettings) -> list[str]:
    """The encoder's parts, by the last words of their types; none where only the settings say what comes after the
    transformer. Raises CheckpointError and ConfigError for a folder that is no encoder, or none that is read here."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no encoder: it has no config.json")
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json")
    if "auto_map" in read_json(folder / "config.json"):
        raise CheckpointError(f"{folder} brings code of its own (auto_map in config.json), which is never run")
    if (folder / READ[2]).is_file() and read_json(folder / READ[2]).get("do_lower_case"):
        raise CheckpointError(f"{folder / READ[2]}: do_lower_case=true is not supported, only false is")
    Tensors(folder)  # refuses pickles and files that are no safetensors
    path = folder / "modules.json"
    if not path.is_file():
        if not config.pooling or not config.normalize:
            unset = "pooling" if not config.pooling else "normalize"
            raise ConfigError(
                f"{folder} has no modules.json that says how a vector is made of a text's states; set the encoder's "
                f"{unset} (pooling=mean, cls, max or lasttoken; normalize=unit or none)"
            )
        return []
    if config.pooling or config.normalize:
        raise ConfigError(
            f"{path} says how a vector is made; leave pooling={config.pooling or '(empty)'} and "
            f"normalize={config.normalize or '(empty)'} away"
        )
    try:
        listed = json.loads(path.read_bytes())
        kinds = [(str(entry["type"]), str(entry["path"])) for entry in listed]
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} is no list of modules ({error})") from error
    names = [kind.rpartition(".")[2] for kind, _ in kinds]
    for (kind, place), name in zip(kinds, names, strict=True):
        if not kind.startswith("sentence_transformers.") or name not in MODULES:
            raise CheckpointError(f"{path} has a module {kind}, which is not read; known are {', '.join(MODULES)}")
        if name in ("Pooling", "Dense") and not (folder / place / "config.json").is_file():
            raise CheckpointError(f"{folder / place} has no config.json, so what its {name} does is not known")
        if name == "Dense":
            Tensors(folder / place)
    if names[:2] != ["Transformer", "Pooling"] or kinds[0][1]:
        raise CheckpointError(
            f"{path} must begin with a Transformer in the folder itself and a Pooling, not {names[:2]}"
        )
    return names


def _loaded(folder: Path, config: EncoderSettings, modules: Sequence[str]) -> Any:
    """sentence-transformers' model. Raises CheckpointError for what it cannot read."""
    if find_spec("sentence_transformers") is None:
        raise ConfigError(INSTALL)
    bitsandbytes = logging.getLogger("bitsandbytes")  # imported on the way, and warns of what is not needed
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    quiet_transformers("an encoder")
    import sentence_transformers
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    bitsandbytes.setLevel(level)
    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    weights = {"use_safetensors": True, "dtype": torch.float32}
    try:
        if modules:
            return sentence_transformers.SentenceTransformer(str(folder), device="cpu", model_kwargs=weights, **here)
        inner = Transformer(str(folder), model_kwargs={**here, **weights}, processor_kwargs=here, config_kwargs=here)
        parts = [inner, Pooling(inner.get_embedding_dimension(), pooling_mode=config.pooling)]  # type: ignore[arg-type]
        parts += [Normalize()] if config.normalize == "unit" else []
        return sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    except Exception as error:  # whatever two libraries raise for somebody's files
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(f"{folder} cannot be read as an encoder ({reason[0][:200]})") from error


def _digest(folder: Path, config: EncoderSettings) -> str:
    """SHA-256 of all that decides a vector: files and settings, without how many texts are computed together."""
    parts = sorted(p for p in folder.glob("*/config.json"))
    dense = sorted(p for p in folder.glob("*/model.safetensors"))
    files = [folder / name for name in READ if (folder / name).is_file()] + parts
    files += [folder / "tokenizer.json", *Tensors(folder).paths, *dense]
    settings = [config.pooling, config.normalize, config.max_length, config.query_prompt, config.passage_prompt]
    told = [fingerprint(files), [p.relative_to(folder).as_posix() for p in files], *settings, config.too_long]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


__all__ = ["EncoderBackend", "EncoderConfig", "EncoderTokenizer"]
