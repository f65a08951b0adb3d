"""The diagonal moment: sums of squares, axes for directions, and nothing but axes in what grows from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growthring.errors import ConfigError, DataError, NumericalError
from growthring.subspace import SecondMoment, Subspace

from .strategies import PROPERTY, dims, randn, scales, seeds

streams = st.tuples(seeds, dims, st.lists(st.integers(0, 30), min_size=1, max_size=4), scales)
energies = st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0])


def rows_of(stream):
    """Batches of rows, some features never there."""
    seed, d, sizes, scale = stream
    there = torch.rand(d, generator=torch.Generator().manual_seed(seed)) < 0.7
    strength = 10.0 ** (3 * torch.rand(d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64))
    return [randn(seed + i, n, d) * there * strength * scale for i, n in enumerate(sizes)]


def diagonal(batches, d):
    moment = SecondMoment(d, form="diagonal")
    for batch in batches:
        moment.update(batch)
    return moment


@PROPERTY
@given(streams)
def test_it_is_the_diagonal_of_the_dense_moment(stream):
    batches = rows_of(stream)
    moment, x = diagonal(batches, stream[1]), torch.cat(batches)
    expected = (x**2).sum(0)
    torch.testing.assert_close(moment.matrix(), torch.diag(expected), rtol=1e-12, atol=0)
    torch.testing.assert_close(moment.factor().T @ moment.factor(), torch.diag(expected), rtol=1e-12, atol=0)
    assert moment.count == len(x)
    assert moment.trace == pytest.approx(float(expected.sum()), rel=1e-12)
    assert moment.top() == pytest.approx(float(expected.max()), rel=1e-12)
    assert moment.shrinkage == 0.0
    values, vectors = moment.residual_spectrum()
    torch.testing.assert_close(values, expected.sort(descending=True).values, rtol=1e-12, atol=0)
    torch.testing.assert_close((vectors * values) @ vectors.T, torch.diag(expected), rtol=1e-12, atol=0)


@PROPERTY
@given(streams, energies)
def test_what_grows_from_it_are_the_strongest_axes(stream, energy):
    batches = rows_of(stream)
    moment = diagonal(batches, stream[1])
    if moment.trace == 0.0:
        return
    space = Subspace(stream[1], dtype=torch.float64)
    growth = space.grow(moment, energy=energy)
    strength = (torch.cat(batches) ** 2).sum(0)
    projector = space.basis() @ space.basis().T
    assert set(projector.unique().tolist()) <= {0.0, 1.0}  # whole axes, exactly
    chosen = projector.diagonal().bool()
    total, kept = float(strength.sum()), float(strength[chosen].sum())
    assert kept >= energy * total * (1 - 1e-12)
    assert growth.energy == pytest.approx(kept / total, rel=1e-9)
    if energy < 1.0:
        # the smallest number of them: without the weakest one it would be too little
        assert kept - float(strength[chosen].min()) < energy * total
        assert not bool((~chosen).any()) or float(strength[chosen].min()) >= float(strength[~chosen].max())
    else:
        noise = stream[1] * torch.finfo(torch.float64).eps * 4 * float(strength.max()) * max(1, moment.count)
        assert bool(chosen[strength > noise].all())
        assert not bool(chosen[strength == 0].any())
    change = randn(stream[0] + 7, 3, stream[1])
    rest = space.reject(change)
    assert bool((rest[:, chosen] == 0).all())
    assert torch.equal(rest[:, ~chosen], change[:, ~chosen])  # what is free is not touched by a bit


def test_energy_by_hand():
    """Specs, invariant 9: sigma (3, 2, 1); the shares are those of squares, not of fourth powers."""
    rows = torch.diag(torch.tensor([2.0, 3.0, 1.0]))
    for energy, rank in ((0.60, 1), (0.64, 1), (0.65, 2), (0.80, 2), (0.92, 2), (0.93, 3), (1.0, 3)):
        space = Subspace(3)
        space.grow(diagonal([rows], 3), energy=energy)
        assert space.rank == rank
    space = Subspace(3)
    space.grow(diagonal([rows], 3), energy=0.6)
    assert space.basis().abs().flatten().tolist() == [0.0, 1.0, 0.0]


@PROPERTY
@given(seeds, st.integers(2, 30))
def test_later_tasks_only_add_axes(seed, d):
    space, chosen = Subspace(d, dtype=torch.float64), torch.zeros(d, dtype=torch.bool)
    for task in range(5):
        there = torch.rand(d, generator=torch.Generator().manual_seed(seed + 50 * task)) < 0.3
        there[task % d] = True
        moment = diagonal([randn(seed + task, 4, d) * there], d)
        growth = space.grow(moment, energy=1.0)
        assert growth.added == int((there & ~chosen).sum())
        chosen |= there
        assert torch.equal((space.basis() @ space.basis().T).diagonal() == 1, chosen)
        assert growth.energy == pytest.approx(1.0)
        assert space.free == int((~chosen).sum())
    values, vectors = moment.residual_spectrum(space)
    assert values.shape == (space.free,)
    assert vectors.shape == (d, space.free)
    assert float(values.sum()) == 0.0


def test_correlated_features_stay_apart():
    """What the form is for: two features that always come together are two axes, and one direction of a gram."""
    rows = torch.tensor([[1.0, 1.0, 0.0]]).repeat(5, 1)
    ranks = []
    for form in ("diagonal", "gram"):
        space = Subspace(3)
        space.grow(SecondMoment(3, form=form).update(rows), energy=1.0)
        ranks.append(space.rank)
    assert ranks == [2, 1]


def test_a_weak_axis_is_seen_down_to_rounding_noise():
    """Relative to the strongest: a millionth where the space is float32, far less where it is float64."""
    rows = torch.tensor([[1e6, 1.0, 1e-1, 0.0]])
    for dtype, rank in ((torch.float32, 2), (torch.float64, 3)):
        space = Subspace(4, dtype=dtype)
        space.grow(diagonal([rows], 4), energy=1.0)
        assert space.rank == rank


@PROPERTY
@given(streams)
def test_order_batching_merging_and_storage_do_not_matter(stream):
    batches, d = rows_of(stream), stream[1]
    whole = diagonal([torch.cat(batches)], d)
    merged = SecondMoment(d, form="diagonal")
    for batch in reversed(batches):
        merged.merge(diagonal([batch], d))
    for other in (diagonal(batches, d), merged, diagonal([b.flip(0) for b in batches], d)):
        torch.testing.assert_close(other.matrix(), whole.matrix(), rtol=1e-12, atol=0)
        assert other.count == whole.count
    again = SecondMoment.from_state_dict(whole.state_dict())
    assert again.form == "diagonal"
    extra = randn(3, 2, d)
    for moment in (whole, again):
        moment.update(extra)
    assert torch.equal(whole.matrix(), again.matrix())
    assert whole.trace == again.trace


def test_masks_leading_dimensions_and_dtypes():
    x = randn(0, 2, 3, 4).to(torch.bfloat16)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    moment = SecondMoment(4, form="diagonal").update(x, mask)
    expected = (x[mask.bool()].double() ** 2).sum(0)
    torch.testing.assert_close(moment.matrix().diagonal(), expected, rtol=1e-12, atol=0)
    assert moment.count == 3


def test_a_copy_is_kept():
    x = randn(0, 3, 4)
    moment = diagonal([x], 4)
    before = moment.matrix().clone()
    state = moment.state_dict()
    x.mul_(2)
    moment.update(x)
    assert torch.equal(SecondMoment.from_state_dict(state).matrix(), before)


def test_nothing_seen_and_zeros():
    moment = SecondMoment(3, form="diagonal")
    assert moment.top() == 0.0
    assert float(moment.matrix().sum()) == 0.0
    assert moment.factor().shape == (3, 3)
    with pytest.raises(DataError, match="no rows"):
        Subspace(3).grow(moment, energy=1.0)
    with pytest.raises(NumericalError, match="zero"):
        Subspace(3).grow(moment.update(torch.zeros(2, 3)), energy=1.0)


def test_bad_rows_and_other_forms_are_refused():
    moment = diagonal([randn(0, 3, 4)], 4)
    before = moment.matrix().clone()
    with pytest.raises(NumericalError, match="NaN or infinity"):
        moment.update(torch.tensor([[1.0, torch.nan, 0.0, 0.0]]))
    with pytest.raises(DataError, match="dimension 4"):
        moment.update(randn(0, 3, 5))
    with pytest.raises(ConfigError, match="cannot merge"):
        moment.merge(SecondMoment(4))
    assert torch.equal(moment.matrix(), before)
    with pytest.raises(ConfigError, match="'diagonal'"):
        SecondMoment(4, form="diag")


def test_wide_features_take_memory_of_their_width():
    moment = diagonal([torch.ones(2, 50_000)], 50_000)
    assert sum(t.numel() for t in moment.state_dict().values()) < 50_010
