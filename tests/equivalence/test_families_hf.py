"""Every family is Hugging Face's, weight by weight and logit by logit (transformers is the independent library)."""

import dataclasses

import pytest
import torch

from trivium.compose import component
from trivium.models.config import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RopeScaling,
)
from trivium.models.huggingface import Reader
from trivium.plugin import discover
from trivium.registry import MODELS

transformers = pytest.importorskip("transformers")

discover()
VOCAB = 97
LOGITS = {"rtol": 0, "atol": 1e-5}  # fp32, logits of order 1: the two sum in other orders
SMALL = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 56, "context": 64}

# tied and untied, grouped, multi-query and one key/value head a query head; another theta and eps; every kind of
# stretched positions, from a context of 16 or 64; windows shorter than the rows; heads wider than dim / heads
CONFIGS = {
    "llama tied grouped": ("llama", LlamaConfig(dim=32, layers=3, heads=4, kv_heads=2, ffn_dim=56, context=64)),
    "llama untied multi-query": (
        "llama",
        LlamaConfig(dim=48, layers=2, heads=6, kv_heads=1, ffn_dim=40, context=64, tied=False),
    ),
    "llama untied full": (
        "llama",
        LlamaConfig(
            dim=32, layers=2, heads=4, kv_heads=4, ffn_dim=64, context=64, tied=False, rope_theta=5e5, norm_eps=1e-3
        ),
    ),
    "llama linear": ("llama", LlamaConfig(**SMALL, rope_scaling=RopeScaling("linear", 4.0))),
    "llama dynamic": ("llama", LlamaConfig(**SMALL, rope_scaling=RopeScaling("dynamic", 2.0))),
    "llama llama3": ("llama", LlamaConfig(**SMALL, rope_scaling=RopeScaling("llama3", 8.0, 16, 1.0, 4.0))),
    "llama yarn": ("llama", LlamaConfig(**SMALL, rope_scaling=RopeScaling("yarn", 4.0, 16))),
    "llama yarn attention factor": (
        "llama",
        LlamaConfig(**SMALL, rope_scaling=RopeScaling("yarn", 4.0, 16, 1.0, 4.0, 4.0, 0.5, 1.3)),
    ),
    "mistral": ("mistral", MistralConfig(**SMALL, window=7)),
    "mistral no window": ("mistral", MistralConfig(**SMALL, window=0, tied=True)),
    "qwen2": ("qwen2", Qwen2Config(**SMALL)),
    "qwen2 untied": ("qwen2", Qwen2Config(**SMALL, tied=False)),
    "qwen3": ("qwen3", Qwen3Config(**SMALL, head_dim=16)),
    "gemma2": (
        "gemma2",
        Gemma2Config(**SMALL, head_dim=16, window=7, query_scale=24, attention_cap=1.5, logit_cap=1.0),
    ),
    "gemma2 uncapped": ("gemma2", Gemma2Config(**SMALL, head_dim=0, window=5, attention_cap=0, logit_cap=0)),
    "gpt2": ("gpt2", GPT2Config(dim=32, layers=3, heads=4, context=64)),
    "mixtral": ("mixtral", MixtralConfig(**SMALL, experts=5, active=2)),
    "mixtral window": ("mixtral", MixtralConfig(**SMALL, experts=3, active=2, window=7, tied=True)),
    "qwen3_moe": ("qwen3_moe", Qwen3MoeConfig(**SMALL, head_dim=16, experts=6, active=3)),
    "qwen3_moe shares": ("qwen3_moe", Qwen3MoeConfig(**SMALL, head_dim=16, experts=4, active=2, renormalise=False)),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def both(name, config):
    """Our model and Hugging Face's, made from our `hf_config`, with the same random weights copied by `hf_names`."""
    ours = MODELS.load(name)(config, VOCAB)
    raw = ours.hf_config() | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **raw), attn_implementation="eager"
    ).float()
    generator = torch.Generator().manual_seed(0)
    state = {}
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(ours_norm(key, ours) + 0.3 * noise if parameter.dim() == 1 else 0.1 * noise)
            state[ours.hf_names()[key]] = as_theirs(ours, key, parameter.detach()).clone()
    if hasattr(config, "experts"):  # in memory theirs are stacked: its own reader makes them of what a file holds
        theirs, told = type(theirs).from_pretrained(
            None, config=theirs.config, state_dict=state, attn_implementation="eager", output_loading_info=True
        )
        missing, unexpected = told["missing_keys"], told["unexpected_keys"]
    else:
        missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tied else set())
    if config.tied:
        theirs.tie_weights()
    return ours.eval(), theirs.eval()


