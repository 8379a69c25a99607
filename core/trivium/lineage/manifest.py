"""MANIFEST.json: what a run was, what it came from and what it reached. Rewritten whole at each change."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trivium.disk import replace_json

FILE = "MANIFEST.json"
PACKAGES = ("trivium-llm", "torch", "lightning", "hydra-core", "omegaconf", "tokenizers", "datasets", "safetensors")
SECRET = ("api_key", "secret", "password", "private_key", "access_token", "auth_token", "hf_token")
IN_URL = re.compile(r"(\w+://)[^/\s@'\"]+@")


def versions() -> dict[str, str]:
    """Versions of everything that decides a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a bare clone
            continue
    return found


def masked(config: Any) -> Any:
    """`config` without secrets: values of secret-looking keys, and user and password in URLs, are replaced by ***.

    >>> masked({"api_key": "abc", "path": "https://me:abc@example.org/x", "depth": [1, {"password": ""}]})
    {'api_key': '***', 'path': 'https://***@example.org/x', 'depth': [1, {'password': ''}]}
    >>> masked({"server": {"key": "abc"}, "token": "<|end|>"})
    {'server': {'key': '***'}, 'token': '<|end|>'}
    """
    if isinstance(config, Mapping):
        return {k: "***" if v and _is_secret(str(k).lower()) else masked(v) for k, v in config.items()}
    if isinstance(config, str):
        return IN_URL.sub(r"\1***@", config)
    return [masked(v) for v in config] if isinstance(config, list) else config


def _is_secret(name: str) -> bool:
    return name in ("key", "keys") or name.endswith(SECRET)


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, by its canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder; empty if it has none or half of one."""
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class Manifest:
    """The manifest of one run, kept on disk as it grows. Time of earlier starts of the same run is added up."""

    def __init__(self, folder: Path, key: str, *, writes: bool = True, **facts: Any) -> None:
        """writes: False for those processes of a run that leave its folder to the first."""
        self.folder, self.writes = folder, writes
        before = read(folder)
        self.was_done = before.get("status") == "done" and before.get("key") == key
        now = datetime.now(UTC).isoformat(timespec="seconds")
        same = before.get("key") == key
        self.others = bool(before) and not same  # until the first update the folder tells of another run
        self._earlier = float(before.get("seconds", 0.0)) if same else 0.0
        self._began = time.monotonic()
        before.pop("error", None)  # of an earlier start
        self.facts: dict[str, Any] = (before if same else {}) | {
            "started": now,
            "versions": versions(),
            **facts,
            "key": key,
        }
        if same and "started" in before:
            self.facts["started"] = before["started"]

    def update(self, status: str = "running", **facts: Any) -> None:
        """Add facts and write."""
        seconds = self._earlier + time.monotonic() - self._began
        self.facts |= {"status": status, "seconds": round(seconds, 3), **facts}
        self.others = False
        if self.writes:
            told = masked(self.facts) | {"key": self.facts["key"]}  # an error's text may quote a setting
            replace_json(self.folder / FILE, told)
