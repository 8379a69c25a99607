"""GGUF in and out: equal to transformers' own loader and to the `gguf` library; no damaged file gets through."""

import random
import resource
import struct
import time

import gguf
import numpy as np
import pytest
import torch
from helpers import smollm2, smollm2_path

from trivium.data.gguf_tokenizer import tokenizer_of
from trivium.errors import CheckpointError, ConfigError, DataError
from trivium.models.gguf import ROPE_FREQS, by_halves, by_pairs, llama3_factors, read_gguf
from trivium.models.gguf_file import TYPES, read_header
from trivium.models.gguf_write import write_gguf

transformers = pytest.importorskip("transformers")

V, C, F, H, K, D, L = 96, 64, 96, 4, 2, 16, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": C,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": D,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [f"t{i}é" for i in range(V)],
    "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (V - 3)],
    "tokenizer.ggml.scores": [0.5] * V,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
}
MAKERS = {
    "llama": lambda: transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"}),
    "qwen2": lambda: transformers.Qwen2Config(**hf_sizes()),
    "qwen3": lambda: transformers.Qwen3Config(head_dim=128, **hf_sizes()),
    "gemma2": lambda: transformers.Gemma2Config(head_dim=256, **hf_sizes() | {"tie_word_embeddings": True}),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=V, n_embd=C, n_layer=L, n_head=H, n_positions=1024),
}


def hf_sizes():
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
    return {name: CONFIG[name] for name in names}


def draw(shape, seed=0, std=0.1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def tiny(config=CONFIG):
    """A Llama's tensors under Hugging Face's names, all different."""
    kept = {k: v for k, v in config.items() if k not in ("torch_dtype", "architectures")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**kept))
    return {name: draw(p.shape, seed) for seed, (name, p) in enumerate(model.named_parameters())}


@pytest.fixture
def file(tmp_path):
    """A small F32 file as `write_gguf` makes it."""
    write_gguf(tmp_path / "tiny.gguf", CONFIG, tiny(), TOKENIZER)
    return tmp_path / "tiny.gguf"


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_written_and_read_back_is_the_same(file):
    """F32: every bit of every tensor, the config and the tokenizer's keys."""
    found = read_gguf(file)
    assert same_tensors(dict(found.tensors), tiny())
    assert found.config == CONFIG
    assert found.tokenizer == TOKENIZER


@pytest.mark.parametrize("dtype", ["F16", "Q8_0"])
def test_narrow_types_round_once(tmp_path, dtype):
    """F16 rounds to 11 bits: relative 2**-11. Q8_0 keeps 32 values as int8 steps of their largest / 127: half a step,
    and 2**-11 of it for the fp16 scale. Norms are exact. Written again, nothing changes any more."""
    write_gguf(tmp_path / "a.gguf", CONFIG, tiny(), TOKENIZER, dtype)
    found = read_gguf(tmp_path / "a.gguf")
    for name, expected in tiny().items():
        error = (found.tensors[name] - expected).abs()
        if expected.dim() == 1:
            assert error.max() == 0
        elif dtype == "F16":
            assert 0 < error.max() and (error <= expected.abs() * 2**-11 + 2**-25).all()
        else:
            largest = expected.view(-1, 32).abs().amax(1, keepdim=True)
            assert 0 < error.max() and (error.view(-1, 32) <= largest * (0.5 / 127 + 2**-10)).all()
    write_gguf(tmp_path / "b.gguf", found.config, found.tensors, found.tokenizer, dtype)
    assert same_tensors(dict(read_gguf(tmp_path / "b.gguf").tensors), dict(found.tensors))


def test_q8_0_falls_back_to_f16_for_rows_that_no_block_fills(tmp_path):
    """ffn_down has rows of 40 values: 32 do not divide them."""
    config = CONFIG | {"intermediate_size": 40}
    write_gguf(tmp_path / "a.gguf", config, tiny(config), TOKENIZER, "Q8_0")
    types = {name: TYPES[t.type][0] for name, t in read_header(tmp_path / "a.gguf").tensors.items()}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_rows_of_q_and_k_are_stored_by_pairs(file):
    """In the file row 2i + j of a head is row i + j D/2 of Hugging Face's (D = 16), of q and k and nothing else."""
    stored, given = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(file).tensors}, tiny()
    for theirs, ours, heads in (("attn_q", "q_proj", H), ("attn_k", "k_proj", K)):
        for head in range(heads):
            for i in range(D // 2):
                for j in range(2):
                    there = stored[f"blk.1.{theirs}.weight"][head * D + 2 * i + j]
                    here = given[f"model.layers.1.self_attn.{ours}.weight"][head * D + i + j * D // 2]
                    assert torch.equal(there, here)
    assert torch.equal(stored["blk.1.attn_v.weight"], given["model.layers.1.self_attn.v_proj.weight"])
    assert torch.equal(by_halves(by_pairs(draw((12, 5)), 3), 3), draw((12, 5)))


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
], ids=lambda s: s["rope_type"])  # fmt: skip
def test_rope_scaling_survives(tmp_path, scaling):
    write_gguf(tmp_path / "a.gguf", CONFIG | {"rope_scaling": scaling}, tiny(), TOKENIZER)
    assert read_gguf(tmp_path / "a.gguf").config == CONFIG | {"rope_scaling": scaling}


