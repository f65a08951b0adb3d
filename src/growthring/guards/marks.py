"""Marks: one number for each tensor that must not change between two tasks, cheap to take and to compare."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from growthring.subspace import Subspace

__all__ = ["changed", "take"]

Seen = Mapping[str, tuple[Tensor, "Subspace | None"]]
"""Tensors by name, features along the last axis, with the space that is protected of each (``None``: all of it)."""


def take(seen: Seen) -> dict[str, float]:
    """``v^T W P w`` of every tensor ``W``, with fixed vectors: a change ``D`` moves it by about ``||D P||_F``.

    What lies outside the protected space does not count: old inputs do not see it.
    """
    return {name: _mark(tensor, space) for name, (tensor, space) in seen.items()}


def changed(seen: Seen, marks: Mapping[str, float]) -> list[str]:
    """Names of tensors that are no longer what their mark was taken of, by more than rounding explains."""
    return [name for name, mark in marks.items() if name in seen and _differs(*seen[name], mark)]


@torch.no_grad()
def _mark(tensor: Tensor, space: Subspace | None) -> float:
    rows = tensor.detach().double().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    part = _pattern(rows.shape[0]).to(rows) @ rows
    if space is not None:
        part = space.project(part)
    return float(part.cpu() @ _pattern(part.shape[0]))


def _differs(tensor: Tensor, space: Subspace | None, mark: float) -> bool:
    rounding = 1e-2 if tensor.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return abs(_mark(tensor, space) - mark) > rounding * max(float(tensor.detach().double().norm()), 1e-6)


def _pattern(size: int) -> Tensor:
    # as good as random, the same everywhere: no sign, order or common shift of the elements goes unseen
    return torch.arange(1.0, size + 1, dtype=torch.float64).square().cos() * 2**0.5
