"""Subspace kernels against the full SVD, in one run: time and how much energy the found range captures.

python benchmarks/subspace_kernels.py    # writes benchmarks/results/subspace_kernels.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from _common import machine, store
from growthring.subspace import RangeFinder, SecondMoment, Subspace, SubspaceBank, find_range

SHAPES = ((384, 384), (1024, 1024), (4096, 1024))
RANKS = (8, 32)


def median(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of ``call`` after one warm-up."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def decaying(m: int, n: int) -> torch.Tensor:
    """A random matrix with singular values ``i^-0.6``."""
    small = min(m, n)
    left = torch.linalg.qr(torch.randn(m, small))[0]
    right = torch.linalg.qr(torch.randn(n, small))[0]
    return (left * torch.arange(1, small + 1).pow(-0.6)) @ right.T


def range_finders() -> list[dict[str, Any]]:
    """Each range finder on each shape and rank."""
    rows = []
    for m, n in SHAPES:
        matrix = decaying(m, n)
        moved = matrix + 0.05 * matrix.norm() * torch.randn(m, n) / (m * n) ** 0.5
        svd = median(lambda moved=moved: torch.linalg.svd(moved, full_matrices=False), 3)
        optimum = torch.linalg.svdvals(moved).square()
        for rank in RANKS:
            start = find_range(matrix, rank, "full")
            best = float(optimum[:rank].sum())
            methods: tuple[RangeFinder, ...] = ("gram", "randomized", "warm")
            for method in methods:
                call = lambda moved=moved, rank=rank, method=method, start=start: find_range(  # noqa: E731
                    moved, rank, method, previous=start if method == "warm" else None
                )
                seconds = median(call)
                energy = float((call().T @ moved).square().sum()) / best
                rows.append(
                    {
                        "shape": [m, n],
                        "rank": rank,
                        "method": method,
                        "milliseconds": seconds * 1e3,
                        "svd_over_this": svd / seconds,
                        "energy_over_optimum": energy,
                    }
                )
    return rows


def bank() -> dict[str, Any]:
    """Forty sites of 768 x 768 with bases of about 96 columns: batched against one after another."""
    spaces = [Subspace(768, torch.randn(768, 96 + i % 8)) for i in range(40)]
    matrices = [torch.randn(768, 768) for _ in spaces]
    stacked = SubspaceBank(spaces, [(768, 768)] * 40)
    thin = [torch.randn(8, 768) for _ in spaces]
    thin_bank = SubspaceBank(spaces, [(8, 768)] * 40)

    def loop(items: list[torch.Tensor]) -> None:
        for space, matrix in zip(spaces, items, strict=True):
            space.reject_(matrix)

    full_rank = {"loop_ms": median(lambda: loop(matrices)), "bank_ms": median(lambda: stacked.reject_(matrices))}
    rank_8 = {"loop_ms": median(lambda: loop(thin)), "bank_ms": median(lambda: thin_bank.reject_(thin))}
    return {name: {k: v * 1e3 for k, v in row.items()} for name, row in (("full_rank", full_rank), ("lora", rank_8))}


def growth() -> list[dict[str, Any]]:
    """Second moment and growth against an SVD of the same rows, 8,192 rows."""
    rows = []
    for dim in (384, 768, 1536):
        features = torch.randn(8192, dim) * torch.arange(1, dim + 1).pow(-0.6)

        def ours(features: torch.Tensor = features, dim: int = dim) -> None:
            Subspace(dim).grow(SecondMoment(dim, products=torch.float32).update(features), energy=0.95)

        def plain(features: torch.Tensor = features) -> None:
            torch.linalg.svd(features, full_matrices=False)

        mine, theirs = median(ours, 3), median(plain, 3)
        rows.append(
            {"dim": dim, "moment_and_growth_ms": mine * 1e3, "svd_ms": theirs * 1e3, "svd_over_this": theirs / mine}
        )
    return rows


def main() -> None:
    """Measure and store."""
    torch.manual_seed(0)
    result = {"machine": machine(), "range_finders": range_finders(), "bank": bank(), "growth": growth()}
    print(store("subspace_kernels.json", result))


if __name__ == "__main__":
    main()
