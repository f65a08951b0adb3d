"""State of the projected optimizers: saved, loaded, copied, and continued bit for bit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from optim_helpers import (
    PAIRS,
    assert_same_state,
    parameters,
    run,
    snapshot,
    spectrum_gradients,
    states,
    tiny_net,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from growthring.optim import GORP, GaLore
from growthring.subspace import RANGE_FINDERS, Subspace

SHAPES = [(14, 9), (9, 14), (14, 9), (10, 10), (10, 3, 2, 2), (9,)]


def series_of(steps, dtype=torch.float32):
    return [
        spectrum_gradients(s, steps, seed=i, dtype=dtype) if len(s) == 2
        else [torch.randn(s, generator=torch.Generator().manual_seed(50 * i + k)).to(dtype) for k in range(steps)]
        for i, s in enumerate(SHAPES)
    ]  # fmt: skip


def through_a_file(optimizer):
    """The state dict after ``torch.save`` and a safe ``torch.load``."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(make, steps, cut, dtype=torch.float32, protect=None):
    """Weights and optimizer of an uninterrupted run, and of one that was saved after ``cut`` steps."""
    outcomes = []
    for at in (None, cut):
        params = parameters(SHAPES, dtype=dtype)
        optimizer = make(params)
        if protect is not None:
            protect(optimizer, params)
        series = series_of(steps, dtype)
        if at is None:
            run(optimizer, params, series)
        else:
            run(optimizer, params, [s[:at] for s in series])
            saved = through_a_file(optimizer)
            params = [nn.Parameter(p.detach().clone()) for p in params]
            optimizer = make(params)
            optimizer.load_state_dict(saved)
            if protect is not None:
                protect(optimizer, params)
            run(optimizer, params, [s[at:] for s in series])
        outcomes.append((params, optimizer))
    return outcomes


def assert_equal_runs(outcomes):
    (a, one), (b, two) = outcomes
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert_same_state(one, two)


@pytest.mark.parametrize("finder", RANGE_FINDERS)
@pytest.mark.parametrize("cut", [1, 4, 6, 7])
def test_invariant_11_resume_is_bitwise_at_any_step(finder, cut):
    """Refresh 3, staggered: some cuts are on a boundary of some matrices, none on one of all."""
    assert_equal_runs(resumed(lambda p: GORP(p, rank=3, refresh=3, range_finder=finder, weight_decay=0.1), 14, cut))


@pytest.mark.parametrize("finder", RANGE_FINDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_invariant_11_resume_is_bitwise_for_every_dtype(finder, dtype):
    """``Optimizer.load_state_dict`` casts state to the dtype of the weights; bases and moments must not lose bits."""
    outcomes = resumed(lambda p: GORP(p, rank=3, refresh=3, range_finder=finder), 11, 5, dtype=dtype)
    assert_equal_runs(outcomes)
    params, optimizer = outcomes[1]
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for key in ("basis", "exp_avg", "exp_avg_sq"):
        assert all(optimizer.state[p][key].dtype == wanted for p in params[:4])


@pytest.mark.parametrize(("rule", "side"), PAIRS)
def test_invariant_11_resume_is_bitwise_for_every_rule_and_side(rule, side):
    assert_equal_runs(resumed(lambda p: GORP(p, rank=3, refresh=3, rule=rule, side=side), 11, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("exact", [True, False])
def test_invariant_11_resume_is_bitwise_with_memory(exact):
    """The memory is a run-time attachment: whoever binds it binds it again."""

    def protect(optimizer, params):
        generator = torch.Generator().manual_seed(3)
        optimizer.protect(
            {p: (Subspace(p.shape[1], torch.randn(p.shape[1], 3, generator=generator)), None) for p in params[:4]},
            exact=exact,
        )

    assert_equal_runs(resumed(lambda p: GORP(p, rank=3, refresh=3, weight_decay=0.1), 11, 5, protect=protect))


def test_invariant_11_resume_of_the_galore_preset():
    assert_equal_runs(resumed(lambda p: GaLore(p, 0.01, rank=3, refresh=3, weight_decay=0.1), 11, 5))


def test_resume_would_notice_a_lost_basis():
    (a, _), (b, _) = resumed(lambda p: GORP(p, rank=3, refresh=30), 11, 5)
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = GORP(params, rank=3, refresh=30)
    series = series_of(11)
    run(optimizer, params, [s[:5] for s in series])
    optimizer.state[params[0]]["basis"] = torch.eye(9)[:, :3].clone()
    run(optimizer, params, [s[5:] for s in series])
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], params[0])


def test_state_holds_tensors_and_scalars_that_own_their_storage():
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = GORP(params, rank=3, refresh=3)
    run(optimizer, params, series_of(5))
    for key, value in states(optimizer):
        assert isinstance(value, torch.Tensor | int | float), key
        if isinstance(value, torch.Tensor):
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), key
    for group in optimizer.state_dict()["param_groups"]:
        for key, value in group.items():
            assert isinstance(value, bool | int | float | str | list | tuple | None), key


