"""Finding the subspace of a gradient: thin products only, outside what is protected, the same on every rank.

A basis is *canonical*: rotated to the singular basis of the gradient that it was found from, each column with its
largest entry positive. So the coordinates of two runs agree where their subspaces do, on one machine or on several.

Costs for ``m x n`` in multiply-adds, a refresh: ``warm`` ``2 m n r`` beyond what a step needs anyway, ``randomized``
``(2 q + 2) m n (r + 8)``, ``gram`` ``m n^2 + 9 n^3``, ``full`` about ``14 m n^2``. What is protected adds ``k (m + n)
r`` to the first two: the gradient itself is not projected, only the thin factors are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from growthring.subspace import Subspace, find_range, solver_device, widest_dtype

from ._matrix import Shard, local
from ._options import SIDE_CODES

__all__ = [
    "Spaces",
    "canonical",
    "dense_range",
    "find_basis",
    "is_outside",
    "rotate_moments",
    "times",
    "without_noise",
]

_OVERSAMPLE = 8
_ITERATIONS = 2
_NOISE = 4.0
"""Directions below this many roundings, times the root of the longer side, of the strongest one are left out."""


@dataclass(frozen=True)
class Spaces:
    """What an update of an ``m x n`` matrix must stay out of.

    Attributes:
        inputs: Protected directions of R^n, or ``None``.
        outputs: Protected directions of R^m, or ``None``.
        exact: Whether the update stays out exactly; else only gradients are swept, once, before the rule.
    """

    inputs: Subspace | None = None
    outputs: Subspace | None = None
    exact: bool = True

    @classmethod
    def of(cls, p: Tensor, pair: tuple[Subspace | None, Subspace | None], exact: bool) -> Spaces:
        """Copies of the subspaces that are not empty, on the parameter's device."""
        inputs, outputs = (None if s is None or s.rank == 0 else s.clone().to(local(p).device) for s in pair)
        return cls(inputs, outputs, exact)

    def hold_off(self, state: Mapping[str, Any]) -> bool:
        """Whether the bases of a parameter's state lie outside, so that they may stay."""
        if not self.exact:
            return True
        basis, out = state["basis"], state.get("basis_out")
        turned = self.mT if SIDE_CODES[int(state["side"])] == "left" else self
        return is_outside(turned.inputs, basis) and (out is None or is_outside(turned.outputs, out))

    def reject_inputs(self, columns: Tensor) -> Tensor:
        """Columns ``(n, k)`` outside the protected inputs."""
        return _outside(self.inputs, columns)

    def reject_outputs(self, columns: Tensor, shard: Shard | None = None) -> Tensor:
        """Columns ``(m, k)``, or this rank's rows of them, outside the protected outputs."""
        return _outside(self.outputs, columns, shard)

    def inner_outputs(self, columns: Tensor, shard: Shard | None) -> Tensor:
        """Coefficients of columns ``(m, k)`` in what is stored of the protected outputs; of this rank's rows alone."""
        assert self.outputs is not None
        return _stored(self.outputs, columns, shard).mT @ columns

    def without_outputs(self, columns: Tensor, inner: Tensor, shard: Shard | None) -> Tensor:
        """Columns ``(m, k)`` outside the protected outputs, given their coefficients over all rows."""
        assert self.outputs is not None
        found = _stored(self.outputs, columns, shard) @ inner
        return found if self.outputs.stores_complement else columns - found

    def reject(self, matrix: Tensor, shard: Shard | None = None) -> Tensor:
        """A whole ``(m, n)`` matrix outside both."""
        return self.reject_outputs(self.reject_inputs(matrix.mT).mT, shard)

    @property
    def mT(self) -> Spaces:
        """The same for the transposed matrix."""
        return Spaces(self.outputs, self.inputs, self.exact)


def _outside(space: Subspace | None, columns: Tensor, shard: Shard | None = None) -> Tensor:
    if space is None or space.rank == 0:
        return columns
    stored = _stored(space, columns, shard)
    inner = stored.mT @ columns
    if shard is not None:
        inner = shard.sum(inner)
    return stored @ inner if space.stores_complement else columns - stored @ inner


def _stored(space: Subspace, columns: Tensor, shard: Shard | None) -> Tensor:
    """What a subspace stores, in the dtype of ``columns`` and their rows."""
    stored = space.stored.to(columns)
    return stored if shard is None else stored[shard.start : shard.start + shard.rows]


