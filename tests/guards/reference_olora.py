"""O-LoRA as plainly as it can be written: loops over layers, earlier branches and entries of A_i A_t^T."""

from __future__ import annotations

import torch
from torch import Tensor


def overlap(old: list[Tensor], new: Tensor, norm: str) -> Tensor:
    """Of one layer: rows of every earlier ``A`` with rows of the new one."""
    total = torch.zeros((), dtype=new.dtype)
    for a in old:
        for i in range(a.shape[0]):
            for j in range(new.shape[0]):
                entry = (a[i] * new[j]).sum()
                total = total + (entry.abs() if norm == "l1" else entry**2)
    return total


def penalty(old: list[list[Tensor]], new: list[Tensor], norm: str) -> Tensor:
    """Over all layers."""
    return torch.stack([overlap(o, n, norm) for o, n in zip(old, new, strict=True)]).sum()
