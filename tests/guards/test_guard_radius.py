"""Radius step by step: its twin in plain float64, its hyper-gradients, and what it must reduce to."""

from __future__ import annotations

import itertools

import pytest
import torch
from deviation_helpers import KINDS, OPTIMIZERS, batch, farthest, loss_of, net, same, train, trainable, values
from peft import LoraConfig, get_peft_model
from reference_radius import RadiusReference, balls_of
from torch import nn

from growthring.adapters import LargoConfig, start_from_activations
from growthring.guards import Radius
from growthring.guards import balls as balls_module
from growthring.guards import radius as radius_module
from growthring.guards.hyper import HyperAdam

MODELS = ("delta", "minor", "product", "lora", "weight")
GRANULARITIES = ("factor", "layer", "component")


def flat(radii):
    return [value for numbers in radii.values() for value in numbers]


# --- the reference twin -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "granularity", "unit", "optimizer"),
    [(k, g, u, "adamw") for k, g, u in itertools.product(MODELS, GRANULARITIES, ("step", "absolute", "anchor"))]
    + [(k, "factor", "step", o) for k in ("delta", "lora") for o in ("sgd", "momentum")],
)
def test_steps_as_the_reference_does(kind, granularity, unit, optimizer):
    settings = {"mu": 0.2, "kappa": 0.7, "unit": unit}
    model, twin = net(kind), net(kind)
    guard = Radius(granularity=granularity, **settings)
    reference = RadiusReference(balls_of(twin, granularity), **settings)
    train(model, guard, optimizer)
    plain = OPTIMIZERS[optimizer](list(trainable(twin).values()))
    for step in range(12):
        plain.zero_grad()
        loss_of(twin, step).backward()
        reference.before_step()
        plain.step()
        reference.after_step()
    assert farthest(values(model), values(twin)) < 1e-12
    wanted = [ball.gamma for ball in reference.balls]
    assert flat(guard.radii()) == pytest.approx(wanted, rel=1e-9)
    assert len(wanted) > 2
    assert len(set(wanted)) == len(wanted)


def test_the_comparison_can_fail():
    runs = []
    for settings in ({}, {"kappa": 0.0}, {"mu": 0.11}, {"first": 0.4}, {"betas": (0.5, 0.9)}):
        model = net("delta")
        train(model, Radius(**settings))
        runs.append(values(model))
    assert all(farthest(runs[0], other) > 1e-6 for other in runs[1:])


# --- hyper-gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["delta", "product", "lora", "weight"])
def test_h_is_the_derivative_of_the_whole_networks_loss(kind, granularity, monkeypatch):
    """Central differences over each radius with every projection of the three layers active; others held."""
    seen = []
    real = HyperAdam.direction
    monkeypatch.setattr(
        HyperAdam, "direction", lambda self, h, where: (seen.append((h, where)), real(self, h, where))[1]
    )
    model = net(kind)
    guard = Radius(granularity=granularity, mu=0.3)
    optimizer = train(model, guard, steps=5)
    # one more step by hand: candidates C, then their projections on the radii that the guard chose
    optimizer.zero_grad()
    loss_of(model, 5).backward()
    guard.before_step()
    optimizer.step()
    candidates = values(model)
    guard.after_step()
    balls, radii = balls_of_candidates(model, candidates, kind, granularity), flat(guard.radii())
    assert len(balls) == len(radii)
    projected = values(model)
    put(model, candidates, balls, radii)
    assert farthest(values(model), projected) < 1e-13
    numeric = []
    for i, gamma in enumerate(radii):
        losses = []
        for sign in (1, -1):
            eps = max(1e-4 * gamma, 1e-6)
            put(model, candidates, balls, [g + sign * eps * (j == i) for j, g in enumerate(radii)])
            losses.append(loss_of(model, 6).item())
        numeric.append((losses[0] - losses[1]) / (2 * eps))
    put(model, candidates, balls, radii)
    optimizer.zero_grad()
    loss_of(model, 6).backward()
    guard.before_step()
    optimizer.step()
    guard.after_step()
    h, where = seen[-1]
    assert bool(where.all())
    assert h.tolist() == pytest.approx(numeric, rel=1e-6, abs=1e-9)


