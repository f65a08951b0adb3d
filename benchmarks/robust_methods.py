"""What the robustness benchmark compares: what trains, what holds it back, and the settings that are searched.

Every method gets the same search: its strengths at the middle learning rate, then lower and higher rates while these
help, all on validation rows of the learned domain. All begin with the same linear probe as their head (LP-FT), but
those whose name ends in ``scratch``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from growthring import guards
from growthring.adapters import LargoConfig

RANK = 8
LOW_RANK_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WEIGHT_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
FRONTIER = ("lora",)
"""Trained at every learning rate; with the WiSE curve of each they make the frontier."""
CURVES = ("lora", "linear")
"""Methods whose WiSE curve is drawn too."""
ALPHAS: Mapping[str, tuple[float, ...]] = {
    "sentiment": (0.25, 0.5, 0.75),
    "topics": (0.25, 0.5, 0.75),
    "emoji": (0.5,),  # images take longer to score
}
"""Places of a WiSE curve between start and end, by bench."""


@dataclass(frozen=True)
class Cell:
    """One method on one bench."""

    stream: str
    method: str


@dataclass(frozen=True)
class Method:
    """How a method is made.

    Attributes:
        title: In words.
        adapter: ``"lora"``, ``"linear"``, or settings of :class:`LargoConfig`.
        guard: Makes the guard from its strength; ``None`` without one.
        strengths: Strengths that are tried; of most guards one of their parameters.
        scratch: The head starts at random.
        general: The guard first learns texts of other kinds, as if they were a task before this one.
    """

    title: str
    adapter: str | Mapping[str, Any]
    guard: Callable[[Any], guards.Guard] | None = None
    strengths: tuple[float | None, ...] = (None,)
    scratch: bool = False
    general: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates that are tried."""
        return WEIGHT_RATES if self.adapter == "linear" else LOW_RANK_RATES


MUS = (0.3, 1.0, 3.0)
METHODS: Mapping[str, Method] = {
    "lora": Method("LoRA", "lora"),
    "linear": Method("all linear weights (LP-FT)", "linear"),
    "linear-scratch": Method("all linear weights, head from scratch", "linear", scratch=True),
    "l2-sp": Method("L2-SP", "linear", lambda w: guards.L2SP(w), (1e-3, 1e-2)),
    "ftp": Method("FTP", "linear", lambda _: guards.FTP()),
    "tpgm": Method("TPGM", "linear", lambda _: guards.TPGM()),
    "spd": Method("SPD", "linear", lambda w: guards.SPD(w), (0.3, 1.0)),
    "digrap": Method("DiGraP", "linear", lambda w: guards.Directional(weight=w), (0.0, 1e-2)),
    "pissa": Method("PiSSA", {"form": "residual"}),
    "milora": Method("MiLoRA", {"form": "residual", "init": "minor"}),
    "largo-f": Method("LARGO-F, principal", {"form": "delta"}, lambda mu: guards.Radius(mu), MUS),
    "largo-f-minor": Method("LARGO-F, minor", {"form": "delta", "init": "minor"}, lambda mu: guards.Radius(mu), MUS),
    "largo-p": Method("LARGO-P, principal", {"form": "product"}, lambda mu: guards.Radius(mu), MUS),
    "largo-p-activation": Method(
        "LARGO-P, activation", {"form": "product", "init": "activation"}, lambda mu: guards.Radius(mu), MUS
    ),
    "lora-outside": Method(
        "LoRA kept out of general text",
        "lora",
        lambda energy: guards.PEGP(energy=energy, unprotected="allow", kinds=("lora_A", "lora_B"), probes=0),
        (0.5, 0.9),
        general=True,
    ),
    "largo-d": Method("LARGO-D, principal", {"form": "delta"}, lambda mu: guards.Directional(mu), (1e-2, 1e-1)),
}


def adapter(method: Method, layers: Sequence[str]) -> Any:
    """What ``RobustTrainer(adapter=...)`` takes.

    Args:
        method: The method.
        layers: Names of the linear layers to adapt.
    """
    if method.adapter == "linear":
        return None  # the encoder's own weights, made trainable before
    names = list(layers)
    if method.adapter == "lora":
        return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    return LargoConfig(r=RANK, target_modules=names, **dict(method.adapter))  # type: ignore[arg-type]
