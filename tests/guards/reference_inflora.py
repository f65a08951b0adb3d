"""InfLoRA as slowly and plainly as it can be written, from raw inputs and full singular value decompositions.

Liang and Li, arXiv 2404.00228: A from the new task's inputs outside the old space, frozen; DualGPM keeps either the
protected directions ("remove") or, once they are more than half, the free ones ("retain").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class DualGPM:
    """The memory of one layer; ``power`` 2 is the paper's energy, 4 is what the released code computes."""

    def __init__(self, dim: int, power: int = 2) -> None:
        self.dim, self.power = dim, power
        self.mode = "remove"
        self.basis = torch.zeros(dim, 0, dtype=torch.float64)

    def projector(self) -> Tensor:
        """Onto the protected space."""
        inside = self.basis @ self.basis.T
        return inside if self.mode == "remove" else torch.eye(self.dim, dtype=torch.float64) - inside

    def grow(self, x: Tensor, energy: float) -> None:
        """Rows ``x`` ``(n, d)`` of one task's inputs."""
        x = x.double()
        total = float((torch.linalg.svdvals(x) ** self.power).sum())
        free = x - x @ self.projector()
        _, sigma, right = torch.linalg.svd(free, full_matrices=False)
        share = sigma**self.power / total
        outside = float(share.sum())
        count = 0
        if energy == 1.0:
            count = int((sigma > 1e-10 * sigma[0].clamp_min(1e-300)).sum()) if float(sigma[0]) > 1e-9 else 0
        else:
            while outside > (1.0 - energy) * (1 + 1e-9):
                outside -= float(share[count])
                count += 1
        new = right[:count].T
        if self.mode == "remove":
            self.basis = torch.cat([self.basis, new], dim=1)
            if self.basis.shape[1] > self.dim / 2:
                left = torch.linalg.svd(self.basis)[0]
                self.basis, self.mode = left[:, self.basis.shape[1] :], "retain"
        else:
            kept = self.basis - new @ (new.T @ self.basis)
            self.basis = torch.linalg.svd(kept)[0][:, : self.basis.shape[1] - count]


class ReferenceInfLoRA:
    """Layers ``y = W x + b + scale * sum_t B_t A_t x`` with a function between each two of them."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor], between: list, rank: int, scale: float) -> None:
        self.weights, self.biases, self.between, self.rank, self.scale = weights, biases, between, rank, scale
        self.memory = [DualGPM(w.shape[1]) for w in weights]
        self.branches: list[list[tuple[Tensor, Tensor]]] = [[] for _ in weights]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The answer, and what every layer saw."""
        seen = []
        for index, (w, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            seen.append(x.detach())
            y = x @ w.T + bias
            for a, b in self.branches[index]:
                y = y + self.scale * (x @ a.T) @ b.T
            x = self.between[index](y)
        return x, seen

    def prepare(self, x: Tensor) -> list[Tensor]:
        """New branches; returns what trains."""
        _, seen = self.forward(x)
        trained = []
        for index, (inputs, memory) in enumerate(zip(seen, self.memory, strict=True)):
            right = torch.linalg.svd(inputs - inputs @ memory.projector(), full_matrices=False)[2]
            a = right[: self.rank] / math.sqrt(3.0)
            b = torch.zeros(self.weights[index].shape[0], self.rank, dtype=torch.float64, requires_grad=True)
            for _, old in self.branches[index]:
                old.requires_grad_(False)
            self.branches[index].append((a, b))
            trained.append(b)
        return trained

    def finish(self, x: Tensor, energy: float) -> None:
        with torch.no_grad():
            _, seen = self.forward(x)
        for inputs, memory in zip(seen, self.memory, strict=True):
            memory.grow(inputs, energy)
