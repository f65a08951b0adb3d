"""GORP's memory as slowly and plainly as it can be written: dense projectors, dense second moments, float64.

Wang et al., ACL 2025, with the bases in the coordinates of the weight, built from every gradient of the task, and the
update projected as well as the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grow(basis: Tensor, moment: Tensor, energy: float) -> Tensor:
    """Columns ``(d, k)`` extended by the fewest eigenvectors that reach the share of ``tr(moment)``."""
    projector = torch.eye(basis.shape[0], dtype=torch.float64) - basis @ basis.T
    total = float(moment.trace())
    if total == 0.0:
        return basis
    have = total - float((projector @ moment @ projector).trace())
    values, vectors = torch.linalg.eigh(projector @ moment @ projector)
    chosen = 0
    while have < energy * total * (1 - 1e-12) and basis.shape[1] + chosen < basis.shape[0]:
        chosen += 1
        have += float(values[-chosen])
    return torch.linalg.qr(torch.cat([basis, vectors.flip(1)[:, :chosen]], 1))[0]


class ReferenceGradientMemory:
    """Weights ``(out, in)`` by name, with a basis of each side that old gradients lay in."""

    def __init__(self, weights: dict[str, Tensor], side: str) -> None:
        self.weights, self.side = weights, side
        self.inside = {n: torch.zeros(w.shape[1], 0, dtype=torch.float64) for n, w in weights.items()}
        self.outside = {n: torch.zeros(w.shape[0], 0, dtype=torch.float64) for n, w in weights.items()}
        self.anchor: dict[str, Tensor] = {}

    def keep(self, name: str, change: Tensor) -> Tensor:
        s, t = self.inside[name], self.outside[name]
        return (change - t @ t.T @ change) @ (torch.eye(s.shape[0], dtype=torch.float64) - s @ s.T)

    def begin(self) -> None:
        self.anchor = {n: w.detach().clone() for n, w in self.weights.items()}
        self.seen = {n: [] for n in self.weights}

    def before_step(self) -> None:
        for name, w in self.weights.items():
            size = float(w.grad.norm())
            w.grad = self.keep(name, w.grad)
            if float(w.grad.norm()) > 1e-14 * size:  # else rounding is all that is left
                self.seen[name].append(w.grad.clone())

    def after_step(self) -> None:
        for name, w in self.weights.items():
            with torch.no_grad():
                w.copy_(self.anchor[name] + self.keep(name, w - self.anchor[name]))

    def end(self, energy: float) -> None:
        for name, gradients in self.seen.items():
            if self.side != "output":
                self.inside[name] = grow(
                    self.inside[name],
                    sum((g.T @ g for g in gradients), 0 * self.inside[name] @ self.inside[name].T),
                    energy,
                )
            if self.side != "input":
                self.outside[name] = grow(
                    self.outside[name],
                    sum((g @ g.T for g in gradients), 0 * self.outside[name] @ self.outside[name].T),
                    energy,
                )
