"""The tokenizer inside a GGUF file is the model's own: on a hand-made vocabulary, and on SmolLM2's."""

import json
import sysconfig
from pathlib import Path

import pytest
import tokenizers
from helpers import smollm2
from tokenizers import decoders, models, pre_tokenizers

from trivium.data.gguf_tokenizer import PRE, keys_of, tokenizer_of
from trivium.errors import DataError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ Ġ", "Ċ Ċ", "ĊĊ ĠĠ", "1 2", "h i", "Ġ hi"]
TOKENS = ["<|end|>", "<|turn|>", *ALPHABET, *(m.replace(" ", "") for m in MERGES), "<tool>"]


def keys(**changes):
    """A tokenizer.* section with 256 bytes, six merges, two control tokens and one of the user's."""
    section = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": [3, 3, *[1] * (len(TOKENS) - 3), 4],
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "padding_token_id": 0,
        "add_bos_token": True,
    }
    section = {f"tokenizer.ggml.{k}": v for k, v in (section | changes).items() if v is not None}
    return section | {"tokenizer.chat_template": "{{ messages }}"}


def test_tokens_merges_and_special_tokens():
    """ "12" is one entry and yet two tokens: "smollm" splits digits first. Control tokens vanish from decoded text."""
    core, config = tokenizer_of(keys())
    assert core.get_vocab_size() == len(TOKENS)
    assert core.encode("\n\n  12 hi<|turn|><tool>").tokens == ["ĊĊĠĠ", "1", "2", "Ġhi", "<|turn|>", "<tool>"]
    assert core.decode(core.encode("hi<|turn|><tool>é").ids) == "hi<tool>é"
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|turn|>",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "eot_token": "<|end|>",
        "add_bos_token": True,
        "chat_template": "{{ messages }}",
    }


def test_pre_tokenizers_differ_where_the_models_do():
    """One vocabulary under each name: digits apart, digits together, up to three, and one by one."""
    told = {name: tokenizer_of(keys(pre=name))[0].encode("12 hi").tokens for name in PRE}
    assert told == {
        "smollm": ["1", "2", "Ġhi"],
        "gpt-2": ["12", "Ġhi"],
        "llama-bpe": ["12", "Ġhi"],
        "qwen2": ["1", "2", "Ġhi"],
        "stablelm2": ["1", "2", "Ġhi"],
    }


@pytest.mark.parametrize("name", PRE)
def test_keys_of_is_the_inverse(name):
    """Into keys and back: the same tokenizer to the byte; and the first keys again, but for the end of turn."""
    core, config = tokenizer_of(keys(pre=name))
    written = keys_of(core, config)
    assert written.pop("tokenizer.ggml.eot_token_id") == 0
    assert written == keys(pre=name)
    again, settings = tokenizer_of(written)
    assert again.to_str() == core.to_str() and settings == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "is of the kind 'llama'"),
        ({"pre": "deepseek-llm"}, "by the rules of 'deepseek-llm'; read are smollm, gpt-2"),
        ({"pre": None}, "by the rules of None"),
        ({"tokens": None}, r"tokens is not a list of texts"),
        ({"tokens": [*TOKENS[:-1], "h"]}, "1 tokens twice"),
        ({"tokens": [*TOKENS[:-1], ""]}, "not a list of texts"),
        ({"token_type": [1]}, "one type for each of 265 tokens"),
        ({"merges": ["h i j"]}, "merges 'h i j'"),
        ({"merges": ["q z"]}, "merges 'q z'"),
        ({"merges": []}, "merges is not a list"),
        ({"eos_token_id": 265}, "eos_token_id is 265; its tokens are 0 to 264"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(DataError, match=message):
        tokenizer_of(keys(**changes))


def test_keys_of_refuses_what_gguf_cannot_say():
    own = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.Whitespace(), decoders.ByteLevel()
    with pytest.raises(DataError, match="GGUF has no name for how this tokenizer cuts text"):
        keys_of(own, {})
    with pytest.raises(DataError, match="of the kind Unigram"):
        keys_of(tokenizers.Tokenizer(models.Unigram([("a", 0.0)])), {})
    odd = tokenizers.Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>"))
    with pytest.raises(DataError, match="has end_of_word_suffix, for which GGUF has no key"):
        keys_of(odd, {})
    core, config = tokenizer_of(keys())
    with pytest.raises(DataError, match="names three ends, and this tokenizer has <tool> besides"):
        keys_of(core, {**config, "eot_token": "<|turn|>", "stop_tokens": ["1", "<tool>"]})
    core.add_special_tokens([tokenizers.AddedToken("<x>", lstrip=True)])
    with pytest.raises(DataError, match="has <x> with lstrip"):
        keys_of(core, config)


def test_ids_without_a_token_are_filled_and_left_out_again():
    """Rows of an embedding beyond the tokens, as many models have them: llama.cpp wants a token for each."""
    core, config = tokenizer_of(keys())
    written = keys_of(core, config, size=270)
    assert written["tokenizer.ggml.tokens"][-5:] == [f"[PAD{i}]" for i in range(265, 270)]
    assert written["tokenizer.ggml.token_type"][-6:] == [4, 5, 5, 5, 5, 5]
    assert tokenizer_of(written)[0].to_str() == core.to_str()
    holes = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "c": 5000}, []))
    holes.pre_tokenizer = PRE["gpt-2"].pieces()
    with pytest.raises(DataError, match="3 entries for 5,001 ids"):
        keys_of(holes, {})


def test_a_third_end_and_templates_by_name():
    core, config = tokenizer_of(keys())
    named = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}]
    config |= {"stop_tokens": ["<|turn|>"], "chat_template": named}
    written = keys_of(core, config)
    assert written["tokenizer.ggml.eom_token_id"] == 1
    assert written["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert tokenizer_of(written)[1] == config


def test_places_in_the_text_do_not_matter():
    """trim_offsets, which published files set either way, changes no id."""
    core, config = tokenizer_of(keys(pre="gpt-2"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True, trim_offsets=False)
    assert keys_of(core, config)["tokenizer.ggml.pre"] == "gpt-2"


def test_smollm2_tokenizer_is_exact():
    """49,152 entries; 120 real texts come back byte for byte; digits are single; two spaces stay together."""
    core, config = tokenizer_of(smollm2().tokenizer)
    assert core.get_vocab_size() == 49_152
    assert core.encode("\n\n  3").tokens == ["ĊĊĠĠ", "3"]
    assert core.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    texts = [p.read_text() for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]]
    assert len(texts) == 120
    ids = [e.ids for e in core.encode_batch_fast(texts)]
    assert core.decode_batch(ids) == texts
    assert sum(map(len, ids)) < 0.4 * sum(map(len, texts))  # its merges are used
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert core.encode("<|im_start|>user").ids[0] == 1
    special = [entry for entry in json.loads(core.to_str())["added_tokens"] if entry["special"]]
    assert [entry["id"] for entry in special] == list(range(17))