def balls_of_candidates(model, candidates, kind, granularity):
    """Where the candidates are, and how large: ``(members, n)`` of every ball."""
    starts = {name: p.clone() for name, p in net(kind).named_parameters()}
    with torch.no_grad():
        kept = values(model)
        for name, p in trainable(model).items():
            p.copy_(candidates[name])
        found = balls_of(model, granularity)
        sizes = []
        for ball in found:
            if kind == "weight":
                ball.members = [
                    (p, starts[n], i) for p, _, i in ball.members for n, q in trainable(model).items() if q is p
                ]
            sizes.append(float(ball.whole().norm()))
        for name, p in trainable(model).items():
            p.copy_(kept[name])
    return list(zip(found, sizes, strict=True))


def put(model, candidates, balls, radii):
    """Set the model to the projections of the candidates."""
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(candidates[name])
        for (ball, n), gamma in zip(balls, radii, strict=True):
            for p, start, index in ball.members:
                p[index] = start[index] + (p - start)[index] * (gamma / n)


def test_radii_are_not_in_the_graph():
    model, guard = net("delta"), Radius()
    train(model, guard, steps=3)
    assert not any(v.requires_grad for v in vars(guard._task).values() if isinstance(v, torch.Tensor))
    assert set(trainable(model)) == {n for n in trainable(model) if "largo_" in n}


# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["delta", "residual", "product", "lora", "weight"])
def test_radius_0_is_the_pretrained_model_bit_for_bit(kind, optimizer):
    model = net(kind)
    x, _ = batch(99)
    before, at_start = model(x).detach(), values(model)
    train(model, Radius(fixed=0.0), optimizer)
    assert torch.equal(model(x), before)
    free = net(kind)
    train(free, (), optimizer)
    assert farthest(values(free), at_start) > 1e-3
    if kind == "weight":
        assert same(values(model), at_start)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_infinite_radius_is_the_plain_optimizer_bit_for_bit(kind, optimizer):
    if kind == "pissa":
        model, free = net("pissa", dtype=torch.float32), net("pissa", dtype=torch.float32)
    else:
        model, free = net(kind), net(kind)
    guard = Radius(fixed=float("inf"))
    train(model, guard, optimizer)
    train(free, (), optimizer)
    assert same(values(model), values(free))
    certificate = guard.end_task("one")
    assert certificate.kept is None
    assert all(d.bound is None and d.kept is None for d in certificate.deviations)


class Factored(nn.Module):
    """``W_res x + bias + s B A x`` with factors that train, as PiSSA has it."""

    def __init__(self, layer):
        super().__init__()
        base, a, b = layer.get_base_layer(), layer.largo_A0["default"], layer.largo_B0["default"]
        self.scale = layer.scaling["default"]
        self.rest, self.bias = base.weight.detach() - self.scale * b @ a, base.bias.detach()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x):
        return nn.functional.linear(x, self.rest, self.bias) + self.scale * x @ self.a.T @ self.b.T


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["delta", "minor", "residual"])
def test_deltas_with_an_infinite_radius_are_factors_that_start_at_singular_vectors(kind, optimizer):
    model, like = net(kind), net(kind)
    layers = [m for m in like.modules() if hasattr(m, "largo_B")]
    first, second, third = (Factored(layer) for layer in layers)
    plain = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)
    train(model, Radius(fixed=float("inf")), optimizer, steps=10)
    train(plain, (), optimizer, steps=10)
    moved = [m for m in model.modules() if hasattr(m, "largo_B")]
    for layer, one in zip(moved, (first, second, third), strict=True):
        a, b = layer.largo_A["default"].weight, layer.largo_B["default"].weight
        assert torch.allclose(layer.largo_A0["default"] + a, one.a, rtol=0, atol=1e-11)
        assert torch.allclose(layer.largo_B0["default"] + b, one.b, rtol=0, atol=1e-11)
        assert float(a.detach().norm()) > 1e-3


