"""``Subspace`` against its dense twin, and every trap and invariant of the papers that concerns a basis."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from growthring.errors import ConfigError, DataError, NumericalError
from growthring.subspace import SecondMoment, Subspace

from . import reference
from .strategies import (
    PROPERTY,
    dims,
    distance,
    gram_error,
    low_rank,
    orthonormal,
    randn,
    scales,
    seeds,
    wide_dtypes,
    with_spectrum,
)

# relative error of one rounding to the dtype, plus the float32 basis
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@st.composite
def bases(draw):
    """``(seed, d, k)`` with any rank, empty and full included."""
    d = draw(dims)
    return draw(seeds), d, draw(st.integers(0, d))


# --- projections ----------------------------------------------------------------------------------------------------


@PROPERTY
@given(bases(), wide_dtypes)
def test_invariant_1_projector(where, dtype):
    """U^T U = I; P = I - U U^T is symmetric, idempotent, kills U, and has rank d - k."""
    seed, d, k = where
    space = Subspace(d, orthonormal(seed, d, k), dtype=dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    assert (space.rank, space.free, space.dtype) == (k, d - k, dtype)
    assert gram_error(space.basis()) < tolerance
    assert gram_error(space.free_basis()) < tolerance
    p = space.reject(torch.eye(d, dtype=dtype)).double()
    assert float((p - p.T).abs().max()) < tolerance
    assert float((p @ p - p).abs().max()) < tolerance
    assert k == 0 or float((p @ orthonormal(seed, d, k)).abs().max()) < tolerance
    assert round(float(p.trace())) == d - k
    assert float(p.trace()) == pytest.approx(d - k, abs=40 * tolerance)


@PROPERTY
@given(bases(), st.sampled_from(list(TOLERANCE)), scales, st.sampled_from([(), (1,), (7,), (2, 3), (2, 1, 3), (0,)]))
def test_projections_equal_the_dense_twin(where, dtype, scale, leading):
    seed, d, k = where
    basis = orthonormal(seed, d, k)
    space = Subspace(d, basis)
    x = (randn(seed + 9, *leading, d) * scale).clamp(-1e4, 1e4).to(dtype)
    before = x.clone()
    atol = TOLERANCE[dtype] * float(x.double().norm()) + (1e-7 if dtype == torch.float16 else 1e-300)
    for found, expected in (
        (space.project(x), reference.project(x, basis)),
        (space.reject(x), reference.reject(x, basis)),
        (space.project_(x.clone()), reference.project(x, basis)),
        (space.reject_(x.clone()), reference.reject(x, basis)),
    ):
        assert found.dtype == dtype
        assert found.shape == x.shape
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)
    assert torch.equal(x, before)


@PROPERTY
@given(bases(), wide_dtypes)
def test_coordinates_and_lift_are_transposes(where, dtype):
    seed, d, k = where
    space = Subspace(d, orthonormal(seed, d, k), dtype=dtype)
    x, c = randn(seed, 5, d, dtype=dtype), randn(seed + 1, 5, k, dtype=dtype)
    close = {"rtol": 0, "atol": 2e-5 if dtype == torch.float32 else 1e-12}
    assert space.coordinates(x).shape == (5, k)
    torch.testing.assert_close(space.lift(space.coordinates(x)), space.project(x), **close)
    torch.testing.assert_close(space.coordinates(space.lift(c)), c, **close)
    torch.testing.assert_close((space.coordinates(x) * c).sum(), (x * space.lift(c)).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [0, 2, 5])
@pytest.mark.parametrize("name", ["project", "reject"])
def test_results_never_share_memory_with_the_argument(k, name):
    x = randn(0, 3, 5, dtype=torch.float32)
    before = x.clone()
    getattr(Subspace(5, torch.eye(5)[:, :k]), name)(x).add_(1.0)
    assert torch.equal(x, before)


def test_empty_and_full_are_exact_bit_for_bit():
    """Invariant 6's ground: an empty basis changes no bit; a full one leaves exactly nothing."""
    x = randn(0, 4, 6, dtype=torch.float32)
    empty, full = Subspace(6), Subspace(6, orthonormal(1, 6, 6))
    assert torch.equal(empty.reject(x), x)
    assert not empty.project(x).any()
    assert torch.equal(full.project(x), x)
    assert not full.reject(x).any()


