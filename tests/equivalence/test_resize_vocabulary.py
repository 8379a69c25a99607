"""A larger vocabulary: the old tokens as they were, the new ones the mean of all old."""

import pytest
import torch
from helpers import tiny_llama

from trivium.errors import CheckpointError
from trivium.models.weights import resize_vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_resize_keeps_the_old_and_adds_their_mean(tied):
    """10 tokens to 13: old logits to the bit, and each new logit is the mean of the ten old ones."""
    model = tiny_llama(10, tied=tied)
    tokens, positions = torch.tensor([[1, 5, 9, 2]]), torch.arange(4)[None]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = model.head(model(tokens, positions))
    resize_vocabulary(model, 13)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and (model.head.weight is model.embed.weight) == tied
    assert (model.vocab_size, model.embed.num_embeddings, model.head.out_features) == (13, 13, 13)
    for name, old in before.items():
        new = after[name]
        assert torch.equal(new[: len(old)], old)
        if len(new) > len(old):
            assert len(new) == 13 and torch.equal(new[10:], old.mean(0, keepdim=True).expand(3, -1))
    grown = model.head(model(tokens, positions))
    torch.testing.assert_close(grown[..., :10], logits)
    torch.testing.assert_close(grown[..., 10:], logits.mean(-1, keepdim=True).expand(-1, -1, 3))
    model.head(model(torch.tensor([[12, 11]]), torch.arange(2)[None])).sum().backward()
    assert after["embed.weight"].grad is not None and after["embed.weight"].grad[12].abs().sum() > 0


def test_resize_to_the_same_size_changes_nothing_and_shrinking_is_refused():
    model = tiny_llama(10)
    before = model.embed.weight.detach().clone()
    resize_vocabulary(model, 10)
    assert torch.equal(model.embed.weight, before)
    with pytest.raises(CheckpointError, match="a vocabulary of 10 tokens cannot shrink to 9"):
        resize_vocabulary(model, 9)


def test_resize_keeps_frozen_weights_frozen():
    model = tiny_llama(10, tied=False)
    model.embed.weight.requires_grad_(False)
    resize_vocabulary(model, 12)
    assert not model.embed.weight.requires_grad and model.head.weight.requires_grad


def test_spare_rows_become_the_mean_of_those_in_use():
    """Ten rows, of which seven belong to tokens: nine tokens need no further row, and two of the spare ones."""
    model = tiny_llama(10, tied=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    resize_vocabulary(model, 10, used=7)
    for name in ("embed.weight", "head.weight"):
        new = model.get_parameter(name)
        assert new.shape == before[name].shape and new[:7].equal(before[name][:7])
        torch.testing.assert_close(new[7:], before[name][:7].mean(0, keepdim=True).expand(3, -1))
