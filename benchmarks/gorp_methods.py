"""What the GORP quality benchmark compares, and the settings that its search tries for each.

Everything but learning rate and energy is fixed here, and is stored with every run: a method whose fixed settings are
changed is searched and run again.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, PeftConfig

import _runs
from _runs import Setting
from growthring.guards import Guard
from pegp_methods import ATTENTION, SAMPLES, UP, OsfSchedule

_LORA = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_WEIGHTS = (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)
_GUARDED = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
_PROJECTED = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
_RANK = 8
"""Of LoRA."""


@dataclass(frozen=True)
class Method:
    """One line of the tables.

    Attributes:
        rates: Learning rates in rising order; the search starts in the middle.
        trains: ``"linear"`` (all linear weights), ``"lora"`` or ``"osf"``.
        optimizer: Class in ``growthring.optim`` and its arguments but the rate; default: AdamW.
        guards: Classes in ``growthring.guards`` (or ``"OSF"``), each with its arguments.
        energies: What the last guard is given as energy, if the search has to choose one.
        full_rank: ``full_rank`` of the trainer: base weights that train beside LoRA.
        joint: All tasks at once.
    """

    rates: tuple[float, ...]
    trains: str = "linear"
    optimizer: tuple[str, Mapping[str, Any]] | None = None
    guards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    energies: tuple[float | None, ...] = (None,)
    full_rank: str | tuple[str, ...] | None = None
    joint: bool = False

    @property
    def fixed(self) -> str:
        """What the search does not choose, as JSON."""
        chosen = ("rates", "energies")
        return json.dumps({k: v for k, v in dataclasses.asdict(self).items() if v and k not in chosen}, sort_keys=True)


_SUBSPACE = {"rank": 32, "refresh": 10, "scale": 1.0}
METHODS: Mapping[str, Method] = {
    "sequential-lora": Method(_LORA, "lora"),
    "sequential-linear": Method(_WEIGHTS),
    "pegp-linear": Method(_GUARDED, guards={"PEGP": {"samples": SAMPLES}}, energies=(0.7, 0.9)),
    "joint": Method(_GUARDED, joint=True),
    "o-lora": Method(_LORA, "lora", guards={"OLoRA": {"weight": 0.5}}),
    "galore": Method(_PROJECTED, optimizer=("GaLore", _SUBSPACE)),
    "gorp-paper": Method(
        _PROJECTED,
        optimizer=("GORP", _SUBSPACE),
        guards={"GradientMemory": {"energy": 0.9, "side": "output", "source": "exp_avg", "project": "gradient"}},
    ),
    "gorp": Method(
        _PROJECTED,
        optimizer=("GORP", _SUBSPACE),
        guards={"GradientMemory": {"side": "input"}},
        energies=(0.8, 0.95),
    ),
    "osf": Method((5e-5, 1e-4, 2e-4), "osf", guards={"OSF": {}}),
}
"""Every method, by name; the benchmark runs them in this order. ``_gorp_tables.TITLES`` has a line for each."""


@dataclass(frozen=True)
class Cell:
    """One place in the tables.

    Attributes:
        stream: Name of the stream.
        method: Name of the method.
        fixed: Its settings that are not searched, as JSON.
    """

    stream: str
    method: str
    fixed: str

    def __str__(self) -> str:
        return f"{self.stream} {self.method}"


def cells(streams: Iterable[str], methods: Iterable[str]) -> Iterator[Cell]:
    """Every method on every stream."""
    streams = tuple(streams)
    yield from (Cell(stream, name, METHODS[name].fixed) for name in methods for stream in streams)


def missing(name: str) -> str | None:
    """The class that a method needs and that this version of the library does not have."""
    method = METHODS[name]
    needs = [("growthring.guards", guard) for guard in method.guards if guard != "OSF"]
    if method.optimizer is not None:
        needs.append(("growthring.optim", method.optimizer[0]))
    lacking = (f"{module}.{what}" for module, what in needs if not hasattr(importlib.import_module(module), what))
    return next(lacking, None)


def next_setting(cell: Cell, scores: Mapping[Setting, float]) -> Setting | None:
    """What the search tries next of a cell, given what its settings scored; see :func:`_runs.next_setting`."""
    method = METHODS[cell.method]
    return _runs.next_setting(method.rates, method.energies, scores)


def adapter(method: Method) -> PeftConfig | str:
    """What trains."""
    if method.trains == "lora":
        return LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=ATTENTION["text"] + UP["text"])
    if method.trains == "osf":
        return OSFConfig(effective_rank=1, target_modules="all-linear")
    return method.trains


def optimizer(method: Method) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The optimizer as the trainer takes it; ``None`` for AdamW."""
    if method.optimizer is None:
        return None
    name, options = method.optimizer
    return getattr(importlib.import_module("growthring.optim"), name), dict(options)


def guards(method: Method, setting: Setting, tasks: int) -> list[Guard]:
    """The guards of one run over ``tasks`` tasks."""
    made = []
    for name, options in method.guards.items():
        energy = setting.energy if name == list(method.guards)[-1] else None
        options = options if energy is None else {"energy": energy, **options}
        known = importlib.import_module("growthring.guards")
        made.append(OsfSchedule(tasks) if name == "OSF" else getattr(known, name)(**options))
    return made