def is_outside(space: Subspace | None, columns: Tensor) -> bool:
    """Whether columns are orthogonal to a subspace, to what float32 resolves."""
    return space is None or float((columns - _outside(space, columns)).norm()) <= 1e-5 * float(columns.norm())


def find_basis(
    gradient: Tensor,
    rank: int,
    method: str,
    *,
    previous: Tensor | None,
    spaces: Spaces,
    seed: int,
    norm: float,
    shard: Shard | None = None,
    found: Tensor | None = None,
    raw: bool = False,
    turned: bool = False,
) -> tuple[Tensor, Tensor]:
    """A canonical basis of the dominant right space of ``gradient`` outside what is protected.

    Args:
        gradient: ``(m, n)`` float32 or wider, finite and not zero; this rank's rows of it.
        rank: ``r <= n``.
        method: A range finder; ``"warm"`` without ``previous`` starts as ``"randomized"``.
        previous: ``(n, r)`` basis to start from, or ``None``.
        spaces: What is protected.
        seed: Of the random start.
        norm: ``||gradient||_F`` over all ranks; divided by, so that no product leaves the range of float32.
        shard: How rows are spread.
        found: What :func:`dense_range` says of the whole gradient, ``(n, r)``; needed by ``"full"`` and ``"gram"``
            where rows are spread.
        raw: Take what ``"full"`` finds as the solver gives it, signs and all.
        turned: ``gradient`` is the transpose of what the solver is to see: it matters for ``raw``.

    Returns:
        The basis ``(n, r)`` and the coordinates ``gradient @ basis`` ``(m, r)``. Where fewer than ``r`` directions are
        free, or the gradient has fewer beyond rounding, the last columns of both are zero.
    """
    outside = spaces if spaces.exact else Spaces()
    free = rank if outside.inputs is None else min(rank, outside.inputs.free)
    if free == 0:
        return gradient.new_zeros(gradient.shape[1], rank), gradient.new_zeros(gradient.shape[0], rank)
    total: Callable[[Tensor], Tensor] = shard.sum if shard is not None else _same
    if method == "warm" and previous is not None:
        previous = _filled(previous, seed, outside)
        inner = outside.reject_outputs(times(gradient, previous), shard) / norm
        moved = outside.reject_inputs(total(inner.mT @ gradient).mT)
        found = moved / _peak(moved.abs().amax()) + torch.finfo(moved.dtype).eps * previous
        found = _orthonormal(found)
    elif method in ("warm", "randomized"):
        found = _randomized(gradient, free, seed, norm, outside, shard, total)
    elif found is None:
        found = dense_range(gradient, rank, method, spaces=spaces, raw=raw, turned=turned)
    if outside.inputs is not None and outside.inputs.rank:
        found = _orthonormal(outside.reject_inputs(found[:, : max(free, 1)]))
        found = outside.reject_inputs(found)  # twice is enough: what the first left is rounding
    coordinates = outside.reject_outputs(times(gradient, found), shard)
    if raw and method == "full" and found.shape[1] == rank:
        return found, coordinates
    rows = gradient.shape[0] if shard is None else sum(shard.counts)
    return canonical(found, coordinates, rank, norm, rows, total)


def dense_range(
    matrix: Tensor, rank: int, method: str, *, spaces: Spaces, raw: bool = False, turned: bool = False
) -> Tensor:
    """What ``"full"`` and ``"gram"`` make of a whole matrix.

    Args:
        matrix: ``(m, n)``, all rows.
        rank: Columns wanted.
        method: ``"full"`` or ``"gram"``.
        spaces: What is protected.
        raw: As in :func:`find_basis`.
        turned: As in :func:`find_basis`.

    Returns:
        ``(n, min(m, n, rank))``, orthonormal columns; zeros where all of the matrix is protected.
    """
    matrix, most = spaces.reject(matrix) if spaces.exact else matrix, min(rank, *matrix.shape)
    if not bool(matrix.any()):
        return matrix.new_zeros(matrix.shape[1], most)
    if raw and method == "full":
        left, _, right = torch.linalg.svd(matrix.mT if turned else matrix, full_matrices=False)
        return left[:, :most].clone() if turned else right[:most].mT.contiguous()
    return find_range(matrix.mT, most, method)  # type: ignore[arg-type]


