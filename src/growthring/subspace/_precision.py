"""Dtype and device rules that every file of this floor follows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["full_precision", "orthonormalise", "solver_device", "widen", "widest_dtype"]


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make float32 products mean float32 on ``device``: no autocast, no TensorFloat-32, no bfloat16 kernels.

    A projection in bfloat16 leaves 3e-3 of what it should remove, and so does one in float32 after
    ``torch.set_float32_matmul_precision("medium")``.
    """
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    if not autocast and not _shortened():
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if autocast:
        stack.enter_context(torch.autocast(device.type, enabled=False))
    stack.enter_context(_exact_products())
    return stack


def _backends() -> list[Any]:
    """Backends whose float32 products can be shortened one by one (torch 2.9 and later; empty before)."""
    found = (getattr(torch.backends.cuda, "matmul", None), getattr(torch.backends.mkldnn, "matmul", None))
    return [b for b in found if b is not None and hasattr(b, "fp32_precision")]


def _shortened() -> bool:
    backends = _backends()
    if backends:
        return any(b.fp32_precision in ("tf32", "bf16") for b in backends)
    return torch.get_float32_matmul_precision() != "highest"


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Full float32 products inside, the caller's setting afterwards."""
    backends = _backends()
    if backends:
        before = [b.fp32_precision for b in backends]
        try:
            for b in backends:
                b.fp32_precision = "ieee"
            yield
        finally:
            for b, precision in zip(backends, before, strict=True):
                b.fp32_precision = precision
    else:
        legacy = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)


def widen(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32 or wider."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)


def solver_device(device: torch.device) -> torch.device:
    """Where float64 decompositions run: on the device itself, or on the CPU where it has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype on ``device``: float64, or float32 where there is none (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def orthonormalise(columns: Tensor) -> Tensor:
    """Orthonormalise columns by Householder QR in float64, keeping the direction of each leading column.

    The sign of every column is fixed so that ``R`` has a non-negative diagonal: columns that were already
    orthonormal come back as they were, to rounding.

    Args:
        columns: ``(..., d, k)`` with ``k <= d`` and full column rank.

    Returns:
        ``(..., d, k)`` float64, contiguous and owning its storage.
    """
    q, r = torch.linalg.qr(columns.to(solver_device(columns.device)).to(torch.float64))
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    fixed: Tensor = (q * signs.unsqueeze(-2)).contiguous()
    return fixed.to(columns.device)
