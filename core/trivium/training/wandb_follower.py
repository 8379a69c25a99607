"""A process of its own that reads metrics.jsonl as it grows and hands its rows to wandb.

Training does not wait for wandb, cannot be stopped by it and does not import it: whatever a network, a missing key or
the package itself does, it does here. Ends when its standard input is closed, and so when the run is killed.
Started as a file: it imports nothing of ours.
"""

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ANSWER_SECONDS = 5.0
"""How long the server may take to answer at the start; then the rows are kept offline."""
FINISH_SECONDS = 60.0
"""How long the last rows may take at the end."""
POLL_SECONDS = 0.5


def main(folder: str, name: str, project: str, mode: str, first_step: str, watched: str) -> int:
    """Follow `folder`/metrics.jsonl from the step after `first_step` on. watched: the process whose memory is shown.

    Writes to standard output what a person should know, a line each.
    """
    say, sys.stdout, sys.stderr = sys.stdout, open(os.devnull, "w"), open(os.devnull, "w")  # noqa: SIM115
    import wandb

    limits = {"init_timeout": ANSWER_SECONDS, "login_timeout": ANSWER_SECONDS, "finish_timeout": FINISH_SECONDS}
    wanted = {"console": "off", "disable_git": True, "save_code": False, "silent": True, "x_stats_pid": int(watched)}
    settings = {k: v for k, v in {**limits, **wanted}.items() if k in wandb.Settings.model_fields}
    try:
        run = wandb.init(
            project=project, name=name, id=name.replace("/", "-"), resume="allow", dir=folder,
            mode=mode,  # type: ignore[reportArgumentType]
            config=settings_of(Path(folder)), settings=wandb.Settings(**settings),
        )  # fmt: skip
    except Exception as error:
        if mode == "offline":
            raise
        with suppress(OSError):  # the run may be over
            print(str(error).strip().partition("\n")[0], file=say, flush=True)
        again = [sys.executable, "-P", __file__, folder, name, project, "offline", first_step, watched]
        # a fresh process, with a service of its own: the one of this process waits for the server still
        environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
        os._exit(subprocess.call(again, stdin=0, stdout=say, env=environment))
    run.define_metric("*", step_metric="step")
    with open(Path(folder) / "metrics.jsonl", encoding="utf-8") as file:
        part, ended = "", False
        while not ended:
            ended = bool(select.select([0], [], [], POLL_SECONDS)[0])
            *lines, part = (part + file.read()).split("\n")
            for row in map(json.loads, lines):
                if row["step"] > int(first_step):
                    run.log({key: value for key, value in row.items() if value is not None})
    run.finish()
    return 0


def settings_of(folder: Path) -> dict:
    """The run's settings, as its manifest has them: secrets are masked there."""
    try:
        return json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError):
        return {}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
