"""Answers of a given form: every finished one holds, checked by jsonschema and Python's re; the rest is refused."""

import ipaddress
import json
import re
import uuid

import pytest
import torch

from trivium.data.config import BPEConfig, UnigramConfig
from trivium.data.tokenizer import train_bpe, train_unigram
from trivium.errors import BackendError
from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import NativeBackend, collect
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.types import Request, SamplingParams

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

TEXT = 'the cat said {"name": "é", "n": 12, "漢字": [true, false, null]} 😀 and sat, 3.5 times\n' * 4
CONTEXT = 96
SIZES = {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn_dim": 32, "context": CONTEXT, "tied": False}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(BPEConfig(vocab_size=340), [TEXT])


def model_for(tokenizer, seed=0, **changes):
    """More rows than the tokenizer has tokens, as real models have: the last seven are never to be drawn."""
    model = Llama(LlamaConfig(**SIZES, **{"init_std": 0.5} | changes), tokenizer.vocab_size + 7)
    model.init_weights(seed)
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_for(tokenizer)


@pytest.fixture
def backend(model, tokenizer):
    return NativeBackend(NativeConfig(), model, tokenizer)


WORD = {"type": "string", "maxLength": 6}
SCHEMAS = {
    "integer": {"type": "integer", "minimum": -20, "exclusiveMaximum": 300},
    "number": {"type": "number", "minimum": 0, "maximum": 12.5},
    "even": {"type": "integer", "multipleOf": 4, "minimum": 0},
    "enum": {"enum": ["é", "漢字", 3, None, {"a": [1, "x y"]}]},
    "string": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^[a-cé😀]{2,5}$"},
    "object": {
        "type": "object",
        "properties": {"name": WORD, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name"],
        "additionalProperties": False,
    },
    "open object": {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": {"type": "boolean"}},
    "array": {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [WORD, {"type": "boolean"}], "items": False, "minItems": 2},
    "recursive": {
        "$defs": {"tree": {"type": "object", "properties": {"of": {"anyOf": [{"$ref": "#/$defs/tree"}, {"const": 0}]}},
                           "required": ["of"], "additionalProperties": False}},
        "$ref": "#/$defs/tree",
    },
    "all of": {"allOf": [{"type": "string", "maxLength": 5}, {"pattern": "^[x-z]*$"}]},
    "one of": {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"const": "none"}]},
    "address": {"type": "string", "format": "ipv4"},
    "identity": {"type": "string", "format": "uuid"},
    "address 6": {"type": "string", "format": "ipv6"},
    "without a type": {"maxLength": 3, "maximum": 5, "maxItems": 1, "enum": ["abc", "abcd", 4, 6, [1], [1, 2]]},
}  # fmt: skip
REGEXES = {
    "date": r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d",
    "words": r"[a-z]{1,5}( [a-z]{1,5}){0,2}\.",
    "not ASCII": "[éü漢字😀]{2,4}",
    "any": ".{3,6}",
    "emoji": "😀{1,3}|🎈",
    "class": r"[^\d\s]{2,4}",
    "space": r"( |\t)[\w-]{2,6}",
    "escapes": r"\{\"a\\\/\": \[\x41\u0042]\}",
    "named": r"(?P<key>[A-Z]{2})=(?:yes|no)?",
    "negated": r"\D\W\S",
    "brackets": r"[]^-]{3}[^]a]",
}


def fits(schema, text):
    jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
    kind = schema.get("format")
    {"ipv4": ipaddress.IPv4Address, "ipv6": ipaddress.IPv6Address, "uuid": uuid.UUID}.get(kind, str)(json.loads(text))


def prompts(num):
    return [tuple(1 + (7 * i + j) % 250 for j in range(1 + i % 5)) for i in range(num)]


def answers(backend, tokenizer, num=100, **params):
    """(text, finish_reason) of greedy answers and of ones at temperature 2.0, half and half."""
    params = {"max_tokens": 40, "stop_ids": tokenizer.stop_ids, **params}
    requests = [
        Request(f"{t}/{i}", prompt, SamplingParams(temperature=t, seed=i, **params))
        for t in (0.0, 2.0)
        for i, prompt in enumerate(prompts(num))
    ]
    out = []
    for events in collect(backend, requests).values():
        ids = [e.token_id for e in events if e.token_id not in params["stop_ids"]]
        out.append((tokenizer.decode(ids), events[-1].finish_reason))
    return out


@pytest.mark.parametrize("name", SCHEMAS)
def test_finished_answers_hold_the_schema(backend, tokenizer, name):
    schema = SCHEMAS[name]
    found = answers(backend, tokenizer, json_schema=json.dumps(schema))
    finished = {text for text, reason in found if reason == "stop"}
    for text in finished:
        fits(schema, text)
    assert len(finished) >= (2 if name != "all of" else 1) and {reason for _, reason in found} <= {"stop", "length"}


@pytest.mark.parametrize("name", REGEXES)
def test_finished_answers_hold_the_regex(backend, tokenizer, name):
    found = answers(backend, tokenizer, regex=REGEXES[name])
    finished = {text for text, reason in found if reason == "stop"}
    for text in finished:
        assert re.fullmatch(REGEXES[name], text, re.ASCII), text
    assert len(finished) >= (1 if name == "escapes" else 2)


def events_of(backend, requests):
    return {
        name: [(e.token_id, e.finish_reason) for e in events] for name, events in collect(backend, requests).items()
    }


def test_characters_split_over_tokens_come_out_whole(backend, tokenizer):
    """The emoji is four bytes, and no token of this vocabulary holds two characters of these: an answer of 3 takes
    more than 3 tokens, none of which is text alone."""
    stops = tokenizer.stop_ids
    params = SamplingParams(max_tokens=40, regex="[🎈🎉]{3}", temperature=2.0, stop_ids=stops)
    ids = [e.token_id for e in collect(backend, [Request("a", (5,), params)])["a"]]
    text = tokenizer.decode([i for i in ids if i not in stops])
    assert re.fullmatch("[🎈🎉]{3}", text)
    assert len(ids) > 3 and all("\ufffd" in tokenizer.decode([i]) for i in ids if i not in stops)


def test_answer_ends_with_the_constraint_where_nothing_can_follow(backend):
    """Without a stop id: "stop" as soon as the text is complete, even before min_tokens, and even when it takes
    max_tokens exactly; "length" when it is cut."""
    regex = r"\d{5}"  # digits are single tokens

    def reasons(**more):
        events = collect(backend, [Request("a", (3, 4), SamplingParams(regex=regex, **more))])["a"]
        return [e.finish_reason for e in events]

    assert reasons(max_tokens=9) == reasons(max_tokens=9, min_tokens=7) == reasons(max_tokens=5)
    assert reasons(max_tokens=5) == [None] * 4 + ["stop"]
    assert reasons(max_tokens=4) == [None] * 3 + ["length"]


def test_stop_ids_come_exactly_where_the_text_may_end(backend, tokenizer):
    """`a{2,}`: never before two, then at once, since it is biased by 100. An end-of-text token that is no stop id of
    the request never comes. An "a" that is a stop id cannot be text any more, so that nothing is left of `ab?`."""
    (a,), stop = tokenizer.encode("a"), tokenizer.eot_id
    bias = ((stop, 100.0), (tokenizer.eos_id, 200.0))
    params = SamplingParams(max_tokens=8, regex="a{2,}", stop_ids=(stop,), logit_bias=bias)
    assert [t for t, _ in events_of(backend, [Request("x", (9,), params)])["x"]] == [a, a, stop]
    params = SamplingParams(max_tokens=8, regex="ab?", stop_ids=(a,), logit_bias=((a, 100.0),))
    with pytest.raises(BackendError, match="request x: no token is allowed to come next"):
        collect(backend, [Request("x", (9,), params)])


def test_neighbours_without_constraint_are_unchanged(backend, tokenizer):
    free = [Request(f"f{i}", p, SamplingParams(max_tokens=12, temperature=1.0)) for i, p in enumerate(prompts(4))]
    bound = [
        Request("r", (7, 8), SamplingParams(max_tokens=12, temperature=1.0, regex="[ab]{6}")),
        Request("j", (7,), SamplingParams(max_tokens=12, temperature=1.0, json_schema='{"type": "boolean"}')),
    ]
    together = events_of(backend, [free[0], bound[0], free[1], free[2], bound[1], free[3]])
    assert together == {**events_of(backend, free), **{k: v for r in bound for k, v in events_of(backend, [r]).items()}}


def test_preempted_rows_answer_as_others_do(model, tokenizer):
    """Pages for about three of eight rows: rows begin again in the middle of their strings, and the constraint with
    them."""
    schema = json.dumps(SCHEMAS["object"])
    requests = [
        Request(
            str(i), p, SamplingParams(max_tokens=40, temperature=1.5, json_schema=schema, stop_ids=tokenizer.stop_ids)
        )
        for i, p in enumerate(prompts(8))
    ]
    wanted = events_of(NativeBackend(NativeConfig(memory="slab"), model, tokenizer), requests)
    tight = NativeBackend(NativeConfig(memory="paged", page=4, slots=64, prefix_cache=False), model, tokenizer)
    assert events_of(tight, requests) == wanted
    assert tight.stats().preempted > 0


def test_guesses_change_no_bound_answer(model, tokenizer):
    """Prompts that repeat themselves, so that there are guesses: for the free rows, and never for the bound ones."""
    schema = json.dumps(SCHEMAS["object"])
    params = SamplingParams(max_tokens=30, temperature=1.5, json_schema=schema, stop_ids=tokenizer.stop_ids)
    requests = [Request(f"b{i}", (*p, *p, *p), params) for i, p in enumerate(prompts(2))]
    requests += [Request(f"f{i}", (*p, *p, *p), SamplingParams(max_tokens=30)) for i, p in enumerate(prompts(2))]
    wanted = events_of(NativeBackend(NativeConfig(), model, tokenizer), requests)
    guessing = NativeBackend(NativeConfig(speculate="ngram"), model, tokenizer)
    assert events_of(guessing, requests[:2]) == {r.id: wanted[r.id] for r in requests[:2]}
    assert guessing.stats().drafted_tokens == 0
    assert events_of(guessing, requests) == wanted
    assert guessing.stats().drafted_tokens > 0


UNSUPPORTED_SCHEMAS = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems at its root"),
    ({"properties": {"a": {"items": {"not": {}}}}}, "not at /properties/a/items"),
    ({"type": "object", "minProperties": 1}, "minProperties at its root"),  # of equal keys JSON keeps the last
    ({"minLenght": 1}, "minLenght at its root"),
    ({"x-guidance": {"lenient": True}, "if": {}}, "x-guidance at its root"),
    ({"contains": {}}, "contains"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"propertyNames": {}}, "propertyNames"),
    ({"anyOf": [{}, {"unevaluatedProperties": False}]}, "unevaluatedProperties at /anyOf/1"),
    ({"format": "date"}, "format='date'"),
    ({"$ref": "https://example.org/schema"}, r"\$ref='https://example.org/schema'"),
    ({"$ref": "#/nowhere"}, "cannot be held: .*nowhere"),
    ({"multipleOf": 0.1}, "multipleOf=0.1"),
    ({"minimum": 1, "exclusiveMinimum": True}, "exclusiveMinimum=true"),
    ({"type": "string", "pattern": "(?=a)b"}, r"\(\?= in pattern='\(\?=a\)b'"),
    ({"type": "string", "pattern": "a$|b"}, r"\$ inside in pattern"),
    ({"patternProperties": {r"\bx": {}}}, r"\\b in patternProperties"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"type": "string", "pattern": "^a$", "minLength": 3}, "cannot be held: Unsatisfiable"),
    ({"items": 3}, "3 at /items, which is no schema"),
    ({"type": "thing"}, "cannot be held: .*thing"),
    ([], "must be an object"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "told"), UNSUPPORTED_SCHEMAS, ids=lambda x: str(x)[:40])
