"""Directional: its twin in plain float64, its hyper-gradient, its limits, and steps that are none."""

from __future__ import annotations

import math

import pytest
import torch
from deviation_helpers import farthest, loss_of, net, same, train, trainable, values
from reference_radius import DirectionalReference
from torch import nn

import growthring as gr
from growthring.errors import ConfigError, GuardError
from growthring.guards import Directional
from growthring.guards.deviation import find_deviations
from growthring.guards.hyper import HyperAdam

KINDS = ("delta", "product", "lora", "weight")


def starts(model):
    return [torch.zeros_like(t.parameter) if t.anchor is None else t.anchor.clone() for t in tensors(model)]


def tensors(model):
    return [t for d in find_deviations(model, anchors=None) for t in d.tensors]


@pytest.mark.parametrize("weight", [0.0, 0.05])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_as_the_reference_does(kind, weight):
    models = model, twin, free = net(kind), net(kind), net(kind)
    guard = Directional(0.3, weight=weight)
    reference = DirectionalReference([t.parameter for t in tensors(twin)], starts(twin), 1.0, 0.3, weight)
    steep, plain, bare = (torch.optim.SGD(trainable(m).values(), lr=1.0) for m in models)
    train(model, guard, steep, steps=25)
    most = 0.0
    for step in range(25):
        plain.zero_grad()
        loss_of(twin, step).backward()
        reference.before_step()
        plain.step()
        most = max(most, *(row["omega"] for row in reference.rows))
    assert most > 0.2  # it was put to work
    assert farthest(values(model), values(twin)) < 1e-10
    assert list(guard.strengths().values()) == pytest.approx([row["omega"] for row in reference.rows], abs=1e-8)
    train(free, (), bare, steps=25)
    assert farthest(values(model), values(free)) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_hyper_gradient_is_that_of_the_next_loss(kind, monkeypatch):
    """Of plain gradient descent: central differences over the strengths of the step before."""
    seen = []
    real = HyperAdam.direction

    def direction(self, h, where):
        seen.append((h, where))
        return real(self, h, where)

    monkeypatch.setattr(HyperAdam, "direction", direction)
    model, guard = net(kind), Directional(0.3, weight=0.0)
    optimizer = train(model, guard, "sgd", steps=6)
    omega, before = guard._omega.clone(), values(model)

    def step(omegas, number):
        with torch.no_grad():
            for name, p in trainable(model).items():
                p.copy_(before[name])
        optimizer.zero_grad()
        loss_of(model, number).backward()
        parts = [t.parameter for t in guard._attached()]
        anchors = [t.anchor for t in guard._attached()]
        with torch.no_grad():
            for p, anchor, w in zip(parts, anchors, omegas.tolist(), strict=True):
                c = p - anchor if anchor is not None else p.clone()
                d, size = float((p.grad * c).sum()), float((c * c).sum())
                if d < 0 and size > 0:
                    p.grad.sub_(w * d / size * c)
        optimizer.step()

    # the guard's own step 6, then what it reads in step 7
    optimizer.zero_grad()
    loss_of(model, 6).backward()
    guard.before_step()
    omega = guard._omega.clone()
    optimizer.step()
    guard.after_step()
    after = values(model)
    optimizer.zero_grad()
    loss_of(model, 7).backward()
    guard.before_step()
    h, where = seen[-1]
    assert bool(where.any())
    step(omega, 6)
    assert farthest(values(model), after) < 1e-14
    for i in where.nonzero().flatten().tolist():
        losses = []
        for sign in (1, -1):
            moved = omega.clone()
            moved[i] += sign * 1e-5
            step(moved, 6)
            losses.append(loss_of(model, 7).item())
        assert float(h[i]) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-10)


