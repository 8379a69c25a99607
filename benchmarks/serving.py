"""What the server costs: 32 streams over HTTP against the same 32 requests straight to the engine, in one run.

    pip install -e ".[serve]" && apt-get install hey
    python benchmarks/serving.py                      # --rounds 3 --streams 32 --tokens 64; --threads, --model, --path

`phase=serve` is a process of its own, and so is what loads it: hey (https://github.com/rakyll/hey), which sends
`streams` requests at once and reads each stream to its end. The engine is in this process, with the same settings and
threads, and idle while the server is asked. Both take turns; a ratio is of one round, the median of rounds is shown
with the smallest and largest. Processor time (of the server's process, of this one) is told, too: other work disturbs
it less, as long as there are not more threads than cores (--threads 1).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Tell me a long story about a heron and a crane who meet at the river every morning, and what they say."
TICK = os.sysconf("SC_CLK_TCK")


class Took(NamedTuple):
    """Tokens a second, and milliseconds of processor time a token."""

    rate: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, in either process")
    parser.add_argument("--model", default="smollm2_135m", help="what init_from= takes")
    parser.add_argument("--path", default="/v1/chat/completions", choices=["/v1/chat/completions", "/v1/completions"])
    asked = parser.parse_args()
    if shutil.which("hey") is None:
        sys.exit("benchmarks/serving.py needs hey: apt-get install hey (or https://github.com/rakyll/hey)")
    torch.set_num_threads(asked.threads)
    engine = Engine(asked.model, asked.path)
    with tempfile.TemporaryDirectory() as runs, Server(asked.model, runs, asked.path, asked.threads) as server:
        for way in (engine, server):
            way.run(min(2, asked.streams), 4)
        found = [(engine.run(asked.streams, asked.tokens), server.run(asked.streams, asked.tokens))
                 for _ in range(asked.rounds)]  # fmt: skip
    print(f"{asked.streams} streams of {asked.tokens} tokens, {asked.rounds} rounds, torch on {asked.threads} threads")
    for name, column in (("engine", 0), ("server", 1)):
        rates, times = zip(*(row[column] for row in found), strict=True)
        print(f"  {name}: {spread(rates)} tokens/s, {spread(times, 3)} ms of processor time a token")
    print(f"  server's rate is {spread([s.rate / e.rate for e, s in found], 3)} of the engine's")
    print(f"  server's processor time is {spread([s.cpu / e.cpu for e, s in found], 3)} of the engine's")


def spread(values: Any, digits: int = 1) -> str:
    """Median (smallest to largest)."""
    shown = [f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


class Engine:
    """The engine by itself, as phase=serve makes it."""

    def __init__(self, model: str, path: str) -> None:
        from trivium.plugin import discover

        discover()
        from trivium.build import load_artifact
        from trivium.data.chat import Chat
        from trivium.data.fetch import fetch
        from trivium.inference.config import NativeConfig
        from trivium.inference.native.engine import NativeBackend

        artifact = load_artifact(str(fetch(model)) if "/" not in model else model)
        self.tokenizer = artifact.tokenizer
        self.backend = NativeBackend(NativeConfig(), artifact.model(None)[0].eval(), artifact.tokenizer)
        chat = [{"role": "user", "content": PROMPT}]
        self.ids = Chat(self.tokenizer).prompt_ids(chat) if "chat" in path else self.tokenizer.encode(PROMPT)

    def run(self, streams: int, tokens: int) -> Took:
        from trivium.inference.native.engine import collect
        from trivium.types import Request, SamplingParams

        params = SamplingParams(max_tokens=tokens, min_tokens=tokens, stop_ids=self.tokenizer.stop_ids)
        requests = [Request(str(i), tuple(self.ids), params) for i in range(streams)]
        cpu, began = time.process_time(), time.perf_counter()
        events = collect(self.backend, requests)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        count = sum(map(len, events.values()))
        assert count == streams * tokens, count
        return Took(count / seconds, 1000 * cpu / count)


class Server:
    """phase=serve in a process of its own."""

    def __init__(self, model: str, runs: str, path: str, threads: int) -> None:
        self.path = path
        command = [sys.executable, str(ROOT / "launch.py"), "phase=serve", f"init_from={model}", f"runs={runs}",
                   "server.port=0", f"trainer.threads={threads}", "inference.sampling.temperature=0"]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __enter__(self) -> Server:
        assert self.process.stdout is not None
        said = ""
        while not (found := re.search(r"answers at (http://\S+)/v1", said)):
            if not (line := self.process.stdout.readline()):
                raise SystemExit(f"phase=serve did not start:\n{said}")
            said += line
        self.url = found[1]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def run(self, streams: int, tokens: int) -> Took:
        body: dict[str, Any] = {"stream": True, "max_tokens": tokens, "min_tokens": tokens}
        chat = "chat" in self.path
        body |= {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
        count = str(streams)
        command = ["hey", "-n", count, "-c", count, "-t", "0", "-m", "POST", "-T", "application/json",
                   "-d", json.dumps(body), self.url + self.path]  # fmt: skip
        before = self._cpu()
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        cpu = self._cpu() - before
        if not (total := re.search(r"Total:\s+([\d.]+) secs", said)) or f"[200]\t{streams} responses" not in said:
            raise SystemExit(f"not every stream was answered:\n{said}")
        return Took(streams * tokens / float(total[1]), 1000 * cpu / (streams * tokens))


if __name__ == "__main__":
    main()
