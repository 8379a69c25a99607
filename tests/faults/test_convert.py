"""Pickled checkpoints become safetensors and never run; what is no checkpoint is refused in one sentence."""

import json
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers import folder_of

from trivium.build import load_artifact
from trivium.errors import TriviumError
from trivium.models.weights import weights_of
from trivium.phases.convert import convert, read_pickle
from trivium.plugin import discover

pytest.importorskip("transformers")
discover()


class Malicious:
    """What runs a command when an unrestricted reader meets it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def pickled(trained, tmp_path):
    """A folder as older programs wrote it: pytorch_model.bin in place of model.safetensors."""
    folder = tmp_path / "old"
    folder_of("llama", load_artifact(str(trained)).tokenizer, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    return folder, tensors


def test_a_folder_is_the_same_in_safetensors(pickled, main, tmp_path):
    folder, tensors = pickled
    refused = main("phase=export", f"init_from={folder}", f"runs={tmp_path}", "name=out")
    assert refused.code == 1 and f"`python launch.py convert {folder} NEW_FOLDER`" in refused.err
    done = main("convert", folder, tmp_path / "new")
    assert done.code == 0 and f"{len(tensors)} tensors" in done.out, done.err
    found = load_file(tmp_path / "new/model.safetensors")
    assert found.keys() == tensors.keys()  # the head, which shares the embedding's numbers, is left out
    assert all(found[name].equal(tensors[name]) for name in tensors)
    assert not list((tmp_path / "new").glob("*.bin"))
    model, _ = load_artifact(str(tmp_path / "new")).model(None)
    assert weights_of(model)["embed.weight"].equal(tensors["model.embed_tokens.weight"])


def test_shards_stay_shards(pickled, main, tmp_path):
    folder, tensors = pickled
    (folder / "pytorch_model.bin").unlink()
    halves = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    where = {name: halves[i % 2] for i, name in enumerate(tensors)}
    for half in halves:
        torch.save({n: t for n, t in tensors.items() if where[n] == half}, folder / half)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    done = main("convert", folder, tmp_path / "new")
    assert done.code == 0, done.err
    assert sorted(p.name for p in (tmp_path / "new").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    model, _ = load_artifact(str(tmp_path / "new")).model(None)
    assert weights_of(model)["embed.weight"].equal(tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
def test_one_file_and_what_programs_wrap_around_it(old, tmp_path):
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    weights["a_too"] = weights["a"]
    weights["row"] = weights["a"][1]  # shares numbers, and is another tensor
    saved = {"epoch": 3, "state_dict": weights}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    assert convert([str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors")]) == 0
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == {"a", "b", "row"}
    assert all(found[name].equal(weights[name]) and found[name].dtype == weights[name].dtype for name in found)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_is_never_run(how, tmp_path):
    mark, path = tmp_path / "it ran".replace(" ", "_"), tmp_path / "bad.bin"
    content = {"a": torch.ones(1), "b": Malicious(mark)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"b": Malicious(mark)}))
    with pytest.raises(TriviumError, match="bad.bin (holds more than tensors|cannot be read)"):
        convert([str(path), str(tmp_path / "out.safetensors")])
    assert not mark.exists() and not (tmp_path / "out.safetensors").exists()


def test_damaged_files_are_one_kind_of_error(tmp_path):
    """500 damaged copies: an error of ours, or tensors by name."""
    torch.save({"a": torch.arange(64.0), "b": torch.ones(3, 3)}, tmp_path / "a.bin")
    sound, draw, refused = (tmp_path / "a.bin").read_bytes(), random.Random(0), 0
    for _ in range(500):
        data = bytearray(sound)
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "a.bin").write_bytes(bytes(data[: draw.choice([len(data), draw.randrange(len(data))])]))
        try:
            assert all(isinstance(t, torch.Tensor) for t in read_pickle(tmp_path / "a.bin").values())
        except TriviumError:
            refused += 1
    assert refused > 250


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(1)], "holds no tensors by name, but a list"),
        ({"a": 3}, "'a' is no tensor but a int"),
        ({"a": torch.tensor([float("nan")])}, "a in .* is no longer finite"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content, sentence, tmp_path):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(TriviumError, match=sentence):
        convert([str(tmp_path / "a.bin"), str(tmp_path / "b.safetensors")])
    assert not (tmp_path / "b.safetensors").exists()


def test_wrong_usage(tmp_path):
    (tmp_path / "there").mkdir()
    for args, sentence in (
        ([], "write `convert FILE_OR_FOLDER OUT`"),
        ([str(tmp_path / "no"), str(tmp_path / "out")], "does not exist"),
        ([str(tmp_path / "no"), str(tmp_path / "there")], "exists; name a new place"),
        ([str(tmp_path / "there"), str(tmp_path / "out")], "has neither pytorch_model.bin nor"),
    ):
        with pytest.raises(TriviumError, match=sentence):
            convert(args)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            {"model": {"w": torch.ones(2)}, "head.weight": torch.ones(2)},
            "tensors beside 'model', which would be lost",
        ),
        ({"state_dict": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}}, "which would be lost: ema"),
        ({None: torch.ones(2), "a": torch.ones(2)}, "'None' is no tensor but a Tensor"),
        ({"__metadata__": torch.ones(3)}, "'__metadata__' is no tensor"),
        ({"a": torch.ones(3).to_sparse()}, "'a' is no plain tensor"),
        ({"a": torch.ones(3, device="meta")}, "'a' is no plain tensor"),
    ],
)
def test_what_would_be_lost_or_unreadable_is_refused(content, told, main, tmp_path):
    torch.save(content, tmp_path / "a.bin")
    done = main("convert", tmp_path / "a.bin", tmp_path / "out.safetensors")
    assert done.code == 1 and told in done.err and "fault of the program" not in done.err, done.err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_folder_of_both_forms_is_refused(main, tmp_path):
    """What lies there as safetensors would take the place of what is converted."""
    (tmp_path / "in").mkdir()
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "in/pytorch_model.bin")
    save_file({"a": torch.full((2,), 7.0)}, tmp_path / "in/model.safetensors")
    done = main("convert", tmp_path / "in", tmp_path / "out")
    assert done.code == 1 and "has model.safetensors already" in done.err and not (tmp_path / "out").exists()
