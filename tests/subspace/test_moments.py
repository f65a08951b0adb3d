"""``SecondMoment`` against the dense ``X^T X`` of all rows, in every form."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growthring.errors import ConfigError, DataError, NumericalError
from growthring.subspace import SecondMoment, Subspace

from . import reference
from .strategies import PROPERTY, dims, low_rank, orthonormal, randn, scales, seeds, with_spectrum

FORMS = ["gram", "root", "sketch"]
EXACT = ["gram", "root"]
forms = st.sampled_from(FORMS)


@st.composite
def streams(draw):
    """``(seed, d, batch sizes, dtype, scale)``."""
    sizes = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    scale = draw(scales) if dtype != torch.float16 else draw(st.sampled_from([1e-2, 1.0, 1e3]))
    return draw(seeds), draw(dims), sizes, dtype, scale


def batches(seed, d, sizes, dtype, scale):
    return [(randn(seed + i, n, d) * scale).to(dtype) for i, n in enumerate(sizes)]


@PROPERTY
@given(streams(), st.sampled_from(EXACT))
def test_equals_the_dense_moment_for_every_dtype_and_scale(stream, form):
    """Half-precision features lose nothing beyond their own rounding: products and sums are float64."""
    rows = batches(*stream)
    moment = SecondMoment(stream[1], form=form)
    for batch in rows:
        assert moment.update(batch) is moment
    expected = reference.moment(torch.cat(rows))
    close = {"rtol": 1e-12, "atol": 1e-13 * float(expected.trace())}
    torch.testing.assert_close(moment.matrix(), expected, **close)
    torch.testing.assert_close(moment.factor().T @ moment.factor(), expected, **close)
    assert moment.count == sum(stream[2])
    assert moment.trace == pytest.approx(float(expected.trace()), rel=1e-12)
    assert moment.shrinkage == 0.0
    values, vectors = moment.residual_spectrum()
    torch.testing.assert_close((vectors * values) @ vectors.T, expected, rtol=1e-9, atol=1e-12 * moment.trace)
    assert bool((values >= 0).all())
    assert bool((values.diff() <= 0).all())


def test_control_a_gram_matrix_of_bfloat16_would_be_wrong():
    rows = randn(0, 500, 8).to(torch.bfloat16)
    expected = reference.moment(rows)
    assert float(((rows.T @ rows).double() - expected).norm() / expected.norm()) > 1e-4
    assert float((SecondMoment(8).update(rows).matrix() - expected).norm() / expected.norm()) < 1e-14


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("products", [torch.float64, torch.float32])
def test_autocast_does_not_reach_the_products(form, products):
    rows = randn(0, 50, 16, dtype=torch.float32)
    plain = SecondMoment(16, form=form, rows=4, products=products).update(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = SecondMoment(16, form=form, rows=4, products=products).update(rows)
        assert torch.equal(cast.matrix(), plain.matrix())


def test_never_centred():
    constant = torch.full((10, 3), 2.0)
    torch.testing.assert_close(SecondMoment(3).update(constant).matrix(), torch.full((3, 3), 40.0).double())


@pytest.mark.parametrize("form", EXACT)
def test_any_leading_shape(form):
    rows = randn(0, 24, 5)
    expected = SecondMoment(5, form=form).update(rows)
    for shape in ((24, 5), (2, 12, 5), (2, 3, 4, 5), (1, 24, 1, 5)):
        found = SecondMoment(5, form=form).update(rows.reshape(shape))
        assert torch.equal(found.matrix(), expected.matrix())
    single = SecondMoment(5, form=form).update(rows[0])
    torch.testing.assert_close(single.matrix(), torch.outer(rows[0], rows[0]))
    assert single.count == 1


# --- masks ----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(seeds, st.integers(1, 6), st.integers(1, 9), st.sampled_from([torch.bool, torch.long, torch.float32]), forms)
def test_masked_rows_are_as_if_they_had_never_been(seed, batch, length, dtype, form):
    features = randn(seed, batch, length, 4)
    keep = randn(seed + 1, batch, length) > 0
    features[~keep] = float("nan")  # padding may hold anything
    expected = SecondMoment(4, form=form).update(features[keep])
    for shape in ((batch, length), (batch * length,), (batch, 1, length), (1, batch, length, 1)):
        found = SecondMoment(4, form=form).update(features, keep.reshape(shape).to(dtype))
        assert found.count == int(keep.sum())
        torch.testing.assert_close(found.matrix(), expected.matrix())
    flat = SecondMoment(4, form=form).update(features.reshape(-1, 4), keep)
    torch.testing.assert_close(flat.matrix(), expected.matrix())


def test_a_mask_of_patches_may_be_flatter_than_the_features():
    features, keep = randn(0, 2, 3, 4, 5), randn(1, 2, 12) > 0
    expected = reference.moment(features.reshape(2, 12, 5)[keep])
    torch.testing.assert_close(SecondMoment(5).update(features, keep).matrix(), expected)


@pytest.mark.parametrize("shape", [(3, 2), (6, 2), (2,), (2, 3, 5), (0,)])
def test_a_mask_that_does_not_fit_or_is_transposed_is_refused(shape):
    """``(T, B)`` has as many elements as ``(B, T)`` and would mask the wrong rows."""
    with pytest.raises(DataError, match="does not fit"):
        SecondMoment(5).update(torch.ones(2, 3, 5), torch.ones(shape))


def test_an_additive_mask_is_refused_instead_of_inverted():
    mask = torch.tensor([[0.0, 0.0, torch.finfo(torch.float32).min]])
    with pytest.raises(DataError, match="additive"):
        SecondMoment(5).update(torch.ones(1, 3, 5), mask)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_kept_or_no_rows_adds_nothing(form):
    moment = SecondMoment(3, form=form)
    moment.update(torch.ones(2, 3), torch.zeros(2)).update(torch.zeros(0, 3)).update(torch.zeros(4, 0, 3))
    assert (moment.count, moment.trace, moment.top()) == (0, 0.0, 0.0)
    assert not moment.matrix().any()


# --- health ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_trap_2_a_non_finite_batch_is_refused_and_nothing_is_added(form, value):
    moment = SecondMoment(3, form=form).update(randn(0, 5, 3))
    before = moment.matrix().clone()
    bad = torch.ones(4, 3)
    bad[2, 1] = value
    with pytest.raises(NumericalError, match="NaN or infinity"):
        moment.update(bad)
    assert (moment.count, torch.equal(moment.matrix(), before)) == (5, True)
    moment.update(bad, torch.tensor([1, 1, 0, 1]))
    assert moment.count == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_features_do_not_overflow(dtype):
    rows = torch.full((64, 4), 6e4, dtype=dtype)
    assert SecondMoment(4).update(rows).trace == pytest.approx(float(rows.double().square().sum()))


@pytest.mark.parametrize(
    "arguments", [{"dim": 0}, {"dim": 3, "rows": 0}, {"dim": 3, "form": "dense"}, {"dim": 3, "products": torch.half}]
)
def test_bad_settings(arguments):
    with pytest.raises(ConfigError, match="SecondMoment"):
        SecondMoment(**arguments)


@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (3, 2)])
def test_features_of_another_dimension_are_refused(shape):
    with pytest.raises(DataError, match="dimension 3"):
        SecondMoment(3).update(torch.ones(shape))


def test_default_form_follows_the_limit():
    assert SecondMoment(64, limit=64).form == "gram"
    assert SecondMoment(65, limit=64).form == "sketch"


# --- merging and order ----------------------------------------------------------------------------------------------


@PROPERTY
@given(streams(), st.sampled_from(EXACT), st.randoms(use_true_random=False))
def test_merge_in_any_order_equals_one_pass(stream, form, random):
    rows = batches(*stream)
    whole = SecondMoment(stream[1], form=form).update(torch.cat(rows))
    parts = [SecondMoment(stream[1], form=form).update(batch) for batch in rows]
    copies = [part.matrix().clone() for part in parts]
    random.shuffle(order := list(range(len(parts))))
    merged = SecondMoment(stream[1], form=form)
    for index in order:
        assert merged.merge(parts[index]) is merged
    close = {"rtol": 1e-11, "atol": 1e-13 * whole.trace}
    torch.testing.assert_close(merged.matrix(), whole.matrix(), **close)
    assert merged.count == whole.count
    assert merged.trace == pytest.approx(whole.trace, rel=1e-12)
    for part, copy in zip(parts, copies, strict=True):  # the sources stay as they were, also when merged grows on
        merged.update(torch.ones(1, stream[1]))
        torch.testing.assert_close(part.matrix(), copy, **close)


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("n", [2, 7, 40])
def test_merging_with_itself_doubles(form, n):
    moment = SecondMoment(5, form=form).update(randn(0, n, 5))
    expected = 2 * moment.matrix().clone()
    moment.merge(moment)
    torch.testing.assert_close(moment.matrix(), expected)
    assert moment.count == 2 * n


def test_merge_refuses_what_is_not_alike():
    for other in (SecondMoment(4), SecondMoment(3, form="root"), SecondMoment(3, products=torch.float32)):
        with pytest.raises(ConfigError, match="make both alike"):
            SecondMoment(3).merge(other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trap_3_the_batch_is_neither_pinned_nor_followed(form, dtype):
    """A caller that reuses its buffer must not change what was already counted."""
    buffer = randn(0, 500, 6, dtype=dtype)
    moment = SecondMoment(6, form=form, rows=3).update(buffer[:2])
    expected = moment.matrix().clone()
    assert all(block.untyped_storage().nbytes() <= 8 * block.numel() for block in moment._rows)
    buffer.zero_()
    torch.testing.assert_close(moment.matrix(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_the_number_of_samples(form):
    moment = SecondMoment(32, form=form, rows=8)
    for step in range(40):
        moment.update(randn(step, 17, 32))
        held = sum(block.untyped_storage().nbytes() for block in moment._rows)
        assert held <= 8 * 32 * {"gram": 0, "root": 3 * 32, "sketch": 3 * 8}[form]
    assert moment.count == 680


# --- the root sees what a Gram matrix cannot ------------------------------------------------------------------------


def test_root_resolves_directions_that_squaring_loses():
    rows = with_spectrum(0, 30, 10, [1.0, 1e-3, 1e-11])
    space = {form: Subspace(10, dtype=torch.float64) for form in EXACT}
    for form, grown in space.items():
        grown.grow(SecondMoment(10, form=form).update(rows), energy=1.0)
    assert {form: grown.rank for form, grown in space.items()} == {"gram": 2, "root": 3}


def test_float32_products_are_close_and_their_noise_is_not_taken_for_a_direction():
    rows = low_rank(0, 400, 24, 6)
    moment = SecondMoment(24, products=torch.float32).update(rows)
    exact = reference.moment(rows)
    assert 0 < float((moment.matrix() - exact).norm() / exact.norm()) < 1e-5
    space = Subspace(24)
    assert space.grow(moment, energy=1.0).added == 6


# --- sketch ---------------------------------------------------------------------------------------------------------


@PROPERTY
@given(seeds, dims, st.integers(1, 90), st.integers(1, 12), st.integers(1, 40), st.integers(1, 30))
def test_frequent_directions_bound(seed, d, n, size, rank, batch):
    """``0 <= C - F^T F <= shrinkage I`` and ``shrinkage <= ||X||_F^2 / l``."""
    rows = low_rank(seed, n, d, rank)
    sketch = SecondMoment(d, form="sketch", rows=size)
    for part in rows.split(batch):
        sketch.update(part)
    factor, energy = sketch.factor(), float(rows.square().sum())
    assert factor.shape[0] <= max(sketch.sketch_rows, 1)
    gap = torch.linalg.eigvalsh(reference.moment(rows) - factor.T @ factor)
    assert float(gap[0]) >= -1e-12 * energy
    assert float(gap[-1]) <= sketch.shrinkage + 1e-12 * energy
    assert sketch.shrinkage <= energy / sketch.sketch_rows
    # the heart of the proof: each unit of shrinkage takes at least l units of energy out of the sketch
    assert energy - float(factor.square().sum()) >= sketch.sketch_rows * sketch.shrinkage - 1e-12 * energy
    assert sketch.trace == pytest.approx(energy, rel=1e-12)
    if min(rank, n, d) <= sketch.sketch_rows:  # it fits: nothing is lost
        assert sketch.shrinkage <= 1e-12 * energy


def test_frequent_directions_are_no_worse_than_the_row_by_row_original():
    rows = with_spectrum(0, 200, 40, 0.8 ** torch.arange(40.0))
    sketch = SecondMoment(40, form="sketch", rows=8).update(rows)
    plain, lost = reference.frequent_directions(rows, 8)
    exact = reference.moment(rows)

    def error(factor):
        return float(torch.linalg.matrix_norm(exact - factor.T @ factor, 2))

    assert error(sketch.factor()) <= 1.05 * error(plain)
    assert 0 < sketch.shrinkage <= lost
    # the control: keeping the top rows of the first batch only breaks the bound
    assert error(rows[:8]) > 2 * error(sketch.factor())


@PROPERTY
@given(seeds, st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_frequent_directions_bound_survives_merging(seed, sizes):
    rows = [low_rank(seed + i, n, 20, 15, 1.5**i) for i, n in enumerate(sizes)]
    merged = SecondMoment(20, form="sketch", rows=6)
    for part in rows:
        merged.merge(SecondMoment(20, form="sketch", rows=6).update(part))
    energy = float(torch.cat(rows).square().sum())
    gap = torch.linalg.eigvalsh(reference.moment(torch.cat(rows)) - merged.matrix())
    assert float(gap[0]) >= -1e-12 * energy
    assert float(gap[-1]) <= merged.shrinkage + 1e-12 * energy
    assert merged.shrinkage <= energy / 6


# --- reading and storing --------------------------------------------------------------------------------------------


@PROPERTY
@given(seeds, dims, st.integers(1, 40), forms)
def test_top_is_a_scale_of_the_largest_eigenvalue_from_below(seed, d, n, form):
    moment = SecondMoment(d, form=form).update(low_rank(seed, n, d, d))
    largest = float(torch.linalg.eigvalsh(moment.matrix())[-1])
    assert 0.5 * largest <= moment.top() <= largest * (1 + 1e-9)


@pytest.mark.parametrize("form", EXACT)
def test_top_is_not_caught_by_an_invariant_coordinate_axis(form):
    """The largest diagonal element may lie outside the largest eigenvector, which may have both signs."""
    rows = torch.zeros(2, 101, dtype=torch.float64)
    rows[0, 0] = 1.005
    rows[1, 1:] = 0.1**0.5 * torch.tensor([1.0, -1.0]).repeat(50)
    assert SecondMoment(101, form=form).update(rows).top() == pytest.approx(10.0, rel=0.01)


@PROPERTY
@given(seeds, st.integers(1, 30), st.integers(0, 30), st.integers(0, 70), st.sampled_from(EXACT))
def test_residual_spectrum_equals_the_dense_one(seed, d, k, n, form):
    k = min(k, d)
    basis = orthonormal(seed, d, k)
    rows = randn(seed + 1, n, d)
    moment = SecondMoment(d, form=form).update(rows)
    values, vectors = moment.residual_spectrum(Subspace(d, basis, dtype=torch.float64))
    assert vectors.shape == (d, values.shape[0])
    expected = reference.reject(torch.eye(d), basis) @ reference.moment(rows) @ reference.reject(torch.eye(d), basis)
    close = {"rtol": 1e-9, "atol": 1e-10 * (1 + moment.trace)}
    torch.testing.assert_close((vectors * values) @ vectors.T, expected, **close)
    assert bool((values >= 0).all())


@PROPERTY
@given(streams(), forms, st.sampled_from([torch.float64, torch.float32]), st.integers(1, 9))
def test_state_round_trip_goes_on_bit_for_bit_and_taking_it_changes_nothing(stream, form, products, size):
    """A checkpoint in the middle of a collection leaves no trace, in the copy or in the original."""
    rows = batches(*stream)
    middle = len(rows) // 2
    moments = [SecondMoment(stream[1], form=form, rows=size, products=products) for _ in range(2)]
    for batch in rows[:middle]:
        for moment in moments:
            moment.update(batch)
    buffer = io.BytesIO()
    torch.save(moments[0].state_dict(), buffer)
    buffer.seek(0)
    moments.append(SecondMoment.from_state_dict(torch.load(buffer, weights_only=True)))
    for batch in rows[middle:]:
        for moment in moments:
            moment.update(batch)
    saved, never_saved, loaded = moments
    for other in (saved, loaded):
        assert torch.equal(other.matrix(), never_saved.matrix())
        assert (other.count, other.trace, other.shrinkage) == (
            never_saved.count,
            never_saved.trace,
            never_saved.shrinkage,
        )
        assert (other.form, other.products, repr(other)) == (form, products, repr(never_saved))
