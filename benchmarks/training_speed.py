"""Tokens a second of one training step: this project, the Hugging Face Trainer and bare PyTorch loops, in one run.

    pip install -e ".[bench]"
    python benchmarks/training_speed.py                  # fp32; --precision bf16; --compile; --steps 24; --rounds 6

One Llama (6 layers, width 256, vocabulary 4,096, 5.8 M parameters), batches of 16 x 256 tokens, AdamW, clipping at 1.0.
Every way is timed in turn, `--rounds` times, so that a slow spell of the machine meets all of them, each in a process
of its own. A round's figure is its median step, a ratio is of two figures of one round, and what is printed is the
median over the rounds. Absolute speeds are of one machine on one day.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROWS, LENGTH, VOCAB = 16, 256, 4096
SIZES = {"dim": 256, "layers": 6, "heads": 8, "kv_heads": 8, "ffn_dim": 688, "context": 256}


def ours(steps: int, precision: str, compiled: bool, _device: str) -> list[float]:
    """Seconds of each step, as metrics.jsonl has them: a real run of `launch.py`, saving and logging apart."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as runs:
        sizes = [f"model.{k}={v}" for k, v in SIZES.items()]
        command = [
            sys.executable, str(root / "launch.py"), "phase=pretrain", "model=llama", *sizes, f"runs={runs}", "name=b",
            f"tokenizer.vocab_size={VOCAB}", f"batch.size={ROWS}", f"batch.micro_size={ROWS}", f"batch.length={LENGTH}",
            f"trainer.max_steps={steps}", "validation.every_steps=0", "samples.every_steps=0",
            f"checkpoint.every_steps={steps}", f"precision={precision}", f"trainer.compile={str(compiled).lower()}",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(runs) / "b" / "metrics.jsonl").read_text().splitlines()]
    return [row["step_seconds"] for row in rows]


def batches(steps: int, device: str) -> list[torch.Tensor]:
    """Random tokens, the same for every way."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (ROWS, LENGTH), generator=generator).to(device) for _ in range(steps)]


def bare(steps: int, precision: str, compiled: bool, device: str) -> list[float]:
    """A loop that does nothing but train: our model and loss, torch's fused AdamW."""
    from trivium.models.config import LlamaConfig
    from trivium.models.llama import Llama
    from trivium.objectives.config import NextTokenConfig
    from trivium.objectives.next_token import NextToken
    from trivium.types import TokenBatch

    model = Llama(LlamaConfig(**SIZES), VOCAB).to(device)
    model.init_weights(0)
    if compiled:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    objective = NextToken(NextTokenConfig())
    positions = torch.arange(LENGTH, device=device).expand(ROWS, LENGTH).contiguous()
    took = []
    for tokens in batches(steps, device):
        began = time.perf_counter()
        labels = tokens.clone()
        labels[:, 0] = -100
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(model, TokenBatch(tokens, labels, positions)).loss_sum / (ROWS * (LENGTH - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        took.append(_since(began, device))
    return took


def dense(steps: int, precision: str, compiled: bool, device: str) -> list[float]:
    """A loop around transformers' own Llama, which makes all logits at once."""
    model = _hf_model().to(device)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    took = []
    for tokens in batches(steps, device):
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        took.append(_since(began, device))
    return took


def hf_trainer(steps: int, precision: str, compiled: bool, device: str) -> list[float]:
    """transformers.Trainer with its defaults but for the optimizer's kernel (fused) and reports (none)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            _since(0, device)
            marks.append(time.perf_counter())

    data = [{"input_ids": row, "labels": row} for tokens in batches(steps, "cpu") for row in tokens]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=ROWS, max_steps=steps, report_to=[], save_strategy="no",
            logging_steps=10_000, optim="adamw_torch_fused", bf16=precision == "bf16", use_cpu=device == "cpu",
            torch_compile=compiled, learning_rate=1e-3, disable_tqdm=True, dataloader_pin_memory=device != "cpu",
        )  # fmt: skip
        Trainer(model=_hf_model(), args=arguments, train_dataset=data, callbacks=[Clock()]).train()  # type: ignore[arg-type]
    return [after - before for before, after in zip(marks, marks[1:], strict=False)]


def _hf_model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=SIZES["dim"], num_hidden_layers=SIZES["layers"],
            num_attention_heads=SIZES["heads"], num_key_value_heads=SIZES["kv_heads"],
            intermediate_size=SIZES["ffn_dim"], max_position_embeddings=SIZES["context"], tie_word_embeddings=True,
        )
    )  # fmt: skip


def _since(began: float, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


WAYS = {
    "trivium": ours,
    "bare loop, our model": bare,
    "bare loop, transformers' model": dense,
    "transformers.Trainer": hf_trainer,
}


def in_process(way: str, a: argparse.Namespace) -> list[float]:
    """Seconds of each step of one way, in a process of its own: none inherits another's memory or threads."""
    command = [sys.executable, __file__, "--way", way, "--precision", a.precision, "--steps", str(a.steps)]
    command += ["--compile"] * a.compile
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])[a.steps // 4 :]  # the first steps compile, allocate and warm up


def main() -> None:
    """Time every way in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.way:
        print(json.dumps(WAYS[a.way](a.steps, a.precision, a.compile, device)))
        return
    took = [{way: statistics.median(in_process(way, a)) for way in WAYS} for _ in range(a.rounds)]
    where = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(
        f"{a.precision}{', compiled' * a.compile}, {where}; median of {a.rounds} rounds, lowest and highest in brackets"
    )
    for way in WAYS:
        speeds = [ROWS * LENGTH / each[way] for each in took]
        ratios = [each[way] / each["trivium"] for each in took]  # of one round: a slow spell meets both
        print(
            f"{way:<32} {statistics.median(speeds):>7,.0f} tokens/s   trivium is {statistics.median(ratios):.3f} x as "
            f"fast ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
