"""Every backend keeps the contract, and says what the native one says."""

import dataclasses
import gc
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from trivium.build import _readable, build_backend, load_artifact, write_folder
from trivium.compose import Component
from trivium.data.config import BPEConfig
from trivium.data.tokenizer import train_bpe
from trivium.disk import make_folder
from trivium.errors import BackendError, ConfigError
from trivium.inference.config import HFBackendConfig, LlamaCppConfig, NativeConfig, VLLMConfig
from trivium.inference.native.engine import NativeBackend
from trivium.inference.protocol import collect
from trivium.inference.sampling import filtered_probabilities
from trivium.inference.vllm import VLLMBackend
from trivium.models.config import HFConfig, LlamaConfig
from trivium.models.gguf_write import write_gguf
from trivium.models.hf import HuggingFace
from trivium.models.llama import Llama
from trivium.models.weights import hf_tensors
from trivium.plugin import discover
from trivium.testing import BackendContract
from trivium.types import Request, SamplingParams

discover()
CONTEXT = 64
SIZES = {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 64, "context": CONTEXT, "tied": False}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    text = "the cat sat on the mat, é and 漢字 and 😀\n" * 20
    return train_bpe(BPEConfig(vocab_size=320, rules="gguf"), [text])


@pytest.fixture(scope="module")
def model(tokenizer):
    model = Llama(LlamaConfig(**SIZES, init_std=0.2), tokenizer.vocab_size)
    model.init_weights(3)
    return model.eval()


