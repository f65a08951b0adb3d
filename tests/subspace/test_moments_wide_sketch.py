"""Sketches of few wide rows are compacted through their products; the result is that of an SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from growthring.subspace import SecondMoment, Subspace


def frequent_directions(blocks: list[Tensor], keep: int) -> tuple[Tensor, float]:
    """Liberty 2013, with a buffer of twice the rows: the product of the sketch, and what was shrunk."""
    held, lost = torch.zeros(0, blocks[0].shape[1], dtype=torch.float64), 0.0
    for row in torch.cat(blocks):
        held = torch.cat([held, row.double().unsqueeze(0)])
        if held.shape[0] == 2 * keep:
            _, sigma, right = torch.linalg.svd(held, full_matrices=False)
            cut = float(sigma[keep] ** 2)
            lost += cut
            held = (sigma[:keep] ** 2 - cut).clamp_min(0).sqrt().unsqueeze(1) * right[:keep]
    return held.mT @ held, lost


@pytest.mark.parametrize("rank", [3, 12, 40], ids=["low rank", "cut", "full"])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_few_wide_rows_are_sketched_as_by_an_svd(rank: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    mixing = torch.randn(rank, 120, generator=generator, dtype=torch.float64) * scale
    blocks = [torch.randn(8, rank, generator=generator, dtype=torch.float64) @ mixing for _ in range(9)]
    moment = SecondMoment(120, form="sketch", rows=8)
    for block in blocks:
        moment.update(block)
    wanted, lost = frequent_directions(blocks, 8)
    whole = torch.cat(blocks)
    top = float((whole.mT @ whole).trace())
    torch.testing.assert_close(moment.matrix(), wanted, rtol=0, atol=1e-12 * top)
    assert moment.shrinkage == pytest.approx(lost, abs=1e-12 * top)
    assert float(torch.linalg.matrix_norm(whole.mT @ whole - moment.matrix(), 2)) <= moment.shrinkage + 1e-12 * top
    assert bool(moment.factor().isfinite().all())
    if rank == 3:
        assert Subspace(120).grow(moment, energy=1.0).added == 3


def test_zero_rows_stay_zero() -> None:
    moment = SecondMoment(40, form="sketch", rows=2).update(torch.zeros(9, 40))
    assert float(moment.matrix().abs().max()) == 0.0
    moment.update(torch.eye(40)[:1])
    assert moment.top() == pytest.approx(1.0)
