"""Range finders: spans are compared, never vectors, with what Eckart and Young say is best."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growthring.errors import ConfigError, NumericalError
from growthring.subspace import RANGE_FINDERS, find_range

from .strategies import PROPERTY, distance, gram_error, orthonormal, randn, scales, seeds, with_spectrum

COLD = ["full", "gram", "randomized"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def captured(matrix, basis):
    return float((basis.double().mT @ matrix.double()).square().sum())


def optimum(matrix, rank):
    return float(torch.linalg.svdvals(matrix.double())[:rank].square().sum())


def find(matrix, rank, method, **more):
    """Any method, cold: ``warm`` starts from a random basis and takes a few steps."""
    if method == "warm":
        more = {"previous": orthonormal(5, matrix.shape[0], rank).to(matrix.dtype), "iterations": 8} | more
    return find_range(matrix, rank, method, generator=generator(), **more)


@st.composite
def cases(draw):
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return draw(seeds), m, n, draw(st.integers(1, min(m, n)))


@PROPERTY
@given(cases(), st.sampled_from(RANGE_FINDERS), st.sampled_from(DTYPES), scales)
def test_columns_are_orthonormal_for_every_shape_rank_dtype_and_scale(case, method, dtype, scale):
    seed, m, n, rank = case
    scale = min(scale, 1e3) if dtype == torch.float16 else scale
    matrix = (randn(seed, m, n) * scale).to(dtype)
    matrix[0, 0] = scale  # half precision may have rounded everything else to zero
    found = find(matrix, rank, method)
    assert found.shape == (m, rank)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gram_error(found) < (1e-12 if dtype == torch.float64 else 1e-5)


@PROPERTY
@given(cases(), st.sampled_from(COLD), scales)
def test_exact_methods_reach_eckart_young(case, method, scale):
    """``||G - P P^T G||_F^2 = sum_{i>r} sigma_i^2`` for full and gram; no other basis captures more."""
    seed, m, n, rank = case
    matrix = with_spectrum(seed, m, n, scale * 0.7 ** torch.arange(min(m, n), dtype=torch.float64))
    best, total = optimum(matrix, rank), float(matrix.square().sum())
    value = captured(matrix, find(matrix, rank, method))
    slack = 1e-3 if method == "randomized" else 1e-12
    assert best * (1 - slack) <= value <= best * (1 + 1e-12)
    if method != "randomized":
        found = find(matrix, rank, method)
        assert float((matrix - found @ (found.T @ matrix)).square().sum()) == pytest.approx(
            total - best, abs=1e-11 * total
        )
    other = orthonormal(seed + 7, m, rank)
    assert captured(matrix, other) <= best * (1 + 1e-12)


@pytest.mark.parametrize("method", RANGE_FINDERS)
@pytest.mark.parametrize("shape", [(30, 30), (12, 40), (40, 12), (1, 9), (9, 1), (1, 1)])
def test_wide_tall_one_row_one_column_and_rank_equal_to_the_smaller_side(method, shape):
    matrix = randn(0, *shape)
    rank = min(shape)
    found = find(matrix, rank, method, **({"iterations": 40} if method == "warm" else {}))
    assert captured(matrix, found) == pytest.approx(float(matrix.square().sum()), rel=1e-9)


@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
@pytest.mark.parametrize("rank", [8, 32])
def test_randomized_is_near_the_optimum_on_a_slow_decay_and_power_iterations_are_why(shape, rank):
    """The spectrum i^-0.6 of the measurements: two iterations are near the optimum, none is not."""
    sigma = torch.arange(1, 121, dtype=torch.float64) ** -0.6
    matrix = with_spectrum(0, *shape, sigma).float()
    best = optimum(matrix, rank)
    shares = [captured(matrix, find(matrix, rank, "randomized", iterations=q)) / best for q in (0, 1, 2)]
    default = captured(matrix, find(matrix, rank, "randomized")) / best
    assert default == shares[2] > 0.99
    assert shares[0] < shares[1] < shares[2] <= 1 + 1e-6
    assert shares[0] < 0.97  # the control
    assert find(matrix, rank, "randomized").equal(find(matrix, rank, "randomized"))  # the generator decides


def test_warm_start_tracks_a_slowly_rotating_matrix():
    """One step a refresh stays at the optimum, where the basis of the first matrix falls behind."""
    m, n, rank = 60, 80, 4
    sigma = torch.cat([torch.full((rank,), 1.0), torch.full((m - rank,), 0.1)]).double()
    left, right = orthonormal(0, m, m), orthonormal(1, n, m)
    skew = randn(2, m, m)
    turn = torch.linalg.matrix_exp(0.004 * (skew - skew.T))
    first = basis = find_range((left * sigma) @ right.T, rank, "full")
    for _ in range(25):
        left = turn @ left
        matrix = (left * sigma) @ right.T
        basis = find_range(matrix, rank, "warm", previous=basis)
        assert captured(matrix, basis) / optimum(matrix, rank) > 0.999
    assert captured(matrix, first) / optimum(matrix, rank) < 0.8  # the control
    assert gram_error(basis) < 1e-12


def test_warm_start_keeps_old_directions_where_the_matrix_has_none():
    """A matrix of rank 1 cannot say what the other columns are; they must not be arbitrary."""
    previous = torch.eye(8)[:, :3]
    matrix = torch.outer(torch.eye(8)[1] + torch.eye(8)[6], randn(0, 5, dtype=torch.float32))
    found = find_range(matrix, 3, "warm", previous=previous)
    assert gram_error(found) < 1e-6
    assert captured(matrix, found) == pytest.approx(float(matrix.square().sum()), rel=1e-5)
    previous = torch.cat([orthonormal(3, 7, 3), torch.zeros(1, 3)]).float()  # nothing along the last axis
    orthogonal = torch.outer(torch.eye(8)[7], randn(0, 5, dtype=torch.float32))
    assert distance(find_range(orthogonal, 3, "warm", previous=previous), previous) < 1e-6


@pytest.mark.parametrize("method", RANGE_FINDERS)
@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15, 1e25])
def test_no_method_leaves_the_range_of_float32(method, scale):
    """Products of two gradients of 1e-25 underflow and of 1e25 overflow; both are usable matrices."""
    matrix = with_spectrum(0, 20, 30, [1.0, 0.5, 0.25, 1e-3]).float()
    expected = find(matrix, 3, method)
    found = find(matrix * scale, 3, method)
    assert distance(found, expected) < 1e-4
    assert captured(matrix, found) == pytest.approx(optimum(matrix, 3), rel=1e-4)


@pytest.mark.parametrize("method", RANGE_FINDERS)
def test_a_batch_equals_its_members(method):
    matrices = torch.stack([randn(s, 12, 20) for s in range(6)]).reshape(2, 3, 12, 20)
    previous = torch.stack([orthonormal(s + 50, 12, 4) for s in range(6)]).reshape(2, 3, 12, 4)
    more = {"iterations": 30 if method == "warm" else 12} if method in ("warm", "randomized") else {}
    found = find_range(matrices, 4, method, previous=previous, generator=generator(), **more)
    assert found.shape == (2, 3, 12, 4)
    for i in range(2):
        for j in range(3):
            one = find_range(
                matrices[i, j], 4, method, previous=previous[i, j].contiguous(), generator=generator(1), **more
            )
            assert captured(matrices[i, j], found[i, j]) == pytest.approx(captured(matrices[i, j], one), rel=1e-3)
            if method in ("full", "gram"):
                assert distance(found[i, j], one) < 1e-9


@pytest.mark.parametrize("method", RANGE_FINDERS)
def test_trap_2_unusable_members_fall_back_to_previous_and_the_others_do_not(method):
    matrices = torch.stack([randn(s, 8, 10) for s in range(5)]).float()
    previous = torch.stack([orthonormal(s + 50, 8, 3) for s in range(5)]).float()
    matrices[1, 2, 3] = float("nan")
    matrices[2, 0, 0] = float("inf")
    matrices[4] = 0.0
    found = find_range(matrices, 3, method, previous=previous, generator=generator())
    for index in (1, 2, 4):
        assert torch.equal(found[index], previous[index])
    healthy = find_range(matrices[[0, 3]], 3, method, previous=previous[[0, 3]], generator=generator(3))
    for index, expected in zip((0, 3), healthy, strict=True):
        assert distance(found[index], previous[index]) > 1e-2
        assert captured(matrices[index], found[index]) == pytest.approx(captured(matrices[index], expected), rel=0.1)
    assert gram_error(found[0]) < 1e-5
    kept = found[1].clone()
    previous.zero_()
    assert torch.equal(found[1], kept)  # a copy, not the caller's tensor


@pytest.mark.parametrize("method", COLD)
def test_trap_2_unusable_without_previous_says_why(method):
    with pytest.raises(NumericalError, match="8 x 10 matrix is all zero"):
        find_range(torch.zeros(8, 10), 2, method)
    with pytest.raises(NumericalError, match="contains NaN or infinity"):
        find_range(torch.full((8, 10), float("nan")), 2, method)
    both = torch.stack([torch.zeros(8, 10), torch.full((8, 10), float("inf"))])
    with pytest.raises(NumericalError, match="contains NaN or infinity and is all zero"):
        find_range(both, 2, method)


@pytest.mark.parametrize("method", RANGE_FINDERS)
def test_trap_3_the_result_owns_just_itself(method):
    matrix = randn(0, 64, 100, dtype=torch.float32)
    assert torch.linalg.svd(matrix)[0][:, :4].untyped_storage().nbytes() == 64 * 64 * 4  # the control
    found = find(matrix, 4, method)
    assert found.untyped_storage().nbytes() == 64 * 4 * 4
    assert found.is_contiguous()
    assert not find(matrix.requires_grad_(), 4, method).requires_grad


@pytest.mark.parametrize("method", RANGE_FINDERS)
def test_trap_4_autocast_and_shortened_products_do_not_reach_it(method):
    matrix = randn(0, 64, 64, dtype=torch.float32)
    plain = find(matrix, 6, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(find(matrix, 6, method), plain)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(find(matrix, 6, method), plain)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("method", RANGE_FINDERS)
@pytest.mark.parametrize("rank", [0, 5, -1])
def test_trap_7_a_rank_that_does_not_fit_is_refused(method, rank):
    with pytest.raises(ConfigError, match="4 x 9 matrix: 1 to 4"):
        find_range(torch.ones(4, 9), rank, method)


def test_trap_8_the_side_is_the_left_one_for_every_shape():
    """Nothing guesses a side: tall, wide and square matrices all give columns of length m."""
    for m, n in ((6, 9), (9, 6), (6, 6)):
        matrix = torch.outer(torch.eye(m)[1], torch.eye(n)[3])
        for method in COLD:
            found = find_range(matrix, 1, method, generator=generator())
            assert found.shape == (m, 1)
            assert float(found[1].abs()) == pytest.approx(1.0, abs=1e-6)


def test_bad_arguments():
    matrix = randn(0, 4, 5)
    with pytest.raises(ConfigError, match="did you mean 'randomized'"):
        find_range(matrix, 2, "randomised")
    with pytest.raises(ConfigError, match="needs previous"):
        find_range(matrix, 2, "warm")
    with pytest.raises(ConfigError, match=r"\(4, 2\) is needed"):
        find_range(matrix, 2, "warm", previous=torch.ones(5, 2))
    with pytest.raises(ConfigError, match="at least 0"):
        find_range(matrix, 2, "randomized", iterations=-1)
