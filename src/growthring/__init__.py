"""growthring: fine-tune a pretrained model on one task after another without losing what it knew.

Public names are loaded when they are first used, so that ``import growthring`` and the command line start at once.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growthring import guards as guards
    from growthring import optim as optim
    from growthring.guards import (
        PEGP,
        Certificate,
        FreshLoRA,
        GradientMemory,
        Guard,
        InfLoRA,
        LinearSchedule,
        OLoRA,
        merge_branches,
    )
    from growthring.optim import GORP
    from growthring.recipes import RunConfig, load_config, run
    from growthring.streams import Task, TaskStream
    from growthring.subspace import SecondMoment, Subspace
    from growthring.trainer import ContinualTrainer, RunResult

try:
    __version__ = version("growthring")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"

_HOME = {
    "GORP": "optim",
    "Certificate": "guards",
    "ContinualTrainer": "trainer",
    "FreshLoRA": "guards",
    "GradientMemory": "guards",
    "Guard": "guards",
    "InfLoRA": "guards",
    "LinearSchedule": "guards",
    "OLoRA": "guards",
    "PEGP": "guards",
    "RunConfig": "recipes",
    "RunResult": "trainer",
    "SecondMoment": "subspace",
    "Subspace": "subspace",
    "Task": "streams",
    "TaskStream": "streams",
    "load_config": "recipes",
    "merge_branches": "guards",
    "run": "recipes",
}

_ROOMS = {"guards", "optim"}

__all__ = [
    "GORP",
    "PEGP",
    "Certificate",
    "ContinualTrainer",
    "FreshLoRA",
    "GradientMemory",
    "Guard",
    "InfLoRA",
    "LinearSchedule",
    "OLoRA",
    "RunConfig",
    "RunResult",
    "SecondMoment",
    "Subspace",
    "Task",
    "TaskStream",
    "load_config",
    "merge_branches",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"growthring.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'growthring' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"growthring.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