def _randomized(
    gradient: Tensor,
    rank: int,
    seed: int,
    norm: float,
    spaces: Spaces,
    shard: Shard | None,
    total: Callable[[Tensor], Tensor],
) -> Tensor:
    """Halko, Martinsson and Tropp 2011, SIAM Review 53(2), with QR between power iterations; on the ``n`` side."""
    n = gradient.shape[1]
    width = min(rank + _OVERSAMPLE, n if spaces.inputs is None else spaces.inputs.free)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, width, generator=generator, dtype=gradient.dtype).to(gradient.device)
    q = _orthonormal(spaces.reject_inputs(start))
    for _ in range(_ITERATIONS):
        inner = spaces.reject_outputs(times(gradient, q), shard) / norm
        moved = spaces.reject_inputs(total(inner.mT @ gradient).mT)
        q = _orthonormal(moved / _peak(moved.abs().amax()) + torch.finfo(moved.dtype).eps * q)
    return q


def canonical(
    basis: Tensor, coordinates: Tensor, rank: int, norm: float, rows: int, total: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotate a basis to the singular basis of what it was found from, fix signs, keep or pad to ``rank`` columns.

    Args:
        basis: ``(n, k)`` orthonormal columns.
        coordinates: ``(m, k)``, the matrix times ``basis``.
        rank: Columns wanted.
        norm: Of the matrix.
        rows: ``m`` over all ranks; these must agree on what is noise.
        total: Sums over ranks, where rows of ``coordinates`` are spread.
    """
    wide = (coordinates / norm).to(widest_dtype(coordinates.device))
    gram = total(wide.mT @ wide)
    values, vectors = (t.flip(-1)[..., :rank] for t in torch.linalg.eigh(gram.to(solver_device(gram.device))))
    # a direction of rounding noise is none: Adam would make full steps of it
    vectors = (vectors * (values > _noise(max(basis.shape[0], rows), basis.dtype) ** 2 * values[0])).to(basis)
    basis = basis @ vectors
    signs = torch.where(basis.gather(0, basis.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(basis)
    basis, coordinates = basis * signs, coordinates @ (vectors * signs)
    missing = rank - basis.shape[1]
    if missing > 0:
        basis, coordinates = (torch.nn.functional.pad(t, (0, missing)) for t in (basis, coordinates))
    return basis, coordinates


def times(matrix: Tensor, columns: Tensor) -> Tensor:
    """``matrix @ columns``, contiguous; of a transposed matrix by the product that reads it as it lies in memory."""
    if matrix.is_contiguous():
        return matrix @ columns
    return (columns.mT @ matrix.mT).mT.contiguous()


def _filled(basis: Tensor, seed: int, spaces: Spaces) -> Tensor:
    """A basis whose zero columns, for which there was no direction so far, are drawn at random."""
    empty = ~basis.any(0)
    if not bool(empty.any()):
        return basis
    drawn = torch.randn(basis.shape, generator=torch.Generator().manual_seed(seed), dtype=basis.dtype).to(basis.device)
    return torch.where(empty, spaces.reject_inputs(drawn) / basis.shape[0] ** 0.5, basis)


def rotate_moments(first: Tensor, second: Tensor | None, rotation: Tensor) -> None:
    """Carry moments ``(rows, r)`` over into a new basis, in place.

    The first moment turns as the coordinates do, ``m <- m R`` with ``R = P_old^T P_new``. Of the second the share
    ``R_ij^2`` of old direction ``i`` goes to new direction ``j`` (coordinates taken as uncorrelated), and what a new
    direction has of none of the old ones is given its row's mean, so that it is not taken for a quiet one.

    Args:
        first: First moment.
        second: Second moment, or ``None`` for rules without one.
        rotation: ``(r, r)``.
    """
    first.copy_(first @ rotation)
    if second is None:
        return
    shares = rotation.square()
    unseen = (1.0 - shares.sum(0)).clamp_(min=0.0)
    second.copy_(second @ (shares + unseen / second.shape[-1]))  # the mean of a row is a product, too


def without_noise(coordinates: Tensor, size: int) -> Tensor:
    """Two-sided coordinates ``(r, r)``, all but diagonal in a new basis, without what is rounding beside it.

    Args:
        coordinates: Changed in place.
        size: Of the matrix that they were made of: its rows and columns together.
    """
    peak = coordinates.abs().amax()
    return coordinates.masked_fill_(coordinates.abs() <= _noise(size, coordinates.dtype) * peak, 0.0)


def _noise(size: int, dtype: torch.dtype) -> float:
    """What of the largest may be rounding."""
    return _NOISE * float(size) ** 0.5 * torch.finfo(dtype).eps


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns.to(solver_device(columns.device)))[0].to(columns.device)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _peak(value: Tensor) -> Tensor:
    return value.clamp_min(torch.finfo(value.dtype).tiny)
