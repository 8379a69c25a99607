"""Trivium: a language model learns, improves and speaks. The public face, imported when first used (PEP 562)."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Plugin": "trivium.plugin",
    "Entry": "trivium.registry",
    "MODELS": "trivium.registry",
    "SOURCES": "trivium.registry",
    "OBJECTIVES": "trivium.registry",
    "BACKENDS": "trivium.registry",
    "Source": "trivium.data.source",
    "Example": "trivium.data.source",
    "SourceConfig": "trivium.data.config",
    "split_of": "trivium.data.source",
    "fingerprint_of": "trivium.data.source",
    "copied": "trivium.data.contamination",
    "MEASURES": "trivium.evaluation.measures",
    "fetch": "trivium.data.fetch",
    "FetchEntry": "trivium.data.fetch",
    "files_of": "trivium.data.fetch",
    "CausalLM": "trivium.models.protocol",
    "KVCache": "trivium.models.cache",
    "Objective": "trivium.objectives.protocol",
    "Backend": "trivium.inference.protocol",
    "Capabilities": "trivium.inference.protocol",
    "Stats": "trivium.inference.protocol",
    "BackendConfig": "trivium.inference.config",
    "TokenBatch": "trivium.types",
    "PreferenceBatch": "trivium.types",
    "UnpairedBatch": "trivium.types",
    "DistillBatch": "trivium.types",
    "RolloutBatch": "trivium.types",
    "LossOutput": "trivium.types",
    "Metric": "trivium.types",
    "Score": "trivium.types",
    "SamplingParams": "trivium.types",
    "Request": "trivium.types",
    "TokenEvent": "trivium.types",
    "TriviumError": "trivium.errors",
    "ConfigError": "trivium.errors",
    "PluginError": "trivium.errors",
    "DataError": "trivium.errors",
    "CheckpointError": "trivium.errors",
    "TrainingError": "trivium.errors",
    "BackendError": "trivium.errors",
}

__all__ = [*_PUBLIC, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trivium' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
