"""Tensors that may be spread over ranks by rows (DTensors of FSDP2): this rank's part, the whole, sums over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from growthring.errors import GuardError

__all__ = ["add", "check", "joined", "like", "local", "most", "offset", "spread", "whole"]


def spread(tensor: Tensor) -> bool:
    """True for a DTensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of this rank; it shares storage. A plain tensor is its own part."""
    part: Tensor = tensor.to_local() if spread(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank; collective for a DTensor, differentiable."""
    full: Tensor = tensor.full_tensor() if spread(tensor) else tensor  # type: ignore[attr-defined]
    return full


def joined(part: Tensor, other: Tensor) -> Tensor:
    """All of the tensor, on every rank, of which ``part`` is this rank's, spread as ``other`` is."""
    if not spread(other):
        return part
    from torch.distributed.tensor import DTensor

    place: Any = other
    mesh, placements, part = place.device_mesh, place.placements, part.contiguous()
    return whole(DTensor.from_local(part, mesh, placements, run_check=False, shape=other.shape, stride=other.stride()))


def like(value: Tensor, other: Tensor) -> Tensor:
    """A copy of ``value``, whole or spread, on the device and spread as ``other`` is; the dtype stays."""
    if not spread(other):
        return whole(value).detach().to(other.device, copy=True)
    if spread(value):
        return value.detach().clone()
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = other.device_mesh  # type: ignore[attr-defined]
    full = value.detach().to(local(other).device, copy=True)
    return distribute_tensor(full, mesh, other.placements, src_data_rank=None)  # type: ignore[attr-defined]


def offset(tensor: Tensor) -> int:
    """Row of the whole tensor at which this rank's part begins."""
    if not spread(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as layout

    return int(layout(tensor.shape, tensor.device_mesh, tensor.placements)[1][0])  # type: ignore[attr-defined]


def check(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are spread otherwise than by rows, or in two ways.

    Raises:
        GuardError: If there are any.
    """
    layouts: set[Any] = set()
    for name, tensor in tensors.items():
        if not spread(tensor):
            layouts.add(None)
            continue
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        for placement in placements:
            if type(placement).__name__ != "Replicate" and not _by_rows(placement):
                raise GuardError(
                    f"{name} is spread over ranks as {placements}: rows can be (FSDP2's fully_shard does that), "
                    "anything else (tensor parallelism) cannot"
                )
        layouts.add((mesh, tuple(placements)))
    if len(layouts) > 1:
        raise GuardError(
            f"the trainable tensors are spread over ranks in {len(layouts)} ways; shard all of them by one mesh "
            "(fully_shard on the whole model), or none"
        )


def add(tensors: Sequence[Tensor], parts: Tensor) -> Tensor:
    """Sum what each rank found in its parts of ``tensors`` (all spread alike), over the ranks that share them out.

    Args:
        tensors: The tensors that ``parts`` was computed from.
        parts: Any shape; the same on every rank.

    Returns:
        The sums; ``parts`` itself where nothing is spread. One all-reduce for each axis of the mesh that shards.
    """
    return _reduced(tensors, parts, dist.ReduceOp.SUM)


def most(tensors: Sequence[Tensor], parts: Tensor) -> Tensor:
    """As :func:`add`, the largest in place of the sum."""
    return _reduced(tensors, parts, dist.ReduceOp.MAX)


def _reduced(tensors: Sequence[Tensor], parts: Tensor, how: Any) -> Tensor:
    if not tensors or not spread(tensors[0]):
        return parts
    mesh: Any = tensors[0].device_mesh  # type: ignore[attr-defined]
    parts = parts.contiguous()
    for axis, placement in enumerate(tensors[0].placements):  # type: ignore[attr-defined]
        if type(placement).__name__ == "Shard":
            dist.all_reduce(parts, op=how, group=mesh.get_group(axis))
    return parts


def _by_rows(placement: Any) -> bool:
    return type(placement).__name__ == "Shard" and placement.dim == 0
