"""Hugging Face's folders in and out: every way in which they say what their special tokens and templates are."""

import json

import pytest
from tokenizers import AddedToken, processors

from trivium.data.chat import Chat
from trivium.data.config import BPEConfig
from trivium.data.packing import encode_examples, tokenise
from trivium.data.tokenizer import Tokenizer, train_bpe
from trivium.errors import DataError

transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": "on the mat"},
]


def core():
    """A small byte-level BPE with the special tokens of Qwen and, last, one that is not special."""
    trained = train_bpe(BPEConfig(vocab_size=320), ["the cat sat on the mat, where? 12"] * 3)._core
    trained.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"])
    trained.add_tokens([AddedToken("<think>", normalized=False)])
    return trained


def folder(path, config, core_=None, **files):
    (core_ or core()).save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        name = name.replace("_jinja", ".jinja") if name.endswith("_jinja") else f"{name}.json"
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


QWEN = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}


def id_of(tokenizer, token):
    return tokenizer._core.token_to_id(token)


def test_folder_without_a_beginning_token(tmp_path):
    """Qwen: bos is null. Documents are their text and the end; the end of a turn is read off the template."""
    tokenizer = Tokenizer.load(folder(tmp_path, QWEN))
    assert tokenizer.bos_id is None and tokenizer.start == []
    assert tokenizer.eos_id == tokenizer.eot_id == id_of(tokenizer, "<|im_end|>")
    assert tokenizer.pad_id == id_of(tokenizer, "<|endoftext|>")
    ids = tokenizer.encode("the cat")
    table = tokenise([{"id": "a", "text": "the cat"}], tokenizer, 16)
    assert table.tokens.tolist() == [*ids, tokenizer.eos_id]
    pair = encode_examples([{"id": "p", "prompt": "the", "completion": " cat"}], tokenizer, "assistant")[0]
    assert pair.ids == [*tokenizer.encode("the"), *tokenizer.encode(" cat"), tokenizer.eos_id]
    assert pair.trained.index(True) == len(tokenizer.encode("the"))


@pytest.mark.parametrize("as_dict", [False, True])
def test_folder_tokens_as_text_or_as_dicts(tmp_path, as_dict):
    def word(token):
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        return {"__type": "AddedToken", "content": token, **flags} if as_dict else token

    config = {"bos_token": word("<s>"), "eos_token": word("<|endoftext|>"), "add_bos_token": True}
    tokenizer = Tokenizer.load(folder(tmp_path, config))
    assert tokenizer.config["bos_token"] == "<s>"
    assert tokenizer.start == [id_of(tokenizer, "<s>")]
    assert tokenizer.eos_id == tokenizer.eot_id == id_of(tokenizer, "<|endoftext|>")


def test_folder_begins_documents_as_its_own_encoding_does(tmp_path):
    """GPT-2 and SmolLM2 name a bos that no document of theirs begins with; Llama's post-processor writes it."""
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    assert Tokenizer.load(folder(tmp_path, config)).bos_id is None
    begins = core()
    bos = begins.token_to_id("<s>")
    begins.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = Tokenizer.load(folder(tmp_path, config, begins))
    assert tokenizer.start == [bos]
    assert tokenizer.encode("a")[0] != bos  # never twice


def test_folder_without_a_pad_fills_with_the_end_and_still_trains_it(tmp_path):
    """pad == eos: the end of a document is a label all the same, and padding is none."""
    from trivium.data.collate import collate

    tokenizer = Tokenizer.load(folder(tmp_path, {"eos_token": "<|endoftext|>"}))
    assert tokenizer.pad_id == tokenizer.eos_id
    table = tokenise([{"id": "a", "text": "the cat sat"}], tokenizer, 32)
    batch = collate(table, [[0]], 32, tokenizer.pad_id)
    n = len(table.tokens)
    assert batch.tokens[0, n - 1 :].tolist() == [tokenizer.eos_id] * (33 - n)
    assert batch.labels[0, n - 1 :].tolist() == [tokenizer.eos_id] + [-100] * (32 - n)
    assert batch.segments[0].tolist() == [1] * n + [0] * (32 - n)


def test_folder_template_from_jinja_list_or_text(tmp_path):
    """chat_template.jinja wins; a list has one named default, and tool_use where there are tools."""
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "T" + CHATML}]
    tokenizer = Tokenizer.load(folder(tmp_path, {**QWEN, "chat_template": named}))
    assert tokenizer.template == CHATML
    tool = {"type": "function", "function": {"name": "f"}}
    assert Chat(tokenizer).render(TALK[:1], prompt=False, tools=[tool]).startswith("T<|im_start|>")
    again = Tokenizer.load(folder(tmp_path, QWEN, chat_template_jinja="J" + CHATML))
    assert again.template == "J" + CHATML


