"""The runs of the demo, with settings that were chosen on validation data (``demo_settings.json``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from .config import RunConfig, parse_config

__all__ = ["DEMO_RUNS", "demo_runs", "demo_settings"]

DEMO_RUNS: Mapping[str, tuple[str, str]] = {
    "sequential-lora": ("sequential-lora", "Sequential LoRA, best learning rate"),
    "sequential-lora-usual": ("sequential-lora", "Sequential LoRA, usual learning rate"),
    "sequential-linear": ("sequential-linear", "Sequential fine-tuning, gentle"),
    "joint": ("joint", "Joint training (upper bound)"),
    "pegp": ("pegp", "PEGP on LoRA"),
    "pegp-linear": ("pegp-linear", "PEGP on linear weights"),
}
"""Method and title of each run, by the run's name, in the order in which they run."""


_SHARED = ("batch_size", "epochs", "weight_decay", "schedule", "warmup")
"""Training settings that all runs share, where the settings name them."""


def demo_settings() -> dict[str, Any]:
    """The packaged settings: data and training of all runs; learning rate and energy of each."""
    text = resources.files(__package__).joinpath("demo_settings.json").read_text(encoding="utf-8")
    settings: dict[str, Any] = json.loads(text)
    return settings


def demo_runs(
    seed: int = 0, settings: Mapping[str, Any] | None = None, *, threads: int | None = None
) -> list[tuple[str, RunConfig]]:
    """The six runs of the demo, over the same data.

    Args:
        seed: Seed of everything: rows drawn, data order, adapter initialisation.
        settings: In place of the packaged ones, in the same form. A run may override ``batch_size`` and ``epochs``.
        threads: CPU threads; default: what PyTorch chooses.

    Returns:
        Pairs of run name and configuration, in order.
    """
    found = demo_settings() if settings is None else settings
    rows = {"train": found["train_rows"], "validation": found["validation_rows"], "test": found["test_rows"]}
    runs = []
    for name, (method, title) in DEMO_RUNS.items():
        own = dict(found[name])
        energy = own.pop("energy", None)
        data = {
            "method": method,
            "title": title,
            "stream": {"source": "demo", **rows},
            "train": {**{name: found[name] for name in _SHARED if name in found}, **own},
            "max_length": found["max_length"],
            "seed": seed,
            "threads": threads,
            "guard": None if energy is None else {"energy": energy},
        }
        runs.append((name, parse_config(data, where=f"demo run {name!r}")))
    return runs
