"""A parameter as a matrix on this rank: views of more than two dimensions, and row shards of a ``DTensor``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from growthring.errors import ConfigError

__all__ = [
    "Shard",
    "as_matrix",
    "is_dtensor",
    "like_rows",
    "local",
    "local_gradient",
    "row_shard",
    "write_back",
]


@dataclass(frozen=True)
class Shard:
    """Where the rows of a matrix that this rank holds lie.

    Attributes:
        group: The process group over which the rows are spread.
        start: First row held here.
        rows: Number of rows held here; may be 0.
        counts: Number of rows that each rank holds.
    """

    group: Any
    start: int
    rows: int
    counts: tuple[int, ...]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over the ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``; without importing ``torch.distributed.tensor`` where nobody has."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that lies on this rank."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_gradient(parameter: Tensor) -> Tensor:
    """The part of its gradient that lies on this rank, placed as the parameter is."""
    gradient = parameter.grad
    assert gradient is not None
    if is_dtensor(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(  # type: ignore[attr-defined]
            parameter.device_mesh,  # type: ignore[attr-defined]
            parameter.placements,  # type: ignore[attr-defined]
        )
    return local(gradient)


def row_shard(parameter: Tensor) -> Shard | None:
    """How the rows of a parameter are spread over ranks; ``None`` where every rank has all of them.

    Raises:
        ConfigError: If it is spread in a way that a projection cannot follow.
    """
    if not is_dtensor(parameter):
        return None
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    found = None
    for axis, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
        if placement.is_replicate():
            continue
        if found is not None or not placement.is_shard(0) or type(placement).__name__ != "Shard":
            raise ConfigError(
                f"a parameter of shape {tuple(parameter.shape)} is placed as "
                f"{tuple(parameter.placements)} over ranks; projected are whole matrices and those "  # type: ignore[attr-defined]
                "sharded once, by rows (FSDP2's Shard(0)). Give its group rank=None"
            )
        found = axis
    if found is None:
        return None
    rows, ranks, here = parameter.shape[0], mesh.size(found), mesh.get_local_rank(found)
    size = -(-rows // ranks)
    counts = tuple(max(0, min(size, rows - rank * size)) for rank in range(ranks))
    return Shard(mesh.get_group(found), min(here * size, rows), counts[here], counts)


def as_matrix(tensor: Tensor) -> Tensor:
    """The local part as ``(rows, rest)``: a view where the layout lets it, else a copy."""
    return local(tensor).flatten(1)


def write_back(parameter: Tensor, matrix: Tensor) -> None:
    """Store ``matrix`` in ``parameter``, unless it is a view of it or the very same memory."""
    home = local(parameter)
    if matrix.data_ptr() != home.data_ptr() or matrix.dtype != home.dtype:
        home.copy_(matrix.view(home.shape))


def like_rows(parameter: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``(m, columns)`` whose rows are placed as those of ``parameter``."""
    here = local(parameter)
    zeros = torch.zeros(here.shape[0], columns, dtype=dtype, device=here.device)
    if row_shard(parameter) is None:
        return zeros
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        zeros,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size((parameter.shape[0], columns)),
        stride=(columns, 1),
    )
    return made