@pytest.mark.parametrize("k", [0, 2, 6])
def test_in_place_works_on_a_parameter_and_out_of_place_is_differentiable(k):
    space = Subspace(6, torch.eye(6)[:, :k])
    weight = torch.nn.Parameter(randn(0, 4, 6, dtype=torch.float32))
    expected = space.reject(weight.detach())
    space.reject(weight).sum().backward()
    torch.testing.assert_close(weight.grad, space.reject(torch.ones(4, 6)))
    space.reject_(weight)
    assert torch.equal(weight.detach(), expected)
    assert weight.requires_grad


def test_non_contiguous_input():
    space, x = Subspace(6, orthonormal(0, 6, 2)), randn(1, 6, 4, dtype=torch.float32).T
    assert not x.is_contiguous()
    torch.testing.assert_close(space.reject(x), space.reject(x.contiguous()))


@PROPERTY
@given(bases(), scales)
def test_share_is_the_leak(where, scale):
    seed, d, k = where
    basis = orthonormal(seed, d, k)
    x = randn(seed + 3, 4, d) * scale
    expected = float(reference.project(x, basis).norm() / x.norm())
    assert Subspace(d, basis).share(x) == pytest.approx(expected, abs=1e-6)
    assert Subspace(d, basis).share(torch.zeros(3, d)) == 0.0


# --- traps of the ground floor --------------------------------------------------------------------------------------


@PROPERTY
@given(bases())
def test_trap_1_signs_and_rotations_of_the_basis_do_not_matter(where):
    seed, d, k = where
    basis = orthonormal(seed, d, k)
    turned = basis @ orthonormal(seed + 1, k, k) if k else basis
    x = randn(seed, 3, d)
    torch.testing.assert_close(
        Subspace(d, basis, dtype=torch.float64).reject(x), Subspace(d, turned, dtype=torch.float64).reject(x)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_trap_2_non_finite_or_zero_sources_are_refused_and_nothing_changes(value):
    space = Subspace(4, torch.eye(4)[:, :1])
    rows = torch.ones(3, 4)
    rows[1, 2] = value
    with pytest.raises(NumericalError, match="NaN or infinity"):
        space.grow(rows, energy=0.9)
    with pytest.raises(NumericalError, match="zero"):
        space.grow(torch.zeros(3, 4), energy=0.9)
    with pytest.raises(NumericalError, match="NaN or infinity"):
        Subspace(4, rows.T[:, :2].contiguous())
    with pytest.raises(NumericalError, match="zero"):
        Subspace(4, torch.zeros(4, 1))
    assert torch.equal(space.basis(), torch.eye(4)[:, :1])


def test_trap_3_the_basis_does_not_pin_the_factor_it_came_from():
    rows = randn(0, 200, 64, dtype=torch.float32)
    view = torch.linalg.svd(rows, full_matrices=False)[2][:3]
    assert view.untyped_storage().nbytes() > 10 * view.numel() * 4  # the control: a slice pins everything
    space = Subspace(64)
    space.grow(rows, rank=3)
    for grown in (space, space.clone(), Subspace.from_state_dict(space.state_dict()), Subspace(64, view.T)):
        assert grown.stored.untyped_storage().nbytes() == 64 * 3 * 4
    space.grow(rows, rank=50)
    assert space.stored.untyped_storage().nbytes() == 64 * 11 * 4
    buffer = io.BytesIO()
    torch.save(space.state_dict(), buffer)
    assert buffer.tell() < 64 * 11 * 4 + 4096


def test_trap_4_a_narrow_basis_is_refused_and_would_have_leaked():
    basis = orthonormal(0, 256, 32)
    x = randn(1, 64, 32) @ basis.T
    narrow = basis.to(torch.bfloat16)
    left = x.to(torch.bfloat16) - (x.to(torch.bfloat16) @ narrow) @ narrow.T
    assert float(left.double().norm() / x.norm()) > 1e-3  # the control
    assert float(Subspace(256, basis).reject(x.float()).norm() / x.norm()) < 1e-6
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ConfigError, match="float32"):
            Subspace(4, dtype=dtype)