def test_state_is_no_larger_than_galores():
    """``r max(m, n) * 2 + r min(m, n)`` floats a matrix, and a handful of scalars."""
    (p,) = parameters([(64, 48)], dtype=torch.float32)
    optimizer = GORP([p], rank=8)
    run(optimizer, [p], [[torch.randn(64, 48)] * 2])
    total = sum(v.numel() for _, v in states(optimizer) if isinstance(v, torch.Tensor))
    assert total <= 8 * 64 * 2 + 8 * 48 + 8


def test_shapes_of_state_do_not_depend_on_the_data():
    """DCP makes the state of a fresh optimizer by one step with zero gradients and a learning rate of zero."""
    shapes = []
    for gradient in (torch.zeros, torch.randn):
        params = parameters(SHAPES, dtype=torch.float32)
        optimizer = GORP(params, rank=3, lr=0.0)
        run(optimizer, params, [[gradient(s)] for s in SHAPES])
        shapes.append([(k, getattr(v, "shape", None), getattr(v, "dtype", None)) for k, v in states(optimizer)])
    assert shapes[0] == shapes[1]


def test_a_step_with_zero_gradients_counts_for_nothing():
    params = parameters(SHAPES[:4], dtype=torch.float32)
    fresh = parameters(SHAPES[:4], dtype=torch.float32)
    optimizer, other = (GORP(p, rank=3, refresh=3) for p in (params, fresh))
    run(optimizer, params, [[torch.zeros(s)] for s in SHAPES[:4]])
    state = optimizer.state[params[0]]
    assert torch.equal(state["basis"], torch.eye(9)[:, :3])
    assert int(state["refreshes"]) == 0
    assert int(state["step"]) == 0
    assert torch.equal(params[0], fresh[0])
    for o, ps in ((optimizer, params), (other, fresh)):
        run(o, ps, [s[:8] for s in series_of(8)[:4]])
    assert all(torch.equal(a, b) for a, b in zip(params, fresh, strict=True))


def test_refreshes_are_counted_and_staggered():
    params = parameters([(14, 9)] * 3, dtype=torch.float32)
    optimizer = GORP(params, rank=3, refresh=5)
    seen = []
    for k in range(12):
        run(optimizer, params, [[torch.randn(14, 9)] for _ in params])
        seen.append([int(optimizer.state[p]["refreshes"]) for p in params])
        assert [int(optimizer.state[p]["step"]) for p in params] == [k + 1] * 3
    for ordinal in range(3):
        grown = [k for k in range(12) if seen[k][ordinal] > (seen[k - 1][ordinal] if k else 0)]
        assert grown == [k for k in range(12) if k == 0 or (k + ordinal) % 5 == 0]
    optimizer = GORP(params, rank=3, refresh=5, stagger=False)
    run(optimizer, params, [[torch.randn(14, 9)] * 6 for _ in params])
    assert [int(optimizer.state[p]["refreshes"]) for p in params] == [2, 2, 2]


# --- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("kind", [GORP, GaLore])
def test_an_optimizer_can_be_copied(how, kind):
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = kind(params, 0.01, rank=3, refresh=3)
    series = series_of(9)
    run(optimizer, params, [s[:4] for s in series])
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert type(twin) is kind
    copies = [p for g in twin.param_groups for p in g["params"]]
    assert not any(a is b for a, b in zip(params, copies, strict=True))
    run(optimizer, params, [s[4:] for s in series])
    run(twin, copies, [s[4:] for s in series])
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    assert_same_state(optimizer, twin)


def test_a_state_of_an_older_version_without_newer_keys_is_taken():
    """``__setstate__`` fills options in that a saved group does not know, with their defaults."""
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = GORP(params, rank=3, refresh=3)
    series = series_of(9)
    run(optimizer, params, [s[:4] for s in series])
    saved = through_a_file(optimizer)
    for group in saved["param_groups"]:
        for key in ("stagger", "rotate", "rule", "range_finder", "side", "scale"):
            group.pop(key, None)
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    other = GORP(fresh, rank=3, refresh=3)
    other.load_state_dict(saved)
    run(optimizer, params, [s[4:] for s in series])
    run(other, fresh, [s[4:] for s in series])
    assert all(torch.equal(a, b) for a, b in zip(params, fresh, strict=True))
    old = copy.deepcopy(optimizer)
    state = old.__getstate__()
    state = {**state, "param_groups": [{k: v for k, v in g.items() if k != "stagger"} for g in state["param_groups"]]}
    old.__setstate__(state)
    assert old.param_groups[0]["stagger"] is True


