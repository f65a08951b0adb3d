"""L2-SP, FTP, SPD and TPGM written down from their equations, slowly, in float64: what the guards must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def row_norms(d: Tensor, norm: str) -> Tensor:
    """Of each row the sum of absolute values; of the whole tensor (or of one with a single axis) one number."""
    if norm == "tensor":
        return d.norm().reshape(1)
    rows = d.reshape(d.shape[0], -1) if d.ndim > 1 else d.reshape(1, -1)
    return rows.abs().sum(1)


def scaled(d: Tensor, factors: Tensor) -> Tensor:
    """Every row times its factor."""
    rows = d.reshape(len(factors), -1) if d.numel() else d
    return (rows * factors[:, None]).reshape(d.shape) if d.numel() else d


class Adam:
    """Adam's direction of one number."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-30) -> None:
        self.m = self.v = 0.0
        self.k, self.betas, self.eps = 0, betas, eps

    def direction(self, h: float) -> float:
        b1, b2 = self.betas
        self.k += 1
        self.m = b1 * self.m + (1 - b1) * h
        self.v = b2 * self.v + (1 - b2) * h * h
        return (self.m / (1 - b1**self.k)) / ((self.v / (1 - b2**self.k)) ** 0.5 + self.eps)


class SlowFTP:
    """FTP of one tensor. ``C = theta - u - theta_0``, ``n_i`` its rows' norms, and what the rows are scaled by."""

    def __init__(self, anchor: Tensor, mu: float, kappa: float, norm: str, first: float) -> None:
        self.anchor, self.mu, self.kappa, self.norm, self.first = anchor.double(), mu, kappa, norm, first
        self.candidate: Tensor | None = None
        self.radius: float | None = None
        self.adam = Adam()
        self.h: float | None = None

    def step(self, gradient: Tensor, candidate: Tensor) -> Tensor:
        """The gradient at the weights before the optimizer's step, the weights after it; gives the projected ones."""
        c = candidate.double() - self.anchor
        n = row_norms(c, self.norm)
        if self.candidate is None or self.radius is None:
            self.radius = min(self.first, float(n.max()))
        else:
            n_before = row_norms(self.candidate, self.norm)
            h = 0.0
            g, before = gradient.double().reshape(len(n), -1), self.candidate.reshape(len(n), -1)
            for i in range(len(n)):
                if self.radius <= n_before[i] and n_before[i] > 0:  # inside the ball a row does not depend on it
                    h += float(g[i] @ before[i]) / float(n_before[i])
            self.h = h
            h = self.kappa * h if h > 0 else h
            self.radius = min(max(self.radius - self.mu * self.adam.direction(h), 0.0), float(n.max()))
        self.candidate = c
        ratios = torch.tensor([min(1.0, self.radius / float(x)) if x > 0 else 1.0 for x in n], dtype=torch.float64)
        return self.anchor + scaled(c, ratios)


def slow_spd(anchor: Tensor, before: Tensor, gradient: Tensor, after: Tensor, weight: float) -> Tensor:
    """SPD of one tensor: weights before and after the optimizer's step."""
    old, new = before.double() - anchor.double(), after.double() - anchor.double()
    if float((gradient.double() * old).sum()) <= 0 or float(new.norm()) == 0:
        return after.double()
    ratio = min(max((float(new.norm()) - float(old.norm())) / float(new.norm()), 0.0), 1.0)
    return anchor.double() + (1 - min(weight * ratio, 1.0)) * new


def slow_tpgm(
    loss: Callable[[Sequence[Tensor], int], Tensor],
    anchors: Sequence[Tensor],
    weights: Sequence[Tensor],
    iterations: int,
    mu: float,
    norm: str,
) -> tuple[list[Tensor], list[float]]:
    """TPGM with autograd through the radii: projected weights and radii.

    ``loss(weights, iteration)`` is the validation loss.
    """
    ds = [w.double() - a.double() for w, a in zip(weights, anchors, strict=True)]
    norms = [row_norms(d, norm) for d in ds]
    moving = [i for i, n in enumerate(norms) if float(n.max()) > 0]
    radii = [nn.Parameter((n[n > 0].min() if bool((n > 0).any()) else n.min()) / 2) for n in norms]
    optimizer = torch.optim.Adam(radii, lr=mu, eps=1e-30)

    def projected() -> list[Tensor]:
        result = []
        for a, d, n, radius in zip(anchors, ds, norms, radii, strict=True):
            ratios = torch.where(n > 0, (radius / n.clamp(min=1e-300)).clamp(0, 1), torch.ones_like(n))
            result.append(a.double() + scaled(d, ratios))
        return result

    for iteration in range(iterations):
        optimizer.zero_grad()
        loss(projected(), iteration).backward()
        optimizer.step()
        with torch.no_grad():
            for i in moving:
                radii[i].clamp_(torch.zeros(()).double(), norms[i].max())
    return [w.detach() for w in projected()], [float(r.detach()) for r in radii]
