"""Hand an export that has passed its gate to the Hugging Face hub. Off unless push= names where to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trivium.errors import CheckpointError, ConfigError


def ready(repo: str) -> None:
    """Raise ConfigError with what to do unless the hub's package and a token are there. Asks nobody else."""
    if not _hub().get_token():
        raise ConfigError(f"push={repo} needs a token with the right to write: run `hf auth login`, or set HF_TOKEN")


CARD = "README.md"
"""A model card, which people write themselves."""


def push(folder: Path, names: Sequence[str], repo: str, *, public: bool) -> str:
    """Upload these files of a folder, and a model card beside them, in one commit; returns its address.

    A repository that is not there is made, private unless `public`; one that is there is written to only if it is as
    private as that. Raises CheckpointError.
    """
    hub = _hub()
    api = hub.HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise ConfigError(f"push={repo} is public already; name another, or set push_public=true")
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=[*names, CARD], commit_message="Exported by Trivium"
        )
        return str(commit.commit_url)
    except ConfigError:
        raise
    except Exception as error:  # of the package, of the HTTP client under it, of the network
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"{folder} is good and was not pushed to {repo}: {said[:200]}; run the command again to try once more"
        ) from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            "push= needs huggingface_hub, which is not installed: pip install trivium-llm[hub]"
        ) from error
    huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub
