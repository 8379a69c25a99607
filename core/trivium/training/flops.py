"""Model FLOPs utilisation: the share of a device's peak that the model itself needs.

Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311. Only what the model needs counts: six FLOPs for
each weight that a token meets, and the attention to tokens of its own document. Activations made anew
(`trainer.recompute`), a teacher's or a reference's forward pass and sampling are work besides, and lower the figure.
"""

from __future__ import annotations

import re

import torch

from trivium.models.protocol import CausalLM

_H100 = {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}
_H100_NVL = {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}
_A100 = {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}
PEAKS: dict[str, dict[str, float]] = {
    r"NVIDIA GB200": {"bf16": 2500.0, "fp16": 2500.0, "tf32": 1250.0, "fp32": 80.0},
    r"NVIDIA B200": {"bf16": 2250.0, "fp16": 2250.0, "tf32": 1125.0, "fp32": 75.0},
    r"NVIDIA GH200 \d+GB?( HBM3e?)?": _H100,
    r"NVIDIA H200": _H100,
    r"NVIDIA H200 NVL": _H100_NVL,
    r"NVIDIA H100 80GB HBM3": _H100,
    r"NVIDIA H100 NVL": _H100_NVL,
    r"NVIDIA H100 PCIe": {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp32": 51.2},
    r"NVIDIA H20": {"bf16": 148.0, "fp16": 148.0, "tf32": 74.0, "fp32": 44.0},
    r"(NVIDIA )?A[18]00[- ](SXM4[- ]|PCIE-|PG509-)?\d+GB( PCIe)?": _A100,
    r"NVIDIA L4": {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3},
    r"NVIDIA L40": {"bf16": 181.0, "fp16": 181.0, "tf32": 90.5, "fp32": 90.5},
    r"NVIDIA L40S": {"bf16": 362.0, "fp16": 362.0, "tf32": 183.0, "fp32": 91.6},
    r"NVIDIA A10": {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2},
    r"NVIDIA A40": {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4},
    r"NVIDIA RTX A6000": {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7},
    # GeForce cards sum in fp32 at half the rate they sum in fp16 at; a matrix product of torch sums in fp32
    r"NVIDIA GeForce RTX 5090": {"bf16": 209.5, "fp16": 209.5, "tf32": 104.8, "fp32": 104.8},
    r"NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    r"NVIDIA GeForce RTX 3090": {"bf16": 71.0, "fp16": 71.0, "tf32": 35.6, "fp32": 35.6},
    # older than bf16 and tf32: these are emulated, at no rate that a data sheet gives
    r"(NVIDIA |Tesla )T4": {"fp16": 65.0, "fp32": 8.1},
    r"(NVIDIA |Tesla )V100-SXM[23]-\d+GB": {"fp16": 125.0, "fp32": 15.7},
    r"(NVIDIA |Tesla )V100-PCIE-\d+GB": {"fp16": 112.0, "fp32": 14.0},
    r"AMD Instinct MI300X": {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4},
}
"""A device's whole name, as torch has it -> dense TFLOP/s by number format, from the vendors' data sheets.

Where a sheet gives a rate with 2:4 sparsity, this is half of it. A part of a device (MIG) and a laptop's namesake have
names that match none of these: no figure is better than one against another device's peak.
"""


def peak_flops(device_name: str, number_format: str) -> float | None:
    """Dense FLOP/s of matrix products in "bf16", "fp16", "tf32" or "fp32"; None for what we do not know.

    >>> peak_flops("NVIDIA A100-SXM4-80GB", "bf16"), peak_flops("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16")
    (312000000000000.0, None)
    """
    found = next((rates for name, rates in PEAKS.items() if re.fullmatch(name, device_name)), {})
    return found[number_format] * 1e12 if number_format in found else None


def peak_of(device: torch.device, compute: torch.dtype | None) -> float | None:
    """The peak of a device in the number format of its matrix products (None: fp32); None where it is not known."""
    if device.type != "cuda":
        return None
    exact = torch.get_float32_matmul_precision() == "highest"
    formats = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32" if exact else "tf32"}
    return peak_flops(torch.cuda.get_device_name(device), formats.get(compute or torch.float32, ""))


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation, a share of 1. peak: FLOP/s of all devices together.

    A model that needs 7.5 GFLOP a token (1.25e9 weights), at 15,600 tokens/s on one A100:

    >>> mfu(15_600, 7.5e9, 312e12)
    0.375
    """
    return tokens_per_second * flops_per_token / peak


def step_flops(model: CausalLM, tokens: int, targets: int, attended: int) -> float | None:
    """What a step needs: `tokens` real ones, of which `targets` met the head; None where not all weights are trained.

    attended: the sum, over the tokens, of how many they attend to, themselves included: T (T + 1) / 2 for a document of
    T tokens. Packed documents do not attend to one another, so this is less than the length of a row would give.
    """
    head = 0 if model.score is not None else targets  # a reward model's tokens meet a head of one column
    trained = [*model.blocks.parameters(), *([model.head.weight] if head else [])]
    if not tokens or not all(p.requires_grad for p in trained):
        return None
    context = 2 * attended / tokens - 1  # T for a document of T tokens, of which a token attends to half on average
    return tokens * model.flops_per_token(context) - 6 * model.head.weight.numel() * (tokens - head)  # type: ignore[arg-type]