def with_strength(kind, omega, weight):
    """One step's gradients, before and after."""
    model, guard = net(kind), Directional(1e-9, weight=weight)
    train(model, (), "adamw", steps=4)
    fresh = net(kind)
    guard.attach(fresh)  # anchored at the start
    with torch.no_grad():
        for p, q in zip(fresh.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    guard.begin_task()
    guard._omega.fill_(omega)
    loss_of(fresh, 0).backward()
    rows = [(t.parameter, t.delta().clone(), t.parameter.grad.clone()) for t in guard._attached()]
    guard.before_step()
    return [(c, g, p.grad) for p, c, g in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_a_pull_back_only(kind):
    for c, g, new in with_strength(kind, 0.0, 0.1):
        assert torch.allclose(new, g + 0.1 * c, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_1_leaves_nothing_outwards(kind):
    rows = with_strength(kind, 1.0, 0.1)
    outwards = 0
    for c, g, new in rows:
        if float((g * c).sum()) < 0:
            outwards += 1
            assert float((new * c).sum()) == pytest.approx(0.1 * float((c * c).sum()), rel=1e-9)
        else:
            assert torch.allclose(new, g + 0.1 * c)
    assert outwards


def test_it_does_nothing_where_nothing_points_outwards():
    model = nn.Linear(4, 3, bias=False).double()
    guard = Directional(0.5)
    guard.attach(model)
    guard.begin_task()
    with torch.no_grad():
        model.weight.add_(1.0)
    model.weight.grad = torch.ones_like(model.weight)
    guard.before_step()
    assert torch.equal(model.weight.grad, torch.ones_like(model.weight))
    model.weight.grad = -torch.ones_like(model.weight)
    guard._omega.fill_(0.5)
    guard.before_step()
    assert torch.allclose(model.weight.grad, torch.full_like(model.weight, -0.5))


def test_strengths_stay_between_0_and_1():
    model, guard = net("delta"), Directional(5.0)
    found = []
    steep = torch.optim.SGD(trainable(model).values(), lr=1.0)
    train(model, guard, steep, steps=25, watch=lambda step: found.extend(guard.strengths().values()))
    assert min(found) == 0.0
    assert max(found) == 1.0


@pytest.mark.parametrize("gradient", ["inf", "nan", "finite"])
def test_a_skipped_step_says_nothing(gradient):
    model, guard = net("delta"), Directional(0.3)
    optimizer = train(model, guard, "sgd", steps=6)
    for p in trainable(model).values():
        p.grad = torch.full_like(p, float(gradient)) if gradient != "finite" else p.grad
    guard.before_step()
    omega, adam, weights = guard._omega.clone(), guard._adam.state_dict(), values(model)
    guard.after_step()
    assert same(weights, values(model))
    optimizer.zero_grad()
    loss_of(model, 7).backward()
    guard.before_step()
    assert torch.equal(omega, guard._omega)
    assert all(torch.equal(v, guard._adam.state_dict()[k]) for k, v in adam.items())
    assert all(bool(p.grad.isfinite().all()) for p in trainable(model).values())


def test_a_tensor_without_a_gradient_rests():
    model, guard = net("weight"), Directional(0.3, weight=0.1)
    optimizer = train(model, guard, "sgd", steps=5)
    optimizer.zero_grad()
    loss_of(model, 5).backward()
    model[2].weight.grad = None
    at = [t.name for t in guard._attached()].index("2.weight")
    count = guard._adam.count.clone()
    guard.before_step()
    assert model[2].weight.grad is None
    assert guard._adam.count[at] == count[at]
    optimizer.step()
    guard.after_step()
    optimizer.zero_grad()
    loss_of(model, 6).backward()
    guard.before_step()
    assert guard._adam.count[at] == count[at]
    assert bool((guard._adam.count > count).any())


def test_sparse_gradients_count_as_dense_ones():
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 4, sparse=sparse).double())
        guard, optimizer = Directional(0.01, weight=0.5), torch.optim.SGD(model.parameters(), lr=0.1)
        guard.attach(model)
        guard.begin_task()
        guard.bind(optimizer)
        guard._omega.fill_(0.9)
        for step in range(6):
            optimizer.zero_grad()
            model(torch.tensor([0, 1, 1, step])).sin().sum().backward()
            guard.before_step()
            optimizer.step()
            guard.after_step()
        ends.append((values(model), guard.strengths()))
    assert farthest(ends[0][0], ends[1][0]) < 1e-12
    assert ends[0][1] == pytest.approx(ends[1][1])
    assert 0 < max(ends[1][1].values()) < 0.9  # it learned


def test_rates_follow_the_optimizers_groups():
    model, guard = net("weight"), Directional(0.3)
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[2].weight], "lr": torch.tensor(0.2)}]
    guard.attach(model)
    guard.begin_task()
    assert guard._rates().tolist() == [1.0] * 6
    guard.bind(torch.optim.SGD(groups, lr=0.3))
    guard.bind(None)
    rates = dict(zip([t.name for t in guard._attached()], guard._rates().tolist(), strict=True))
    assert (rates["0.weight"], rates["4.weight"]) == (0.1, 1.0)
    assert rates["2.weight"] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", [False, True])
def test_it_goes_on_bit_for_bit(kind, folder, tmp_path):
    whole = net(kind)
    train(whole, Directional(0.3, weight=0.01), "momentum", steps=14)
    model, guard = net(kind), Directional(0.3, weight=0.01)
    optimizer = train(model, guard, "momentum", steps=7)
    again = net(kind)
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    other = torch.optim.SGD(trainable(again).values(), lr=0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    if folder:
        guard.save_pretrained(tmp_path)
        resumed = Directional.load_pretrained(tmp_path, again)
    else:
        torch.save(guard.state_dict(), tmp_path / "state")
        resumed = Directional(0.3, weight=0.01)
        resumed.attach(again)
        resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    train(again, resumed, other, steps=range(7, 14))
    assert same(values(whole), values(again))


def test_its_certificate_measures_and_bounds_nothing():
    model, guard = net("delta"), Directional()
    train(model, guard, steps=8)
    certificate = guard.end_task("one")
    assert (certificate.guard, certificate.task, certificate.kept) == ("directional", "one", None)
    dense = [m.get_delta_weight("default").detach().norm() for m in model.modules() if hasattr(m, "largo_B")]
    assert [d.frobenius for d in certificate.deviations] == pytest.approx([float(n) for n in dense])
    total = math.sqrt(sum(d.frobenius**2 for d in certificate.deviations))
    assert gr.deviation(model).total == pytest.approx(total)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mu": 0.0}, r"Directional\(mu=0\).*above 0"),
        ({"mu": -1.0}, r"Directional\(mu=-1.0\)"),
        ({"mu": True}, r"Directional\(mu=True\)"),
        ({"weight": -0.1}, r"Directional\(weight=-0.1\)"),
        ({"weight": float("nan")}, r"Directional\(weight=nan\)"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ConfigError, match=said):
        Directional(**settings)


def test_misuse():
    with pytest.raises(GuardError, match="not attached"):
        Directional().before_step()
    guard = Directional()
    guard.attach(net("delta"))
    guard._last = None
    with pytest.raises(GuardError, match="without before_step"):
        guard.after_step()
    with pytest.raises(ConfigError, match="no regular expression"):
        Directional(exclude="(").attach(net("delta"))
