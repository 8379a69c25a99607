"""Peak memory and time of the loss, chunked against dense: 4,096 tokens of width 576 meet a vocabulary of 49,152.

    python benchmarks/loss_memory.py        # each way in a process of its own; forward and backward, fp32

Memory is what the process holds at most beyond its inputs and weights (on a GPU: what the allocator gave).
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from trivium.objectives.logprobs import logprobs, token_sums
from trivium.training.memory import peak_bytes, reset_peak

TOKENS, WIDTH, VOCAB = 4096, 576, 49_152


def dense(head: nn.Linear, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(states).float(), targets, reduction="sum")


def chunked(head: nn.Linear, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_sums(head, states, targets, lambda logits, y: (-logprobs(logits, y),))[0]


WAYS = {"dense": dense, "chunked": chunked}


def measure(name: str) -> None:
    """Print bytes and seconds of one way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=False).to(device)
    states = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
    targets = torch.randint(VOCAB, (TOKENS,), device=device)
    WAYS[name](head, states[:256], targets[:256]).backward()  # libraries, gradients
    reset_peak()
    before, began = peak_bytes(), time.perf_counter()
    WAYS[name](head, states, targets).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print(peak_bytes() - before, time.perf_counter() - began)


def main() -> None:
    """Every way in a process of its own, and what the chunked one needs of the dense one's."""
    found = {}
    for name in WAYS:
        said = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True).stdout
        found[name] = [float(x) for x in said.split()]
        print(f"{name:<8} {found[name][0] / 1e9:6.2f} GB  {found[name][1]:6.2f} s")
    memory, seconds = (found["chunked"][i] / found["dense"][i] for i in (0, 1))
    print(f"chunked / dense: memory {memory:.2f}, time {seconds:.2f}")


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