def on_file(model, tensors):
    """Tensors of transformers under the names, and in the form, of its files."""
    return transformers.core_model_loading.revert_weight_conversion(model, dict(tensors))


def ours_norm(key, model):
    return 0.0 if key.endswith("bias") or type(model).__name__ == "Gemma2" else 1.0


def as_theirs(model, key, tensor):
    return tensor.t() if key.endswith(model.hf_transposed or ("\0",)) else tensor


def logits_of(model, tokens, positions=None, cache=None):
    if positions is None:
        positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return model.head(model(tokens, positions, cache=cache))


def draw(*shape, seed=1):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS)
def pair(request):
    return both(*CONFIGS[request.param])


@torch.no_grad()
def test_logits_equal_transformers(pair):
    ours, theirs = pair
    tokens = draw(3, 40)
    expected = theirs(tokens).logits
    assert expected.std() > 0.1  # not all alike: the tolerance means something
    torch.testing.assert_close(logits_of(ours, tokens), expected, **LOGITS)


@torch.no_grad()
def test_logits_of_shifted_positions_equal_transformers(pair):
    """Explicit positions (a document in the middle of a row) reach the rotary angles as they do there."""
    ours, theirs = pair
    tokens, positions = draw(2, 10), torch.arange(20, 30).expand(2, -1)
    torch.testing.assert_close(
        logits_of(ours, tokens, positions), theirs(tokens, position_ids=positions).logits, **LOGITS
    )


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 24, [7, 17], [23, 1], [5, 5, 5, 9]])
def test_chunked_prefill_equals_transformers(pair, chunks):
    """24 tokens read in pieces through the cache: the logits of one pass."""
    ours, theirs = pair
    tokens = draw(2, 24)
    cache, start, found = ours.new_cache(2, 30), 0, []
    for size in chunks:
        here = slice(start, start + size)
        found.append(logits_of(ours, tokens[:, here], torch.arange(start, start + size).expand(2, -1), cache))
        start += size
    torch.testing.assert_close(torch.cat(found, 1), theirs(tokens).logits, **LOGITS)


@torch.no_grad()
def test_cached_decode_of_ragged_rows_equals_transformers(pair):
    """Prompts of 3, 9 and 1 tokens padded on the right to 9, then 12 tokens each, one at a time: every row's logits are
    those that it has alone in transformers. One row leaves after 5 steps and the cache grows after 8."""
    ours, theirs = pair
    lengths = [3, 9, 1]
    full = draw(3, 21)
    prompts = torch.full((3, 9), 5)  # whatever lies in the padding
    for b, n in enumerate(lengths):
        prompts[b, :n] = full[b, :n]
    cache = ours.new_cache(3, 17)
    first = logits_of(ours, prompts, torch.arange(9).expand(3, -1), cache)
    alone = [theirs(full[b : b + 1, : n + 12]).logits[0] for b, n in enumerate(lengths)]
    for b, n in enumerate(lengths):
        torch.testing.assert_close(first[b, n - 1], alone[b][n - 1], **LOGITS)
    rows = [0, 1, 2]
    for step in range(12):
        if step == 5:
            rows = [2, 1]
            kept = ours.new_cache(2, 17)
            kept.keys[:], kept.values[:] = cache.keys[:, [2, 1]], cache.values[:, [2, 1]]
            cache = kept
        if step == 8:
            longer = ours.new_cache(2, 40)
            longer.copy_from(cache)
            cache = longer
        at = [lengths[b] + step for b in rows]
        token = torch.stack([full[b, p] for b, p in zip(rows, at, strict=True)])[:, None]
        found = logits_of(ours, token, torch.tensor(at)[:, None], cache)
        for i, (b, p) in enumerate(zip(rows, at, strict=True)):
            torch.testing.assert_close(found[i, 0], alone[b][p], **LOGITS)


