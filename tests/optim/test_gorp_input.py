"""What people feed an optimizer by accident: gradients, options, parameters that come and go."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from optim_helpers import SIDES, gradients, matrix, run, tiny_net, train
from torch import nn

from growthring.errors import ConfigError
from growthring.optim import GORP, GaLore, ParameterPlan
from growthring.subspace import RANGE_FINDERS

# --- gradients that cannot be used -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("finder", RANGE_FINDERS)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("due", [True, False])
def test_invariant_15_an_unusable_gradient_skips_its_matrix(side, finder, value, due):
    """Weights, moments, basis and step count of that matrix stay; the other one learns on."""
    bad, good = matrix(), matrix(seed=1)
    optimizer = GORP(
        [bad, good], lr=0.1, rank=3, refresh=1 if due else 100, side=side, range_finder=finder, weight_decay=0.1
    )
    run(optimizer, [bad, good], [gradients((12, 8), 2), gradients((12, 8), 2, seed=1)])
    kept = {k: v.clone() for k, v in optimizer.state[bad].items()}
    before, other = bad.detach().clone(), good.detach().clone()
    broken = torch.full((12, 8), value)
    if value != 0.0:
        broken[1:] = 1.0
    with pytest.warns(UserWarning, match="skipped") as caught:
        run(optimizer, [bad, good], [[broken], gradients((12, 8), 1, seed=2)])
    assert len(caught) == 1
    assert torch.equal(bad, before)
    assert not torch.equal(good, other)
    state = optimizer.state[bad]
    for key, old in kept.items():
        assert torch.equal(state[key], old + (1 if key == "skipped" else 0)), key
    with warnings.catch_warnings():  # once an optimizer is enough
        warnings.simplefilter("error")
        run(optimizer, [bad, good], [[broken], [broken]])
    assert int(state["skipped"]) == 2
    run(optimizer, [bad, good], [gradients((12, 8), 1), gradients((12, 8), 1)])
    assert not torch.equal(bad, before)
    assert torch.isfinite(bad).all()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_unusable_first_gradient_leaves_the_basis_to_be_found(value):
    p = matrix()
    optimizer = GORP([p], lr=0.1, rank=3)
    before = p.detach().clone()
    warns = contextlib.nullcontext() if value == 0.0 else pytest.warns(UserWarning, match="skipped")
    with warns:  # zero from the start, as LoRA's A has it, is no fault
        run(optimizer, [p], [[torch.full((12, 8), value)]])
    assert torch.equal(p, before)
    assert int(optimizer.state[p]["skipped"]) == 1
    assert int(optimizer.state[p]["refreshes"]) == 0
    twin = matrix()
    other = GORP([twin], lr=0.1, rank=3)
    series = gradients((12, 8), 12)
    run(optimizer, [p], [series])
    run(other, [twin], [series])
    assert torch.equal(p, twin)


def test_one_bad_entry_outside_the_basis_is_seen():
    """NaN times a zero of the basis is NaN: whatever the basis, one bad entry is seen, and the step is skipped."""
    p = matrix()
    optimizer = GORP([p], lr=0.1, rank=3, refresh=100)
    run(optimizer, [p], [gradients((12, 8), 1)])
    optimizer.state[p]["basis"].copy_(torch.eye(8)[:, :3])
    broken = gradients((12, 8), 1, seed=2)[0]
    broken[4, 7] = float("nan")
    before = p.detach().clone()
    with pytest.warns(UserWarning, match="skipped"):
        run(optimizer, [p], [[broken]])
    assert torch.equal(p, before)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e25])
@pytest.mark.parametrize("finder", RANGE_FINDERS)
@pytest.mark.parametrize("side", SIDES)
def test_finite_gradients_of_any_size_are_taken(size, finder, side):
    """Squares of these leave the range of float32; the gradients themselves do not."""
    p = matrix()
    optimizer = GORP([p], lr=0.1, rank=3, refresh=2, range_finder=finder, side=side, rule="momentum")
    run(optimizer, [p], [[g * size for g in gradients((12, 8), 5)]])
    state = optimizer.state[p]
    assert int(state["step"]) == 5
    assert int(state["skipped"]) == 0
    for key in ("basis", "basis_out"):
        if key in state:
            assert (state[key].mT @ state[key] - torch.eye(3)).abs().max() < 1e-5
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("finder", RANGE_FINDERS)
def test_a_gradient_orthogonal_to_the_basis_is_not_lost_for_ever(finder):
    """A basis that sees nothing of the gradient must be found again at the next refresh, warm or not."""
    p = nn.Parameter(torch.zeros(12, 8))
    optimizer = GORP([p], lr=0.1, rank=2, refresh=3, side="right", range_finder=finder)
    eye = torch.eye(8)
    one, two = torch.randn(12, 2) @ eye[:2], torch.randn(12, 2) @ eye[4:6]
    run(optimizer, [p], [[one] * 4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # coordinates of zero until the refresh
        run(optimizer, [p], [[two] * 9])
    basis = optimizer.state[p]["basis"]
    assert (basis.mT @ eye[:, 4:6]).norm() ** 2 > 1.9


def test_a_warm_start_that_lost_its_gradient_starts_again():
    """New strong directions orthogonal to the basis, weak old ones going on: one iteration would stay with those."""
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(16)
    old = torch.randn(20, 2, generator=generator) @ eye[:2]
    new = old + 10 * torch.randn(20, 2, generator=generator) @ eye[4:6]
    p = nn.Parameter(torch.zeros(20, 16))
    optimizer = GORP([p], lr=0.1, rank=2, refresh=3)
    run(optimizer, [p], [[old] * 4])
    refreshes = int(optimizer.state[p]["refreshes"])
    run(optimizer, [p], [[new] * 3])
    assert int(optimizer.state[p]["refreshes"]) == refreshes + 1
    basis = optimizer.state[p]["basis"]
    assert (new @ basis).norm() ** 2 > 0.98 * new.norm() ** 2


def test_nonfinite_gradients_of_plain_parameters_go_through_as_in_adamw():
    """A choice: plain parameters are AdamW's, bit for bit, with what it does to NaN."""
    p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    ours, theirs = GORP([p], lr=0.1), torch.optim.AdamW([q], lr=0.1, weight_decay=0.0)
    for optimizer, parameter in ((ours, p), (theirs, q)):
        run(optimizer, [parameter], [[torch.tensor([1.0, float("nan"), 0.0, 2.0])]])
    assert torch.equal(p.isnan(), q.isnan())


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"lr": -0.1}, r"lr=-0\.1.*at least 0"),
    ({"lr": float("nan")}, "lr=nan"),
    ({"lr": "fast"}, "lr='fast'"),
    ({"rank": 0}, "rank=0.*at least 1"),
    ({"rank": -2}, "rank=-2"),
    ({"rank": 2.5}, r"rank=2\.5.*whole"),
    ({"rank": True}, "rank=True"),
    ({"refresh": 0}, "refresh=0"),
    ({"refresh": None}, "refresh=None"),
    ({"scale": 0.0}, r"scale=0\.0"),
    ({"scale": -1.0}, r"scale=-1\.0"),
    ({"scale": float("inf")}, "scale=inf"),
    ({"betas": (1.0, 0.999)}, r"betas=\(1\.0, 0\.999\)"),
    ({"betas": (0.9, -0.1)}, "betas="),
    ({"betas": 0.9}, r"betas=0\.9"),
    ({"betas": (0.9, 0.99, 0.999)}, "betas="),
    ({"eps": -1e-8}, "eps=-1e-08"),
    ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
    ({"side": "rigth"}, r"side='rigth'.*did you mean 'right'"),
    ({"side": None}, "side=None"),
    ({"rule": "adamm"}, r"rule='adamm'.*did you mean 'adam'"),
    ({"range_finder": "wram"}, r"range_finder='wram'.*did you mean 'warm'"),
    ({"rotate": 1}, "rotate=1"),
    ({"stagger": "yes"}, "stagger='yes'"),
    ({"side": "two-sided", "rule": "shared"}, "two-sided.*shared"),
    ({"seed": "x"}, "seed='x'"),
    ({"seed": None}, "seed=None"),
    ({"seed": 1.5}, r"seed=1\.5"),
])  # fmt: skip
def test_wrong_options_are_refused_with_the_value_and_what_is_allowed(options, message):
    with pytest.raises(ConfigError, match=message):
        GORP([matrix()], **options)
    with pytest.raises(ConfigError, match=message):
        GORP([{"params": [matrix()], **options}])
    with pytest.raises(ConfigError, match=message.replace("GORP", "GaLore")):
        GaLore([matrix()], **{"rank": 4, **options})


