"""Robustness of a fine-tuned model: accuracy inside and outside the training domain, and what lies above a frontier.

Notation: ``x`` is the accuracy on the test rows of the task that was trained on (in distribution, ID), ``y`` the
unweighted mean of the accuracies on sets of other domains (out of distribution, OOD). All are fractions of 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from growthring.errors import DataError

__all__ = ["Frontier", "RobustPoint", "effective_robustness", "frontier"]


@dataclass(frozen=True)
class RobustPoint:
    """One model, measured inside and outside its training domain.

    Attributes:
        method: Name of the method.
        seed: Seed of the training.
        id_validation: Accuracy on the task's validation rows: all that choices may be made on.
        id_test: Accuracy on the task's test rows; ``None`` where they were not scored.
        ood: Accuracy on each set of another domain, by name; empty where none was scored.
        alpha: Place between the start (0) and the trained model (1), as in WiSE-FT.
        setting: What was chosen for the method, as plain values.
        deviation: ``||W - W0||_F`` over all adapted weights; ``None`` where the method has no such matrix.
        trained: Number of trained parameters, the head's included.
        seconds: Wall time of the training.

    Raises:
        DataError: If an accuracy is no fraction, or ``alpha`` is not between 0 and 1.
    """

    method: str
    seed: int
    id_validation: float
    id_test: float | None = None
    ood: Mapping[str, float] = field(default_factory=dict)
    alpha: float = 1.0
    setting: Mapping[str, Any] = field(default_factory=dict)
    deviation: float | None = None
    trained: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        values = {"id_validation": self.id_validation, "id_test": self.id_test, "alpha": self.alpha, **self.ood}
        for name, value in values.items():
            if value is not None and not 0.0 <= value <= 1.0:
                raise DataError(f"point of {self.method!r}: {name}={value!r} is no fraction between 0 and 1")

    @property
    def ood_mean(self) -> float | None:
        """``mean_d ood_d``, every domain alike however many rows it has; ``None`` without any."""
        return math.fsum(self.ood.values()) / len(self.ood) if self.ood else None

    def to_dict(self) -> dict[str, Any]:
        """The point as plain values for JSON."""
        return {**dataclasses.asdict(self), "ood": dict(self.ood), "setting": dict(self.setting)} | {
            "ood_mean": self.ood_mean
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RobustPoint:
        """Rebuild a point from what :meth:`to_dict` gave."""
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


@dataclass(frozen=True)
class Frontier:
    """The upper concave hull of some points ``(x, y)``, made monotone: what mixtures of the baselines reach.

    Answering each input by model ``a`` with probability ``p`` and else by model ``b`` has the expected accuracies
    ``p (x_a, y_a) + (1 - p) (x_b, y_b)``: every point of the hull is reached by a random mixture of two baselines, so
    only what lies above it is better than all of them.

    Attributes:
        corners: Corners ``(x, y)`` of the hull from its highest point to its right end, ``x`` rising, ``y`` falling.
    """

    corners: tuple[tuple[float, float], ...]

    def height(self, x: float) -> float:
        """The best OOD accuracy that mixtures of the baselines have at an ID accuracy of ``x``.

        Left of the highest corner its height (a model with more ID accuracy is no worse there); between corners the
        straight line; right of the last corner the height of that one, since no baseline gets there.
        """
        if x <= self.corners[0][0]:
            return self.corners[0][1]
        for (x0, y0), (x1, y1) in zip(self.corners, self.corners[1:], strict=False):
            if x <= x1:
                return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        return self.corners[-1][1]


def frontier(points: Iterable[RobustPoint | tuple[float, float]]) -> Frontier:
    """The frontier of baselines.

    Args:
        points: Points with both accuracies, or pairs ``(x, y)``. Several seeds of one setting are best averaged
            before: the hull of single seeds is higher than any of the settings, by luck.

    Raises:
        DataError: There is no point, or one lacks its ID test or OOD accuracies.
    """
    pairs = sorted({_pair(point) for point in points}, reverse=True)
    if not pairs:
        raise DataError("a frontier needs at least one baseline point; got none")
    hull: list[tuple[float, float]] = []  # from the right end to the left, the upper side
    for x, y in pairs:
        if hull and x == hull[-1][0]:
            continue  # below it: pairs of one x come with the highest y first
        while len(hull) >= 2 and _turn(hull[-2], hull[-1], (x, y)) <= 0:
            hull.pop()
        hull.append((x, y))
    top = max(range(len(hull)), key=lambda i: (hull[i][1], hull[i][0]))
    return Frontier(tuple(reversed(hull[: top + 1])))


def effective_robustness(point: RobustPoint | tuple[float, float], baseline: Frontier) -> float:
    """How far a point lies above the frontier of the baselines: ``rho = y - height(x)``.

    Positive: better outside the domain than any mixture of the baselines that is as good inside. (Taori et al. 2020
    subtract what a fit through standard models predicts; the hull here is a stricter comparison.) What is smaller than
    the rounding of means, 1e-12, is exactly 0: a point on the frontier is not above it.

    Raises:
        DataError: The point lacks its ID test or OOD accuracies.
    """
    x, y = _pair(point)
    above = y - baseline.height(x)
    return above if abs(above) >= 1e-12 else 0.0


def _pair(point: RobustPoint | Sequence[float]) -> tuple[float, float]:
    if isinstance(point, RobustPoint):
        if point.id_test is None or point.ood_mean is None:
            raise DataError(
                f"point of {point.method!r}, seed {point.seed}: id_test and ood are needed, and one is missing"
            )
        return point.id_test, point.ood_mean
    x, y = map(float, point)
    if not (math.isfinite(x) and math.isfinite(y)):
        raise DataError(f"a point ({x}, {y}) is not finite")
    return x, y


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Positive if the way from ``a`` by ``b`` to ``c``, leftwards, bends as the upper side of a hull does."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
