"""Health checks: what a matrix must be before a subspace is taken from it.

A NaN gradient from an fp16 overflow or an all-zero gradient makes an SVD fail or return noise. Finding out first is
cheap; training on garbage directions is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._precision import solver_device, widen

__all__ = ["Health", "check_health", "numerical_rank"]


@dataclass(frozen=True)
class Health:
    """The state of one matrix or of a batch of them (each field has the batch's shape).

    Attributes:
        finite: Boolean; no NaN and no infinity.
        zero: Boolean; every element is exactly 0.
    """

    finite: Tensor
    zero: Tensor

    @property
    def usable(self) -> Tensor:
        """Boolean; finite and not all zero: directions can be taken from it."""
        return self.finite & ~self.zero

    def describe(self) -> str:
        """One phrase for an error message."""
        if bool(self.usable.all()):
            return "healthy"
        kinds = []
        if not bool(self.finite.all()):
            kinds.append("contains NaN or infinity")
        if bool(self.zero.any()):
            kinds.append("is all zero")
        return " and ".join(kinds)


def check_health(matrix: Tensor) -> Health:
    """Look at ``matrix`` ``(..., m, n)`` in one pass over its bytes.

    Returns:
        A :class:`Health` whose fields have shape ``(...)``.
    """
    if matrix.numel() == 0:
        shape = matrix.shape[:-2]
        return Health(torch.ones(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool))
    # the largest absolute value is NaN if any element is, infinite if any is, and 0 only if all are
    peak = matrix.abs().amax(dim=(-2, -1))
    return Health(torch.isfinite(peak), peak == 0)


def numerical_rank(matrix: Tensor, rtol: float | None = None) -> Tensor:
    """Count singular values above ``rtol`` times the largest.

    Args:
        matrix: ``(..., m, n)``, finite.
        rtol: Relative cut; default ``max(m, n) * eps`` of the matrix's dtype (float32 at least).

    Returns:
        Integer tensor of shape ``(...)``; 0 for a zero matrix.
    """
    wide = widen(matrix)
    if rtol is None:
        rtol = max(matrix.shape[-2:]) * torch.finfo(wide.dtype).eps
    values: Tensor = torch.linalg.svdvals(wide.to(solver_device(wide.device)))
    if values.shape[-1] == 0:
        return torch.zeros(matrix.shape[:-2], dtype=torch.long)
    return (values > rtol * values[..., :1]).sum(-1)
