"""``SubspaceBank`` must equal the plain loop, whatever is mixed."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growthring.errors import ConfigError
from growthring.subspace import Subspace, SubspaceBank

from . import reference
from .strategies import PROPERTY, orthonormal, randn, scales, seeds

ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw_sites(seed):
    """Up to twelve sites ``(rows, d, rank, dtype, basis dtype)``; few different sizes, so that they share kernels."""
    pick = random.Random(seed)
    return [
        (
            pick.choice([1, 3, 8]),
            pick.choice([1, 5, 12]),
            pick.choice([0, 1, 2, 4, 5, 9, 12]),
            pick.choice(list(ROUNDING)),
            pick.choice([torch.float32, torch.float64]),
        )
        for _ in range(pick.randint(1, 12))
    ]


def make(seed, sites, scale=1.0):
    spaces, matrices = [], []
    for index, (rows, d, k, dtype, kept) in enumerate(sites):
        spaces.append(Subspace(d, orthonormal(seed + index, d, min(k, d)), dtype=kept))
        matrices.append((randn(seed + 100 + index, rows, d) * scale).clamp(-1e4, 1e4).to(dtype))
    return spaces, matrices


@PROPERTY
@given(seeds, st.sampled_from([1, 4, 16]), scales)
def test_equals_the_loop_for_mixed_shapes_ranks_and_dtypes(seed, pad, scale):
    """Empty and full subspaces, stored bases and complements, float16 to float64 side by side."""
    spaces, matrices = make(seed, draw_sites(seed), scale)
    expected = reference.loop_reject(spaces, matrices)
    one_by_one = [space.reject(matrix) for space, matrix in zip(spaces, matrices, strict=True)]
    before = [matrix.clone() for matrix in matrices]
    SubspaceBank(spaces, [tuple(m.shape) for m in matrices], pad=pad).reject_(matrices)
    for found, dense, single, original in zip(matrices, expected, one_by_one, before, strict=True):
        assert found.dtype == original.dtype
        atol = ROUNDING[found.dtype] * float(original.double().norm()) + (1e-7 if found.dtype == torch.half else 0)
        torch.testing.assert_close(found.double(), dense, rtol=0, atol=atol)
        torch.testing.assert_close(found.double(), single.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("k", [2, 5])
def test_a_wider_matrix_than_its_basis_is_computed_in_its_own_dtype(count, k):
    spaces = [Subspace(6, orthonormal(s, 6, k)) for s in range(count)]
    matrices = [randn(s, 4, 6) for s in range(count)]
    matrices[1:2] = [m.float() for m in matrices[1:2]]
    expected = reference.loop_reject(spaces, matrices)
    SubspaceBank(spaces, [(4, 6)] * count).reject_(matrices)
    for found, wanted in zip(matrices, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [0, 3, 9, 12])
def test_the_same_subspace_may_stand_several_times(k):
    """Query, key and value share one input, and one basis."""
    space = Subspace(12, orthonormal(0, 12, k))
    matrices = [randn(s, 6, 12, dtype=torch.float32) for s in range(3)]
    expected = [space.reject(m) for m in matrices]
    SubspaceBank([space] * 3, [(6, 12)] * 3).reject_(matrices)
    for found, wanted in zip(matrices, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_empty_changes_no_bit_and_full_leaves_exactly_nothing():
    spaces = [Subspace(6), Subspace(6), Subspace(6, orthonormal(0, 6, 6)), Subspace(6, orthonormal(1, 6, 6))]
    matrices = [randn(s, 4, 6, dtype=torch.float32) for s in range(4)]
    before = [m.clone() for m in matrices]
    SubspaceBank(spaces, [(4, 6)] * 4).reject_(matrices)
    assert torch.equal(matrices[0], before[0])
    assert torch.equal(matrices[1], before[1])
    assert not matrices[2].any()
    assert not matrices[3].any()


def test_parameters_and_non_contiguous_matrices_are_changed_in_place():
    space = Subspace(6, orthonormal(0, 6, 2))
    weight = torch.nn.Parameter(randn(0, 5, 6, dtype=torch.float32))
    base = randn(1, 6, 5, dtype=torch.float32)
    expected = [space.reject(weight.detach()), space.reject(base.T)]
    SubspaceBank([space, space], [(5, 6), (5, 6)]).reject_([weight, base.T])
    torch.testing.assert_close(weight.detach(), expected[0])
    torch.testing.assert_close(base.T, expected[1])
    assert weight.requires_grad
    assert weight.is_leaf


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("k", [10, 50])
def test_trap_4_autocast_and_shortened_products_do_not_reach_it(count, k):
    spaces = [Subspace(64, orthonormal(s, 64, k)) for s in range(count)]
    start = [randn(s, 64, 64, dtype=torch.float32) for s in range(count)]
    bank = SubspaceBank(spaces, [(64, 64)] * count)

    def run():
        matrices = [m.clone() for m in start]
        bank.reject_(matrices)
        return torch.stack(matrices)

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(), plain)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(run(), plain)
    finally:
        torch.set_float32_matmul_precision(before)
    for space, found in zip(spaces, plain, strict=True):
        assert space.share(found) < 1e-6


def test_forty_sites_cost_a_few_kernels():
    """Ranks that differ within the padding share a block; the count of blocks is what the batching is for."""
    spaces = [Subspace(64, orthonormal(s, 64, 17 + s % 10)) for s in range(40)]
    bank = SubspaceBank(spaces, [(64, 64)] * 40)
    assert len(bank._blocks) == 1
    assert len(SubspaceBank(spaces, [(64, 64)] * 40, pad=1)._blocks) == 10  # the control


def test_disagreements_are_refused_before_anything_changes():
    spaces = [Subspace(4, torch.eye(4)[:, :1]), Subspace(5, torch.eye(5)[:, :1])]
    with pytest.raises(ConfigError, match="2 subspaces for 1"):
        SubspaceBank(spaces, [(3, 4)])
    with pytest.raises(ConfigError, match=r"matrix 1 is \(3, 4\).*R\^5"):
        SubspaceBank(spaces, [(3, 4), (3, 4)])
    bank = SubspaceBank(spaces, [(3, 4), (3, 5)])
    with pytest.raises(ConfigError, match="got 1 matrices"):
        bank.reject_([torch.ones(3, 4)])
    matrices = [torch.ones(3, 4), torch.ones(5, 3)]
    with pytest.raises(ConfigError, match=r"matrix 1 is \(5, 3\).*\(3, 5\)"):
        bank.reject_(matrices)
    assert torch.equal(matrices[0], torch.ones(3, 4))


def test_nothing_to_do():
    bank = SubspaceBank([], [])
    bank.reject_([])
    with pytest.raises(ConfigError, match="0 subspaces got 1"):
        bank.reject_([torch.ones(2, 3)])


def _spaces_of_every_kind(dim: int, dtype: torch.dtype) -> list[Subspace]:
    generator = torch.Generator().manual_seed(5)
    spaces = []
    for rank in (0, 3, dim // 4, dim - 5, dim):
        columns = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
        spaces.append(Subspace(dim, columns, dtype=dtype) if rank else Subspace(dim, dtype=dtype))
    return spaces


@pytest.mark.parametrize("rows", [4, 300], ids=["stacked", "in-place"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("basis", "weights", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-6),
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float64, 2e-6),
    ],
)
def test_updates_are_rejected_and_anchors_stay(
    rows: int, transposed: bool, basis: torch.dtype, weights: torch.dtype, tolerance: float
) -> None:
    dim = 256
    spaces = _spaces_of_every_kind(dim, basis)
    shape = (dim, rows) if transposed else (rows, dim)
    owners = [torch.nn.Parameter(torch.randn(shape, dtype=weights)) for _ in spaces]
    anchors = [torch.randn(shape, dtype=weights) for _ in spaces]
    before = [a.clone() for a in anchors]
    expected = [
        a.double() + s.clone().reject((p.detach() - a).double().mT if transposed else (p.detach() - a).double()).mT
        if transposed
        else a.double() + s.reject((p.detach() - a).double())
        for p, a, s in zip(owners, anchors, spaces, strict=True)
    ]
    views = [p.mT if transposed else p for p in owners]
    starts = [a.mT if transposed else a for a in anchors]
    SubspaceBank(spaces, [(rows, dim)] * len(spaces)).reject_updates_(views, starts)
    for owner, anchor, kept, wanted, space in zip(owners, anchors, before, expected, spaces, strict=True):
        assert torch.equal(anchor, kept)
        torch.testing.assert_close(owner.detach().double(), wanted, rtol=0, atol=tolerance * 10)
        if space.free == 0:
            assert torch.equal(owner.detach(), anchor)


def test_large_matrices_are_not_copied_into_the_bank() -> None:
    space = Subspace(256, torch.randn(256, 20))
    bank = SubspaceBank([space] * 3, [(300, 256)] * 3)
    assert all(basis.data_ptr() == space.stored.data_ptr() for _, basis, _ in bank._large)
    assert not bank._blocks


@pytest.mark.parametrize("rows", [4, 300])
def test_half_precision_matrices_are_updated_in_their_own_dtype(rows: int) -> None:
    space = Subspace(256, torch.randn(256, 20))
    matrix, anchor = torch.randn(rows, 256).bfloat16(), torch.randn(rows, 256)
    wanted = (anchor + space.reject(matrix.float() - anchor)).bfloat16()
    SubspaceBank([space], [(rows, 256)]).reject_updates_([matrix], [anchor])
    assert matrix.dtype == torch.bfloat16
    torch.testing.assert_close(matrix.float(), wanted.float(), rtol=1e-2, atol=1e-2)
