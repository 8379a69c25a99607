"""Model FLOPs utilisation, worked out by hand; an unknown device has none."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.objectives.config import NextTokenConfig
from trivium.objectives.next_token import NextToken
from trivium.training import objective_module
from trivium.training.flops import mfu, peak_flops, step_flops
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.types import TokenBatch

DIM, LAYERS, FFN, VOCAB = 16, 2, 24, 61
BLOCK = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24
"""Weights of one block's matrices: q and out 16 x 16, k and v 16 x 8 (one of two heads), three of 16 x 24."""


def small():
    model = Llama(LlamaConfig(dim=DIM, layers=LAYERS, heads=2, kv_heads=1, ffn_dim=FFN, context=64), VOCAB)
    model.init_weights(seed=0)
    return model


@pytest.mark.parametrize(
    ("device", "number_format", "teraflops"),
    [
        # names as torch.cuda.get_device_name gives them; H100 SXM5's sheet: 1,979 with sparsity, so 989 without
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", 66.9),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("A100-SXM4-40GB", "bf16", 312.0),  # as older drivers say it
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA A10", "fp16", 125.0),
        ("Tesla T4", "fp16", 65.0),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-PCIE-32GB", "fp16", 112.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 3090", "bf16", 71.0),
    ],
)
def test_peak_is_the_data_sheet_s(device, number_format, teraflops):
    assert peak_flops(device, number_format) == pytest.approx(teraflops * 1e12, rel=1e-9)


@pytest.mark.parametrize(
    ("device", "number_format"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),  # a part of the device
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),  # another chip
        ("NVIDIA GeForce RTX 3090 Ti", "bf16"),
        ("NVIDIA A10G", "bf16"),  # not an A10
        ("Tesla T4", "bf16"),  # emulated
        ("Tesla V100-SXM2-16GB", "tf32"),
        ("NVIDIA H100 80GB HBM3", "fp64"),
        ("Some new device", "bf16"),
    ],
)
def test_unknown_peak_is_none(device, number_format):
    assert peak_flops(device, number_format) is None


def test_mfu_by_hand():
    """nanoGPT's own example: 124 M weights, 12 layers of width 768, rows of 1,024: 6 N + 12 L C T = 857.1 MFLOP a token
    (with full attention); 178,000 tokens/s on one A100 are 0.489 of 312 TFLOP/s."""
    per_token = 6 * 123_977_472 + 12 * 12 * 768 * 1024
    assert mfu(178_000, per_token, 312e12) == pytest.approx(0.489, abs=5e-4)


def test_step_counts_the_attention_within_documents_and_the_head_where_it_is_met():
    """Documents of 7 and 3 tokens, of which 4 are trained on. Matrices: 6 FLOPs a weight and token. Attention: 12 C L
    for each two tokens of a document, and half of the 7 * 7 + 3 * 3 are visible."""
    attended = sum(range(1, 8)) + sum(range(1, 4))
    expected = 6 * LAYERS * BLOCK * 10 + 6 * VOCAB * DIM * 4 + 12 * LAYERS * DIM * (7 * 7 + 3 * 3) / 2
    assert step_flops(small(), 10, 4, attended) == pytest.approx(expected, rel=1e-12)


def test_one_whole_row_is_what_the_model_says():
    model = small()
    assert step_flops(model, 32, 32, 32 * 33 // 2) == pytest.approx(32 * model.flops_per_token(32), rel=1e-12)


def test_reward_model_s_tokens_do_not_meet_the_vocabulary():
    model = small()
    model.add_score_head()
    assert step_flops(model, 10, 4, 55) == pytest.approx(6 * LAYERS * BLOCK * 10 + 12 * LAYERS * DIM * 100 / 2)


def test_frozen_weights_have_no_figure():
    """A frozen weight needs four FLOPs, not six; what an adapter needs is not in the formula."""
    model = small()
    next(model.blocks.parameters()).requires_grad_(False)
    assert step_flops(model, 10, 4, 55) is None


def rows_of_a_run(monkeypatch, peak):
    """The rows of two steps of two micro-batches of 3 rows: documents of 5 and 3 tokens and 2 of padding in each."""
    monkeypatch.setattr(objective_module, "peak_of", lambda device, compute: peak)
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0, 0]).expand(3, -1)
    segments = torch.tensor([1] * 5 + [2] * 3 + [0] * 2).expand(3, -1)
    tokens = torch.arange(30).view(3, 10)
    labels = torch.where((positions > 0) & (segments > 0), tokens, -100)
    batch = TokenBatch(tokens, labels, positions, segments)
    settings = StepSettings(grad_clip=1.0, seed=0)
    module = ObjectiveModule(
        small(), NextToken(NextTokenConfig()), lambda m: torch.optim.SGD(m.parameters(), 0.1), lambda _: 1.0, settings
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([[batch, batch]] * 2, batch_size=None))
    return list(module.rows())


def test_rows_have_mfu_where_the_peak_is_known(monkeypatch):
    """48 real tokens a step, 36 of them trained; 5 * 5 + 3 * 3 pairs in each of 6 rows; a device of 1 GFLOP/s."""
    flops = 6 * LAYERS * BLOCK * 48 + 6 * VOCAB * DIM * 36 + 12 * LAYERS * DIM * 6 * (5 * 5 + 3 * 3) / 2
    for row in rows_of_a_run(monkeypatch, 1e9):
        assert row["mfu"] == pytest.approx(flops / row["step_seconds"] / 1e9, rel=1e-9)


def test_rows_have_no_mfu_where_it_is_not(monkeypatch):
    for row in rows_of_a_run(monkeypatch, None):
        assert "mfu" not in row and "targets" not in row and "attended" not in row
        assert 50e6 < row["memory"] < 50e9
