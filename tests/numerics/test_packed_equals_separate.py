"""Packing and padding change where tokens lie, never what is computed from them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_llama

from trivium.data.collate import collate
from trivium.data.table import TokenTable
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.objectives.config import NextTokenConfig
from trivium.objectives.logprobs import shift
from trivium.objectives.next_token import NextToken

VOCAB, PAD = 53, 0
LENGTHS = [7, 2, 11, 5]


def table_of(seed=0, lengths=LENGTHS):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, VOCAB, sum(lengths)).astype(np.int32)
    trained = generator.random(sum(lengths)) < 0.7
    return TokenTable(tokens, trained, np.cumsum([0, *lengths]), [str(i) for i in range(len(lengths))])


def small_llama():
    return tiny_llama(VOCAB, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, context=64, init_std=0.2)


def token_losses(model, batch):
    states, targets = shift(model(batch.tokens, batch.positions, batch.segments), batch.labels)
    return F.cross_entropy(model.head(states), targets, reduction="none")


def loss_and_gradients(batches):
    model, objective = small_llama(), NextToken(NextTokenConfig())
    total = sum(objective(model, batch).loss_sum for batch in batches)
    total.backward()
    return total.detach(), {n: p.grad for n, p in model.named_parameters()}


# the same four documents: each alone and unpadded; in one row; in two padded rows, in another order
ALONE = [collate(table_of(), [[d]], n, PAD) for d, n in enumerate(LENGTHS)]
PACKED = collate(table_of(), [[0, 1, 2, 3]], 30, PAD)
TWO_ROWS = collate(table_of(), [[2, 1], [3, 0]], 16, PAD)


def test_packed_token_losses_equal_separate_ones():
    """Losses of 3 to 10 nats in fp32: 1e-5 is the design's bound (design/numbers.md, section 3)."""
    model = small_llama()
    separate = [token_losses(model, batch) for batch in ALONE]
    torch.testing.assert_close(token_losses(model, PACKED), torch.cat(separate), rtol=0, atol=1e-5)
    in_order = torch.cat([separate[d] for d in (2, 1, 3, 0)])
    torch.testing.assert_close(token_losses(model, TWO_ROWS), in_order, rtol=0, atol=1e-5)


def test_packed_token_losses_would_show_attention_across_documents():
    """Without `segments` the same losses are off by far more than the tolerance."""
    model = small_llama()
    right = token_losses(model, PACKED)
    leaking = token_losses(model, type(PACKED)(PACKED.tokens, PACKED.labels, PACKED.positions, None))
    assert (leaking - right).abs().max() > 1e-2


def test_packed_gradients_equal_separate_ones():
    """Gradients of a sum of losses, up to about 30 here: 1e-5 relative to the largest is fp32's rounding."""
    loss, expected = loss_and_gradients(ALONE)
    for batches in ([PACKED], [TWO_ROWS]):
        other_loss, found = loss_and_gradients(batches)
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item(), msg=name)


@torch.no_grad()
def test_document_is_blind_to_the_one_before_it():
    """Other tokens in document 0 (columns 0-6): columns 7-24 stay as they were; masked keys weigh exactly 0."""
    model = small_llama()
    changed = PACKED.tokens.clone()
    changed[:, :7] = 1 + (changed[:, :7] + 17) % (VOCAB - 1)
    before = model(PACKED.tokens, PACKED.positions, PACKED.segments)
    after = model(changed, PACKED.positions, PACKED.segments)
    assert (after[:, :7] - before[:, :7]).abs().max() > 0.1
    torch.testing.assert_close(after[:, 7:25], before[:, 7:25], rtol=0, atol=1e-6)


@torch.no_grad()
def test_document_is_blind_to_later_tokens():
    """Other tokens from column 12 on (inside document 2): columns 0-11 stay as they were."""
    model = small_llama()
    changed = PACKED.tokens.clone()
    changed[:, 12:] = 1 + (changed[:, 12:] + 17) % (VOCAB - 1)
    before = model(PACKED.tokens, PACKED.positions, PACKED.segments)
    after = model(changed, PACKED.positions, PACKED.segments)
    assert (after[:, 12:25] - before[:, 12:25]).abs().max() > 0.1
    torch.testing.assert_close(after[:, :12], before[:, :12], rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [25, 26, 40])
def test_padding_changes_neither_count_nor_loss_nor_gradients(length):
    """25 tokens in rows of 25, 26 and 40, against the documents alone; the pad id's embedding gets exactly nothing."""
    batch = collate(table_of(), [[0, 1, 2, 3]], length, PAD)
    objective = NextToken(NextTokenConfig())
    assert objective.count(batch).item() == sum(objective.count(b).item() for b in ALONE)
    loss, expected = loss_and_gradients(ALONE)
    padded_loss, found = loss_and_gradients([batch])
    torch.testing.assert_close(padded_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        assert torch.isfinite(found[name]).all()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item(), msg=name)


@torch.no_grad()
def test_padding_is_never_read_and_never_nan():
    """Whatever lies in padding, real columns do not change; a row of padding only is finite (no empty softmax)."""
    model = small_llama()
    tokens = PACKED.tokens.clone()
    tokens[:, 25:] = 9
    before = model(PACKED.tokens, PACKED.positions, PACKED.segments)
    after = model(tokens, PACKED.positions, PACKED.segments)
    torch.testing.assert_close(after[:, :25], before[:, :25], rtol=0, atol=1e-6)
    empty = torch.zeros(1, 5, dtype=torch.long)
    assert torch.isfinite(model(empty, empty, empty)).all()


def test_padding_embedding_gets_no_gradient():
    """Untied, so that the head's share does not hide it: the pad id's row is exactly 0."""
    config = LlamaConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, context=64, tied=False, init_std=0.2)
    model = Llama(config, VOCAB)
    model.init_weights(seed=1)
    NextToken(NextTokenConfig())(model, TWO_ROWS).loss_sum.backward()
    assert (TWO_ROWS.tokens == PAD).any()
    assert torch.equal(model.embed.weight.grad[PAD], torch.zeros(32))
