"""How long training waits for a save of about 50 million parameters with AdamW's state, and what memory it takes.

    python benchmarks/saving.py [FOLDER]

Each way has a process of its own, which steps and saves six times; the figure is the median of the last five. FOLDER is
on the disk to be measured; without it, a temporary folder.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from trivium.training.background import Background
from trivium.training.checkpoint import CheckpointStore, Contents
from trivium.training.optim import optimizer_tensors


def measure(way: str, folder: Path) -> dict[str, float]:
    """Seconds that training waits a save, seconds until it is done, bytes saved, peak memory on top of training's."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(48)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    data = torch.randn(1, 1024)

    def step() -> None:
        model(data).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    step()
    store, background = CheckpointStore(folder / way), Background()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    waited, took = [], []
    for number in range(1, 7):
        step()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        found = Contents({"model.safetensors": weights, "optimizer.safetensors": optimizer_tensors(optimizer)}, {}, {})
        began = time.perf_counter()
        if way == "async":
            held = found.held()
            background.start(lambda number=number, held=held: store.save(number, held))
            del held
        else:
            store.save(number, found)
        waited.append(time.perf_counter() - began)
        background.wait()
        took.append(time.perf_counter() - began)
    saved = sum(p.stat().st_size for p in (folder / way / "step-6").iterdir())
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    seconds = {"waited": statistics.median(waited[1:]), "took": statistics.median(took[1:])}
    return {**seconds, "bytes": saved, "peak": peak}


def main() -> None:
    """Both ways, and their ratio."""
    if len(sys.argv) > 2:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[1]))))
        return
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        found = {}
        for way in ("sync", "async"):
            done = subprocess.run([sys.executable, __file__, folder, way], capture_output=True, text=True, check=True)
            found[way] = f = json.loads(done.stdout)
            print(
                f"{way:<6} training waits {f['waited']:.3f} s a save, done after {f['took']:.3f} s; "
                f"{f['bytes'] / 1e6:,.0f} MB saved, {f['peak'] / f['bytes']:.2f} of that on top of training's memory"
            )
    print(f"async waits {found['async']['waited'] / found['sync']['waited']:.2f} of what sync does")


if __name__ == "__main__":
    main()
