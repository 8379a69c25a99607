"""Seconds and peak memory to load SmolLM2-135M with its tokenizer: here and by transformers, from both forms.

    pip install -e ".[bench]"
    python benchmarks/loading.py                     # --rounds 5; --form file or folder, for one of them

Forms are the GGUF file as it is fetched (Q4_1) and a Hugging Face folder of it (fp32 safetensors). Each way has a
process of its own, which imports everything, then loads and adds up all weights, so that none is left on the disk;
imports are not counted. We take the files' SHA-256 besides, for the run's lineage, in a thread of its own: when that is
done is a figure apart. The ways take turns, and a ratio is of one round. Memory is what the peak of resident memory
rises by, in bytes of fp32 weights. Files are in the page cache: disks are not compared.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def trivium(path: Path) -> Any:
    """The model as every phase loads it: names, shapes and values checked; the file's hash is taken beside that."""
    from trivium.build import load_artifact

    artifact = load_artifact(str(path))
    return artifact.model(None)[0], artifact.tokenizer, lambda: artifact.sha256


def transformers(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, more = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **more)
    return model, AutoTokenizer.from_pretrained(where, **more), lambda: None


def prepare(way: str) -> None:
    """Import what is not to be counted."""
    import gguf.quants  # noqa: F401

    if way == "trivium":
        from trivium.plugin import discover

        discover()
        import trivium.build
        import trivium.models.llama  # noqa: F401
    else:
        import transformers
        import transformers.models.llama.modeling_llama  # noqa: F401

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def measure(way: str, path: Path) -> dict[str, float]:
    """Seconds, and the rise of the peak in bytes of the weights."""
    prepare(way)
    import torch

    before = peak_bytes()
    began = time.perf_counter()
    model, _, hashed = WAYS[way](path)
    with torch.no_grad():
        total = sum(p.sum().item() for p in model.parameters())
    seconds = time.perf_counter() - began
    hashed()
    until_hashed = time.perf_counter() - began
    rise = peak_bytes() - before
    assert total == total
    return {"seconds": seconds, "hashed": until_hashed, "peak": rise / sum(4 * p.numel() for p in model.parameters())}


def peak_bytes() -> int:
    """Of this process alone: getrusage begins with what its parent held."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


WAYS = {"trivium": trivium, "transformers": transformers}


def folder_of(file: Path, folder: Path) -> Path:
    """The same model as a Hugging Face folder."""
    from trivium.build import load_artifact
    from trivium.phases.export import write_folder
    from trivium.plugin import discover

    discover()
    artifact = load_artifact(str(file))
    model, record = artifact.model(None)
    write_folder(model, record["name"], artifact.tokenizer, folder)
    return folder


def main() -> None:
    """Time both ways on both forms in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--form", choices=["file", "folder"])
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.way:
        print(json.dumps(measure(a.way[0], Path(a.way[1]))))
        return
    from trivium.data.fetch import fetch

    file = fetch("smollm2_135m")
    with tempfile.TemporaryDirectory() as place:
        forms = {"GGUF file": file, "Hugging Face folder": folder_of(file, Path(place))}
        for form, path in forms.items():
            if not form.endswith(a.form or ""):
                continue
            rounds: list[dict[str, dict[str, float]]] = []
            for _ in range(a.rounds):
                found = {}
                for way in WAYS:
                    command = [sys.executable, __file__, "--way", way, str(path)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    found[way] = json.loads(done.stdout.splitlines()[-1])
                rounds.append(found)
            ratios = [r["trivium"]["seconds"] / r["transformers"]["seconds"] for r in rounds]
            for way in WAYS:
                keys = ("seconds", "hashed", "peak")
                seconds, hashed, peak = (statistics.median(r[way][key] for r in rounds) for key in keys)
                also = f" (hashed after {hashed:.2f} s)" if way == "trivium" else ""
                print(f"{form:<20} {way:<13} {seconds:>6.2f} s, {peak:.2f} of the weights' bytes at the peak{also}")
            print(
                f"{form:<20} trivium takes {statistics.median(ratios):.3f} of transformers' time "
                f"({min(ratios):.3f} to {max(ratios):.3f} in {a.rounds} rounds)"
            )


if __name__ == "__main__":
    main()