@pytest.mark.parametrize("fixed", [0.05, 0.3])
@pytest.mark.parametrize("kind", ["delta", "product", "lora", "weight"])
def test_a_fixed_radius_holds_and_is_reached(kind, fixed):
    model, guard = net(kind), Radius(fixed=fixed)
    train(model, guard, steps=20)
    assert {r for numbers in guard.radii().values() for r in numbers} == {fixed}
    sizes = guard._task._balls.sizes()
    assert float(sizes.max()) == pytest.approx(fixed, rel=1e-12)
    assert float(sizes.max()) <= fixed * (1 + 1e-12)


# --- the projection -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", MODELS)
def test_after_every_step_it_is_inside_and_points_where_it_did(kind, granularity):
    model, guard = net(kind), Radius(granularity=granularity)
    optimizer = OPTIMIZERS["adamw"](list(trainable(model).values()))
    guard.attach(model)
    guard.begin_task()
    balls = guard._task._balls
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        guard.before_step()
        optimizer.step()
        wanted = balls.split(balls.look())
        size = balls.sizes()
        guard.after_step()
        gamma = guard._task.radii()
        # a plain weight is rounded where it stands, not where its small difference does
        assert bool((balls.sizes() <= gamma * (1 + 1e-12) + 1e-15 * (kind == "weight")).all())
        ratio = (gamma / size).clamp(max=1.0)
        for stack in balls._stacks:
            for part, index in zip(stack.parts, stack.index, strict=True):
                got = part.read(part.parameter)
                got = got - part.read(part.origin) if part.origin is not None else got
                candidate = wanted[balls.parts.index(part)]
                by = ratio[index].reshape([-1] + [1] * (got.ndim - 1) if part.along == "rows" else [1, -1])
                assert torch.allclose(got, candidate * (by if got.ndim > 1 else by.squeeze()), rtol=1e-12, atol=1e-15)
        # a second projection on the same radii moves nothing by more than rounding
        kept = values(model)
        balls.scale((gamma / balls.sizes()).clamp(max=1.0))
        assert farthest(kept, values(model)) < 1e-14


def test_the_projection_brings_nothing_farther_apart():
    """Of two candidates in one ball of radius 1."""
    ends = []
    for seed in (1, 2):
        p = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        balls = balls_module.Balls([balls_module.Part(p, 0)], 1)
        before = p.detach().clone()
        balls.scale((1.0 / balls.sizes()).clamp(max=1.0))
        assert float(p.detach().norm()) == pytest.approx(1.0)
        ends.append((before, p.detach()))
    (a0, a1), (b0, b1) = ends
    assert float((a1 - b1).norm()) <= float((a0 - b0).norm())


def test_rows_of_shards_have_the_balls_of_their_own_rows(monkeypatch):
    """The last ranks of two tensors may hold as many rows each, from different rows on."""
    one, two = (nn.Parameter(torch.ones(2, 3, dtype=torch.float64)) for _ in range(2))
    begins = {id(one): 3, id(two): 6}
    monkeypatch.setattr(balls_module.shards, "offset", lambda tensor: begins[id(tensor)])
    parts = [balls_module.Part(one, 0, along="rows"), balls_module.Part(two, 5, along="rows")]
    sizes = balls_module.Balls(parts, 13).sizes()
    assert sizes.nonzero().flatten().tolist() == [3, 4, 11, 12]


# --- locality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["delta", "product", "lora", "weight"])
def test_no_layer_asks_another_one(kind):
    """With its gradient held, a layer's new radius does not change by a bit when others move or learn otherwise."""
    found = []
    for change in (False, True):
        model, guard = net(kind), Radius()
        optimizer = train(model, guard, steps=4)
        optimizer.zero_grad()
        loss_of(model, 4).backward()
        if change:
            with torch.no_grad():
                for name, p in trainable(model).items():
                    if ".0." not in f".{name}":
                        p.mul_(1.7)
                        p.grad.neg_()
        guard.before_step()
        optimizer.step()
        guard.after_step()
        found.append((guard.radii(), values(model)))
    (radii, weights), (other_radii, other_weights) = found
    own = [name for name in radii if ".0." in f".{name}."]
    assert own
    assert all(radii[name] == other_radii[name] for name in own)
    assert any(radii[name] != other_radii[name] for name in radii if name not in own)
    assert all(torch.equal(weights[n], other_weights[n]) for n in weights if ".0." in f".{n}")