def test_schema_that_cannot_be_held_is_refused_by_its_keyword(backend, schema, told):
    request = Request("it", (1,), SamplingParams(json_schema=json.dumps(schema)))
    with pytest.raises(BackendError, match=f"^request it: json_schema.*{told}"):
        next(iter(backend.generate([Request("good", (1,)), request])))
    with pytest.raises(BackendError, match=told):
        backend.add(request)
    assert not backend.busy


UNSUPPORTED_REGEXES = [
    ("(?=a)b", r"\(\?="),
    ("(?<!a)b", r"\(\?<"),
    ("(?i)a", r"\(\?i"),
    (r"\bfoo", r"\\b"),
    (r"(a)\1", r"\\1"),
    (r"(?P<x>a)(?P=x)", r"\(\?P"),
    (r"\p{L}", r"\\p"),
    ("^a", r"\^ \(a regex is always of the whole answer"),
    ("a$", r"\$ \(a regex"),
    ("a+?", r"\+\? \(a lazy"),
    ("a++", r"\+\+ \(a lazy or possessive"),
    ("[a[b]]", r"\[ in a character class"),
    ("[a-z&&[^b]]", "&& in a character class"),
    ("[a--b]", "-- in a character class"),
    (r"[\b]", r"\\b in a character class"),
    ("[ab", "no regular expression"),
    ("(", "no regular expression"),
    ("\\", r"\\"),
    ("(" * 40 + "a" + ")" * 40, "more than 32 groups"),
    ("((((a{100}){100}){100}){100})", "cannot be held"),
    ("a" * 70000, "has 70000 bytes; at most 65536"),
]


