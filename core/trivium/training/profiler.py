"""What a few steps spend their time on, operation by operation: torch's profiler, a trace to open and a table.

`profile/trace.json` in the run's folder opens in https://ui.perfetto.dev or chrome://tracing. The steps that are
profiled are slower than the others, and their figures show it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from trivium.disk import make_folder, replace_file
from trivium.schema import ProfilerConfig

TOP = 10


class Profile(L.Callback):
    """Profiles `steps` steps from the `first_step`-th after the start on: the first ones compile and fill caches.

    say: told where the trace is, and the table of the operations that took longest.
    """

    def __init__(self, config: ProfilerConfig, folder: Path, say: Callable[[str], None]) -> None:
        self.config, self.folder, self.say = config, folder / "profile", say
        self._profiler: profile | None = None
        self._done = self._recorded = 0

    def on_train_batch_start(self, *_: Any) -> None:
        if self._done + 2 == self.config.first_step:  # one step earlier, which is the profiler's own warm-up
            self._profiler = profile(
                activities={ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities(),
                schedule=schedule(wait=0, warmup=1, active=self.config.steps, repeat=1),
                on_trace_ready=self._write,
            )
            self._profiler.start()

    def on_train_batch_end(self, *_: Any) -> None:
        self._done += 1
        if self._profiler is not None:
            self._recorded += self._done >= self.config.first_step
            self._profiler.step()
            if self._recorded == self.config.steps:
                self._end()

    def on_train_end(self, *_: Any) -> None:
        self._end()
        if not self._recorded:
            self.say(f"nothing was profiled: the run ended before its step {self.config.first_step}")

    def on_exception(self, *_: Any) -> None:
        self._end()

    def _end(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()  # writes what there is, if that was not done

    def _write(self, profiler: profile) -> None:
        if not self._recorded:
            return
        make_folder(self.folder)
        trace = self.folder / "trace.json"
        profiler.export_chrome_trace(str(trace))
        order = "self_cuda_time_total" if ProfilerActivity.CUDA in profiler.activities else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=TOP, max_name_column_width=40)
        replace_file(self.folder / "top.txt", table.encode())
        self.say(f"profile of {self._recorded} steps: {trace} (https://ui.perfetto.dev opens it)\n{table}")
