"""What every benchmark shares: where results go, and on what they were measured."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from growthring._io import write_json
from growthring.trainer.result import versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "versions": versions(),
    }


def load(name: str) -> dict[str, Any]:
    """A stored result, or an empty one."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def store(name: str, value: dict[str, Any]) -> Path:
    """Write a result."""
    return write_json(RESULTS / name, value)
