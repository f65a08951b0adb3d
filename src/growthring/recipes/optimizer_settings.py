"""Settings of the projected optimizers, for the methods that have one. What has no effect is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from growthring.errors import ConfigError

from ._method import TRAINS, Method, OptimizerName
from .methods import METHODS
from .settings import Section

__all__ = ["OPTIMIZER_DEFAULTS", "OptimizerSettings", "optimizer_for"]

OPTIMIZER_DEFAULTS: Mapping[OptimizerName, Mapping[str, Any]] = {
    "gorp": {
        "rank": 8,
        "refresh": 10,
        "scale": 1.0,
        "side": "auto",
        "rule": "adam",
        "range_finder": "warm",
        "rotate": True,
        "full_rank_lr": None,
    },
    "galore": {"rank": 128, "refresh": 200, "scale": 0.25, "side": "auto", "range_finder": "full"},
}
"""The settings that each optimizer has, with their defaults; ``full_rank_lr`` is the method's."""

_PAPER: Mapping[str, Any] = {"side": "right", "rotate": False}
"""What the published rule fixes: a basis on the input side, and moments that keep their numbers when it changes."""


class OptimizerSettings(Section):
    """The projected optimizer. Which settings there are depends on the method; defaults are filled in."""

    rank: int | None = Field(
        default=None, ge=1, description="Dimension of the subspace of each gradient. Default: GORP 8, GaLore 128."
    )
    refresh: int | None = Field(
        default=None, ge=1, description="Steps between two searches for it. Default: GORP 10, GaLore 200."
    )
    scale: float | None = Field(
        default=None, gt=0, description="Factor on projected updates. Default: GORP 1, GaLore 0.25."
    )
    side: Literal["auto", "left", "right", "two-sided"] | None = Field(
        default=None,
        description="Where the basis lies: outputs (left), inputs (right) or both. Default auto: the shorter side.",
    )
    rule: Literal["adam", "momentum", "adafactor", "shared"] | None = Field(
        default=None,
        description="GORP: what is done inside the subspace: Adam (default), momentum, Adam with a factored second "
        "moment, or with one that all rows share.",
    )
    range_finder: Literal["warm", "full", "gram", "randomized"] | None = Field(
        default=None,
        description="How the subspace is found: from the last one (warm, default for GORP), by SVD (full, default for "
        "GaLore), from the Gram matrix, or randomised.",
    )
    rotate: bool | None = Field(
        default=None, description="GORP: carry the moments over into a new subspace. Default true."
    )
    full_rank_lr: float | None = Field(
        default=None, gt=0, description="gorp: learning rate of the weights beside LoRA. Default: that of the method."
    )


def optimizer_for(method: Method, given: OptimizerSettings | None, *, paper: bool) -> OptimizerSettings | None:
    """The optimizer's settings with defaults filled in; ``None`` for methods that take any optimizer.

    Args:
        method: The method.
        given: What the configuration says.
        paper: Whether the guard follows the published rule, which fixes some of them.

    Raises:
        ConfigError: A setting has no effect for this method, or is not the published one.
    """
    if method.optimizer is None:
        if given is not None:
            having = ", ".join(m.name for m in METHODS.values() if m.optimizer)
            raise ConfigError(
                f"optimizer: has no effect: the method {method.name!r} has no optimizer of its own. Choose one by "
                f"train.optimizer, or a method that has one ({having})"
            )
        return None
    allowed = dict(OPTIMIZER_DEFAULTS[method.optimizer])
    values = {} if given is None else {n: v for n in type(given).model_fields if (v := getattr(given, n)) is not None}
    if method.full_rank_lr is None:
        allowed.pop("full_rank_lr", None)
        if "full_rank_lr" in values:
            raise ConfigError(
                f"optimizer.full_rank_lr: has no effect: the method {method.name!r} trains {TRAINS[method.adapter]}, "
                "all at train.learning_rate"
            )
    else:
        allowed["full_rank_lr"] = method.full_rank_lr
    for name in values:
        if name not in allowed:
            raise ConfigError(
                f"optimizer.{name}: has no effect: the method {method.name!r} has the settings {', '.join(allowed)}"
            )
    if paper:
        allowed |= _PAPER
        for name, fixed in _PAPER.items():
            if values.get(name, fixed) != fixed:
                raise ConfigError(
                    f"optimizer.{name}: {values[name]!r}: the published rule (guard.mode: paper) has {fixed!r}. "
                    f"Remove {name}, or choose guard.mode: sound"
                )
    return (given or OptimizerSettings()).model_copy(update={**allowed, **values})