def test_llama3_divisors_are_those_of_transformers():
    """Frequencies before over after, D = 64 and theta = 500,000: some 1, some 8, some between."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "max_position_embeddings": 131072}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    config = transformers.LlamaConfig(**sizes, rope_parameters={**scaling, "rope_theta": 500000.0})
    after, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    before = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    found = llama3_factors({"head_dim": 64, "rope_theta": 500000.0}, scaling)
    torch.testing.assert_close(found, before / after, rtol=1e-5, atol=0)
    assert found.min() == 1 and found.max() == 8 and ((found > 1.01) & (found < 7.9)).any()


def file_of(path, family, kind="F32"):
    """A random tiny model of a family as the `gguf` library writes it, by its own name table; and nothing of ours."""
    writer = gguf.GGUFWriter(path, family)
    eps = writer.add_layer_norm_eps if family == "gpt2" else writer.add_layer_norm_rms_eps
    eps(1e-6 if family != "gpt2" else 1e-5)
    for add, value in (
        (writer.add_context_length, 1024 if family == "gpt2" else 128), (writer.add_embedding_length, C),
        (writer.add_block_count, L),
        (writer.add_feed_forward_length, 4 * C if family == "gpt2" else F), (writer.add_head_count, H),
        (writer.add_head_count_kv, H if family == "gpt2" else K),
    ):  # fmt: skip
        add(value)
    if family in ("qwen3", "gemma2"):
        writer.add_key_length(128 if family == "qwen3" else 256)  # transformers goes by its defaults here
        writer.add_value_length(128 if family == "qwen3" else 256)
    if family == "gemma2":
        writer.add_sliding_window(4096)
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    writer.add_token_list([f"t{i}" for i in range(V)])
    model = transformers.AutoModelForCausalLM.from_config(MAKERS[family]())
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, L)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        values = draw(parameter.shape, seed).numpy()
        if family == "gpt2" and ".h." in name and values.ndim == 2:
            values = np.ascontiguousarray(values.T)  # as the converter does
        type = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        data = gguf.quants.quantize(values, type)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(theirs, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded_by_transformers(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model, dict(model.named_parameters())


@pytest.mark.parametrize("family", MAKERS)
def test_families_equal_transformers_loader(tmp_path, family):
    """Name by name and bit by bit; and its config says of the model what ours says."""
    file_of(tmp_path / "tiny.gguf", family)
    model, expected = loaded_by_transformers(tmp_path / "tiny.gguf")
    found = read_gguf(tmp_path / "tiny.gguf")
    assert same_tensors(dict(found.tensors), {n: p.detach() for n, p in expected.items()})
    ours = type(model.config)(**{k: v for k, v in found.config.items() if k not in ("torch_dtype", "architectures")})
    theirs, told = model.config.to_dict(), ours.to_dict()
    names = found.config.keys() & theirs.keys() - {"torch_dtype", "architectures", "_name_or_path", "n_inner"}
    for name in names | {"rope_parameters"} & theirs.keys():
        assert told[name] == pytest.approx(theirs[name], rel=1e-6) if isinstance(told[name], float) else (
            told[name] == theirs[name]
        ), name  # fmt: skip
    assert {"hidden_size", "vocab_size"} <= names or {"n_embd", "vocab_size"} <= names


BLOCKS = {name: (block, width) for name, block, width in TYPES.values()}


@pytest.mark.parametrize("kind", BLOCKS)
def test_each_type_is_dequantised_as_the_library_does(tmp_path, kind):
    """Random bytes for the embedding (256 wide), with scales that are finite: read in pieces, equal in one piece."""
    block, width = BLOCKS[kind]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (block, width)
    sizes = CONFIG | {"hidden_size": 256, "vocab_size": 700, "num_attention_heads": 16, "num_key_value_heads": 16}
    raw = np.random.default_rng(0).integers(0, 256, (700, 256 // block * width), np.uint8)
    halves = raw.view(np.uint16)
    halves &= 0xBFFF  # no exponent of all ones, in whatever halves the scales lie
    raw = halves.view(np.uint8)
    if kind == "F32":
        raw = raw.view(np.uint32) & np.uint32(0xBFFFFFFF)
        raw = raw.view(np.uint8)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(700, 256)
    assert np.isfinite(expected).all() and np.unique(expected).size > 50
    tensors = tiny(sizes)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for name in ("embedding_length", "context_length", "block_count", "feed_forward_length"):
        getattr(writer, f"add_{name}")(
            {"embedding_length": 256, "block_count": L, "feed_forward_length": F}.get(name, 128)
        )
    writer.add_head_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, L)
    for name, tensor in tensors.items():
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if name == "model.embed_tokens.weight":
            writer.add_tensor(theirs, raw, raw_dtype=gguf.GGMLQuantizationType[kind], raw_shape=raw.shape)
        else:
            writer.add_tensor(theirs, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "a.gguf").tensors["model.embed_tokens.weight"]
    assert found.shape == (700, 256) and np.array_equal(found.numpy(), expected)


def patched(file, old, new):
    data = file.read_bytes()
    assert data.count(old) >= 1
    file.write_bytes(data.replace(old, new, 1))
    return file


def claim(key, type, value):
    """A key with its type and value, as the file has it."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", type) + value


