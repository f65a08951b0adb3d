"""PEGP as slowly and plainly as it can be written: dense projectors from SVDs of the raw old features.

Qiao et al., arXiv 2405.13383, equations 13-14, with the growth rule of GPM (energy is sigma squared, not centred, the
smallest number of directions that reaches the threshold) and the update projected as well as the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grow_basis(basis: Tensor, features: Tensor, energy: float) -> Tensor:
    """Columns ``(d, k)`` extended by what rows ``features`` ``(n, d)`` need."""
    inside = features @ basis @ basis.T
    rest = features - inside
    total = float((features**2).sum())
    have = float((inside**2).sum())
    _, sigma, right = torch.linalg.svd(rest, full_matrices=False)
    chosen = 0
    if energy == 1.0:
        chosen = int((sigma > 1e-10 * torch.linalg.matrix_norm(features, 2)).sum())
    else:
        while have < energy * total:
            have += float(sigma[chosen] ** 2)
            chosen += 1
    return torch.cat([basis, right[:chosen].T], dim=1)


class ReferencePEGP:
    """Weights ``(out, d)`` by name, each with a basis of the old features that it must not see moved."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.basis = {n: torch.zeros(w.shape[1], 0, dtype=torch.float64) for n, w in weights.items()}
        self.anchor: dict[str, Tensor] = {}

    def remember(self, features: dict[str, Tensor], energy: dict[str, float]) -> None:
        for name, x in features.items():
            self.basis[name] = grow_basis(self.basis[name], x.double(), energy[name])

    def projector(self, name: str) -> Tensor:
        u = self.basis[name]
        return torch.eye(u.shape[0], dtype=torch.float64) - u @ u.T

    def begin(self) -> None:
        self.anchor = {n: w.detach().clone() for n, w in self.weights.items()}

    def before_step(self) -> None:
        for name, w in self.weights.items():
            w.grad = w.grad @ self.projector(name)

    def after_step(self) -> None:
        for name, w in self.weights.items():
            with torch.no_grad():
                w.copy_(self.anchor[name] + (w - self.anchor[name]) @ self.projector(name))
