"""Range finders: ``r`` orthonormal columns that span the dominant left space of a matrix.

Four ways, from exact and slow to approximate and fast; all work on a batch of equal shapes at once. Costs for one
``m x n`` matrix, ``m <= n``, in multiply-adds (after Halko, Martinsson and Tropp 2011, SIAM Review 53(2)):

==============  ======================================  ==========================================================
``full``        about ``14 m^2 n``                      thin SVD; exact
``gram``        ``m^2 n + 9 m^3``                       eigenvectors of ``G G^T``; squares the condition number
``randomized``  ``(2 q + 2) m n (r + p)``               Gaussian sketch, ``q`` power iterations with QR between
``warm``        ``2 m n r`` a step                      ``QR(G (G^T P))`` from the last basis ``P``
==============  ======================================  ==========================================================
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from growthring.errors import ConfigError, NumericalError, nearest

from ._precision import full_precision, solver_device, widen
from .health import check_health

__all__ = ["RANGE_FINDERS", "RangeFinder", "find_range"]

RangeFinder = Literal["full", "gram", "randomized", "warm"]
RANGE_FINDERS: tuple[RangeFinder, ...] = ("full", "gram", "randomized", "warm")
_OVERSAMPLE = 8


@torch.no_grad()
def find_range(
    matrix: Tensor,
    rank: int,
    method: RangeFinder = "randomized",
    *,
    previous: Tensor | None = None,
    iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Find ``rank`` orthonormal columns that span the dominant left singular space of ``matrix``.

    Only the *span* is meant: signs and rotations inside it are free, and compare subspaces, never vectors.

    Args:
        matrix: ``(..., m, n)``, any floating dtype; computed in float32 or wider.
        rank: ``r``, ``1 <= r <= min(m, n)``.
        method: ``"full"``, ``"gram"``, ``"randomized"`` (default) or ``"warm"``.
        previous: ``(..., m, r)`` basis to start from (needed by ``"warm"``). It is also what an unusable matrix (NaN,
            infinite or all zero) falls back to, in any method.
        iterations: Power iterations of ``"randomized"`` (default 2) or steps of ``"warm"`` (default 1).
        generator: Random state of ``"randomized"``; on the matrix's device.

    Returns:
        ``(..., m, r)`` float32 or wider, orthonormal columns, owning its storage.

    Raises:
        ConfigError: On an unknown method, a rank that does not fit, negative ``iterations``, or ``"warm"`` without
            ``previous``.
        NumericalError: If a matrix is unusable and there is no ``previous``.
    """
    if method not in RANGE_FINDERS:
        raise ConfigError(f"unknown range finder {method!r}; {nearest(method, RANGE_FINDERS)}")
    m, n = matrix.shape[-2:]
    if not 1 <= rank <= min(m, n):
        raise ConfigError(f"rank {rank} does not fit a {m} x {n} matrix: 1 to {min(m, n)} are allowed")
    if previous is not None and previous.shape != (*matrix.shape[:-1], rank):
        expected = (*matrix.shape[:-1], rank)
        raise ConfigError(f"previous basis of shape {tuple(previous.shape)} does not fit: {expected} is needed")
    if method == "warm" and previous is None:
        raise ConfigError("the warm range finder needs previous=, the basis to start from")
    if iterations is not None and iterations < 0:
        raise ConfigError(f"find_range(iterations={iterations}): must be at least 0")
    health = check_health(matrix)
    usable = health.usable
    if previous is None and not bool(usable.all()):
        raise NumericalError(f"no range can be found: the {m} x {n} matrix {health.describe()}")
    wide = widen(matrix)
    if not bool(usable.all()):
        wide = torch.where(
            usable.to(wide.device)[..., None, None], wide, torch.eye(m, n, dtype=wide.dtype, device=wide.device)
        )
    with full_precision(wide.device):
        if method == "full":
            left = torch.linalg.svd(wide.to(solver_device(wide.device)), full_matrices=False)[0][..., :rank]
            found: Tensor = left.to(wide.device)
        elif method == "gram":
            found = _gram(wide, rank)
        elif method == "randomized":
            found = _randomized(wide, rank, 2 if iterations is None else iterations, generator)
        else:
            assert previous is not None
            found = _warm(wide, previous.to(wide), 1 if iterations is None else iterations)
    if previous is not None:
        found = torch.where(usable.to(found.device)[..., None, None], found, previous.to(found))
    return found.clone(memory_format=torch.contiguous_format)


def _gram(matrix: Tensor, rank: int) -> Tensor:
    device = matrix.device
    wide = matrix.to(solver_device(device)).to(torch.float64)
    if wide.shape[-2] <= wide.shape[-1]:
        vectors: Tensor = torch.linalg.eigh(wide @ wide.mT)[1].flip(-1)[..., :rank]
    else:
        right = torch.linalg.eigh(wide.mT @ wide)[1].flip(-1)[..., :rank]
        vectors = torch.linalg.qr(wide @ right)[0]
    return vectors.to(device=device, dtype=matrix.dtype)


def _randomized(matrix: Tensor, rank: int, iterations: int, generator: torch.Generator | None) -> Tensor:
    m, n = matrix.shape[-2:]
    width = min(rank + _OVERSAMPLE, m, n)
    start = torch.randn((*matrix.shape[:-2], n, width), generator=generator, dtype=matrix.dtype, device=matrix.device)
    q: Tensor = torch.linalg.qr(matrix @ start)[0]
    for _ in range(iterations):
        q = torch.linalg.qr(matrix.mT @ q)[0]
        q = torch.linalg.qr(matrix @ q)[0]
    if width == rank:
        return q
    # rotate to the singular basis of the small matrix and drop the oversampling; in float64, for its Gram matrix
    # squares the condition number and leaves the range of float32
    small = q.mT @ matrix
    small = small.to(solver_device(small.device)).to(torch.float64)
    vectors: Tensor = torch.linalg.eigh(small @ small.mT)[1].flip(-1)[..., :rank]
    return q @ vectors.to(q)


def _warm(matrix: Tensor, previous: Tensor, steps: int) -> Tensor:
    basis = previous
    for _ in range(steps):
        inner = matrix.mT @ basis
        moved = matrix @ (inner / _peak(inner))
        # a basis orthogonal to the matrix's range, or one of lower rank than asked for, would leave zero columns,
        # and QR fills them arbitrarily; keeping a trace of the old basis keeps the old directions there instead
        basis = torch.linalg.qr(moved / _peak(moved) + torch.finfo(moved.dtype).eps * basis)[0]
    return basis


def _peak(matrix: Tensor) -> Tensor:
    """Largest absolute element, never 0: a norm would square, and leave the range of float32."""
    return matrix.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