@pytest.fixture(scope="module")
def gguf(model, tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(
        file, {"model_type": "llama", **model.hf_config()}, hf_tensors(model), tokenizer.gguf_keys(model.vocab_size)
    )
    return file


class Made:
    """Backends over the module's model. A backend is made once: that is what is slow of some."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _made(cls, request, model, tokenizer):
        cls.backend, cls.model = cls.backend_of(request, model, tokenizer), model

    def make(self):
        return self.backend, self.model.vocab_size


class TestNative(Made, BackendContract):
    @staticmethod
    def backend_of(request, model, tokenizer):
        return NativeBackend(NativeConfig(memory="slab"), model, tokenizer)


class TestNativePaged(Made, BackendContract):
    @staticmethod
    def backend_of(request, model, tokenizer):
        return NativeBackend(NativeConfig(memory="paged", prefix_cache=False), model, tokenizer)


class TestHF(Made, BackendContract):
    @staticmethod
    def backend_of(request, model, tokenizer):
        pytest.importorskip("transformers", reason="NOT TESTED: inference=hf needs transformers")
        return build_backend(Component("hf", HFBackendConfig()), model, tokenizer, "cpu")


class TestHFItself(Made, BackendContract):
    """A model that runs through transformers is not copied."""

    @staticmethod
    def backend_of(request, model, tokenizer):
        pytest.importorskip("transformers", reason="NOT TESTED: inference=hf needs transformers")
        settings = json.dumps({"model_type": "llama", **model.hf_config()})
        theirs = HuggingFace(HFConfig(settings=settings), model.vocab_size)
        theirs.init_weights(1)
        backend = build_backend(Component("hf", HFBackendConfig()), theirs.eval(), tokenizer, "cpu")
        assert backend._theirs is theirs.inner
        return backend


class TestLlamaCpp(Made, BackendContract):
    @staticmethod
    def backend_of(request, model, tokenizer):
        pytest.importorskip("xllamacpp", reason="NOT TESTED: inference=llamacpp needs xllamacpp")
        file = request.getfixturevalue("gguf")
        return build_backend(Component("llamacpp", LlamaCppConfig(path=str(file), threads=1)), model, tokenizer, "cpu")


@pytest.mark.gpu
class TestVLLM(Made, BackendContract):
    @staticmethod
    def backend_of(request, model, tokenizer):
        pytest.importorskip(
            "vllm", reason="NEVER RUN HERE: inference=vllm needs vllm and a CUDA GPU; run it there first"
        )
        return build_backend(Component("vllm", VLLMConfig(dtype="float32", gpu_memory=0.3)), model, tokenizer)


PROMPTS = [(5, 6, 7), (9,), tuple(range(20, 40)), (270, 12, 270)]
WAYS = [
    {},
    {"repetition_penalty": 1.4},
    {"logit_bias": ((30, 3.0), (31, -math.inf), (30, 1.0), (33, -2.0))},
    {"repetition_penalty": 1.7, "logit_bias": ((40, 2.0), (9, -4.0)), "min_tokens": 5, "stop_ids": tuple(range(250))},
]


def others(gguf, model, tokenizer):
    """Backends other than ours, over the same weights."""
    found = []
    if importlib.util.find_spec("transformers"):
        found.append(build_backend(Component("hf", HFBackendConfig()), model, tokenizer, "cpu"))
    if importlib.util.find_spec("xllamacpp"):
        config = LlamaCppConfig(path=str(gguf), threads=1)
        found.append(build_backend(Component("llamacpp", config), model, tokenizer, "cpu"))
    if not found:
        pytest.skip("NOT TESTED: neither transformers nor xllamacpp is installed")
    return found


@pytest.mark.parametrize("way", WAYS, ids=["plain", "repetition", "bias", "all"])
def test_greedy_answers_are_the_native_ones(gguf, model, tokenizer, way):
    """Ids, reasons, log-probabilities and the likeliest, with bias, penalty and early stops in the same order. The
    bounds are fp32's in three programs (llama.cpp's sums differ by 1e-5 here)."""
    params = SamplingParams(**{"max_tokens": 12, "top_logprobs": 2, **way})
    requests = [Request(str(i), p, params) for i, p in enumerate(PROMPTS)]
    wanted = collect(NativeBackend(NativeConfig(), model, tokenizer), requests)
    assert len({tuple(e.token_id for e in events) for events in wanted.values()}) == len(PROMPTS)
    for backend in others(gguf, model, tokenizer):
        found = collect(backend, requests)
        for name, events in wanted.items():
            assert [e.token_id for e in found[name]] == [e.token_id for e in events], type(backend)
            assert [e.finish_reason for e in found[name]] == [e.finish_reason for e in events]
            assert [e.logprob for e in found[name]] == pytest.approx([e.logprob for e in events], abs=1e-4)
            assert [t for e in found[name] for t, _ in e.top] == [t for e in events for t, _ in e.top]


def test_an_end_of_the_file_is_a_token_like_any_other(gguf, model, tokenizer):
    """llama.cpp ends at what its file calls an end; here only the request's own stop ids end an answer."""
    end = tokenizer.eos_id
    params = SamplingParams(max_tokens=4, logit_bias=((end, 100.0),))
    for backend in others(gguf, model, tokenizer):
        events = collect(backend, [Request("a", (5, 6), params)])["a"]
        assert [e.token_id for e in events] == [end] * 4 and events[-1].finish_reason == "length"


CHI2 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88}
"""Quantiles at 0.999 by degrees of freedom."""


@pytest.mark.parametrize(
    "cut",
    [
        {"temperature": 0.6, "top_k": 6},
        {"temperature": 2.0, "top_k": 10, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 10, "top_p": 0.9, "min_p": 0.15},
    ],
    ids=str,
)
@torch.no_grad()
def test_draws_follow_the_same_distribution(gguf, model, tokenizer, cut):
    """First tokens of 400 requests against ours, enumerated from the model's logits; temperature comes before the cuts,
    which an order of its own (llama.cpp's default) would not show at temperature 1. Draws are a function of ids."""
    tokens = torch.tensor([PROMPTS[2]])
    logits = model.head(model(tokens, torch.arange(20)[None]))[0, -1:]
    columns = [
        torch.tensor([cut.get(n, d)]) for n, d in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    ]
    kept, ids = filtered_probabilities(logits, *columns)
    expected = {i: p for i, p in zip(ids[0].tolist(), kept[0].tolist(), strict=True) if p > 0}
    assert 3 < len(expected) <= 10
    num = 400
    requests = [Request(f"r{i}", PROMPTS[2], SamplingParams(max_tokens=1, **cut)) for i in range(num)]
    for backend in others(gguf, model, tokenizer):
        drawn = {name: events[0] for name, events in collect(backend, requests).items()}
        tokens = [e.token_id for e in drawn.values()]
        assert set(tokens) <= set(expected)
        chi2 = sum((tokens.count(i) - num * p) ** 2 / (num * p) for i, p in expected.items())
        assert chi2 < CHI2[len(expected) - 1], type(backend)
        assert {e.token_id for e in collect(backend, requests[:9])["r3"]} == {drawn["r3"].token_id}  # a seed decides
        for event in drawn.values():
            if event.drawn_logprob is not None:
                assert math.exp(event.drawn_logprob) == pytest.approx(expected[event.token_id], rel=1e-4)
                whole = (logits[0] / cut["temperature"]).double().softmax(-1)
                assert event.kept == pytest.approx(sum(whole[i].item() for i in expected), rel=1e-4)