def test_unknown_options_are_refused_with_the_near_name():
    with pytest.raises(TypeError, match="refesh"):
        GORP([matrix()], refesh=10)
    with pytest.raises(ConfigError, match=r"'refesh'.*did you mean 'refresh'"):
        GORP([{"params": [matrix()], "refesh": 10}])
    with pytest.raises(ConfigError, match=r"'update_proj_gap'"):
        GORP([{"params": [matrix()], "update_proj_gap": 10}])


def test_a_rank_above_every_matrix_of_its_group_is_refused():
    with pytest.raises(ConfigError, match=r"rank=16.*largest shorter side is 8.*rank=None"):
        GORP([matrix(12, 8), matrix(4, 30), nn.Parameter(torch.zeros(3))], rank=16)
    with pytest.raises(ConfigError, match="rank=9"):
        GORP([{"params": [matrix(20, 20)]}, {"params": [matrix()], "rank": 9}])
    optimizer = GORP([matrix(12, 8), matrix(4, 30)], rank=6)  # above one of them: that one is AdamW's, and it says so
    assert [p.treatment for p in optimizer.explain()] == ["projected", "adamw"]
    assert "4" in optimizer.explain()[1].why
    assert "6" in optimizer.explain()[1].why


def test_a_group_without_matrices_is_no_rank_error():
    optimizer = GORP([{"params": [nn.Parameter(torch.zeros(4))]}, {"params": [matrix()]}], rank=3)
    assert [p.treatment for p in optimizer.explain()] == ["adamw", "projected"]


