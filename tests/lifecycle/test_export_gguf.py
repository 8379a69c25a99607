"""Models leave as GGUF files: read again here to the bit, and by llama.cpp. Skipped, loudly, where that is missing."""

import json
import re
import sys

import pytest
import torch
from tests.helpers import FAMILIES, folder_of, smollm2_path

from trivium.build import load_artifact
from trivium.data.config import BPEConfig
from trivium.data.tokenizer import train_bpe
from trivium.errors import TriviumError
from trivium.models.gguf_file import read_header
from trivium.models.gguf_write import write_gguf
from trivium.models.weights import hf_tensors, weights_of
from trivium.phases.export_gguf import TEXTS, verify_gguf
from trivium.plugin import discover

pytest.importorskip("transformers")
pytest.importorskip("xllamacpp", reason="NOT TESTED IN LLAMA.CPP: pip install xllamacpp")

discover()
SAID = {
    "mistral": {"sliding_window": 128},  # the whole context: no window
    "qwen2": {"head_dim": 8},
    "gemma2": {"query_pre_attn_scalar": 16},
}
"""Where a family's small settings are none that llama.cpp computes."""


@pytest.fixture(scope="module")
def tokenizer(trained):
    return load_artifact(str(trained)).tokenizer


def exported(main, tmp_path, origin, *more):
    done = main("phase=export", "format=gguf", f"init_from={origin}", f"runs={tmp_path}", "name=out", *more)
    assert done.code == 0, done.err
    return tmp_path / "out/gguf/model.gguf", json.loads((tmp_path / "out/gguf/VERIFIED.json").read_text()), done.out


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("mixtral", "qwen3_moe")])
def test_every_family_is_what_it_was_and_llama_cpp_agrees(family, tokenizer, main, tmp_path):
    """Bits, settings and tokenizer after a second import (Gemma's norms hold 1 more, rounded to 2**-24 and back)."""
    folder_of(family, tokenizer, tmp_path / "in", SAID.get(family))
    file, found, _ = exported(main, tmp_path, tmp_path / "in")
    before, after = load_artifact(str(tmp_path / "in")), load_artifact(str(file))
    ours, theirs = (weights_of(a.model(None)[0]) for a in (before, after))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if family == "gemma2" and "norm" in name:
            assert (tensor - theirs[name]).abs().max() <= 2**-24 * 2
        else:
            assert tensor.equal(theirs[name]), name
    same = before.record["config"].keys() & after.record["config"].keys() - {"init_std"}
    assert {k: before.record["config"][k] for k in same} == {k: after.record["config"][k] for k in same}
    assert before.tokenizer.stop_ids == after.tokenizer.stop_ids and before.tokenizer.start == after.tokenizer.start
    assert found["type"] == "F32" and found["logprobs"] < 1e-4 * max(1, found["of"]) and found["greedy"] > 0
    assert set(tokenizer.stop_ids) <= set(found["ends"])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(("kind", "least"), [("f16", 0.4), ("q8_0", 0.2)])
def test_narrow_types_say_what_they_cost(family, kind, least, tokenizer, main, tmp_path):
    """Half and, where rows are whole blocks of 32, a quarter of the bytes; perplexity before and after is our own."""
    folder_of(family, tokenizer, tmp_path / "in", SAID.get(family))
    file, found, out = exported(main, tmp_path, tmp_path / "in", f"quantize={kind}")
    cost = found["perplexity"]
    assert cost["tokens"] == 4 * 512 and cost["before"] > 1
    assert 0 < abs(cost["after"] / cost["before"] - 1) < (1e-3 if kind == "f16" else 2e-2)
    assert re.search(r"perplexity of 2,048 tokens .* before and .* in", out.replace("\n", " "))
    stored = read_header(file).tensors
    whole = 4 * sum(torch.tensor(t.shape).prod().item() for t in stored.values())
    assert least < sum(t.size for t in stored.values()) / whole < least + 0.3