@pytest.mark.parametrize(("regex", "told"), UNSUPPORTED_REGEXES, ids=lambda x: str(x)[:20])
def test_regex_that_cannot_be_held_is_refused_by_what_it_says(backend, regex, told):
    with pytest.raises(BackendError, match=f"^request it: regex.*{told}"):
        backend.check(Request("it", (1,), SamplingParams(regex=regex)))


def test_deep_and_large_schemas_are_refused(backend):
    deep: dict = {}
    for _ in range(40):
        deep = {"items": deep}
    with pytest.raises(BackendError, match="a schema deeper than 32"):
        backend.check(Request("it", (1,), SamplingParams(json_schema=json.dumps(deep))))
    nested = '{"default": ' + "[" * 20000 + "]" * 20000 + "}"
    with pytest.raises(BackendError, match="json_schema"):
        backend.check(Request("it", (1,), SamplingParams(json_schema=nested)))
    with pytest.raises(BackendError, match="json_schema is no JSON"):
        backend.check(Request("it", (1,), SamplingParams(json_schema="{")))


def test_grammar_is_compiled_once(backend, tokenizer):
    grammars = backend._grammars
    answers(backend, tokenizer, num=3, regex="[ab]{2}")
    answers(backend, tokenizer, num=3, json_schema='{"type": "null"}')
    backend.check(Request("it", (1,), SamplingParams(regex="[ab]{2}")))
    told = grammars._compiled.cache_info()
    assert (told.misses, told.currsize) == (2, 2) and told.hits > 10