def test_gradients_equal_transformers(pair):
    """The gradient of the summed cross-entropy, to 1e-4 of each tensor's largest entry."""
    ours, theirs = pair
    tokens = draw(2, 20)

    def loss_of(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

    loss_of(logits_of(ours, tokens)).backward()
    loss_of(theirs(tokens).logits).backward()
    expected = on_file(theirs, {name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        gradient = expected[ours.hf_names()[name]]
        largest = gradient.abs().max().item()
        assert largest > 0
        gradient = as_theirs(ours, name, gradient)
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-4 * largest, msg=name)


def test_hf_names_name_every_tensor_of_transformers(pair):
    """One name for each of ours and each of theirs; a tied head is not a tensor of its own on either side."""
    ours, theirs = pair
    assert set(ours.hf_names()) == {n for n, _ in ours.named_parameters()}
    assert len(set(ours.hf_names().values())) == len(ours.hf_names())
    assert set(ours.hf_names().values()) == set(on_file(theirs, theirs.named_parameters()))
    assert ours.num_parameters == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_survive_hugging_faces_form(case):
    """Through the dictionary that transformers itself writes, and through ours: the same settings and defaults."""
    name, config = CONFIGS[case]
    ours, theirs = both(name, config)
    free = dict.fromkeys(config.runtime_fields)
    for raw in (ours.hf_config(), theirs.config.to_dict()):
        found = component("model", {"name": name, **type(ours).settings_from_hf(Reader(raw, "config.json"))})
        assert dataclasses.asdict(found.config) | free == dataclasses.asdict(config) | free


@torch.no_grad()
@pytest.mark.parametrize(
    "case", ["llama tied grouped", "mistral", "qwen3", "gemma2", "gpt2", "mixtral window", "qwen3_moe"]
)
def test_packed_documents_are_computed_as_they_are_alone(case):
    """Three documents of 5, 12 and 11 tokens in a row of 30, the window of 7 within and across them."""
    ours, theirs = both(*CONFIGS[case])
    lengths, tokens = [5, 12, 11], draw(1, 30)
    segments, positions = torch.zeros(1, 30, dtype=torch.long), torch.zeros(1, 30, dtype=torch.long)
    start = 0
    for number, n in enumerate(lengths, 1):
        segments[0, start : start + n], positions[0, start : start + n] = number, torch.arange(n)
        start += n
    packed = ours.head(ours(tokens, positions, segments))
    start = 0
    for n in lengths:
        alone = theirs(tokens[:, start : start + n]).logits
        torch.testing.assert_close(packed[:, start : start + n], alone, **LOGITS)
        start += n


@torch.no_grad()
def test_long_rows_stretch_positions():
    """Beyond a context of 16 the dynamic base grows, and what is computed differs from an unscaled model."""
    config = LlamaConfig(**{**SMALL, "context": 16}, rope_scaling=RopeScaling("dynamic", 2.0))
    ours, theirs = both("llama", config)
    plain, _ = both("llama", dataclasses.replace(config, rope_scaling=RopeScaling()))
    tokens = draw(1, 40)
    torch.testing.assert_close(logits_of(ours, tokens), theirs(tokens).logits, **LOGITS)
    assert (logits_of(ours, tokens) - logits_of(plain, tokens)).abs().max() > 1e-2
