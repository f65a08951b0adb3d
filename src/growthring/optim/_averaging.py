"""Averages over processes that hold whole weights: of coordinates, ``r`` columns, in place of gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from growthring.errors import ConfigError

from ._matrix import is_dtensor

__all__ = ["agree_on_gradients", "average", "check_process_group"]

LARGE = 1 << 20
"""Contiguous tensors of this many elements are sent as they lie; smaller ones are copied into one message."""


def check_process_group(group: Any, who: str) -> None:
    """Refuse what gradients cannot be averaged over.

    Raises:
        ConfigError: If it is no process group of which this process is a member.
    """
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ConfigError(
            f"{who}(average_over={group!r}): a process group that this process belongs to is needed, such as "
            "torch.distributed.group.WORLD after init_process_group(); or None"
        )


def agree_on_gradients(
    parameters: Sequence[Tensor], states: MutableMapping[Tensor, Any], given: dict[Tensor, Tensor], group: Any
) -> None:
    """Give a parameter a gradient of zeros where it has none here and has one on another rank.

    Args:
        parameters: The trainable ones, in the same order on every rank.
        states: Their states.
        given: Coordinates in place of gradients, of some.
        group: The ranks.

    Raises:
        ConfigError: If a parameter is sharded.
    """
    if not parameters:
        return
    sharded = next((p for p in parameters if is_dtensor(p)), None)
    if sharded is not None:
        raise ConfigError(
            f"average_over: a parameter of shape {tuple(sharded.shape)} is a DTensor, whose gradient FSDP2 has "
            "averaged. Leave average_over out"
        )
    here = [2 if p in given else int(p.grad is not None) for p in parameters]
    kinds = torch.tensor(here, dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(kinds, dist.ReduceOp.MAX, group=group)
    for p, ours, kind in zip(parameters, here, kinds.tolist(), strict=True):
        if not ours and kind == 1:
            p.grad = torch.zeros_like(p)
        elif not ours and kind == 2:
            given[p] = torch.zeros_like(states[p]["exp_avg"])


def average(tensors: Sequence[Tensor], group: Any) -> None:
    """Replace tensors by their means over the ranks; small ones in one message for each dtype and device."""
    ranks = dist.get_world_size(group)
    together: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel() >= LARGE and tensor.is_contiguous():
            dist.all_reduce(tensor.div_(ranks), group=group)
        else:
            together[tensor.dtype, tensor.device].append(tensor)
    for members in together.values():
        flat = torch.cat([t.reshape(-1) for t in members]).div_(ranks)
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(members, flat.split([t.numel() for t in members]), strict=True):
            tensor.copy_(part.view(tensor.shape))