@pytest.mark.parametrize("kind", ["delta", "product", "lora", "weight"])
def test_order_and_batching_do_not_matter(kind, monkeypatch):
    found = []
    for way in ("stacked", "one by one", "backwards"):
        with monkeypatch.context() as patch:
            if way == "one by one":
                patch.setattr(balls_module, "STACKED", 1)
            if way == "backwards":
                real = radius_module.find_deviations
                patch.setattr(radius_module, "find_deviations", lambda *a, real=real: real(*a)[::-1])
            model, guard = net(kind), Radius()
            train(model, guard)
            found.append((guard.radii(), values(model)))
    assert list(found[2][0]) != list(found[0][0])
    for radii, weights in found[1:]:
        assert farthest(weights, found[0][1]) < 1e-13
        assert all(radii[n] == pytest.approx(found[0][0][n], rel=1e-12) for n in radii)


# --- learning -----------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """One plain weight whose gradient is set by hand."""

    def __init__(self, size=5, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype))


def pull(guard, model, gradient, optimizer):
    model.weight.grad = torch.as_tensor(gradient, dtype=model.weight.dtype).expand_as(model.weight).clone()
    guard.before_step()
    optimizer.step()
    guard.after_step()
    return guard.radii()["weight"][0]


def line(lr=1.0, **settings):
    model, guard = Line(), Radius(**settings)
    guard.attach(model)
    guard.begin_task()
    return model, guard, torch.optim.SGD(model.parameters(), lr=lr)


def test_it_grows_outwards_and_shrinks_inwards():
    model, guard, optimizer = line(mu=0.2)
    first = pull(guard, model, -1.0, optimizer)
    assert first == pytest.approx(0.5 * 5**0.5)
    grown = pull(guard, model, -1.0, optimizer)
    assert grown == pytest.approx(first + 0.2 * 5**0.5)  # Adam's first direction is a sign
    model, guard, optimizer = line(mu=0.2)
    first = pull(guard, model, -1.0, optimizer)
    back = pull(guard, model, [1.1, -0.9, 0.1, 0.1, 0.1], optimizer)  # back in a little, and far aside
    assert back == pytest.approx(first - 0.2 * 2.05**0.5)


def test_kappa_0_shrinks_by_the_step_only():
    model, guard, optimizer = line(mu=0.2, kappa=0.0)
    first = pull(guard, model, -1.0, optimizer)
    back = pull(guard, model, 0.1, optimizer)
    assert back == pytest.approx(first - 0.1 * 5**0.5)  # n itself
    assert back == pytest.approx(float(model.weight.detach().norm()))


def test_a_ball_never_dies(monkeypatch):
    """Signals to shrink first: a radius of 0 would keep no direction to grow in again."""

    def ends(floor):
        monkeypatch.setattr(radius_module, "FLOOR", floor)
        model, guard, optimizer = line(mu=0.3, lr=0.1)
        pull(guard, model, -1.0, optimizer)
        for sign in (1.0, 1.0, 1.0, *[-1.0] * 40):
            direction = torch.sign(model.weight.detach()[0]) or -1.0
            pull(guard, model, sign * float(direction) if sign > 0 else -1.0, optimizer)
        return guard.radii()["weight"][0]

    assert ends(radius_module.FLOOR) > 0.1
    assert ends(0.0) == 0.0


@pytest.mark.parametrize("factor", [1e-9, 1e6])
def test_the_scale_of_the_loss_does_not_matter(factor):
    found = []
    for scale in (1.0, factor):
        model, guard = net("delta"), Radius()
        optimizer = torch.optim.Adam(trainable(model).values(), lr=1e-2, eps=0.0)
        train(model, guard, optimizer, scale=scale)
        found.append((guard.radii(), values(model)))
    (radii, weights), (other_radii, other_weights) = found
    assert farthest(weights, other_weights) < 1e-9
    assert flat(radii) == pytest.approx(flat(other_radii), rel=1e-7)


