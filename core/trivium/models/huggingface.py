"""Hugging Face folders: config.json to settings and back, and the tensors of one file or of several.

A family's own `settings_from_hf` and `hf_config` say which key is which; here is what all of them share. Nothing of a
folder is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trivium.errors import CheckpointError
from trivium.models.config import RopeScaling
from trivium.models.names import difference, few

HEAD = "lm_head.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NEEDED = object()


class Reader:
    """A config.json: what is asked for and missing is an error, and so is what would change the computation.

    origin: the file, for sentences.
    """

    def __init__(self, raw: Mapping[str, Any], origin: str) -> None:
        self.raw, self.origin = raw, origin

    def get(self, key: str, default: Any = _NEEDED) -> Any:
        """The value of `key`; the default where it is absent or null. Numbers must be sane. Raises CheckpointError."""
        value = self.raw.get(key)
        if value is None:
            if default is _NEEDED:
                raise CheckpointError(f"{self.origin} has no {key}")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        if not -(2**53) < value < 2**53:  # not NaN either
            raise CheckpointError(f"{self.origin}: {key}={value} is no size of a model")
        return value

    def count(self, key: str) -> int:
        """The value of `key`, a whole number above 0."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.origin}: {key}={value!r} is not a whole number above 0")
        return value

    def switch(self, key: str, default: float) -> Any:
        """The value of `key`, 0 where it is null: a number that null switches off."""
        return 0 if self.raw.get(key, default) is None else self.get(key, default)

    def require(self, **fixed: Any) -> None:
        """Refuse keys that are there with another value than the only one that is computed here."""
        for key, only in fixed.items():
            if (value := self.raw.get(key)) not in (None, only):
                raise CheckpointError(f"{self.origin}: {key}={value!r} is not supported, only {only!r} is")


def rope_settings(config: Reader, context: int) -> dict[str, Any]:
    """rope_theta and rope_scaling, from the form of transformers 5 (rope_parameters) or the one before."""
    raw = config.get("rope_parameters", None) or config.get("rope_scaling", None) or {}
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{config.origin}: rope_scaling={raw!r} is no mapping")
    inner = Reader(raw, f"{config.origin}: rope_scaling")
    theta = inner.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind == "default":
        return {"rope_theta": float(theta)}
    known = {"linear": (), "dynamic": (), "llama3": ("low_freq_factor", "high_freq_factor"),
             "yarn": ("beta_fast", "beta_slow", "attention_factor")}  # fmt: skip
    if kind not in known:
        raise CheckpointError(f"{config.origin}: rope_type={kind!r} is not one of default, {', '.join(known)}")
    inner.require(partial_rotary_factor=1.0, truncate=True, mscale=1.0, mscale_all_dim=1.0)
    original = 0 if kind == "dynamic" else inner.get("original_max_position_embeddings", context)
    scaling: dict[str, Any] = {"kind": kind, "factor": float(inner.get("factor"))}
    scaling["original_context"] = 0 if original == context else original
    defaults = RopeScaling()
    scaling |= {name: float(inner.get(name, getattr(defaults, name))) for name in known[kind]}
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def rope_scaling_of(scaling: RopeScaling, context: int) -> dict[str, Any] | None:
    """The inverse, in the form that every version and every other loader reads."""
    if scaling.kind == "none":
        return None
    found: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        found["original_max_position_embeddings"] = scaling.original_context or context
    if scaling.kind == "llama3":
        found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor:
            found["attention_factor"] = scaling.attention_factor
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


class Tensors(Mapping[str, Tensor]):
    """The tensors of a folder by name, read when asked for, whatever files they lie in. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        named: dict[str, str] = {}
        if (folder / INDEX).is_file():
            named = read_json(folder / INDEX).get("weight_map", {})
            if not isinstance(named, dict) or not all(isinstance(f, str) for f in named.values()):
                raise CheckpointError(f"{folder / INDEX} has no weight_map of names")
        elif not (folder / SINGLE).is_file():
            others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack"))
            hint = f"; {others[0]} can run code when it is read and is not" if others else ""
            if others and others[0].endswith((".bin", ".pt", ".pth")):
                hint += f": `python launch.py convert {folder} NEW_FOLDER` makes safetensors of it, without running any"
            raise CheckpointError(f"{folder} has no {SINGLE}{hint}")
        files = sorted(set(named.values())) if named else [SINGLE]
        self.paths = [folder / name for name in files]
        self._open = ExitStack()
        self._where: dict[str, Any] = {}
        for name in files:
            if Path(name).name != name:
                raise CheckpointError(f"{folder / INDEX} names {name!r}, which is no file of its folder")
            try:
                file = self._open.enter_context(safe_open(folder / name, "pt"))
                keys = list(file.keys())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{folder / name} cannot be read as safetensors ({error})") from error
            for key in keys:
                if key in self._where:
                    raise CheckpointError(f"{folder} has {key} twice")
                self._where[key] = file
        if named and named.keys() != self._where.keys():
            raise CheckpointError(
                f"{folder / INDEX} and the files disagree about {few(named.keys() ^ self._where.keys())}"
            )

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._where[name].get_tensor(name)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading its values."""
        return tuple(self._where[name].get_slice(name).get_shape())


class Renamed(Mapping[str, Tensor]):
    """Hugging Face's tensors under our names; what is no weight of ours is left out, anything else is refused.

    names: ours -> theirs. family: a CausalLM class, whose hf_prefix, hf_buffers and hf_transposed hold. A file may
    hold a head that shares the embedding's weight besides, and must then hold the same.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str], origin: str, family: Any) -> None:
        prefix, buffers, transposed = family.hf_prefix, family.hf_buffers, family.hf_transposed
        self._tensors, self._transposed, self._origin = tensors, transposed, origin
        bare = prefix and not any(name.startswith(prefix) for name in tensors)
        self._names = {ours: theirs.removeprefix(prefix) if bare else theirs for ours, theirs in names.items()}
        wanted = set(self._names.values())
        held = {n for n in tensors if n in wanted or not n.endswith(buffers or ("\0",))}
        if HEAD in held - wanted and wanted <= held:
            one, other = tensors[HEAD], tensors[self._names["embed.weight"]]
            if one.shape != other.shape or not one.equal(other):
                raise CheckpointError(f"{origin}: {HEAD} differs from the embedding, whose weight it should share")
            held.remove(HEAD)
        if told := difference(wanted, held):
            raise CheckpointError(f"{origin} is of another architecture than its config.json says: it {told}")

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[self._names[name]]
        return tensor.t() if name.endswith(self._transposed or ("\0",)) and tensor.dim() == 2 else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 over files, in this order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