def test_empty_groups():
    with pytest.raises(ValueError, match="empty"):
        GORP([])
    optimizer = GORP([{"params": []}, {"params": [matrix()]}], rank=3)
    p = optimizer.param_groups[1]["params"][0]
    run(optimizer, [p], [gradients((12, 8), 3)])
    assert int(optimizer.state[p]["step"]) == 3
    optimizer.load_state_dict(optimizer.state_dict())


def test_duplicate_parameters():
    p = matrix()
    with pytest.raises(ValueError, match="more than one parameter group"):
        GORP([{"params": [p]}, {"params": [p]}], rank=3)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        GORP([p, p], rank=3)


def test_not_a_leaf_and_not_a_tensor():
    with pytest.raises(ValueError, match="non-leaf"):
        GORP([matrix() * 2], rank=3)
    with pytest.raises(TypeError):
        GORP(["weight"], rank=3)
    with pytest.raises(TypeError):
        GORP(matrix(), rank=3)


# --- what trains when ------------------------------------------------------------------------------------------------


def test_explain_says_how_each_is_treated_and_why():
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 5))
    model[1].weight.requires_grad_(False)
    optimizer = GORP(
        [{"params": list(model.named_parameters())}, {"params": [("head", matrix())], "rank": None}], rank=4, refresh=7
    )
    plans = {plan.name: plan for plan in optimizer.explain()}
    assert plans["0.weight"] == ParameterPlan("0.weight", (20, 12), "projected", "right", 4, plans["0.weight"].why)
    assert "4 of 12" in plans["0.weight"].why
    assert "7" in plans["0.weight"].why
    assert (plans["0.bias"].treatment, plans["0.bias"].side, plans["0.bias"].rank) == ("adamw", None, None)
    assert "1 dimension" in plans["0.bias"].why
    assert plans["1.weight"].treatment == "frozen"
    assert plans["head"].treatment == "adamw"
    assert "rank=None" in plans["head"].why
    assert all(len(plan.why) > 10 for plan in plans.values())


def test_explain_names_parameters_without_names_by_their_place():
    optimizer = GORP([{"params": [matrix()]}, {"params": [matrix(), matrix()]}], rank=3)
    assert [p.name for p in optimizer.explain()] == [
        "group 0, parameter 0", "group 1, parameter 0", "group 1, parameter 1"
    ]  # fmt: skip


def test_frozen_parameters_stay():
    model = tiny_net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    optimizer = GORP(model.parameters(), lr=0.05, rank=3, weight_decay=0.5)
    train(model, optimizer, 4)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight not in optimizer.state


def test_a_parameter_frozen_and_thawed_in_between():
    """A stale gradient of a frozen parameter is not stepped with, by no rule, and its state waits for it."""
    model = tiny_net()
    optimizer = GORP(model.parameters(), lr=0.05, rank=3, weight_decay=0.5, refresh=2)
    train(model, optimizer, 4)
    weight = model[0].weight
    weight.requires_grad_(False)
    assert weight.grad is not None
    before, kept = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
    optimizer.step()
    train(model, optimizer, 2)
    assert torch.equal(weight, before)
    assert all(torch.equal(v, kept[k]) for k, v in optimizer.state[weight].items())
    weight.requires_grad_(True)
    train(model, optimizer, 3)
    assert not torch.equal(weight, before)


