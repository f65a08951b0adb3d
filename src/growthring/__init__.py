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
        FTP,
        L2SP,
        PEGP,
        SPD,
        TPGM,
        Certificate,
        Directional,
        FreshLoRA,
        GradientMemory,
        Guard,
        InfLoRA,
        LinearSchedule,
        OLoRA,
        Radius,
        deviation,
        merge_branches,
    )
    from growthring.optim import GORP
    from growthring.recipes import RunConfig, load_config, run
    from growthring.streams import EvaluationSet, Task, TaskStream
    from growthring.subspace import SecondMoment, Subspace
    from growthring.trainer import ContinualTrainer, RobustTrainer, RunResult

try:
    __version__ = version("growthring")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"

_HOME = {
    "GORP": "optim",
    "Certificate": "guards",
    "ContinualTrainer": "trainer",
    "EvaluationSet": "streams",
    "FreshLoRA": "guards",
    "GradientMemory": "guards",
    "Guard": "guards",
    "InfLoRA": "guards",
    "LinearSchedule": "guards",
    "OLoRA": "guards",
    "FTP": "guards",
    "L2SP": "guards",
    "PEGP": "guards",
    "SPD": "guards",
    "TPGM": "guards",
    "Directional": "guards",
    "Radius": "guards",
    "RobustTrainer": "trainer",
    "RunConfig": "recipes",
    "RunResult": "trainer",
    "SecondMoment": "subspace",
    "Subspace": "subspace",
    "Task": "streams",
    "TaskStream": "streams",
    "deviation": "guards",
    "load_config": "recipes",
    "merge_branches": "guards",
    "run": "recipes",
}

_ROOMS = {"guards", "optim"}

__all__ = [
    "FTP",
    "GORP",
    "L2SP",
    "PEGP",
    "SPD",
    "TPGM",
    "Certificate",
    "ContinualTrainer",
    "Directional",
    "EvaluationSet",
    "FreshLoRA",
    "GradientMemory",
    "Guard",
    "InfLoRA",
    "LinearSchedule",
    "OLoRA",
    "Radius",
    "RobustTrainer",
    "RunConfig",
    "RunResult",
    "SecondMoment",
    "Subspace",
    "Task",
    "TaskStream",
    "deviation",
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
