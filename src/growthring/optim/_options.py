"""Options of a projected optimizer: their defaults, what is allowed, and what a parameter's shape lets them do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from growthring.errors import ConfigError, nearest
from growthring.subspace import RANGE_FINDERS

from ._matrix import is_dtensor, row_shard

__all__ = ["RULES", "SIDES", "SIDE_CODES", "ParameterPlan", "check_options", "matrix_shape", "plan_of", "side_of"]

SIDES = ("auto", "left", "right", "two-sided")
RULES = ("adam", "momentum", "adafactor", "shared")
SIDE_CODES = ("right", "left", "two-sided")
"""What ``state["side"]`` holds is the place in this tuple."""

Treatment = Literal["projected", "adamw", "frozen"]


@dataclass(frozen=True)
class ParameterPlan:
    """How an optimizer treats one parameter, and why.

    Attributes:
        name: Its name, where the optimizer was given names; else its place, as ``group 0, parameter 3``.
        shape: Its shape.
        treatment: ``"projected"``: stepped inside a low-rank subspace of its gradient. ``"adamw"``: as
            ``torch.optim.AdamW`` would. ``"frozen"``: it needs no gradient and stays as it is.
        side: ``"right"``, ``"left"`` or ``"two-sided"``; ``None`` unless projected.
        rank: Dimension of the subspace; ``None`` unless projected.
        why: The reason, in a sentence.
    """

    name: str
    shape: tuple[int, ...]
    treatment: Treatment
    side: str | None
    rank: int | None
    why: str


def check_options(options: Mapping[str, Any], who: str) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: Naming the option, the value and what is allowed.
    """
    for name in ("lr", "eps", "weight_decay"):
        value = options[name]
        if isinstance(value, Tensor) and value.numel() == 1:
            value = float(value)
        if not _number(value) or not 0.0 <= value < math.inf:
            raise ConfigError(f"{who}({name}={options[name]!r}): a finite number of at least 0 is needed")
    if not _number(options["scale"]) or not 0.0 < options["scale"] < math.inf:
        raise ConfigError(f"{who}(scale={options['scale']!r}): a finite number above 0 is needed")
    betas = options["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(_number(b) and 0.0 <= b < 1.0 for b in betas):
        raise ConfigError(f"{who}(betas={betas!r}): two numbers in [0, 1) are needed")
    for name, least in (("rank", 1), ("refresh", 1), ("seed", 0)):
        value = options[name]
        if value is None and name == "rank":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{who}({name}={value!r}): a whole number of at least {least} is needed")
    for name, allowed in (("side", SIDES), ("rule", RULES), ("range_finder", RANGE_FINDERS)):
        if options[name] not in allowed:
            raise ConfigError(f"{who}({name}={options[name]!r}): {nearest(str(options[name]), allowed)}")
    for name in ("rotate", "stagger", "compile"):
        if not isinstance(options[name], bool):
            raise ConfigError(f"{who}({name}={options[name]!r}): True or False is needed")
    if options["side"] == "two-sided" and options["rule"] == "shared":
        raise ConfigError(
            f"{who}(side='two-sided', rule='shared'): both axes of the coordinates are rank axes, so no axis is left "
            "to share the second moment over. Use side='right' or 'left', or rule='adam'"
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """``(m, n)`` of a parameter of two or more dimensions, seen as ``(shape[0], rest)``."""
    return parameter.shape[0], math.prod(parameter.shape[1:])


def side_of(parameter: Tensor, wanted: str) -> str:
    """The side that ``"auto"`` stands for: the basis lies on the shorter axis, or on the one that is not sharded.

    Raises:
        ConfigError: If a basis on the sharded axis was asked for.
    """
    if is_dtensor(parameter):
        if row_shard(parameter) is not None and wanted in ("left", "two-sided"):
            raise ConfigError(
                f"side={wanted!r}: the rows of a parameter of shape {tuple(parameter.shape)} are spread over ranks, "
                "and a basis on that side would have to be, too. Use side='right' (or 'auto', which takes it)"
            )
        if wanted == "auto":
            return "right"
    if wanted != "auto":
        return wanted
    m, n = matrix_shape(parameter)
    return "right" if m >= n else "left"


def plan_of(parameter: Tensor, group: Mapping[str, Any], name: str) -> ParameterPlan:
    """How one parameter of ``group`` is treated."""
    shape, rank = tuple(parameter.shape), group["rank"]

    def says(treatment: Treatment, why: str) -> ParameterPlan:
        return ParameterPlan(name, shape, treatment, None, None, why)

    if not parameter.requires_grad:
        return says("frozen", "it does not require a gradient")
    if rank is None:
        return says("adamw", "its group has rank=None")
    if parameter.ndim < 2:
        return says("adamw", f"it has {parameter.ndim} dimensions; a matrix is needed")
    m, n = matrix_shape(parameter)
    if min(m, n) < rank:
        return says("adamw", f"its shorter side, {min(m, n)}, is below the rank {rank}")
    side = side_of(parameter, group["side"])
    kept = {"right": f"{rank} of {n} input directions", "left": f"{rank} of {m} output directions"}
    why = kept.get(side, f"{rank} of {n} input and {rank} of {m} output directions")
    return ParameterPlan(name, shape, "projected", side, rank, f"{why}, found again every {group['refresh']} steps")
