"""Seeded data with a known spectrum, and the settings of every property test of this folder."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

PROPERTY = settings(
    deadline=None, max_examples=30, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

dims = st.integers(1, 40)
seeds = st.integers(0, 10_000)
scales = st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6])
wide_dtypes = st.sampled_from([torch.float32, torch.float64])


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(seed: int, d: int, k: int) -> Tensor:
    return torch.linalg.qr(randn(seed, d, k))[0]


def with_spectrum(seed: int, n: int, d: int, sigma: list[float] | Tensor) -> Tensor:
    """Rows ``(n, d)`` with exactly these singular values, float64."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return (orthonormal(seed, n, len(sigma)) * sigma) @ orthonormal(seed + 1, d, len(sigma)).T


def low_rank(seed: int, n: int, d: int, rank: int, scale: float = 1.0) -> Tensor:
    """Rows ``(n, d)`` of the given rank with a gentle, well separated spectrum."""
    rank = min(rank, n, d)
    return with_spectrum(seed, n, d, scale * 1.2 ** -torch.arange(rank, dtype=torch.float64))


def distance(first: Tensor, second: Tensor) -> float:
    """Largest element of the difference of two projectors: spans are compared, never vectors."""
    gap = first.double() @ first.double().T - second.double() @ second.double().T
    return float(gap.abs().max())


def gram_error(columns: Tensor) -> float:
    wide = columns.double()
    return float((wide.T @ wide - torch.eye(wide.shape[1], dtype=torch.float64)).norm())
