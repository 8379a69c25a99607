"""Decoding SmolLM2-135M: our engine against transformers' generate and llama.cpp, in one run on this machine.

    pip install -e ".[bench]"
    python benchmarks/decoding.py                     # --rounds 3; --only one,many,prefix to choose

one: a prompt of 100 tokens, 64 new ones, batch 1: tokens a second without the prompt's time, and what part of the
memory bandwidth (of a plain sum, measured in the same round) reading the weights once a token comes to. compiled: with
inference.compile=true. guessing: the same answer, with guesses by the same weights in 4 bits. many: 16 prompts of 32 to
256 tokens that arrive a little apart, 64 new tokens each: requests a second; transformers answers them in batches of
what has arrived. prefix: time to the first token of a prompt that begins with 512 tokens read before, against the same
prompt read anew. Ways take turns; a ratio is of one round, the median of rounds is shown with the smallest and largest.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

NEW = 64
BANDWIDTH_BYTES = 1 << 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="one,many,prefix")
    parser.add_argument("--llama", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.llama:
        answer(asked.llama)
        return
    model, tokenizer, path = load()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {asked.rounds} rounds")
    for name in asked.only.split(","):
        {"one": one, "many": many, "prefix": prefix}[name](model, tokenizer, path, asked.rounds)


def load() -> tuple[Any, Any, str]:
    from trivium.plugin import discover

    discover()
    from trivium.build import load_artifact
    from trivium.data.fetch import fetch

    path = fetch("smollm2_135m")
    artifact = load_artifact(str(path))
    return artifact.model(None)[0].eval(), artifact.tokenizer, str(path)


def theirs(model: Any, dtype: torch.dtype) -> Any:
    """The same weights in transformers."""
    transformers = importlib.import_module("transformers")
    settings = {k: v for k, v in model.hf_config().items() if k != "architectures"}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).float()
    names = model.hf_names()
    made.load_state_dict({names[n]: p for n, p in model.named_parameters() if n in names}, strict=False)
    made.tie_weights()
    return made.to(dtype).eval()


def prompts(tokenizer: Any, count: int, low: int, high: int) -> list[tuple[int, ...]]:
    rng = random.Random(0)
    words = (
        "river stone house morning letter bread winter garden road music story friend window answer city child".split()
    )
    found = []
    for _ in range(count):
        length = rng.randint(low, high)
        ids = tokenizer.encode(" ".join(rng.choice(words) for _ in range(length)))
        found.append(tuple(ids[:length]))
    return found


def bandwidth() -> float:
    """Bytes a second of a sum over 256 MB, the best of five."""
    data = torch.ones(BANDWIDTH_BYTES // 4)
    best = min(timed(data.sum) for _ in range(5))
    return BANDWIDTH_BYTES / best


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def native(model: Any, tokenizer: Any, **settings: Any) -> Any:
    from trivium.inference.config import NativeConfig
    from trivium.inference.native.engine import NativeBackend

    return NativeBackend(NativeConfig(**settings), model, tokenizer)


def request(name: str, ids: tuple[int, ...], new: int) -> Any:
    from trivium.types import Request, SamplingParams

    return Request(name, ids, SamplingParams(max_tokens=new, min_tokens=0))


def decode_seconds(backend: Any, ids: tuple[int, ...]) -> float:
    """Of NEW tokens after the first."""
    backend.add(request("x", ids, NEW + 1))
    while not backend.step():
        pass
    return timed(lambda: until_idle(backend))


def generated_seconds(made: Any, ids: tuple[int, ...]) -> float:
    """Of NEW tokens after the first: by two calls, since generate tells of no first token."""

    def call(new: int) -> Any:
        with torch.no_grad():
            made.generate(torch.tensor([ids]), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    return timed(lambda: call(NEW + 1)) - timed(lambda: call(1))


def one(model: Any, tokenizer: Any, path: str, rounds: int) -> None:
    (ids,) = prompts(tokenizer, 1, 100, 100)
    ways: dict[str, Callable[[], float]] = {}
    kinds = ["same", "bf16", "int8", "int4", *(f"{kind}, compiled" for kind in ("fp32", "bf16", "int8", "int4"))]
    kinds += ["same, guessing", "fp32, compiled, guessing", "bf16, compiled, guessing"]
    for kind in kinds:
        weights, *how = kind.split(", ")
        more: dict[str, Any] = {"speculate": "self", "draft_weights": "int4"} if "guessing" in how else {}
        backend = native(model, tokenizer, weights=weights, prefix_cache=False, compile="compiled" in how, **more)
        ways[kind] = lambda backend=backend: decode_seconds(backend, ids)
    for name, dtype in (("transformers fp32", torch.float32), ("transformers bf16", torch.bfloat16)):
        made = theirs(model, dtype)
        ways[name] = lambda made=made: generated_seconds(made, ids)
    with LlamaCpp(path) as server:
        if server is not None:
            ways["llama.cpp Q4_1"] = lambda: server(ids)
        for way in ways.values():
            way()
        found = [{"bandwidth": bandwidth(), **{name: way() for name, way in ways.items()}} for _ in range(rounds)]
    size = sum(p.numel() for p in model.parameters())
    held = {"same": 4, "fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5}
    print(
        f"\nbatch 1, {NEW} tokens after a prompt of {len(ids)}: tokens a second (bandwidth "
        f"{statistics.median(f['bandwidth'] for f in found) / 1e9:.1f} GB/s)"
    )
    for name in ways:
        rate = statistics.median(NEW / f[name] for f in found)
        bytes_each = held.get(name.removesuffix(", compiled"), 0)
        part = [size * bytes_each * NEW / f[name] / f["bandwidth"] for f in found] if bytes_each else []
        print(f"  {name:25} {rate:6.1f}" + (f"   {statistics.median(part):.0%} of the bandwidth" if part else ""))
    for a, b in (
        ("same", "transformers fp32"),
        ("fp32, compiled", "transformers fp32"),
        ("same, guessing", "transformers fp32"),
        ("fp32, compiled, guessing", "transformers fp32"),
        ("bf16", "transformers bf16"),
        ("bf16, compiled", "transformers bf16"),
        ("bf16, compiled, guessing", "transformers bf16"),
        ("int8", "bf16"),
        ("int8, compiled", "bf16"),
        ("int8, compiled", "bf16, compiled"),
        ("int4", "llama.cpp Q4_1"),
        ("int4, compiled", "llama.cpp Q4_1"),
    ):
        if b in ways:
            show(f"{a} over {b}", [f[b] / f[a] for f in found])


def many(model: Any, tokenizer: Any, path: str, rounds: int) -> None:
    asked = prompts(tokenizer, 16, 32, 256)
    rng = random.Random(1)
    gaps = [rng.expovariate(1 / 0.15) for _ in asked]
    arrivals = [sum(gaps[:i]) for i in range(len(gaps))]
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        made = theirs(model, dtype)
        ways: dict[str, Callable[[], float]] = {"transformers": lambda made=made: batched(made, asked, arrivals)}
        for name, compiled in (("ours", False), ("ours, compiled", True)):
            backend = native(model, tokenizer, weights=precision, compile=compiled)
            list(backend.generate([request("w", asked[0], 4)]))
            ways[name] = lambda backend=backend: arriving(backend, asked, arrivals)
        found = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
        print()
        for name in ways:
            rate = statistics.median(len(asked) / f[name] for f in found)
            print(f"16 requests, {precision}, {name}: {rate:.2f} a second")
        for name in list(ways)[1:]:
            show(f"{name} over transformers, {precision}", [f["transformers"] / f[name] for f in found])


def arriving(backend: Any, asked: list[tuple[int, ...]], arrivals: list[float]) -> float:
    backend.scheduler.memory.forget()
    began, waiting = time.perf_counter(), list(zip(arrivals, asked, strict=True))
    while waiting or backend.busy:
        now = time.perf_counter() - began
        while waiting and waiting[0][0] <= now:
            _, ids = waiting.pop(0)
            backend.add(request(f"r{len(waiting)}", ids, NEW))
        if backend.busy:
            backend.step()
        else:
            time.sleep(0.001)
    return time.perf_counter() - began


def batched(made: Any, asked: list[tuple[int, ...]], arrivals: list[float]) -> float:
    """Whatever has arrived is one batch, padded on the left."""
    began, waiting = time.perf_counter(), list(zip(arrivals, asked, strict=True))
    while waiting:
        now = time.perf_counter() - began
        here = [ids for when, ids in waiting if when <= now]
        if not here:
            time.sleep(0.001)
            continue
        waiting = waiting[len(here) :]
        longest = max(map(len, here))
        tokens = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in here])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in here])
        with torch.no_grad():
            made.generate(
                tokens, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
    return time.perf_counter() - began


def prefix(model: Any, tokenizer: Any, path: str, rounds: int) -> None:
    (shared,) = prompts(tokenizer, 1, 512, 512)
    backend, found = native(model, tokenizer, weights="bf16"), []
    for number in range(rounds):
        backend.scheduler.memory.forget()
        times = []
        for part in range(2):
            backend.add(request("x", (*shared, 5 + number, 6 + part), 1))
            times.append(timed(lambda: until_idle(backend)))
        found.append(times[1] / times[0])
    print()
    show("first token with 512 tokens in the cache over without", found)


def until_idle(backend: Any) -> None:
    while backend.busy:
        backend.step()


class LlamaCpp:
    """A server of llama.cpp over the file, asked for NEW tokens after a prompt; None where it is not installed.

    In a process of its own: its threads beside ours would be more than cores, and then OpenMP lets ours sleep.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> Callable[[tuple[int, ...]], float] | None:
        if importlib.util.find_spec("xllamacpp") is None:
            print("llama.cpp: not installed (pip install xllamacpp)")
            return None
        command = [sys.executable, __file__, "--llama", self.path]
        self.process = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

        def ask(ids: tuple[int, ...]) -> float:
            assert self.process.stdin and self.process.stdout
            print(json.dumps(ids), file=self.process.stdin, flush=True)
            while not (line := self.process.stdout.readline()).startswith("took "):
                assert line, "llama.cpp has ended"
            return float(line.split()[1])

        return ask

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "process"):
            self.process.kill()
            self.process.wait()


def answer(path: str) -> None:
    """What the process above does: a prompt a line, the seconds of NEW tokens a line."""
    found = importlib.import_module("xllamacpp")
    params = found.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, 1024, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = found.Server(params)
    for line in sys.stdin:
        told = server.handle_completions(
            {"prompt": json.loads(line), "n_predict": NEW + 1, "temperature": 0, "ignore_eos": True,
             "cache_prompt": False}
        )  # fmt: skip
        print("took", NEW * told["timings"]["predicted_per_token_ms"] / 1000, flush=True)


def show(name: str, ratios: list[float]) -> None:
    print(f"  {name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
