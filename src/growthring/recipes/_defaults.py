"""What each kind of adapter and each guard can be told, and what it is told where a configuration says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._method import AdapterKind, GuardName

__all__ = ["ADAPTER_DEFAULTS", "GUARD_DEFAULTS", "PAPER_MEMORY"]

ADAPTER_DEFAULTS: Mapping[AdapterKind, Mapping[str, Any]] = {
    "lora": {"r": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": "all-linear", "tower": None},
    "lora+weights": {
        "r": 8,
        "alpha": 16.0,
        "dropout": 0.0,
        "target_modules": "preset",
        "full_rank": "preset",
        "branches": "merged",
        "tower": None,
    },
    "largo": {
        "r": 8,
        "alpha": None,
        "init": "principal",
        "form": "delta",
        "svd_iterations": None,
        "target_modules": "all-linear",
        "tower": None,
    },
    "bottleneck": {
        "r": 16,
        "placement": "both",
        "mode": "parallel",
        "activation": "relu",
        "scaling": 1.0,
        "dropout": 0.0,
        "tower": None,
    },
    "prefix": {"tokens": 10, "tower": None},
    "prompt": {"tokens": 10, "tower": None},
    "ia3": {"tower": None},
    "linear": {},
    "full": {},
}
"""The settings that each kind of adapter has, with their defaults; ``alpha`` of ``"largo"`` is ``r``."""

GUARD_DEFAULTS: Mapping[GuardName, Mapping[str, Any]] = {
    "pegp": {
        "energy": None,
        "samples": 256,
        "probes": 8,
        "unprotected": "hold",
        "mode": "strict",
        "project": "update",
        "kinds": None,
        "merge": 0.0,
    },
    "inflora": {"energy": None, "samples": 256},
    "o-lora": {"weight": 0.5, "norm": "l1"},
    "gradient-memory": {
        "energy": None,
        "mode": "sound",
        "side": "input",
        "source": "gradient",
        "project": "update",
    },
    "radius": {"mu": 1.0, "kappa": 1.0, "unit": "step", "granularity": "factor"},
    "directional": {"mu": 0.01, "weight": 0.0},
    "l2-sp": {"weight": 0.01},
    "ftp": {"mu": 0.01, "kappa": 1.0, "norm": "rows"},
    "tpgm": {"iterations": 200, "mu": 0.01, "norm": "rows", "samples": 256},
    "spd": {"weight": 1.0},
}
"""The settings that each guard has, with their defaults; the energy's is that of the method."""

PAPER_MEMORY: Mapping[str, Any] = {"side": "output", "source": "exp_avg", "project": "gradient"}
"""The gradient memory of the published rule."""
