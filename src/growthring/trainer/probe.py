"""Logistic regression on frozen features: the first half of LP-FT, and a baseline of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from growthring.errors import ConfigError, DataError, NumericalError

__all__ = ["PENALTIES", "LinearProbe", "fit_linear_probe"]

PENALTIES: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Weights of the squared norm that are tried, strongest first."""

_ITERATIONS = 200


@dataclass(frozen=True)
class LinearProbe:
    """A linear head without a bias, learned by logistic regression.

    Attributes:
        weight: ``(classes, d)`` in float64; what a linear head holds.
        penalty: The weight of the squared norm that was chosen.
        validation: Accuracy on the validation features.
        tried: ``(penalty, validation accuracy)`` of every penalty, strongest first.
    """

    weight: Tensor
    penalty: float
    validation: float
    tried: tuple[tuple[float, float], ...]


def fit_linear_probe(
    features: Tensor,
    labels: Sequence[int] | Tensor,
    validation_features: Tensor,
    validation_labels: Sequence[int] | Tensor,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
) -> LinearProbe:
    """Multinomial logistic regression, its regularisation chosen on validation data.

    ``min_W mean_i -log softmax(W x_i)[y_i] + penalty / 2 * ||W||_F^2``, with features divided by their root mean
    square, so that a penalty means the same for every encoder; the weight is returned for the features as they are.
    L-BFGS in float64, each penalty from the solution of the one before. No bias: linear heads here have none.

    Args:
        features: ``(n, d)`` training features.
        labels: ``n`` classes from 0.
        validation_features: ``(v, d)``.
        validation_labels: ``v`` classes.
        classes: Number of classes.
        penalties: Those to try; default :data:`PENALTIES`.

    Returns:
        The probe with the highest validation accuracy; of several, the one with the lowest validation loss.

    Raises:
        ConfigError: There is no penalty, or one is not above 0.
        DataError: Features and labels do not fit together, or a split is empty.
        NumericalError: Features are not finite, or all zero.
    """
    penalties = sorted(penalties, reverse=True)
    if not penalties or not penalties[-1] > 0:
        raise ConfigError(f"penalties={penalties}: give numbers above 0")
    data = []
    for name, rows, given in (
        ("training", features, labels),
        ("validation", validation_features, validation_labels),
    ):
        targets = torch.as_tensor(given, dtype=torch.long).cpu()
        if rows.ndim != 2 or not len(rows) or len(rows) != len(targets):
            raise DataError(
                f"{name} features of shape {tuple(rows.shape)} for {len(targets)} labels: give (n, d) each"
            )
        if int(targets.min()) < 0 or int(targets.max()) >= classes:
            raise DataError(
                f"{name} labels run from {int(targets.min())} to {int(targets.max())}, of {classes} classes"
            )
        data.append((rows.detach().cpu().double(), targets))
    (x, y), (held, truth) = data
    scale = float(x.square().mean().sqrt())
    if not (0 < scale < float("inf")) or not bool(torch.isfinite(held).all()):
        raise NumericalError(
            f"the root mean square of the features is {scale}: the encoder gives nothing to learn from"
        )
    x, held = x / scale, held / scale
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64)
    found: list[tuple[float, float, float, Tensor]] = []
    for penalty in penalties:
        weight = _solve(x, y, weight, penalty)
        logits = held @ weight.T
        right = float((logits.argmax(1) == truth).double().mean())
        found.append((right, -float(F.cross_entropy(logits, truth)), penalty, weight))
    right, _, penalty, best = max(found, key=lambda one: one[:2])
    return LinearProbe(best / scale, penalty, right, tuple((p, r) for r, _, p, _ in found))


def _solve(x: Tensor, y: Tensor, start: Tensor, penalty: float) -> Tensor:
    """The minimum for one penalty."""
    with torch.enable_grad():
        weight = start.clone().requires_grad_(True)
        search = torch.optim.LBFGS(
            [weight], max_iter=_ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            search.zero_grad()
            loss = F.cross_entropy(x @ weight.T, y) + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        search.step(closure)
    return weight.detach()
