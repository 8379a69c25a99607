"""The verb `convert`: weights out of pickles into safetensors, which nothing else here reads.

A pickle is a program. torch's own restricted reader (`weights_only=True`) knows tensors and plain containers and
refuses everything else; it is asked for here, where somebody has said so, and never behind init_from=.
"""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.disk import make_folder, replace_file
from trivium.errors import CheckpointError, ConfigError, TrainingError
from trivium.models.huggingface import INDEX, SINGLE, read_json
from trivium.models.names import few
from trivium.training.tensorfile import write_tensors

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
INSIDE = ("state_dict", "model_state_dict", "model", "module")
"""Where training programs put the weights when they save more than these."""


def convert(args: Sequence[str]) -> int:
    """`convert FILE_OR_FOLDER OUT`: a pickled checkpoint as safetensors; a Hugging Face folder with all else in it."""
    if len(args) != 2:
        raise ConfigError(
            "write `convert FILE_OR_FOLDER OUT`, for instance `convert pytorch_model.bin model.safetensors`"
        )
    source, out = Path(args[0]), Path(args[1])
    if out.exists():
        raise ConfigError(f"{out} exists; name a new place")
    if source.is_dir():
        count = _folder(source, out)
    elif source.is_file():
        if out.suffix != ".safetensors":
            raise ConfigError(f"{out} would be one file of weights; let its name end in .safetensors")
        make_folder(out.parent)
        count = _file(source, out)
    else:
        raise ConfigError(f"{source} does not exist")
    print(f"{out}: {count:,} tensors; nothing of {source} was executed")
    return 0


def _folder(source: Path, out: Path) -> int:
    if (source / PICKLED_INDEX).is_file():
        named = read_json(source / PICKLED_INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(f, str) and Path(f).name == f for f in named.values()):
            raise CheckpointError(f"{source / PICKLED_INDEX} has no weight_map of files of its folder")
        files = sorted(set(named.values()))
    elif (source / PICKLED).is_file():
        files, named = [PICKLED], {}
    else:
        raise CheckpointError(f"{source} has neither {PICKLED} nor {PICKLED_INDEX}; name a file in it instead")
    if there := sorted(p.name for p in source.iterdir() if p.suffix == ".safetensors" or p.name == INDEX):
        raise CheckpointError(f"{source} has {there[0]} already; take it out of the folder, or use that one")
    make_folder(out)
    try:
        places: dict[str, str] = {}
        for file in files:
            name = SINGLE if len(files) == 1 else f"{Path(file).stem.replace('pytorch_model', 'model')}.safetensors"
            tensors = read_pickle(source / file)
            if twice := tensors.keys() & places.keys():
                raise CheckpointError(f"{source} has {sorted(twice)[0]} twice")
            _write(out / name, tensors)
            places |= dict.fromkeys(tensors, name)
        if missing := named.keys() - places.keys() - _shared(source, files, named):
            raise CheckpointError(f"{source / PICKLED_INDEX} names {sorted(missing)[0]}, which is in none of its files")
        if len(files) > 1:
            index = {"metadata": {}, "weight_map": places}
            replace_file(out / INDEX, json.dumps(index, indent=1).encode())
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in PICKLES and path.name != PICKLED_INDEX:
                shutil.copyfile(path, out / path.name)
    except BaseException:
        shutil.rmtree(out)  # it was new
        raise
    return len(places)


def _shared(source: Path, files: Sequence[str], named: dict[str, Any]) -> set[str]:
    """Names that were left out because another name of theirs was written."""
    return {name for file in files for name in _load(source / file)} & named.keys()


def _file(source: Path, out: Path) -> int:
    tensors = read_pickle(source)
    _write(out, tensors)
    return len(tensors)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        write_tensors(path, tensors)
    except (TrainingError, CheckpointError, RuntimeError, NotImplementedError) as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"{path} is not written: {str(error).splitlines()[0][:200]}") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint; of those that share all their numbers, as tied weights do, the first name.

    Raises CheckpointError for everything that is not tensors by name, and for what would run code.
    """
    found: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in _load(path).items():
        key = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        found[name] = tensor
    return found


def _load(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        first = next(
            (line.strip() for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), ""
        )
        raise CheckpointError(
            f"{path} holds more than tensors and would have to run code to be read, which is never done: "
            f"{(first or str(error).splitlines()[0])[:200]}"
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} cannot be read as torch.save writes it ({str(error)[:200]})") from error
    while isinstance(content, dict) and (key := next((k for k in INSIDE if isinstance(content.get(k), dict)), None)):
        lost = [str(k) for k, v in content.items() if k != key and (isinstance(v, Tensor) or _holds_tensors(v))]
        if lost:
            raise CheckpointError(f"{path} has tensors beside {key!r}, which would be lost: {few(lost)}")
        content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no tensors by name, but a {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or key == "__metadata__" or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {str(key)[:80]!r} is no tensor but a {type(value).__name__}")
        if value.layout != torch.strided or value.is_nested or value.device.type == "meta":
            raise CheckpointError(f"{path}: {key[:80]!r} is no plain tensor ({value.layout}, {value.device.type})")
    return {key: value.resolve_neg() for key, value in content.items()}


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(inner, Tensor) for inner in value.values())