def test_parameters_with_a_gradient_only_sometimes():
    """Each counts its own steps: what is missing is not a step, not a skip, and decays nothing."""
    a, b = matrix(), matrix(seed=1)
    optimizer = GORP([a, b], lr=0.05, rank=3, refresh=2, weight_decay=0.5, stagger=False)
    ga, gb = gradients((12, 8), 6), gradients((12, 8), 6, seed=1)
    sometimes = [g if k % 2 == 0 else None for k, g in enumerate(gb)]
    run(optimizer, [a, b], [ga, sometimes])
    assert [int(optimizer.state[p]["step"]) for p in (a, b)] == [6, 3]
    assert [int(optimizer.state[p]["skipped"]) for p in (a, b)] == [0, 0]
    twin = matrix(seed=1)
    run(
        GORP([twin], lr=0.05, rank=3, refresh=2, weight_decay=0.5, stagger=False),
        [twin],
        [[g for g in sometimes if g is not None]],
    )
    torch.testing.assert_close(b, twin, rtol=1e-5, atol=1e-6)


def test_no_gradients_at_all_is_no_step():
    p = matrix()
    optimizer = GORP([p], rank=3)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)
    assert not optimizer.state


def test_a_group_added_later():
    a, b = matrix(), matrix(16, 10, seed=1)
    optimizer = GORP([a], lr=0.05, rank=3, refresh=3)
    run(optimizer, [a], [gradients((12, 8), 4)])
    optimizer.add_param_group(
        {"params": [("late", b)] if "param_names" in optimizer.param_groups[0] else [b], "rank": 5}
    )
    run(optimizer, [a, b], [gradients((12, 8), 4, seed=3), gradients((16, 10), 4)])
    assert [int(optimizer.state[p]["step"]) for p in (a, b)] == [8, 4]
    assert optimizer.state[b]["basis"].shape == (10, 5)
    with pytest.raises(ConfigError, match="rank=50"):
        optimizer.add_param_group({"params": [matrix(seed=4)], "rank": 50})
    assert len(optimizer.param_groups) == 2  # a refused group is not left behind


def test_options_changed_between_steps_are_followed():
    """Schedulers change lr and betas; people change decay and refresh."""
    p = matrix()
    optimizer = GORP([p], lr=0.05, rank=3, refresh=100)
    run(optimizer, [p], [gradients((12, 8), 3)])
    optimizer.param_groups[0]["refresh"] = 1
    run(optimizer, [p], [gradients((12, 8), 3)])
    assert int(optimizer.state[p]["refreshes"]) == 4


@pytest.mark.parametrize(
    ("name", "value"), [("rank", 5), ("rank", None), ("rule", "adafactor"), ("rule", "momentum"), ("side", "left")]
)
def test_options_that_shape_the_state_cannot_change_between_steps(name, value):
    p = matrix()
    optimizer = GORP([p], lr=0.05, rank=3, side="right")
    run(optimizer, [p], [gradients((12, 8), 3)])
    before = p.detach().clone()
    optimizer.param_groups[0][name] = value
    with pytest.raises(ConfigError, match=r"\(12, 8\)"):
        run(optimizer, [p], [gradients((12, 8), 1)])
    assert torch.equal(p, before)


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(20, 9), (12, 9), (20, 8)])
def test_a_state_of_another_shape_is_refused_at_the_next_step(rank, side, shape):
    """Torch's fused kernel would take it, and write beyond its end."""
    p, q = matrix(), matrix(*shape)
    optimizer, other = (GORP([x], rank=rank, side=side) for x in (p, q))
    run(optimizer, [p], [gradients((12, 8), 3)])
    other.load_state_dict(optimizer.state_dict())
    before = q.detach().clone()
    with pytest.raises(ConfigError, match=rf"\({shape[0]}, {shape[1]}\).*another (shape|one)"):
        run(other, [q], [gradients(shape, 1)])
    assert torch.equal(q, before)


def test_a_closure_is_evaluated_once_with_gradients_on():
    model = tiny_net()
    optimizer = GORP(model.parameters(), lr=0.05, rank=3)
    x = torch.randn(4, 12)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.requires_grad
    assert optimizer.step(closure).item() < loss.item()


def test_gradients_are_not_recorded():
    p = matrix()
    optimizer = GORP([p], lr=0.05, rank=3)
    with torch.enable_grad():
        run(optimizer, [p], [gradients((12, 8), 3)])
    assert p.is_leaf
    assert p.grad_fn is None
    assert not any(v.requires_grad for v in optimizer.state[p].values())


def test_the_global_random_state_is_left_alone():
    p = matrix()
    optimizer = GORP([p], lr=0.05, rank=3, refresh=1, range_finder="randomized")
    series = gradients((12, 8), 3)
    before = torch.get_rng_state()
    run(optimizer, [p], [series])
    assert torch.equal(before, torch.get_rng_state())


def test_seeds():
    """Equal seeds are equal runs; the randomised start of another seed is another one."""
    ends = []
    for seed in (0, 0, 1):
        p = matrix(60, 40)
        run(GORP([p], rank=4, refresh=2, range_finder="randomized", seed=seed), [p], [gradients((60, 40), 5)])
        ends.append(p.detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