def test_with_unit_step_radii_follow_the_learning_rate():
    moves = []
    for lr in (0.1, 0.2):
        model, guard, optimizer = line(lr=lr)
        first = pull(guard, model, -1.0, optimizer)
        moves.append(pull(guard, model, -1.0, optimizer) - first)
    assert moves[1] == pytest.approx(2 * moves[0])
    moves = []
    for lr in (0.1, 0.2):
        model, guard, optimizer = line(lr=lr, unit="absolute", mu=1e-3)
        first = pull(guard, model, -1.0, optimizer)
        moves.append(pull(guard, model, -1.0, optimizer) - first)
    assert moves == pytest.approx([1e-3, 1e-3])


def test_smaller_mu_stays_closer():
    ends = []
    for mu in (0.03, 0.1, 0.3):
        model, guard = net("delta"), Radius(mu=mu)
        train(model, guard, steps=40)
        ends.append(sum(d.frobenius**2 for d in guard.end_task("one").deviations))
    assert ends[0] < ends[1] < ends[2]


# --- steps that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["inf", "nan", "finite"])
@pytest.mark.parametrize("kind", ["delta", "product", "lora", "weight"])
def test_a_skipped_step_changes_nothing(kind, gradient):
    model, guard = net(kind), Radius()
    train(model, guard, steps=4)
    before, weights = guard.state_dict(), values(model)
    for p in trainable(model).values():
        p.grad = torch.full_like(p, float(gradient) if gradient != "finite" else 1.0)
    guard.before_step()
    guard.after_step()
    after = guard.state_dict()
    assert same(weights, values(model))
    for key in ("gamma", "started"):
        assert torch.equal(before["under_way"][key], after["under_way"][key])
    assert all(torch.equal(v, after["under_way"]["adam"][k]) for k, v in before["under_way"]["adam"].items())


def test_a_tensor_without_a_gradient_rests_and_shifts_no_other():
    models = [net("weight"), net("weight")]
    guards = [Radius(), Radius()]
    for model, guard in zip(models, guards, strict=True):
        optimizer = OPTIMIZERS["adamw"](list(trainable(model).values()))
        guard.attach(model)
        guard.begin_task()
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, 0).backward()
            resting = model is models[1] and step in (2, 3)
            if resting:
                model[2].weight.grad = None
                kept = model[2].weight.detach().clone()
                count = guard._task._adam.count.clone()
            guard.before_step()
            optimizer.step()
            guard.after_step()
            if resting:
                assert torch.equal(kept, model[2].weight)
                counted = guard._task._adam.count - count
                names = [ball.name for ball in guard._task.layout.balls]
                assert counted.tolist() == [0.0 if name == "2.weight" else 1.0 for name in names]


def test_half_precision_stays_inside_what_rounding_allows():
    model, guard = net("delta", dtype=torch.bfloat16), Radius(mu=0.05)
    train(model, guard, steps=10)
    assert guard._task._gamma.dtype == torch.float64
    certificate = guard.end_task("one")
    assert certificate.kept is True
    assert all(d.frobenius > 0 for d in certificate.deviations)


@pytest.mark.parametrize("good", [True, False])
def test_a_gradient_scaler_skips_and_goes_on(good):
    """Steps through a real scaler are those without one; one that it skips is none."""
    ends = []
    for scaled in (True, False):
        model, guard = net("delta", dtype=torch.float32), Radius()
        optimizer = OPTIMIZERS["sgd"](list(trainable(model).values()))
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0, growth_interval=1000)
        guard.attach(model)
        guard.begin_task()
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == 3 and not good:
                if not scaled:
                    continue  # no step at all, where the scaler skips one
                next(iter(trainable(model).values())).grad[0] = float("inf")
            scaler.unscale_(optimizer)
            guard.before_step()
            scaler.step(optimizer)
            guard.after_step()
            scaler.update()
        ends.append((values(model), guard.radii()))
    assert farthest(ends[0][0], ends[1][0]) < 1e-6
    assert flat(ends[0][1]) == pytest.approx(flat(ends[1][1]), rel=1e-4)


# --- tensors of every shape ---------------------------------------------------------------------------------------