def word(number):
    return struct.pack("<I", number)


def changed(key, code, old, new):
    """A key with one number, before and after."""
    type = {"I": 4, "f": 6}[code]
    return claim(key, type, struct.pack("<" + code, old)), claim(key, type, struct.pack("<" + code, new))


OUTPUT_NORM = b"output_norm.weight" + word(1)
FOURTH = float(tiny()["model.norm.weight"][3])
REFUSALS = {
    "magic": (b"GGUF", b"GGML", "is no GGUF file: it begins with b'GGML'"),
    "version": (b"GGUF" + word(3), b"GGUF" + word(1), "version 1; versions 2 and 3"),
    "big-endian": (b"GGUF" + word(3), b"GGUF" + word(3)[::-1], "version 50331648"),
    "architecture": (b"\x05" + bytes(7) + b"llama", b"\x05" + bytes(7) + b"mamba", "'mamba'; read are llama, qwen2"),
    "missing key": (
        b"llama.embedding_length",
        b"llama.embedding_xxxxxx",
        "embedding_length is not there; a whole number",
    ),
    "key twice": (b"ggml.bos_token_id", b"ggml.eos_token_id", "has the key 'tokenizer.ggml.eos_token_id' twice"),
    "layers": (*changed("llama.block_count", "I", L, 2**30), "has 21 tensors; 1,073,741,824 layers have 9,663"),
    "fewer layers": (*changed("llama.block_count", "I", L, 1), "has unknown blk.1.attn_k"),
    "width": (*changed("llama.embedding_length", "I", C, 32), r"by the file's own keys it would be \("),
    "no heads": (*changed("llama.attention.head_count", "I", H, 0), "head_count is 0; a whole number above 0"),
    "eps": (*changed("llama.attention.layer_norm_rms_epsilon", "f", 1e-5, float("nan")), "epsilon is nan; a finite"),
    "tensor name": (b"blk.0.ffn_up.w", b"blk.0.ffn_xx.w", "lacks blk.0.ffn_up.weight and has unknown blk.0.ffn_xx"),
    "tensor twice": (b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight", "the tensor 'blk.1.ffn_up.weight' twice"),
    "not UTF-8": (b"t7\xc3\xa9", b"t7\xff\xff", "is not UTF-8"),
    "type": (
        OUTPUT_NORM + struct.pack("<QI", C, 0),
        OUTPUT_NORM + struct.pack("<QI", C, 16),
        "of type 16, which is not",
    ),
    "infinite": (
        struct.pack("<f", FOURTH),
        struct.pack("<f", float("inf")),
        "output_norm.weight holds values that are",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_file_and_reason(file, case):
    old, new, message = REFUSALS[case]
    patched(file, old, new)
    with pytest.raises(CheckpointError, match=f"tiny.gguf.*({message})") as told:
        dict(read_gguf(file).tensors)
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"llama.attention.causal": False}, CheckpointError, "reads its text in both directions"),
        ({"tokenizer.ggml.add_eos_token": True}, DataError, "ends every text with its end-of-text token"),
    ],
)
def test_files_for_another_use_are_refused(tmp_path, more, error, message):
    write_gguf(tmp_path / "a.gguf", CONFIG, tiny(), TOKENIZER | more, "F32")
    with pytest.raises(error, match=message):
        tokenizer_of(read_gguf(tmp_path / "a.gguf").tokenizer)
    plain = {key: not value for key, value in more.items()}  # what a model like ours says changes nothing
    write_gguf(tmp_path / "b.gguf", CONFIG, tiny(), TOKENIZER | plain, "F32")
    with pytest.raises(DataError, match="merges is not a list of texts"):  # the next thing that is looked at
        tokenizer_of(read_gguf(tmp_path / "b.gguf").tokenizer)


