"""Our Llama is Hugging Face's, weight by weight and logit by logit (transformers is the independent library)."""

import pytest
import torch

from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama

transformers = pytest.importorskip("transformers")

VOCAB = 97
LOGITS = {"rtol": 0, "atol": 1e-5}  # fp32, logits of order 1: the two sum in other orders

# tied and untied, grouped, multi-query and one key/value head a query head; another theta and eps
CONFIGS = {
    "tied-grouped": LlamaConfig(dim=32, layers=3, heads=4, kv_heads=2, ffn_dim=56, context=64),
    "untied-multi-query": LlamaConfig(dim=48, layers=2, heads=6, kv_heads=1, ffn_dim=40, context=64, tied=False),
    "untied-full": LlamaConfig(
        dim=32, layers=2, heads=4, kv_heads=4, ffn_dim=64, context=64, tied=False, rope_theta=5e5, norm_eps=1e-3
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def both(config):
    """Our model and Hugging Face's with the same random weights, norms included, copied by `hf_names`."""
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied,
            attn_implementation="eager",
        )
    ).float()
    ours = Llama(config, VOCAB)
    generator = torch.Generator().manual_seed(0)
    state = {}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.1 * noise)
            state[ours.hf_names()[name]] = parameter.detach().clone()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tied else [])
    if config.tied:
        theirs.tie_weights()
    return ours.eval(), theirs.eval()


def logits_of(model, tokens, positions=None, cache=None):
    if positions is None:
        positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return model.head(model(tokens, positions, cache=cache))


def draw(*shape, seed=1):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS)
def pair(request):
    return both(CONFIGS[request.param])


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
            cache.select(torch.tensor([2, 1]))
        if step == 8:
            cache.grow(40)
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
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[ours.hf_names()[name]].grad
        largest = gradient.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-4 * largest, msg=name)


def test_hf_names_name_every_tensor_of_transformers(pair):
    """One name for each of ours and each of theirs; a tied head is not a tensor of its own on either side."""
    ours, theirs = pair
    assert set(ours.hf_names()) == {n for n, _ in ours.named_parameters()}
    assert len(set(ours.hf_names().values())) == len(ours.hf_names())
    assert set(ours.hf_names().values()) == {n for n, _ in theirs.named_parameters()}
    assert ours.num_parameters == sum(p.numel() for p in theirs.parameters())
