"""Health checks: what is looked at before a subspace is taken from a matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growthring.subspace import check_health, numerical_rank

from .strategies import PROPERTY, low_rank, randn, scales, seeds

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@PROPERTY
@given(seeds, st.integers(1, 12), st.integers(1, 12), st.sampled_from(DTYPES), st.sampled_from(["nan", "inf", "-inf"]))
def test_one_bad_element_anywhere_is_seen(seed, m, n, dtype, value):
    matrix = randn(seed, m, n, dtype=dtype)
    assert bool(check_health(matrix).usable)
    matrix[seed % m, seed % n] = float(value)
    health = check_health(matrix)
    assert not bool(health.finite)
    assert not bool(health.zero)
    assert not bool(health.usable)
    assert health.describe() == "contains NaN or infinity"


@PROPERTY
@given(seeds, st.integers(1, 12), st.integers(1, 12), st.sampled_from(DTYPES))
def test_zero_means_every_element(seed, m, n, dtype):
    matrix = torch.zeros(m, n, dtype=dtype)
    health = check_health(matrix)
    assert bool(health.zero)
    assert bool(health.finite)
    assert not bool(health.usable)
    assert health.describe() == "is all zero"
    matrix[seed % m, seed % n] = -torch.finfo(dtype).tiny
    assert bool(check_health(matrix).usable)
    assert check_health(matrix).describe() == "healthy"


def test_every_member_of_a_batch_is_judged_alone():
    batch = torch.ones(2, 3, 4, 5)
    batch[0, 1] = 0.0
    batch[1, 2, 0, 0] = float("nan")
    health = check_health(batch)
    assert health.zero.tolist() == [[False, True, False], [False, False, False]]
    assert health.finite.tolist() == [[True, True, True], [True, True, False]]
    assert health.usable.tolist() == [[True, False, True], [True, True, False]]
    assert health.describe() == "contains NaN or infinity and is all zero"


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 4)])
def test_a_matrix_without_elements_is_not_usable(shape):
    health = check_health(torch.zeros(shape))
    assert health.usable.shape == shape[:-2]
    assert not health.usable.any()


@PROPERTY
@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), scales, st.sampled_from(DTYPES[:2]))
def test_numerical_rank_of_rank_deficient_data(seed, m, n, rank, scale, dtype):
    rank = min(rank, m, n, 15)
    assert int(numerical_rank(low_rank(seed, m, n, rank, scale).to(dtype))) == rank


def test_numerical_rank_of_batches_zero_and_empty_matrices_and_with_a_cut():
    assert numerical_rank(torch.stack([torch.eye(3), torch.zeros(3, 3), torch.ones(3, 3)])).tolist() == [3, 0, 1]
    assert int(numerical_rank(torch.zeros(0, 3))) == 0
    spread = torch.diag(torch.tensor([1.0, 0.1, 0.01]))
    assert [int(numerical_rank(spread, rtol=cut)) for cut in (0.001, 0.05, 0.5)] == [3, 2, 1]
    assert int(numerical_rank(torch.eye(3, dtype=torch.bfloat16))) == 3