def test_cut_off_files_are_refused(file):
    data = file.read_bytes()
    for size in (0, 3, 4, 23, 100, 2000, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="tiny.gguf"):
            read_gguf(file)
    with pytest.raises(CheckpointError, match="is not a file"):
        read_gguf(file.parent)


class Limit:
    """At most `more` bytes of address space beyond what the process has: beyond it, MemoryError."""

    def __init__(self, more):
        self.more = more

    def __enter__(self):
        with open("/proc/self/statm") as stat:
            now = int(stat.read().split()[0]) * resource.getpagesize()
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + self.more, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_AS, self.before)


def seconds_to_load(path):
    """Whether it loads, and the processor time until it does or is refused. Any other error is the test's failure."""
    start = time.process_time()
    try:
        sound = all(torch.isfinite(tensor).all() for tensor in read_gguf(path).tensors.values())
        assert sound
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        sound = False
    return sound, time.process_time() - start


def mutated(data, draw, places):
    """Damage: bytes changed, the end cut off, a piece moved, a count or length made huge."""
    data = bytearray(data)
    way = draw.randrange(5)
    if way == 0:
        for _ in range(draw.choice((1, 3, 20))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif way == 1:
        del data[draw.randrange(len(data)) :]
    elif way == 2:
        at = draw.choice(places)
        data[at : at + 8] = struct.pack("<Q", draw.choice((0, 2**16, 2**24, 2**31, 2**40, 2**62, 2**64 - 1)))
    elif way == 3:
        at = draw.randrange(places[-1])  # the header, where every byte means something
        data[at] = draw.randrange(256)
    else:
        at, size = draw.randrange(places[-1]), draw.randrange(1, 40)
        data[at:at] = data[at : at + size] if draw.random() < 0.5 else b""
        del data[at : at + size]
    return bytes(data)


def test_two_thousand_damaged_files_are_refused_or_sound(file, tmp_path):
    """Each gives CheckpointError or finite tensors of the right shapes, in under 1 s, with under 200 MB."""
    data = file.read_bytes()
    end = data.index(b"blk.1.ffn_down.weight") + 60  # about where the numbers begin
    places = [
        i for i in range(4, end - 8) if data[i + 3 : i + 8] == bytes(5)
    ]  # small numbers of 8 bytes: lengths, counts
    assert len(places) > 200
    read_gguf(file).tensors["model.norm.weight"]  # what is imported on the way is not the file's doing
    draw, told = random.Random(0), []
    with Limit(200_000_000):
        with pytest.raises(MemoryError):  # the limit works
            bytearray(300_000_000)
        for _ in range(2000):
            (path := tmp_path / "damaged.gguf").write_bytes(mutated(data, draw, places))
            told.append(seconds_to_load(path))
    assert max(seconds for _, seconds in told) < 1
    assert 100 < sum(sound for sound, _ in told) < 1500  # a flipped bit of a weight is sound; much else is not


HUGE = {
    "keys": struct.pack("<QQ", 0, 2**63),
    "tensors": struct.pack("<QQ", 2**63, 0),
    "key": struct.pack("<QQQ", 0, 1, 2**40),
    "text": struct.pack("<QQ", 0, 1) + claim("a", 8, struct.pack("<Q", 150_000_000)),
    "numbers": struct.pack("<QQ", 0, 1) + claim("a", 9, struct.pack("<IQ", 0, 150_000_000)),
    "empty texts": struct.pack("<QQ", 0, 1) + claim("a", 9, struct.pack("<IQ", 8, 18_000_000)),
    "arrays in arrays": struct.pack("<QQ", 0, 1) + claim("a", 9, struct.pack("<IQ", 9, 10_000_000)),
    "many arrays": struct.pack("<QQ", 0, 60_000)
    + b"".join(claim(f"{i}", 9, struct.pack("<IQ", 8, 2**16) + bytes(8 * 2**16)) for i in range(60)),
}


@pytest.mark.parametrize("case", HUGE)
def test_huge_claims_that_a_large_file_could_hold(tmp_path, case):
    """A file of 200 MB of zeros after the claim: its length alone does not refute it."""
    with open(path := tmp_path / "huge.gguf", "wb") as file:
        file.write(b"GGUF" + word(3) + HUGE[case])
        file.truncate(200_000_000)
    with Limit(200_000_000):
        sound, seconds = seconds_to_load(path)
    assert not sound and seconds < 1


def test_tensors_that_share_bytes_are_refused(file):
    """A file of 1 MB must not unfold into a thousand tensors of 1 MB each."""
    data, name = bytearray(file.read_bytes()), b"blk.0.attn_k.weight"
    at = data.index(name) + len(name) + 4 + 16 + 4
    data[at : at + 8] = bytes(8)  # where the embedding lies
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="tiny.gguf.*share bytes"):
        read_gguf(file)


