"""Slow plain twins of ``growthring.subspace``, written from the equations with nothing clever in them.

Everything is dense and in float64: the projector is the matrix ``U U^T``, a moment is ``X^T X`` of all rows at once,
growth is the singular value decomposition of the raw rows outside the old space, a bank is a Python loop.
"""

from __future__ import annotations

import torch
from torch import Tensor


def span(vectors: Tensor, rtol: float = 1e-10) -> Tensor:
    """Orthonormal columns of the span of the columns of ``vectors``."""
    left, sigma, _ = torch.linalg.svd(vectors.double(), full_matrices=False)
    return left[:, : int((sigma > rtol * sigma[0]).sum())] if sigma.numel() else left


def projector(basis: Tensor) -> Tensor:
    """``U U^T`` of orthonormal columns."""
    wide = basis.double()
    return wide @ wide.T


def project(x: Tensor, basis: Tensor) -> Tensor:
    return x.double() @ projector(basis)


def reject(x: Tensor, basis: Tensor) -> Tensor:
    return x.double() @ (torch.eye(x.shape[-1], dtype=torch.float64) - projector(basis))


def moment(rows: Tensor) -> Tensor:
    """``sum_n x_n x_n^T``, one outer product at a time."""
    wide = rows.double().reshape(-1, rows.shape[-1])
    total = torch.zeros(wide.shape[1], wide.shape[1], dtype=torch.float64)
    for row in wide:
        total += torch.outer(row, row)
    return total


def energy_inside(rows: Tensor, basis: Tensor) -> float:
    """``||X U||_F^2 / ||X||_F^2``."""
    wide = rows.double()
    return float((wide @ basis.double()).square().sum() / wide.square().sum())


def grow(basis: Tensor, rows: Tensor, *, energy: float, floor: float = 1e-6) -> Tensor:
    """New orthonormal columns: the fewest residual directions of ``rows`` with which the threshold is reached.

    ``floor`` is the share of the largest singular value of ``rows`` below which a residual direction is rounding.
    """
    rows = rows.double()
    residual = reject(rows, basis)
    _, sigma, right = torch.linalg.svd(residual, full_matrices=False)
    largest = float(torch.linalg.svdvals(rows)[0])
    total = float(rows.square().sum())
    kept = [basis.double()]
    captured = total - float(residual.square().sum())
    for value, direction in zip(sigma, right, strict=True):
        if float(value) <= floor * largest:
            break
        if energy < 1.0 and captured >= energy * total * (1 - 1e-12):
            break
        kept.append(direction.unsqueeze(1))
        captured += float(value) ** 2
    return torch.linalg.qr(torch.cat(kept, dim=1))[0]


def loop_reject(spaces, matrices) -> list[Tensor]:
    """What a bank must equal: one dense rejection after the other, in float64."""
    return [reject(matrix, space.basis()) for space, matrix in zip(spaces, matrices, strict=True)]


def frequent_directions(rows: Tensor, size: int) -> tuple[Tensor, float]:
    """Liberty's sketch with one decomposition a row: ``(F, shrinkage)``."""
    kept = torch.zeros(0, rows.shape[1], dtype=torch.float64)
    lost = 0.0
    for row in rows.double():
        kept = torch.cat([kept, row.unsqueeze(0)])
        if kept.shape[0] > size:
            _, sigma, right = torch.linalg.svd(kept, full_matrices=False)
            cut = float(sigma[size]) ** 2 if sigma.shape[0] > size else 0.0
            lost += cut
            kept = (sigma[:size].square() - cut).clamp_min(0).sqrt().unsqueeze(1) * right[:size]
    return kept, lost