def test_a_trained_run_leaves_with_its_own_tokenizer(trained, main, tmp_path):
    """Byte-level BPE as it is trained here; the file goes on where the run would have."""
    file, found, _ = exported(main, tmp_path, trained)
    assert found["greedy"] > 0
    said = []
    for origin in (trained, file):
        done = main("phase=generate", f"init_from={origin}", f"runs={tmp_path}", "name=said", "prompt=ab cd",
                    "inference.sampling.temperature=0", "inference.sampling.max_tokens=8",
                    "prompt_format=text")  # fmt: skip
        assert done.code == 0, done.err
        said.append(json.loads((tmp_path / "said/samples.jsonl").read_text())["completion"])
    assert said[0] == said[1]


def test_rows_without_a_token_and_a_third_end(tokenizer, main, tmp_path):
    """An embedding of more rows than tokens, and three ends: eos, end of turn, and one more; all stop llama.cpp."""
    folder_of("llama", tokenizer, tmp_path / "in", {"vocab_size": tokenizer.num_tokens + 7})
    path = tmp_path / "in/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stop_tokens": ["<|user|>"]}))
    file, found, _ = exported(main, tmp_path, tmp_path / "in")
    again = load_artifact(str(file))
    assert again.tokenizer.num_tokens == tokenizer.num_tokens
    assert again.record["vocab_size"] == tokenizer.num_tokens + 7
    third = again.tokenizer.encode_batch(["<|user|>"], special=True)[0][0]
    assert set(found["ends"]) == {*tokenizer.stop_ids, third} == set(again.tokenizer.stop_ids)


def written(trained, tmp_path, settings=(), **keys):
    """A file of the trained run, its model and tokenizer; settings of the model and keys of the tokenizer: others."""
    artifact = load_artifact(str(trained))
    model, record = artifact.model(None)
    config = {"model_type": record["name"], **model.hf_config(), **dict(settings)}
    section = artifact.tokenizer.gguf_keys(model.vocab_size)
    section |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    write_gguf(tmp_path / "a.gguf", config, hf_tensors(model), section)
    return model.eval(), artifact.tokenizer, tmp_path / "a.gguf"


def test_the_gate_passes_what_is_sound(trained, tmp_path):
    assert verify_gguf(*written(trained, tmp_path), "F32")["logprobs"] < 1e-4


def test_the_gate_sees_other_weights(trained, tmp_path):
    model, tokenizer, file = written(trained, tmp_path)
    model.embed.weight.data.view(-1)[7] += 1e-6
    with pytest.raises(TriviumError, match="embed.weight is not read as it was written"):
        verify_gguf(model, tokenizer, file, "F32")


@pytest.mark.parametrize("settings", [{"rope_theta": 500.0}, {"rms_norm_eps": 1e-2}], ids=str)
def test_the_gate_sees_other_settings(settings, trained, tmp_path):
    """Both readers of a file would agree on a wrong setting: they are held to the model that it came from."""
    with pytest.raises(TriviumError, match="read again, it computes otherwise"):
        verify_gguf(*written(trained, tmp_path, settings), "F32")


def test_the_gate_sees_another_tokenizer(trained, tmp_path):
    model, tokenizer, file = written(trained, tmp_path, add_bos_token=False)
    with pytest.raises(TriviumError, match="its tokenizer is not read as it was written"):
        verify_gguf(model, tokenizer, file, "F32")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.ids[1].insert(3, 9), "llama.cpp reads other tokens: .9"),
        (lambda t: t.chat.pop(), "llama.cpp reads other tokens"),
        (lambda t: t.ends.pop(), "llama.cpp does not stop at <"),
        (lambda t: t.first.update({5: t.first[5] + 0.01}), "log-probabilities of llama.cpp differ by 1.00e-02"),
        (lambda t: t.steps[-1].update({5: 0.0}), "log-probabilities of llama.cpp differ by"),
        (lambda t: t.answer.__setitem__(0, 9), "differ by|answers"),
    ],
)
def test_the_gate_sees_what_llama_cpp_does_otherwise(change, sentence, trained, tmp_path, monkeypatch):
    from trivium.phases import export_gguf

    def spoiled(file, asked):
        told = llama_cpp(file, asked)
        change(told)
        return told

    llama_cpp = export_gguf.ask
    monkeypatch.setattr(export_gguf, "ask", spoiled)
    with pytest.raises(TriviumError, match=sentence):
        verify_gguf(*written(trained, tmp_path), "F32")


