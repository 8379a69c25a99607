"""Encoders for tests: small ones with random weights, made by transformers, and the real MiniLM."""

import json
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from trivium.data.fetch import fetch_folder
from trivium.errors import DataError

TEXTS = ["the heron waits in the river", "a fish swims by", "contracts need two parties and an offer"] * 3
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WIDTH, LONGEST = 32, 48
POOLINGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")


def tiny_encoder(folder, *, pooling="mean", unit=True, said=None, bert=None, seed=0):
    """A BERT in sentence-transformers' form. pooling: of 1_Pooling; None writes no modules.json."""
    transformers = pytest.importorskip("transformers", reason="NOT TESTED: an encoder needs transformers")
    pytest.importorskip("sentence_transformers", reason="NOT TESTED: an encoder needs sentence-transformers")
    normal, cut = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in TEXTS for word, _ in cut.pre_tokenize_str(normal.normalize_str(text))})
    letters = sorted(set("".join(words)))
    pieces = dict.fromkeys([*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters)])
    vocab = {piece: number for number, piece in enumerate(pieces)}  # trained, numbers would be a matter of chance
    core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normal, cut
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    core.enable_truncation(8)  # as many folders have it: what is too long must not be cut by this
    core.enable_padding(length=8)
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    told = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LONGEST}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(
        vocab_size=core.get_vocab_size(),
        max_position_embeddings=LONGEST,
        initializer_range=0.5,
        **sizes,
        **(bert or {}),
    )
    transformers.BertModel(config).save_pretrained(folder)
    if pooling is not None:
        parts = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if unit else [])]
        write_modules(folder, [(path, f"sentence_transformers.models.{kind}") for path, kind in parts])
        (folder / "1_Pooling").mkdir(exist_ok=True)
        chosen = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}.get(pooling, pooling)
        modes = {f"pooling_mode_{name}": name == chosen for name in POOLINGS}
        (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **modes}))
    if said is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(said))
    return folder


def write_modules(folder, parts):
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(parts)]
    (folder / "modules.json").write_text(json.dumps(listed))


@cache
def minilm():
    """The folder of the real all-MiniLM-L6-v2 (84 MB); tests that need it skip, and say why, where it cannot be had."""
    pytest.importorskip("sentence_transformers", reason="NOT TESTED: an encoder needs sentence-transformers")
    try:
        return fetch_folder("minilm", print)
    except DataError as error:
        pytest.skip(f"NOT TESTED ON THE REAL ENCODER: {error}")