@pytest.mark.parametrize("k", [10, 50])
def test_trap_4_autocast_does_not_reach_the_projection(k):
    space = Subspace(64, orthonormal(0, 64, k))
    x, c = randn(1, 8, 64, dtype=torch.float32), randn(1, 8, k, dtype=torch.float32)
    calls = {
        "project": (space.project, x),
        "reject": (space.reject, x),
        "coordinates": (space.coordinates, x),
        "lift": (space.lift, c),
        "reject_": (lambda v: space.reject_(v.clone()), x),
    }
    plain = {name: call(v) for name, (call, v) in calls.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16  # the control: autocast is on
        assert space.share(x) == pytest.approx(float(reference.project(x, space.basis()).norm() / x.norm()), abs=1e-6)
        for name, (call, v) in calls.items():
            assert torch.equal(call(v), plain[name]), name
        twin = space.clone()
        twin.grow(randn(2, 3, 64, dtype=torch.float32), energy=1.0)
        assert gram_error(twin.basis()) < 1e-6


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_trap_4_shortened_float32_products_do_not_reach_the_projection(precision):
    """TensorFloat-32 and bfloat16 kernels behind a float32 face; the caller's setting comes back afterwards."""
    space, x = Subspace(64, orthonormal(0, 64, 10)), randn(1, 64, 64, dtype=torch.float32)
    plain = space.reject(x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(space.reject(x), plain)
        assert torch.get_float32_matmul_precision() == precision
        if hasattr(torch.backends.mkldnn, "matmul"):
            assert torch.backends.mkldnn.matmul.fp32_precision == {"high": "tf32", "medium": "bf16"}[precision]
    finally:
        torch.set_float32_matmul_precision(before)


def test_trap_5_appended_noise_is_dropped_and_the_basis_stays_orthonormal():
    rows = low_rank(0, 60, 24, 6).float()
    space = Subspace(24)
    assert space.grow(rows, energy=1.0).added == 6
    # the control: what a plain SVD of the residual would append is noise, and not orthogonal to the basis
    residual = rows - (rows @ space.basis()) @ space.basis().T
    noise = torch.linalg.svd(residual, full_matrices=False)[2][:3]
    assert float(residual.norm() / rows.norm()) < 1e-6
    assert float((noise @ space.basis()).abs().max()) > 1e-2
    for _ in range(20):
        assert space.grow(rows, energy=1.0).added == 0
        assert space.grow(rows, rank=3).added == 0
    assert gram_error(space.basis()) < 1e-6


def test_trap_6_columns_are_orthonormalised_before_use():
    skew = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    broken = torch.eye(3) - skew @ skew.T
    assert float((broken @ broken - broken).abs().max()) > 1.0  # the control: not a projector
    space = Subspace(3, skew)
    assert distance(space.basis(), torch.eye(3)[:, :2]) < 1e-6
    with pytest.raises(NumericalError, match="dependent"):
        Subspace(3, torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))


def test_trap_7_rank_is_capped_by_what_is_there_and_a_full_basis_says_so():
    space = Subspace(5)
    growth = space.grow(low_rank(0, 20, 5, 3), rank=100)
    assert (growth.added, growth.rank, growth.free) == (3, 3, 2)
    assert space.grow(randn(1, 20, 5), rank=100).added == 2
    growth = space.grow(randn(2, 20, 5), rank=1)
    assert (growth.added, growth.rank, growth.free, growth.energy) == (0, 5, 0, 1.0)
    with pytest.raises(ConfigError, match="k <= 3"):
        Subspace(3, torch.randn(3, 4))


def test_trap_8_the_side_is_the_last_axis_and_never_guessed():
    """A square weight is where a guess from the shape goes wrong."""
    basis = orthonormal(0, 6, 2)
    space = Subspace(6, basis, dtype=torch.float64)
    weight = randn(1, 6, 6)
    torch.testing.assert_close(space.reject(weight), weight @ (torch.eye(6) - basis @ basis.T))
    assert float((space.reject(weight) - space.reject(weight.T).T).abs().max()) > 0.1  # the sides differ
    for shape in ((6, 5), (5,), ()):
        with pytest.raises(DataError, match="last axis"):
            space.reject(torch.zeros(shape))
    with pytest.raises(DataError, match="last axis"):
        space.grow(torch.zeros(6, 5), energy=0.9)


# --- growing --------------------------------------------------------------------------------------------------------


@st.composite
def histories(draw):
    """``(seed, d, [(n, rank, scale, energy), ...])``: the feature rows of a few tasks, rank-deficient ones too."""
    d = draw(dims)
    task = st.tuples(
        st.integers(1, 60), st.integers(1, d), scales, st.sampled_from([0.3, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0])
    )
    return draw(seeds), d, draw(st.lists(task, min_size=1, max_size=4))


@PROPERTY
@given(histories(), wide_dtypes, st.sampled_from(["gram", "root"]))
def test_invariant_2_growth_is_nested_and_keeps_every_past_energy(history, dtype, form):
    """Nested, never shrinking, within d, and every past task keeps its energy; smallest rank that reaches it."""
    seed, d, tasks = history
    space, past = Subspace(d, dtype=dtype), []
    for index, (n, rank, scale, energy) in enumerate(tasks):
        rows = low_rank(seed + 10 * index, n, d, rank, scale)
        before, old_rank = space.basis().double(), space.rank
        twin = reference.grow(before, rows, energy=energy)
        growth = space.grow(SecondMoment(d, form=form).update(rows), energy=energy)
        assert (growth.rank, growth.free, growth.target) == (space.rank, d - space.rank, energy)
        assert growth.added == space.rank - old_rank >= 0
        assert old_rank == 0 or float((space.reject(before.T)).norm()) < 1e-5
        assert gram_error(space.basis()) < 2e-6
        inside = reference.energy_inside(rows, space.basis())
        assert growth.energy == pytest.approx(inside, abs=1e-5)
        past.append((rows, energy))
        for old_rows, old_energy in past:
            assert reference.energy_inside(old_rows, space.basis()) >= old_energy - 1e-6
        if energy < 1.0:
            assert space.rank == twin.shape[1]
        assert space.stored.numel() <= max(d * d / 2, d * (d // 2))


@PROPERTY
@given(seeds, dims, st.integers(1, 60), st.integers(1, 40), scales, wide_dtypes, st.sampled_from(["gram", "root"]))
def test_energy_one_takes_every_direction_and_no_noise(seed, d, n, rank, scale, dtype, form):
    rank = min(rank, n, d)
    rows = low_rank(seed, n, d, rank, scale)
    space = Subspace(d, dtype=dtype)
    growth = space.grow(SecondMoment(d, form=form).update(rows), energy=1.0)
    assert growth.added == rank
    assert distance(space.basis(), reference.span(rows.T)) < 2e-5
    assert space.grow(SecondMoment(d, form=form).update(rows), energy=1.0).added == 0


@pytest.mark.parametrize(
    ("sigma", "energy", "rank"),
    [
        ((3, 2, 1), 0.60, 1),
        ((3, 2, 1), 0.80, 2),
        ((3, 2, 1), 0.90, 2),
        ((3, 2, 1), 0.93, 3),
        ((3, 2, 1), 1.0, 3),
        ((10, 1, 1, 1), 0.97, 1),
        ((10, 1, 1, 1), 0.975, 2),
        ((1, 1, 1, 1), 0.25, 1),
        ((1, 1, 1, 1), 0.5, 2),
        ((1, 1, 1, 1), 0.51, 3),
    ],
)
@pytest.mark.parametrize("as_moment", [True, False])
def test_invariant_9_and_trap_13_energy_is_sigma_squared_and_the_threshold_is_reached(sigma, energy, rank, as_moment):
    """Shares of (3, 2, 1) are .643, .929, 1; of (10, 1, 1, 1) .971, .981, .990, 1: the smallest k that reaches."""
    rows = torch.diag(torch.tensor(sigma, dtype=torch.float64))
    space = Subspace(len(sigma))
    growth = space.grow(SecondMoment(len(sigma)).update(rows) if as_moment else rows, energy=energy)
    assert growth.added == rank
    assert growth.energy >= energy - 1e-12


def test_invariant_9_controls_the_wrong_rules_would_give_other_ranks():
    sigma = torch.tensor([3.0, 2.0, 1.0])

    def smallest(values, energy):
        return int((values.cumsum(0) / values.sum() < energy).sum()) + 1

    assert smallest(sigma**4, 0.80) == 1 != smallest(sigma**2, 0.80)  # energy sigma^4
    assert smallest(sigma, 0.60) == 2 != smallest(sigma**2, 0.60)  # energy sigma
    shares = torch.tensor([100.0, 1, 1, 1]).cumsum(0) / 103
    assert int((shares < 0.97).sum()) == 0  # "<" without the +1 keeps nothing at all


@PROPERTY
@given(seeds, dims, st.integers(1, 60), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_invariant_8_axis_order_and_duplicates(seed, d, n, energy):
    """n != d works; permuting or duplicating the samples leaves U U^T as it was."""
    rows = low_rank(seed, n, d, d)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    spaces = []
    for variant in (rows, rows[order], torch.cat([rows, rows]), rows.reshape(1, n, d)):
        spaces.append(Subspace(d, dtype=torch.float64))
        spaces[-1].grow(variant, energy=energy)
    for other in spaces[1:]:
        assert other.rank == spaces[0].rank
        assert distance(other.basis(), spaces[0].basis()) < 1e-7


def test_invariant_8_controls_sample_axis_and_centring():
    """A projector over samples moves when they are permuted; centring loses the mean direction."""
    rows = low_rank(0, 12, 12, 4)
    turned = rows[torch.arange(12).flip(0)]
    assert distance(reference.span(rows), reference.span(turned)) > 0.1
    assert distance(reference.span(rows.T), reference.span(turned.T)) < 1e-9
    constant = torch.ones(9, 3)
    assert float((constant - constant.mean(0)).norm()) == 0.0  # centred: nothing left to protect
    space = Subspace(3)
    assert space.grow(constant, energy=0.99).added == 1
    assert distance(space.basis(), torch.ones(3, 1) / 3**0.5) < 1e-6


@PROPERTY
@given(seeds, dims, wide_dtypes)
def test_invariant_7_full_rank_features_leave_exactly_nothing(seed, d, dtype):
    space = Subspace(d, dtype=dtype)
    assert space.grow(low_rank(seed, d + 3, d, d), energy=1.0).free == 0
    assert not space.reject(randn(seed, 4, d, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invariant_1_after_fifty_growths(dtype):
    space = Subspace(128, dtype=dtype)
    for task in range(50):
        space.grow(with_spectrum(task, 32, 128, [1.0, 0.5, 1e-3]), rank=2)
        expected = min(128, 2 * (task + 1))
        assert space.rank == expected
    assert gram_error(space.basis()) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert float((space.basis().double().T @ space.basis().double() - torch.eye(100)).abs().max()) < 1e-6
    first = torch.linalg.svd(with_spectrum(0, 32, 128, [1.0, 0.5, 1e-3]))[2][:2]  # what the first growth took in
    assert space.share(first) == pytest.approx(1.0, abs=1e-9)
    assert float(space.reject(first).norm()) < 1e-5


@PROPERTY
@given(histories(), wide_dtypes)
def test_invariant_16_complement_store_equals_a_plain_basis(history, dtype):
    """The same growths with a basis that is always stored plainly: results within 1e-6 of each other."""
    seed, d, tasks = history
    space, plain = Subspace(d, dtype=dtype), torch.zeros(d, 0, dtype=torch.float64)
    for index, (n, rank, _, _) in enumerate(tasks):
        rows = low_rank(seed + 10 * index, n, d, rank)
        added = space.grow(rows, rank=2).added
        left = reference.reject(rows, plain)
        new = torch.linalg.svd(left, full_matrices=False)[2][:added].T
        plain = torch.linalg.qr(torch.cat([plain, new], dim=1))[0]
        assert space.stores_complement == (space.rank > d / 2)
        x = randn(seed, 3, d)
        x = x / x.norm()
        # near-equal singular values rotate freely between two roundings: skip those draws, they are no fault
        sigma = torch.linalg.svdvals(left)
        if 0 < added < sigma.numel() and float(sigma[added - 1] - sigma[added]) < 0.05 * float(sigma[0]):
            return
        assert float((space.reject(x) - reference.reject(x, plain)).abs().max()) < 1e-6
        assert float((space.project(x) - reference.project(x, plain)).abs().max()) < 1e-6


@pytest.mark.parametrize("d", [1, 2, 7, 8])
def test_invariant_16_every_rank_across_the_switch(d):
    target = orthonormal(0, d, d)
    space = Subspace(d)
    for k in range(d):
        space.grow(target[:, k].reshape(1, d), energy=1.0)
        twin = Subspace(d, target[:, : k + 1])
        assert space.rank == twin.rank == k + 1
        assert space.stores_complement == twin.stores_complement == (k + 1 > d / 2)
        assert space.stored.shape[1] == min(k + 1, d - k - 1)
        assert distance(space.basis(), target[:, : k + 1]) < 1e-6
        assert distance(space.free_basis(), target[:, k + 1 :]) < 1e-6


def test_a_sketch_grows_without_a_dense_complement_and_agrees_with_the_rows():
    """Fewer rows than free directions: the residual is formed by rejection; same answer as through the free basis."""
    space, rows = Subspace(300, orthonormal(0, 300, 20)), randn(1, 30, 300)
    mixed = torch.cat([rows, randn(2, 10, 20) @ orthonormal(0, 300, 20).T])
    sketch = SecondMoment(300, form="sketch", rows=64).update(mixed)
    values, vectors = sketch.residual_spectrum(space)
    assert values.shape == (40,)
    expected = torch.linalg.svdvals(reference.reject(mixed, space.basis())).square()
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9)
    assert float((space.basis().double().T @ vectors[:, :30]).abs().max()) < 1e-9
    assert space.grow(sketch, energy=1.0).added == 30
    assert distance(space.basis(), reference.span(torch.cat([orthonormal(0, 300, 20), rows.T], dim=1))) < 1e-6


def test_a_sketch_counts_what_it_lost_as_not_captured():
    rows = with_spectrum(0, 40, 20, [1.0] * 20)
    growth = Subspace(20).grow(SecondMoment(20, form="sketch", rows=5).update(rows), energy=0.9)
    assert growth.added <= 5
    assert growth.energy < 0.9 == growth.target


@pytest.mark.parametrize("arguments", [{}, {"energy": 0.9, "rank": 1}, {"energy": 0.0}, {"energy": 1.1}, {"rank": -1}])
def test_grow_refuses_bad_settings(arguments):
    with pytest.raises(ConfigError, match="grow"):
        Subspace(4).grow(torch.ones(2, 4), **arguments)


def test_grow_refuses_a_source_that_is_empty_or_of_another_dimension():
    with pytest.raises(DataError, match="seen no rows"):
        Subspace(4).grow(SecondMoment(4), energy=0.9)
    with pytest.raises(DataError, match="dimension 5"):
        Subspace(4).grow(SecondMoment(5).update(torch.ones(2, 5)), energy=0.9)


def test_bad_constructions():
    with pytest.raises(ConfigError, match="at least 1"):
        Subspace(0)
    with pytest.raises(ConfigError, match="must be"):
        Subspace(3, torch.eye(4))
    with pytest.raises(DataError, match="int64"):
        Subspace(3).reject(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(DataError, match="rank-2"):
        Subspace(3, torch.eye(3)[:, :2]).lift(torch.ones(4, 3))


# --- storing --------------------------------------------------------------------------------------------------------


@PROPERTY
@given(bases(), wide_dtypes)
def test_save_and_load_bit_for_bit(tmp_path_factory, where, dtype):
    seed, d, k = where
    space = Subspace(d, orthonormal(seed, d, k), dtype=dtype)
    path = tmp_path_factory.mktemp("space") / "memory" / "site.safetensors"
    assert space.save(path) == path
    buffer = io.BytesIO()
    torch.save(space.state_dict(), buffer)
    buffer.seek(0)
    tensors = torch.load(buffer, weights_only=True)
    for twin in (Subspace.load(path), Subspace.from_state_dict(tensors), space.clone()):
        assert torch.equal(twin.stored, space.stored)
        assert (twin.dim, twin.rank, twin.dtype, repr(twin)) == (d, k, dtype, repr(space))
        x = randn(seed, 3, d, dtype=dtype)
        assert torch.equal(twin.reject(x), space.reject(x))
        if k:
            twin.stored.zero_()
            assert space.stored.any() or space.stored.numel() == 0


def header(**changes):
    return {"format": "growthring.subspace", "format_version": "1"} | changes


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (header(format="growthring.pegp"), "not a growthring subspace"),
        (None, "not a growthring subspace"),
        (header(format_version="2"), "version '2'.*[Uu]pgrade"),
        (header(format_version="soon"), "version 'soon'"),
        ({"format": "growthring.subspace"}, "version ''"),
    ],
)
def test_another_kind_of_file_or_a_newer_one_is_refused(tmp_path, metadata, message):
    path = tmp_path / "x.safetensors"
    save_file(Subspace(3, torch.eye(3)[:, :1]).state_dict(), path, metadata=metadata)
    with pytest.raises(DataError, match=message):
        Subspace.load(path)


def test_a_torn_file_is_refused(tmp_path):
    path = Subspace(30, orthonormal(0, 30, 8)).save(tmp_path / "x.safetensors")
    whole = path.read_bytes()
    for content in (whole[:-50], whole[:10], b"", b"hello, I am a text file and no tensors at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="whole"):
            Subspace.load(path)
    with pytest.raises(FileNotFoundError):
        Subspace.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("value", [float("nan"), 5.0])
def test_a_state_that_is_no_basis_is_refused(value):
    state = Subspace(6, orthonormal(0, 6, 2)).state_dict()
    state["columns"][1, 1] = value
    with pytest.raises(DataError, match="orthonormal"):
        Subspace.from_state_dict(state)
    with pytest.raises(DataError, match="lacks shape"):
        Subspace.from_state_dict({"columns": torch.eye(3)})
    with pytest.raises(DataError, match="dimension 4"):
        Subspace.from_state_dict({"columns": torch.eye(3), "shape": torch.tensor([4, 0])})


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = Subspace(4, torch.eye(4)[:, :1]).save(tmp_path / "x.safetensors")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("growthring.subspace.basis.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        Subspace(4, torch.eye(4)[:, :2]).save(path)
    assert Subspace.load(path).rank == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