def test_copy_in_transformers_follows_the_weights(tokenizer):
    """`update_weights` is what makes it new: it never answers from the old ones after that."""
    pytest.importorskip("transformers", reason="NOT TESTED: inference=hf needs transformers")
    model = Llama(LlamaConfig(**SIZES, init_std=0.2), tokenizer.vocab_size)
    model.init_weights(1)
    backend = build_backend(Component("hf", HFBackendConfig()), model.eval(), tokenizer, "cpu")
    before = backend.score([1, 2, 3, 4])
    model.init_weights(2)
    backend.update_weights(7)
    after = backend.score([1, 2, 3, 4])
    assert after == pytest.approx(NativeBackend(NativeConfig(), model).score([1, 2, 3, 4]), abs=1e-4)
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.1
    assert backend.stats().weight_version == 7


def test_settings_of_a_folder_change_no_answer(model, tokenizer, tmp_path):
    """generation_config.json may hold a temperature, a penalty and top_k=50: only the request's own count."""
    pytest.importorskip("transformers", reason="NOT TESTED: inference=hf needs transformers")
    write_folder(model, "llama", tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "repetition_penalty": 9.0, "top_k": 1}')
    theirs, _ = load_artifact(str(tmp_path), family="hf").model(None)
    theirs.inner.generation_config.repetition_penalty = 9.0
    requests = [Request(str(i), p, SamplingParams(max_tokens=10)) for i, p in enumerate(PROMPTS)]
    found = collect(build_backend(Component("hf", HFBackendConfig()), theirs, tokenizer, "cpu"), requests)
    wanted = collect(NativeBackend(NativeConfig(), model), requests)
    assert {n: [e.token_id for e in x] for n, x in found.items()} == {
        n: [e.token_id for e in x] for n, x in wanted.items()
    }


def test_file_is_written_where_there_is_none_and_goes_with_the_backend(model, tokenizer, gguf, tmp_path):
    """init_from's own GGUF file is read as it is; of a run the model is written, for as long as the backend lives."""
    pytest.importorskip("xllamacpp", reason="NOT TESTED: inference=llamacpp needs xllamacpp")
    chosen = Component("llamacpp", LlamaCppConfig(threads=1))
    backend = build_backend(chosen, model, tokenizer, "cpu", load_artifact(str(gguf)))
    assert backend.config.path == str(gguf) and backend.reads is None
    write_folder(model, "llama", tokenizer, make_folder(tmp_path / "folder"))
    assert _readable("folder", load_artifact(str(tmp_path / "folder"))) == str(tmp_path / "folder")
    assert _readable("folder", load_artifact(str(gguf))) == "" == _readable("gguf", None)
    backend = build_backend(chosen, model, tokenizer, "cpu")
    folder, process = backend.reads.name, backend._process
    scores = backend.score([1, 2, 3, 4])
    assert scores == pytest.approx(NativeBackend(NativeConfig(), model).score([1, 2, 3, 4]), abs=1e-4)
    assert Path(folder).is_dir() and process.poll() is None
    del backend
    gc.collect()
    assert not Path(folder).exists() and process.poll() == 0


