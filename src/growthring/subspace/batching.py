"""Many subspaces at once: sites of one shape cost a few batched kernels instead of a Python loop of small ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from growthring.errors import ConfigError

from ._precision import full_precision
from .basis import Subspace

__all__ = ["SubspaceBank"]


LARGE = 1 << 16
"""Matrices of this many elements keep a core busy by themselves: they are worked on in place, not stacked."""


class SubspaceBank:
    """Rejects a list of matrices from a list of subspaces, in place.

    Matrix ``i`` is ``(rows_i, d_i)`` and goes with ``subspaces[i]``. Small matrices of one shape share batched
    kernels: bases of different ranks are padded with zero columns to the next multiple of ``pad``, which changes
    nothing in ``x - (x U) U^T``. Large ones take two GEMMs each, ``2 rows d k`` multiply-adds, and no copy.

    Args:
        subspaces: One per matrix; the same object may stand several times.
        shapes: ``(rows, d)`` per matrix.
        device: Where the matrices live.
        pad: Rank granularity of the padding; wasted work is below ``pad`` columns a site.

    The bases are taken as they are now: make a new bank after a subspace has grown.

    Raises:
        ConfigError: If lengths or dimensions disagree.
    """

    def __init__(
        self,
        subspaces: Sequence[Subspace],
        shapes: Sequence[tuple[int, int]],
        *,
        device: torch.device | str = "cpu",
        pad: int = 16,
    ) -> None:
        if len(subspaces) != len(shapes):
            raise ConfigError(f"SubspaceBank: {len(subspaces)} subspaces for {len(shapes)} matrices")
        groups: dict[tuple[int, int, int, bool, torch.dtype], list[int]] = defaultdict(list)
        self._shapes = [tuple(shape) for shape in shapes]
        self._large: list[tuple[int, Tensor, bool]] = []
        self._blocks: list[tuple[list[int], Tensor, bool]] = []
        for position, (space, shape) in enumerate(zip(subspaces, shapes, strict=True)):
            if space.dim != shape[-1]:
                raise ConfigError(
                    f"SubspaceBank: matrix {position} is {tuple(shape)}, its subspace lies in R^{space.dim}"
                )
            if shape[0] * shape[1] >= LARGE:
                self._large.append((position, space.stored.to(device), space.stores_complement))
                continue
            columns = min(-(-space.stored.shape[1] // pad) * pad, space.dim)
            groups[(shape[0], shape[1], columns, space.stores_complement, space.dtype)].append(position)
        for (_, dim, columns, complement, dtype), positions in groups.items():
            stack = torch.zeros(len(positions), dim, columns, dtype=dtype, device=device)
            for row, position in enumerate(positions):
                stored = subspaces[position].stored
                stack[row, :, : stored.shape[1]] = stored.to(device)
            self._blocks.append((positions, stack, complement))

    @torch.no_grad()
    def reject_(self, matrices: Sequence[Tensor]) -> None:
        """Replace every matrix by its component outside its subspace.

        Args:
            matrices: As many as subspaces; each is changed in place, in its own dtype, computed in float32 or wider.

        Raises:
            ConfigError: If the number of matrices or a shape is wrong; nothing is changed then.
        """
        self._check(matrices)
        for position, basis, complement in self._large:
            matrix = matrices[position]
            dtype = torch.promote_types(basis.dtype, matrix.dtype)
            columns = basis.to(dtype)
            wide = matrix.to(dtype)  # the matrix itself when it is no narrower than the basis
            with full_precision(basis.device):
                inner = wide @ columns
                wide.addmm_(inner, columns.mT, beta=float(not complement), alpha=1.0 if complement else -1.0)
            if wide is not matrix:
                matrix.copy_(wide)
        for positions, stack, complement in self._blocks:
            members = [matrices[p] for p in positions]
            wide, columns = _stacked(members, stack)
            torch._foreach_copy_(members, list(_reject(wide, columns, complement).unbind(0)))

    @torch.no_grad()
    def reject_updates_(self, matrices: Sequence[Tensor], anchors: Sequence[Tensor]) -> None:
        """Take the protected part out of every update: ``matrix <- anchor + reject(matrix - anchor)``.

        Args:
            matrices: As many as subspaces; each is changed in place, in its own dtype.
            anchors: Where each matrix stood; same shapes, in float32 or wider. With no free direction the matrix
                becomes its anchor, bit for bit.

        Raises:
            ConfigError: If a number or a shape is wrong; nothing is changed then.
        """
        self._check(matrices)
        self._check(anchors)
        for position, basis, complement in self._large:
            matrix, anchor = matrices[position], anchors[position]
            dtype = torch.promote_types(basis.dtype, anchor.dtype)
            columns, start, wide = basis.to(dtype), anchor.to(dtype), matrix.to(dtype)
            with full_precision(basis.device):
                inner = (wide - start) @ columns
                if complement:
                    matrix.copy_(torch.addmm(start, inner, columns.mT))
                    continue
                wide.addmm_(inner, columns.mT, alpha=-1.0)
            if wide is not matrix:
                matrix.copy_(wide)
        for positions, stack, complement in self._blocks:
            members = [matrices[p] for p in positions]
            start, columns = _stacked([anchors[p] for p in positions], stack)
            moved = torch.stack([m.to(start.dtype) for m in members]) - start
            kept = start + _reject(moved, columns, complement)
            torch._foreach_copy_(members, list(kept.unbind(0)))

    def _check(self, matrices: Sequence[Tensor]) -> None:
        if len(matrices) != len(self._shapes):
            raise ConfigError(f"SubspaceBank of {len(self._shapes)} subspaces got {len(matrices)} matrices")
        for position, (matrix, shape) in enumerate(zip(matrices, self._shapes, strict=True)):
            if matrix.shape != shape:
                raise ConfigError(
                    f"SubspaceBank: matrix {position} is {tuple(matrix.shape)}, the bank was made for {shape}"
                )


def _stacked(members: Sequence[Tensor], stack: Tensor) -> tuple[Tensor, Tensor]:
    """Members as one tensor, and their bases, both in the widest of their dtypes."""
    dtype = stack.dtype
    for member in members:
        dtype = torch.promote_types(dtype, member.dtype)
    return torch.stack([member.to(dtype) for member in members]), stack.to(dtype)


def _reject(wide: Tensor, columns: Tensor, complement: bool) -> Tensor:
    """The component of every ``(rows, d)`` matrix outside what ``columns`` protect."""
    if columns.shape[-1] == 0:
        return torch.zeros_like(wide) if complement else wide
    with full_precision(wide.device):
        inner = torch.bmm(wide, columns)
        return torch.bmm(inner, columns.mT) if complement else torch.baddbmm(wide, inner, columns.mT, alpha=-1)
