"""Many subspaces at once: sites of one shape cost a few batched kernels instead of a Python loop of small ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from growthring.errors import ConfigError

from ._precision import full_precision
from .basis import Subspace

__all__ = ["SubspaceBank", "bucket"]


def bucket(tensors: Sequence[Tensor]) -> dict[tuple[object, ...], list[int]]:
    """Group tensors that one batched kernel can take: same shape, dtype and device.

    Returns:
        ``{(shape, dtype, device): [positions]}`` in order of first appearance.
    """
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for position, tensor in enumerate(tensors):
        groups[(tuple(tensor.shape), tensor.dtype, tensor.device)].append(position)
    return dict(groups)


class SubspaceBank:
    """Rejects a list of matrices from a list of subspaces, in place, batched over equal shapes.

    Matrix ``i`` is ``(rows_i, d_i)`` and goes with ``subspaces[i]``. Bases of different ranks are padded with zero
    columns to the next multiple of ``pad``, which changes nothing in ``x - (x U) U^T`` and lets them share a kernel.

    Args:
        subspaces: One per matrix; the same object may stand several times.
        shapes: ``(rows, d)`` per matrix.
        device: Where the padded copies live (the matrices' device).
        pad: Rank granularity of the padding; wasted work is below ``pad`` columns a site.

    The bases are copied as they are now: make a new bank after a subspace has grown.

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
        for position, (space, shape) in enumerate(zip(subspaces, shapes, strict=True)):
            if space.dim != shape[-1]:
                raise ConfigError(
                    f"SubspaceBank: matrix {position} is {tuple(shape)}, its subspace lies in R^{space.dim}"
                )
            columns = -(-space.stored.shape[1] // pad) * pad
            groups[(shape[0], shape[1], min(columns, space.dim), space.stores_complement, space.dtype)].append(
                position
            )
        self.size = len(shapes)
        self._shapes = [tuple(shape) for shape in shapes]
        self._blocks: list[tuple[list[int], Tensor, bool]] = []
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
        if len(matrices) != self.size:
            raise ConfigError(f"SubspaceBank of {self.size} subspaces got {len(matrices)} matrices")
        for position, (matrix, shape) in enumerate(zip(matrices, self._shapes, strict=True)):
            if matrix.shape != shape:
                raise ConfigError(
                    f"SubspaceBank: matrix {position} is {tuple(matrix.shape)}, the bank was made for {shape}"
                )
        for positions, stack, complement in self._blocks:
            members = [matrices[p] for p in positions]
            if stack.shape[-1] == 0:
                if complement:  # every direction is protected
                    torch._foreach_zero_(members)
                continue
            dtype = stack.dtype
            for member in members:
                dtype = torch.promote_types(dtype, member.dtype)
            basis = stack.to(dtype)
            with full_precision(stack.device):
                if len(members) == 1:
                    wide, basis = members[0].to(dtype), basis[0]
                    inner = wide @ basis
                    outer = inner @ basis.mT if complement else torch.addmm(wide, inner, basis.mT, alpha=-1)
                    members[0].copy_(outer)
                    continue
                wide = torch.stack([member.to(dtype) for member in members])
                inner = wide @ basis
                outer = torch.bmm(inner, basis.mT) if complement else torch.baddbmm(wide, inner, basis.mT, alpha=-1)
            torch._foreach_copy_(members, list(outer.unbind(0)))