class Shapes(nn.Module):
    """A number, an empty layer, an embedding with sparse gradients, a convolution, what is never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.other_scale = nn.Parameter(torch.tensor(0.5))
        self.words = nn.Embedding(11, 6)
        self.look = nn.Conv1d(6, 5, 2)
        self.empty = nn.Linear(0, 5)
        self.unused = nn.Linear(3, 2)
        self.last = nn.Linear(5, 4)

    def forward(self, ids):
        x = self.look(self.words(ids).transpose(1, 2)).mean(-1) * self.scale + self.other_scale
        return self.last(torch.tanh(x + self.empty(x[:, :0])))


def learn_shapes(model, guard, steps=8):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    guard.attach(model)
    guard.begin_task()
    for step in range(steps):
        optimizer.zero_grad()
        ids = torch.randint(11, (6, 4), generator=torch.Generator().manual_seed(step))
        (model(ids) - torch.cos(ids[:, :4] + step)).square().mean().backward()
        guard.before_step()
        optimizer.step()
        guard.after_step()
    return guard.end_task("one")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_plain_tensors_of_every_shape(granularity, dtype):
    model, guard = Shapes().to(dtype), Radius(granularity=granularity)
    model.words.sparse = dtype != torch.bfloat16
    certificate = learn_shapes(model, guard)
    assert certificate.kept is True
    found = {d.name: d for d in certificate.deviations}
    assert found["scale"].frobenius > 0
    assert found["words.weight"].frobenius > 0
    assert found["unused.weight"].frobenius == found["empty.weight"].frobenius == 0.0
    fixed = Radius(fixed=0.0, granularity=granularity)
    model = Shapes().to(dtype)
    before = values(model)
    learn_shapes(model, fixed)
    assert same(before, values(model))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("adapter", ["lora", "largo", "minor"])
def test_adapters_on_an_embedding_and_a_convolution(adapter, granularity):
    """Of PEFT's LoRA on an embedding it is A that starts at zero, and is scaled."""
    targets = ["words", "look", "last"] if adapter == "lora" else ["words", "last"]
    init = "minor" if adapter == "minor" else "principal"
    config = (
        LoraConfig(r=3, target_modules=targets)
        if adapter == "lora"
        else LargoConfig(r=3, init=init, target_modules=targets)
    )
    model = get_peft_model(Shapes(), config)
    guard = Radius(granularity=granularity)
    tight = Radius(fixed=1e-2, granularity=granularity)
    certificate = learn_shapes(model, guard)
    assert certificate.kept is True
    assert all(d.frobenius > 0 for d in certificate.deviations)
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    for layer, d in zip(layers, certificate.deviations, strict=True):
        assert d.frobenius == pytest.approx(float(layer.get_delta_weight("default").detach().norm()), rel=1e-4)
    again = get_peft_model(Shapes(), config)
    certificate = learn_shapes(again, tight)
    assert certificate.kept is True
    if adapter == "lora" and granularity != "component":
        assert all(d.frobenius <= 1e-2 * (1 + 1e-5) for d in certificate.deviations)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_one_factor_of_a_convolution_with_channels_last(factor):
    """Its matrix is a copy, so it is written back."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(r=2, target_modules=["0"]))
    model = model.double().to(memory_format=torch.channels_last)
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    for p in trainable(model).values():
        p.requires_grad = p is getattr(layer, factor)["default"].weight
    guard = Radius(fixed=0.05)
    guard.attach(model)
    guard.begin_task()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x).square().mean().backward()
        guard.before_step()
        optimizer.step()
        guard.after_step()
    (deviation,) = guard.end_task("one").deviations
    assert deviation.frobenius == pytest.approx(0.05)


@pytest.mark.parametrize("form", ["delta", "product"])
def test_a_start_from_activations(form):
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))
    config = LargoConfig(r=3, init="activation", form=form, target_modules=["0", "2"])
    model = get_peft_model(base, config)
    start_from_activations(model, [batch(i, torch.float32)[0] for i in range(3)])
    guard = Radius(mu=0.3)
    train(model, guard, steps=10)
    certificate = guard.end_task("one")
    assert certificate.kept is True
    assert all(0 < d.frobenius <= d.bound * (1 + 1e-5) for d in certificate.deviations)