def test_write_refuses_what_gguf_cannot_say(tmp_path):
    path, tensors = tmp_path / "a.gguf", tiny()

    def refused(error, match, config=CONFIG, given=tensors, dtype="F32", tokenizer=TOKENIZER):
        with pytest.raises(error, match=match):
            write_gguf(path, config, given, tokenizer, dtype)
        assert list(tmp_path.iterdir()) == []  # and leaves nothing

    norm = tensors["model.norm.weight"]
    refused(ConfigError, "dtype=Q4_0 cannot be written as GGUF; choose F32, F16, Q8_0", dtype="Q4_0")
    refused(ConfigError, "model_type=mixtral cannot", CONFIG | {"model_type": "mixtral"})
    refused(ConfigError, "with sliding_window=64", CONFIG | {"model_type": "mistral", "sliding_window": 64})
    refused(ConfigError, "96 tokens, and the model's embedding 95 rows", CONFIG | {"vocab_size": 95})
    refused(ConfigError, "with attention_bias=True", CONFIG | {"attention_bias": True})
    refused(ConfigError, "longrope", CONFIG | {"rope_scaling": {"rope_type": "longrope"}})
    refused(ConfigError, "lacks hidden_size", {k: v for k, v in CONFIG.items() if k != "hidden_size"})
    refused(ConfigError, "is a dict", tokenizer={"tokenizer.x": {}})
    refused(
        CheckpointError, "lacks model.norm.weight", given={k: v for k, v in tensors.items() if k != "model.norm.weight"}
    )
    refused(CheckpointError, "unknown extra", given=tensors | {"extra": norm})
    refused(CheckpointError, r"norm.weight is \(3,\)", given=tensors | {"model.norm.weight": norm[:3]})
    refused(CheckpointError, "not finite", given=tensors | {"model.norm.weight": norm / 0})
    embed = tensors["model.embed_tokens.weight"]
    refused(
        CheckpointError, "not finite in F16", given=tensors | {"model.embed_tokens.weight": embed * 1e7}, dtype="F16"
    )


def test_unknown_rope_divisors_are_refused(tmp_path, monkeypatch):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0,
               "original_max_position_embeddings": 4096}  # fmt: skip
    write_gguf(tmp_path / "a.gguf", CONFIG | {"rope_scaling": scaling, "rope_theta": 5e5}, tiny(), TOKENIZER)
    assert ROPE_FREQS in read_header(tmp_path / "a.gguf").tensors
    with pytest.raises(CheckpointError, match="not Llama 3's divisors"):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.slow  # transformers takes 17 s to load it
def test_smollm2_equals_transformers_loader():
    """The real file, all 134,515,008 values: the greatest difference is 0."""
    found = smollm2()
    model, expected = loaded_by_transformers(smollm2_path())
    assert found.tensors.keys() == expected.keys()
    assert sum(tensor.numel() for tensor in expected.values()) == 134_515_008
    for name, tensor in expected.items():
        assert torch.equal(found.tensors[name], tensor), name
    assert (found.config["num_hidden_layers"], found.config["rope_theta"], found.config["rms_norm_eps"]) == (
        30,
        1e5,
        1e-5,
    )
    assert model.config.tie_word_embeddings == found.config["tie_word_embeddings"]