def test_constraints_are_declared_only_with_tokenizer_and_library(model, tokenizer, monkeypatch):
    assert {"json_schema", "regex"} <= NativeBackend(NativeConfig(), model, tokenizer).capabilities().sampling
    bare = NativeBackend(NativeConfig(), model)
    with pytest.raises(BackendError, match="request it: NativeBackend cannot honour regex='a'"):
        bare.check(Request("it", (1,), SamplingParams(regex="a")))
    monkeypatch.setattr("trivium.inference.native.engine.installed", lambda: False)
    without = NativeBackend(NativeConfig(), model, tokenizer)
    assert not {"json_schema", "regex"} & without.capabilities().sampling


def spaced():
    """As Llama 2's: words bring their space as "▁", text is given one in front, and decoding takes it away again."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    from trivium.data.tokenizer import Tokenizer

    words = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁▁", "ab", "▁b"]
    core = tokenizers.Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(words)], 0, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["</s>"])
    return Tokenizer(core, {"eos_token": "</s>"})


@pytest.mark.parametrize("kind", ["unigram", "spaced"])
@pytest.mark.parametrize("regex", ["a? [ab]{2} b?", "[é ]{4}", r"[\w ]{1,4}"])
def test_text_and_bytes_agree_with_other_tokenizers(kind, regex):
    """With bytes as pieces; and where an answer's first space is not shown, so that it must not come first."""
    tokenizer = train_unigram(UnigramConfig(vocab_size=600), [TEXT] * 4) if kind == "unigram" else spaced()
    backend = NativeBackend(NativeConfig(), model_for(tokenizer), tokenizer)
    finished = {text for text, reason in answers(backend, tokenizer, num=60, regex=regex) if reason == "stop"}
    assert all(re.fullmatch(regex, text, re.ASCII) for text in finished)
    assert len(finished) >= 2