def test_llama_cpps_own_words_when_it_cannot_read_a_file(trained, tmp_path):
    from trivium.phases.llamacpp import Asked, ask

    model, _, file = written(trained, tmp_path)
    file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(TriviumError, match="a.gguf: llama.cpp cannot read it: .*"):
        ask(file, Asked(TEXTS, "", [1, 2], 1, [], model.vocab_size))


def test_nothing_is_called_good_without_llama_cpp(trained, main, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    done = main("phase=export", "format=gguf", f"init_from={trained}", f"runs={tmp_path}", "name=out")
    assert done.code == 2 and "pip install trivium-llm[gguf], or pip install xllamacpp" in done.err
    assert not (tmp_path / "out/gguf").exists()


def test_a_failed_gate_leaves_no_verdict(trained, main, tmp_path, monkeypatch):
    file, _, _ = exported(main, tmp_path, trained)
    monkeypatch.setattr("trivium.phases.export_gguf.TOLERANCE", {"F32": 0.0})
    done = main("phase=export", "format=gguf", f"init_from={trained}", f"runs={tmp_path}", "name=out")
    assert done.code == 1 and "log-probabilities of llama.cpp differ" in done.err
    assert file.exists() and not (file.parent / "VERIFIED.json").exists()


@pytest.mark.parametrize(
    ("family", "settings", "sentence"),
    [
        ("mistral", {"sliding_window": 9}, "model_type=mistral with sliding_window=9 cannot be written as GGUF"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar=20 cannot be written"),
        ("gemma2", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": None}, "attn_logit_softcapping=None"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling of type dynamic"),
    ],
)
def test_what_a_file_cannot_say_is_refused(family, settings, sentence, tokenizer, main, tmp_path):
    folder_of(family, tokenizer, tmp_path / "in", settings)
    done = main("phase=export", "format=gguf", f"init_from={tmp_path / 'in'}", f"runs={tmp_path}", "name=out")
    assert done.code == 2 and sentence in done.err.replace("\n", " "), done.err
    assert not list((tmp_path / "out/gguf").iterdir())


def test_settings_that_do_not_go_together(trained, main, tmp_path):
    start = ("phase=export", f"init_from={trained}", f"runs={tmp_path}", "name=out")
    done = main(*start, "format=gguf", "quantize=q4_0")
    assert done.code == 2 and "quantize='q4_0' is not one of f32, f16, q8_0" in done.err
    done = main(*start, "quantize=f16")
    assert done.code == 2 and "quantize=f16 is for format=gguf" in done.err


def test_tokenizers_of_rules_gguf_can_be_said_and_others_say_what_to_set():
    texts = ["a (b) 12 don't\n\n"] * 3
    for digits in (True, False):
        made = train_bpe(BPEConfig(vocab_size=300, rules="gguf", split_digits=digits), texts)
        assert made.gguf_keys(0)["tokenizer.ggml.pre"] == ("stablelm2" if digits else "gpt-2")
        own = train_bpe(BPEConfig(vocab_size=300, split_digits=digits), texts)
        with pytest.raises(TriviumError, match=r"tokenizer\.rules=gguf trains one that cuts by stablelm2's"):
            own.gguf_keys(0)


@pytest.mark.slow  # a minute, and 2.5 GB
@pytest.mark.parametrize(("kind", "cost"), [("f32", None), ("f16", 1e-3), ("q8_0", 4e-3)])
def test_smollm2(kind, cost, main, tmp_path):
    smollm2_path()
    done = main("phase=export", "format=gguf", f"quantize={kind}", "model=smollm2_135m", f"runs={tmp_path}", "name=out")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out/gguf/VERIFIED.json").read_text())
    if cost is not None:
        assert found["perplexity"]["before"] == pytest.approx(15.347, rel=1e-3)
        assert abs(found["perplexity"]["after"] / found["perplexity"]["before"] - 1) < cost