@pytest.mark.parametrize("how", ["load_state_dict", "__setstate__"])
def test_a_state_of_an_older_version_without_newer_counters_is_taken(how):
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = GORP(params, rank=3, refresh=3)
    series = series_of(9)
    run(optimizer, params, [s[:4] for s in series])
    other = copy.deepcopy(optimizer)
    fresh = [p for g in other.param_groups for p in g["params"]]
    if how == "load_state_dict":
        saved = through_a_file(optimizer)
        for entry in saved["state"].values():
            entry.pop("share", None)
            entry.pop("skipped", None)
        other = GORP(fresh, rank=3, refresh=3)
        other.load_state_dict(saved)
    else:
        state = other.__getstate__()
        for entry in state["state"].values():
            entry.pop("share", None)
            entry.pop("skipped", None)
        other.__setstate__(state)
    assert set(other.state[fresh[0]]) == set(optimizer.state[params[0]])
    run(optimizer, params, [s[4:] for s in series])
    run(other, fresh, [s[4:] for s in series])
    assert all(torch.equal(a, b) for a, b in zip(params, fresh, strict=True))


def test_an_empty_state_is_taken():
    """accelerate loads a fresh optimizer's own state dict as soon as it wraps it."""
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = GORP(params, rank=3)
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, series_of(2))
    assert int(optimizer.state[params[0]]["step"]) == 2


def test_options_travel_with_the_state():
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = GORP(params, rank=3, refresh=7, rule="shared")
    other = GORP(parameters(SHAPES, dtype=torch.float32), rank=3)
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["refresh"], other.param_groups[0]["rule"]) == (7, "shared")


def test_the_seed_travels_with_the_state():
    """What drives the randomised start belongs to the run that is resumed."""
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = GORP(params, rank=3, refresh=2, range_finder="randomized", seed=5)
    series = series_of(9)
    run(optimizer, params, [s[:4] for s in series])
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    other = GORP(fresh, rank=3, refresh=2, range_finder="randomized")
    other.load_state_dict(through_a_file(optimizer))
    run(optimizer, params, [s[4:] for s in series])
    run(other, fresh, [s[4:] for s in series])
    assert all(torch.equal(a, b) for a, b in zip(params, fresh, strict=True))


def test_an_optimizer_with_an_observer_can_be_copied_and_the_copy_has_none():
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = GORP(params, rank=3)
    seen = []
    optimizer.observe(lambda p, *_: seen.append(p))
    optimizer.protect({params[0]: (Subspace(9, torch.eye(9)[:, :2]), None)})
    twin = pickle.loads(pickle.dumps(optimizer))
    copies = [p for g in twin.param_groups for p in g["params"]]
    run(twin, copies, series_of(2))
    assert not seen
    run(optimizer, params, series_of(2))
    assert seen


def test_names_travel_with_the_state():
    model = tiny_net()
    optimizer = GORP(model.named_parameters(), lr=0.02, rank=3, refresh=3)
    train(model, optimizer, 4)
    saved = through_a_file(optimizer)
    assert saved["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]
    fresh = tiny_net()
    fresh.load_state_dict(model.state_dict())
    other = GORP(fresh.named_parameters(), lr=0.02, rank=3, refresh=3)
    other.load_state_dict(saved)
    train(model, optimizer, 4, start=4)
    train(fresh, other, 4, start=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_state_of_other_groups_is_refused():
    params = parameters(SHAPES, dtype=torch.float32)
    saved = GORP(params, rank=3).state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        GORP(parameters(SHAPES[:2]), rank=3).load_state_dict(saved)


# --- torch.distributed.checkpoint, in one process -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dcp_round_trip_into_a_fresh_optimizer(dtype):
    """``set_optimizer_state_dict`` steps a fresh optimizer with zero gradients and lr 0 before it fills it."""

    def make():
        model = tiny_net(dtype=dtype)
        return model, GORP(model.parameters(), lr=0.02, rank=3, refresh=3)

    straight, whole = make()
    train(straight, whole, 9)
    model, optimizer = make()
    train(model, optimizer, 4)
    saved = get_optimizer_state_dict(model, optimizer)
    assert any(k.endswith("weight") for k in saved["state"])
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    fresh, loaded = make()
    fresh.load_state_dict(model.state_dict())
    set_optimizer_state_dict(fresh, loaded, torch.load(buffer, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    assert_same_state(optimizer, loaded)
    train(fresh, loaded, 5, start=4)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), straight.parameters(), strict=True))
    assert_same_state(whole, loaded)


def test_dcp_state_of_an_optimizer_that_never_stepped():
    """It makes a state by a step that must not count. (For AdamW it does count, in torch too: only matrices here.)"""

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 5, bias=False))
        return model, GORP(model.parameters(), lr=0.02, rank=3, weight_decay=0.1)

    model, optimizer = make()
    before = snapshot(model.parameters())
    saved = get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert saved["state"]
    twin, other = make()
    assert train(model, optimizer, 5) == train(twin, other, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