def test_what_llama_cpp_cannot_do_is_told_in_a_sentence(model, tokenizer, gguf, tmp_path):
    pytest.importorskip("xllamacpp", reason="NOT TESTED: inference=llamacpp needs xllamacpp")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(gguf.read_bytes()[:3000])
    with pytest.raises(BackendError, match=f"{bad}: llama.cpp cannot read it: .+"):
        build_backend(Component("llamacpp", LlamaCppConfig(path=str(bad))), model, tokenizer, "cpu")
    with pytest.raises(BackendError, match="inference.context=65 is more than the model's context of 64"):
        build_backend(Component("llamacpp", LlamaCppConfig(path=str(gguf), context=65)), model, tokenizer, "cpu")
    backend = build_backend(Component("llamacpp", LlamaCppConfig(path=str(gguf), threads=1)), model, tokenizer, "cpu")
    with pytest.raises(BackendError, match="from a file, which does not change"):
        backend.update_weights(1)
    events = backend.generate([Request("a", (1, 2), SamplingParams(max_tokens=9))])
    next(events)
    backend._process.kill()
    backend._process.wait()
    with pytest.raises(BackendError, match="request a: llama.cpp has ended"):
        list(events)
    assert not backend.health() and not backend.busy


def test_missing_packages_are_named_with_what_to_install(model, tokenizer, gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name, config, told in [
        ("hf", HFBackendConfig(), "pip install trivium-llm[hf]"),
        ("llamacpp", LlamaCppConfig(path=str(gguf)), "pip install trivium-llm[gguf]"),
        ("vllm", VLLMConfig(), "inference=vllm needs vllm"),
    ]:
        with pytest.raises((ConfigError, BackendError), match=re.escape(told)):
            build_backend(Component(name, config), model, tokenizer, "cpu")


def test_training_is_not_sampled_from_a_copy(main, pretraining, tmp_path):
    """The copy would stay as the weights were at the first step, and the samples look as if nothing were learnt."""
    pytest.importorskip("transformers", reason="NOT TESTED: inference=hf needs transformers")
    told = main(*pretraining(tmp_path, "a", "inference=hf", "samples.every_steps=2", "trainer.accelerator=cpu"))
    assert told.code == 2 and "inference=hf answers from a copy of the weights" in told.err


PAGE = Path(__file__).parents[2] / "docs/inference.md"


def test_table_of_the_page_is_what_backends_declare(gguf, model, tokenizer):
    """Renewed with UPDATE_TABLE=1. vLLM's is what it declares; whether it keeps that, no machine here can tell."""
    for package in ("transformers", "xllamacpp", "llguidance"):
        pytest.importorskip(package, reason=f"NOT TESTED: the whole table needs {package}")
    found = {"native": NativeBackend(NativeConfig(), model, tokenizer)}
    found |= dict(zip(("hf", "llamacpp"), others(gguf, model, tokenizer), strict=True))
    found["vllm"] = never_run = object.__new__(VLLMBackend)
    never_run._context, never_run._vocab_size = CONTEXT, model.vocab_size
    has = {name: backend.capabilities() for name, backend in found.items()}
    rows = {f"`{f.name}`": [f.name in c.sampling for c in has.values()] for f in dataclasses.fields(SamplingParams)}
    rows["samples from the weights being trained"] = [c.shares_weights for c in has.values()]
    rows["embeddings"] = [c.embeds for c in has.values()]
    head = f"| | {' | '.join(f'`{name}`' for name in has)} |\n| --- |{' --- |' * len(has)}\n"
    table = head + "\n".join(f"| {n} | {' | '.join('yes' if y else 'no' for y in row)} |" for n, row in rows.items())
    text = PAGE.read_text()
    shown = re.search(r"<!-- honours -->\n(.*?)\n?<!-- end -->", text, flags=re.S)
    if os.environ.get("UPDATE_TABLE"):
        PAGE.write_text(text.replace(shown[0], f"<!-- honours -->\n{table}\n<!-- end -->"))
        return
    assert shown[1] == table