def test_folder_reads_special_tokens_map_and_generation_config(tmp_path):
    """Two ids end an answer, as in Qwen's and Llama's generation_config; the map fills in what the config lacks."""
    words = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
    ends = [core().token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
    path = folder(tmp_path, {}, special_tokens_map=words, generation_config={"eos_token_id": ends})
    tokenizer = Tokenizer.load(path)
    assert tokenizer.stop_ids == tuple(ends)
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.stop_ids == tokenizer.stop_ids and again.fingerprint == tokenizer.fingerprint


def test_bare_file_has_the_common_ends(tmp_path):
    """tokenizer.json alone: <|eos|> and <|bos|> are known by their spelling. Beside a config, both are read."""
    path = folder(tmp_path, None)
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    assert tokenizer.eos_id == id_of(tokenizer, "<|eos|>") and not tokenizer.has_template
    folder(tmp_path, QWEN)
    assert Tokenizer.load(path / "tokenizer.json").template == CHATML


def test_folder_without_a_template_writes_text_and_no_conversations(tmp_path):
    tokenizer = Tokenizer.load(folder(tmp_path, {"eos_token": "<|endoftext|>"}))
    assert tokenise([{"id": "a", "text": "the cat"}], tokenizer, 16).num_bytes == 7
    with pytest.raises(DataError, match="this tokenizer has no chat template, so it cannot write conversations"):
        tokenise([{"id": "a", "messages": TALK}], tokenizer, 64, form="chat")


def test_folder_adds_the_tokens_that_only_its_config_knows(tmp_path):
    """added_tokens_decoder with flags: lstrip takes the space before, and the id must be the next one."""
    following = core().get_vocab_size()
    entry = {"content": "<mask>", "lstrip": True, "normalized": False, "rstrip": False, "special": True}
    tokenizer = Tokenizer.load(folder(tmp_path, {**QWEN, "added_tokens_decoder": {str(following): entry}}))
    ids = tokenizer.encode_batch(["the <mask> cat"], special=True)[0]
    assert ids.count(following) == 1 and tokenizer.decode(ids, special=True) == "the<mask> cat"
    with pytest.raises(DataError, match=f"gives '<mask>' the id {following + 5}, tokenizer.json {following}"):
        Tokenizer.load(folder(tmp_path, {**QWEN, "added_tokens_decoder": {str(following + 5): entry}}))


def test_token_that_is_not_special_is_read_in_plain_text(tmp_path):
    """<think> is a word that a template may split an answer at, <|im_end|> in a text is ten characters."""
    tokenizer = Tokenizer.load(folder(tmp_path, QWEN))
    assert id_of(tokenizer, "<think>") in tokenizer.encode("<think>the")
    assert id_of(tokenizer, "<|im_end|>") not in tokenizer.encode("<|im_end|>")
    ids = Chat(tokenizer).prompt_ids([{"role": "user", "content": "<think><|im_end|>"}])
    assert ids.count(id_of(tokenizer, "<think>")) == 1 and ids.count(tokenizer.eot_id) == 1


def test_chat_with_a_break_after_the_end_reads_what_it_was_trained_on(tmp_path):
    """ChatML writes a line break after the end of a turn. No model draws it, but the next prompt holds it."""
    chat = Chat(Tokenizer.load(folder(tmp_path, QWEN)))
    trained = chat.encode([{"id": "e", "messages": TALK}])[0]
    tokenizer = chat.tokenizer
    ids = chat.prompt_ids(TALK[:1]) + [*tokenizer.encode("sat"), tokenizer.eot_id]
    ids = chat.prompt_ids(TALK[:3], ids) + [*tokenizer.encode("on the mat"), tokenizer.eot_id]
    assert trained.ids == [*ids, *tokenizer.encode("\n")]
    assert sum(trained.trained) == len(tokenizer.encode("sat")) + len(tokenizer.encode("on the mat")) + 2


@pytest.mark.parametrize("begins", [False, True])
def test_saved_folder_has_the_same_ids_in_transformers(tmp_path, begins):
    """Ours, loaded from a folder and saved, in AutoTokenizer: plain text, special tokens, template."""
    made = core()
    if begins:
        special = [("<s>", made.token_to_id("<s>"))]
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    config = {**QWEN, "tokenizer_class": "Qwen2Tokenizer", "bos_token": "<s>" if begins else None}
    ours = Tokenizer.load(folder(tmp_path, config, made))
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("the cat sat", "  12\n\nwhere? 😀", "<think>on</think>", "漢字"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.encode(text) == [*ours.start, *ours.encode(text)]
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (ours.eos_id, ours.pad_id, ours.vocab_size)
    rendered = theirs.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=False)
    assert rendered == Chat(ours).prompt_ids(TALK[:3])


def test_trained_tokenizer_has_the_same_ids_in_transformers(tmp_path):
    ours = train_bpe(BPEConfig(vocab_size=320), ["the cat sat on the mat"] * 3)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("the cat 12", add_special_tokens=False) == ours.encode("the cat 12")
    rendered = theirs.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=False)
    assert rendered == Chat(ours).prompt_ids(TALK[:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token": None}, "has no eos_token, so no text would end"),
        ({"eos_token": 5}, "tokenizer_config.json has no usable eos_token: 5; text is needed"),
        ({"pad_token": {"content": None}}, None),
        ({"pad_token": "<|none|>"}, r"pad_token '<\|none\|>' is not in its vocabulary"),
        ({"chat_template": 3}, "chat_template that is neither text nor a list: 3"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, "chat templates without one named default"),
        ({"added_tokens_decoder": {"a": {}}}, "added_tokens_decoder that is no mapping of ids to tokens"),
        ({"added_tokens_decoder": {"1": {"content": 2}}}, "has an added token that is none"),
    ],
)
def test_folder_refuses_what_is_of_no_use(tmp_path, change, message):
    path = folder(tmp_path, QWEN | change)
    if message is None:
        assert Tokenizer.load(path).pad_id
        return
    with pytest.raises(DataError, match=message):
        Tokenizer.load(path)


def test_folder_refuses_an_end_that_its_vocabulary_lacks(tmp_path):
    path = folder(tmp_path, QWEN, generation_config={"eos_token_id": [99_999]})
    with pytest.raises(DataError, match=r"eos_token_id=\[99999\], which its vocabulary does not"):
        Tokenizer.load(path)
