"""How much of the old features' energy is protected: a number, one per kind of site, a rule, or chosen on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from growthring.errors import ConfigError, nearest

__all__ = [
    "CANDIDATES",
    "DEFAULT_ENERGY",
    "KINDS",
    "Energy",
    "LinearSchedule",
    "NullRatio",
    "energy_for",
    "parse_energy",
]

KINDS = (
    "lora_A",
    "lora_B",
    "largo_A",
    "largo_B",
    "adapter_down",
    "adapter_up",
    "prefix_key",
    "prefix_value",
    "prompt_key",
    "prompt_value",
    "ia3",
    "linear",
)
"""Kinds of sites that PEGP protects."""


@dataclass(frozen=True)
class LinearSchedule:
    """Energy rising (or falling) linearly over the tasks of a stream: ``start + (end - start) * t / (tasks - 1)``.

    The rule of InfLoRA (Liang and Li 2024, arXiv 2404.00228), which goes from 0.95 or 0.98 to 1.0.

    Attributes:
        start: Energy after the first task, in (0, 1].
        end: Energy after the last task, in (0, 1].
        tasks: Number of tasks over which it moves, at least 1; later tasks keep ``end``.
    """

    start: float
    end: float
    tasks: int

    def __post_init__(self) -> None:
        _check_number(self.start, "LinearSchedule.start")
        _check_number(self.end, "LinearSchedule.end")
        if isinstance(self.tasks, bool) or not isinstance(self.tasks, int) or self.tasks < 1:
            raise ConfigError(f"LinearSchedule.tasks is {self.tasks!r}; it must be a whole number, at least 1")

    def at(self, task_index: int) -> float:
        """Energy for the task at ``task_index`` (from 0)."""
        if self.tasks == 1:
            return self.end
        share = min(1.0, max(0.0, task_index / (self.tasks - 1)))
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class NullRatio:
    """Protects every direction whose energy is above ``times`` the smallest: the rest counts as the null space.

    The rule of Adam-NSCL (Wang et al. 2021, "Training Networks in Null Space of Feature Covariance for Continual
    Learning", CVPR), applied to what earlier tasks left free, so that the protected space only ever grows.

    Attributes:
        times: At least 1; the paper takes 10, and 30 for twenty tasks.
    """

    times: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.times, bool) or not isinstance(self.times, int | float) or not self.times >= 1.0:
            raise ConfigError(f"NullRatio(times={self.times!r}): must be a number, at least 1")

    def protected(self, energies: Tensor) -> int:
        """How many of the free directions with these energies are to be protected."""
        if energies.numel() == 0:
            return 0
        noise = energies.max() * energies.numel() * torch.finfo(torch.float64).eps
        return int((energies > self.times * energies.min().clamp_min(noise)).sum())


OneEnergy = float | LinearSchedule | NullRatio
Energy = OneEnergy | Mapping[str, OneEnergy] | Literal["auto"]

DEFAULT_ENERGY: Mapping[str, float] = {
    "lora_A": 0.95,
    "lora_B": 0.90,
    "largo_A": 0.95,
    "largo_B": 0.90,
    "adapter_down": 0.95,
    "adapter_up": 0.90,
    "prefix_key": 0.90,
    "prefix_value": 0.90,
    "prompt_key": 0.90,
    "prompt_value": 0.90,
    "ia3": 0.90,
    "linear": 0.80,
}
"""Used where a mapping leaves a kind out."""

_WIDE, _NARROW = ("lora_A", "largo_A", "adapter_down"), ("lora_B", "largo_B", "adapter_up")


def _candidate(wide: float, narrow: float, linear: float, rest: float) -> Mapping[str, float]:
    chosen = dict.fromkeys(_WIDE, wide) | dict.fromkeys(_NARROW, narrow) | {"linear": linear}
    return {kind: chosen.get(kind, rest) for kind in KINDS}


CANDIDATES: tuple[Mapping[str, float], ...] = (
    _candidate(0.99, 0.97, 0.95, 0.97),
    _candidate(0.95, 0.90, 0.90, 0.90),
    _candidate(0.90, 0.70, 0.80, 0.80),
    _candidate(0.80, 0.50, 0.70, 0.60),
)
"""What ``energy="auto"`` tries at the first task boundary, most protective first."""


def parse_energy(value: Any, kinds: Sequence[str] = KINDS) -> Energy:
    """Check an energy given by a user or read from a file.

    Args:
        value: A number in (0, 1]; a :class:`LinearSchedule` or ``{"start", "end", "tasks"}``; a :class:`NullRatio` or
            ``{"times"}``; a mapping from kinds of sites to any of these; or ``"auto"``.
        kinds: Kinds of sites that a mapping may name.

    Returns:
        The same, with rules as objects.

    Raises:
        ConfigError: On anything else, saying what is allowed.
    """
    if value == "auto":
        return "auto"
    if isinstance(value, str) or value is None:
        raise ConfigError(f"energy={value!r}: give a number in (0, 1], a mapping over {', '.join(kinds)}, or 'auto'")
    if isinstance(value, Mapping) and "start" not in value and "times" not in value:
        if not value:
            raise ConfigError(f"energy={{}}: name at least one of {', '.join(kinds)}")
        for kind in value:
            if kind not in kinds:
                raise ConfigError(f"energy names the unknown kind of site {kind!r}; {nearest(str(kind), kinds)}")
        return {kind: _parse_one(one, f"energy[{kind!r}]") for kind, one in value.items()}
    return _parse_one(value, "energy")


def energy_for(
    energy: Energy, kind: str, task_index: int, default: Mapping[str, float] = DEFAULT_ENERGY
) -> float | NullRatio:
    """The threshold, or the rule, for one kind of site after one task; ``default`` where a mapping leaves it out."""
    if energy == "auto":
        raise ConfigError("energy='auto' has not been chosen yet")
    one: Any = energy.get(kind, default[kind]) if isinstance(energy, Mapping) else energy
    if isinstance(one, NullRatio):
        return one
    return one.at(task_index) if isinstance(one, LinearSchedule) else float(one)


def _parse_one(value: Any, where: str) -> OneEnergy:
    if isinstance(value, LinearSchedule | NullRatio):
        return value
    if isinstance(value, Mapping) and set(value) == {"times"}:
        return NullRatio(value["times"])
    if isinstance(value, Mapping):
        unknown = set(value) - {"start", "end", "tasks"}
        if unknown or set(value) != {"start", "end", "tasks"}:
            raise ConfigError(f"{where}={dict(value)}: a schedule has exactly the keys start, end and tasks")
        try:
            return LinearSchedule(value["start"], value["end"], value["tasks"])
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    _check_number(value, where)
    return float(value)


def _check_number(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ConfigError(f"{where}={value!r}: the share of energy to protect must be a number in (0, 1]")
