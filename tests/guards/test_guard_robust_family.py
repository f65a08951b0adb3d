"""L2-SP, FTP, SPD and TPGM against slow float64 references, their limits, and what they do on every kind of weight."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from guard_helpers import OPTIMIZERS, lora_mlp, mlp, rows, trainable
from peft import LoraConfig, get_peft_model
from reference_robust_family import SlowFTP, row_norms, scaled, slow_spd, slow_tpgm
from torch import Tensor, nn

from growthring.adapters import LargoConfig
from growthring.errors import ConfigError, DataError, GuardError, NumericalError
from growthring.guards import FTP, L2SP, SPD, TPGM
from growthring.guards.anchored_guard import AnchoredGuard

DOUBLE = torch.float64
GOAL = rows(16, 3, 9, DOUBLE)


class Scored(nn.Module):
    """A model that returns its loss, as those of transformers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.inner(x)
        return {"logits": out} if labels is None else {"loss": (out - labels).square().mean(), "logits": out}


def batches(count: int = 5, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    return [rows(16, 20, seed, dtype) for seed in range(count)]


def pull(model: nn.Module, x: Tensor, away: float = 1.0) -> Tensor:
    """A loss that keeps changing its mind with ``away``, so that radii grow and shrink."""
    return (model(x) - away * 3 * GOAL.to(x.dtype)).square().mean()


def largo(form: str, dtype: torch.dtype = DOUBLE, **settings: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LargoConfig(r=3, alpha=6, form=form, target_modules=["0", "2"], **settings)
        return get_peft_model(mlp(), config).to(dtype)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "weights": lambda: mlp(DOUBLE),
    "lora": lambda: lora_mlp(DOUBLE),
    "delta": lambda: largo("delta"),
    "residual": lambda: largo("residual", init="minor"),
    "product": lambda: largo("product"),
}


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def starts(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if "largo" in n else p.detach().clone() for n, p in named(model).items()}


def train(model: nn.Module, guard: AnchoredGuard | None, steps: int = 15, make: str = "adamw", **options: Any) -> None:
    """Steps whose goal turns round half-way: first outward, then back."""
    optimizer = OPTIMIZERS[make](trainable(model))
    data = batches(dtype=next(model.parameters()).dtype)
    for step in range(steps):
        optimizer.zero_grad()
        pull(model, data[step % len(data)], -1.0 if step > steps // 2 else 1.0).backward()
        if guard is not None:
            guard.before_step()
        optimizer.step()
        if guard is not None:
            guard.after_step()


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


# --- FTP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("norm", "kappa", "make"), [("rows", 1.0, "adamw"), ("tensor", 0.5, "momentum")])
def test_ftp_is_its_slow_reference(kind, norm, kappa, make):
    model = MODELS[kind]()
    guard = FTP(3e-2, kappa=kappa, norm=norm, exclude=None)
    guard.attach(model)
    slow = {n: SlowFTP(a, 3e-2, kappa, norm, 1e-8) for n, a in starts(model).items()}
    optimizer = OPTIMIZERS[make](trainable(model))
    bound = False
    for step in range(20):
        optimizer.zero_grad()
        pull(model, batches()[step % 5], -1.0 if step > 10 else 1.0).backward()
        gradients = {n: p.grad.clone() for n, p in named(model).items()}
        guard.before_step()
        optimizer.step()
        expected = {}
        for name, parameter in named(model).items():
            moved = bool((parameter.detach() - slow[name].anchor).any())
            expected[name] = slow[name].step(gradients[name], parameter.detach()) if moved else parameter.detach()
            bound |= not torch.allclose(expected[name], parameter.detach())
        guard.after_step()
        for name, parameter in named(model).items():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-11)
    assert bound
    radii = {n: s.radius for n, s in slow.items()}
    assert guard.radii == pytest.approx(radii, rel=1e-8)


@pytest.mark.parametrize("norm", ["rows", "tensor"])
def test_the_gradient_of_a_radius_is_the_whole_networks(norm):
    """``h`` is the central difference of the network's loss, all projections active; unmasked sums are not."""
    model = mlp(DOUBLE)
    guard = FTP(0.1, norm=norm, exclude=None)
    guard.attach(model)
    anchors = starts(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.3)
    for _ in range(7):
        optimizer.zero_grad()
        pull(model, batches()[0]).backward()
        guard.before_step()
        optimizer.step()
        candidates = {n: p.detach() - anchors[n] for n, p in named(model).items()}
        candidates = {n: c.clone() for n, c in candidates.items()}
        guard.after_step()
    optimizer.zero_grad()
    x = batches()[1]
    pull(model, x).backward()
    guard.before_step()
    assert guard._h is not None
    found = dict(zip(guard._names, guard._h[0].tolist(), strict=True))
    masked = 0
    for name, parameter in named(model).items():
        c, radius = candidates[name], guard.radii[name]
        n = row_norms(c, norm)
        if bool(((n - radius).abs() < 1e-6).any()):
            continue  # at a row's norm there is a kink
        masked += int((n < radius).sum())
        here = parameter.detach().clone()
        losses = []
        for gamma in (radius + 1e-6, radius - 1e-6):
            with torch.no_grad():
                parameter.copy_(anchors[name] + scaled(c, (gamma / n).clamp(max=1.0)))
                losses.append(float(pull(model, x)))
                parameter.copy_(here)
        assert found[name] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5, abs=1e-9)
    assert (masked > 0) == (norm == "rows")


def test_ftp_at_an_infinite_radius_is_the_base_optimizer_bit_for_bit():
    free, held, open_ = mlp(), mlp(), mlp()
    train(free, None)
    guard = FTP(1e6, kappa=0.0, exclude=None)
    guard.attach(open_)
    state = guard.state_dict()
    radii = torch.full_like(state["radii"], math.inf)
    moments = {**state["moments"], "first": -torch.ones_like(radii), "second": torch.ones_like(radii)}
    guard.load_state_dict({**state, "radii": radii, "moments": {**moments, "count": torch.full_like(radii, 9)}})
    train(open_, guard)
    assert same(free, open_)
    tight = FTP(1e-3, exclude=None)
    tight.attach(held)
    train(held, tight)
    assert not same(free, held)


def test_ftp_at_radius_zero_is_the_pretrained_model_bit_for_bit():
    model, untouched = mlp(), mlp()
    guard = FTP(1e-300, exclude=None)
    guard.attach(model)
    state = guard.state_dict()
    ones = torch.ones_like(state["radii"])
    moments = {"first": ones, "second": ones, "count": 9 * ones}
    guard.load_state_dict({**state, "radii": 0 * ones, "moments": moments})
    train(model, guard)
    assert same(model, untouched)


def test_a_radius_that_was_zero_grows_again():
    model = mlp()
    guard = FTP(1e-2, exclude=None)
    guard.attach(model)
    train(model, guard, 1)
    state = guard.state_dict()
    guard.load_state_dict({**state, "radii": torch.zeros_like(state["radii"])})
    train(model, guard, 6)
    assert min(guard.radii.values()) > 0


def test_radii_do_not_depend_on_the_scale_of_the_loss():
    one, two = mlp(DOUBLE), mlp(DOUBLE)
    for model, scale in ((one, 1.0), (two, 1e-9)):
        guard = FTP(1e-2, exclude=None)
        guard.attach(model)
        optimizer = torch.optim.Adam(trainable(model), lr=1e-2, eps=1e-30)
        for x in batches() * 2:
            optimizer.zero_grad()
            (scale * pull(model, x)).backward()
            guard.before_step()
            optimizer.step()
            guard.after_step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_parameters_without_a_gradient_rest_and_shift_nobodys_state():
    model, alone = mlp(DOUBLE), mlp(DOUBLE)
    results = []
    for net, first in ((model, True), (alone, False)):
        guard = FTP(1e-2, exclude=None)
        net[0].requires_grad_(first)
        guard.attach(net)
        optimizer = torch.optim.SGD(trainable(net), lr=0.1)
        for x in batches():
            optimizer.zero_grad()
            pull(net, x).backward()
            net[0].weight.grad = net[0].bias.grad = None
            guard.before_step()
            optimizer.step()
            guard.after_step()
        results.append(guard)
    assert same(model, alone)
    assert results[0].radii == results[1].radii
    assert not any(name.startswith("0.") for name in results[0].radii)


# --- SPD ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_spd_is_its_slow_reference(kind, weight):
    model = MODELS[kind]()
    guard = SPD(weight, exclude=None)
    guard.attach(model)
    anchors = starts(model)
    optimizer = OPTIMIZERS["momentum"](trainable(model))
    pulled = 0
    for step in range(20):
        optimizer.zero_grad()
        pull(model, batches()[step % 5], -1.0 if step > 10 else 1.0).backward()
        before = {n: p.detach().clone() for n, p in named(model).items()}
        gradients = {n: p.grad.clone() for n, p in named(model).items()}
        guard.before_step()
        optimizer.step()
        expected = {
            n: slow_spd(anchors[n], before[n], gradients[n], p.detach(), weight) for n, p in named(model).items()
        }
        pulled += sum(not torch.equal(expected[n], p.detach()) for n, p in named(model).items())
        guard.after_step()
        for name, parameter in named(model).items():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-12)
    assert pulled


def test_spd_at_weight_one_returns_to_the_previous_radius_and_at_zero_does_nothing():
    model, free, off = mlp(DOUBLE), mlp(DOUBLE), mlp(DOUBLE)
    guard = SPD(exclude=None)
    guard.attach(model)
    anchors = starts(model)
    optimizer = OPTIMIZERS["momentum"](trainable(model))
    checked = 0
    for step in range(25):
        optimizer.zero_grad()
        pull(model, batches()[step % 5], -1.0 if step > 8 else 1.0).backward()
        old = {n: p.detach() - anchors[n] for n, p in named(model).items()}
        old = {n: d.clone() for n, d in old.items()}
        back = {n: float((p.grad * old[n]).sum()) > 0 for n, p in named(model).items()}
        guard.before_step()
        optimizer.step()
        out = {n: float((p.detach() - anchors[n]).norm()) > float(old[n].norm()) for n, p in named(model).items()}
        guard.after_step()
        for name, parameter in named(model).items():
            if back[name] and out[name]:
                checked += 1
                assert float((parameter.detach() - anchors[name]).norm()) == pytest.approx(float(old[name].norm()))
    assert checked
    idle = SPD(0.0, exclude=None)
    idle.attach(off)
    train(free, None)
    train(off, idle)
    assert same(free, off)


# --- TPGM ---------------------------------------------------------------------------------------------------------


def scored_batches(away: float = 1.0, count: int = 3, dtype: torch.dtype = DOUBLE) -> list[dict[str, Tensor]]:
    return [{"x": rows(16, 20, 50 + i, dtype), "labels": away * 3 * GOAL.to(dtype)} for i in range(count)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("norm", ["rows", "tensor"])
def test_tpgm_is_its_slow_reference(kind, norm):
    model = Scored(MODELS[kind]())
    guard = TPGM(12, mu=3e-3, norm=norm, exclude=None)
    guard.attach(model)
    anchors = list(starts(model).values())
    train(model.inner, None, 12, "sgd")
    names, weights = list(named(model)), [p.detach().clone() for p in trainable(model)]
    held_out = scored_batches(-1.0)

    def loss(values: Any, iteration: int) -> Tensor:
        batch = held_out[iteration % len(held_out)]
        out = torch.func.functional_call(model, dict(zip(names, values, strict=True)), kwargs=batch)
        return out["loss"]

    expected, radii = slow_tpgm(loss, anchors, weights, 12, 3e-3, norm)
    certificate = guard.end_task("one", held_out)
    moved = 0
    for name, parameter, value, weight in zip(names, trainable(model), expected, weights, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=1e-9)
        moved += not torch.equal(parameter.detach(), weight)
        if name in guard.radii:
            assert guard.radii[name] == pytest.approx(radii[names.index(name)], rel=1e-6)
    assert moved
    assert certificate.kept is (True if kind == "weights" else None)
    assert any("12 steps on 3 validation batches" in note for note in certificate.notes)


def test_tpgm_goes_to_the_trained_or_to_the_pretrained_weights_where_the_loss_says_so():
    class Distance(nn.Module):
        def __init__(self, sign: float) -> None:
            super().__init__()
            self.inner, self.start, self.sign = mlp(), list(mlp().parameters()), sign

        def forward(self, labels: Tensor) -> dict[str, Tensor]:
            pairs = zip(self.inner.parameters(), self.start, strict=True)
            return {"loss": self.sign * sum((p - q.detach()).square().sum() for p, q in pairs)}

    for sign in (1.0, -1.0):
        model = Distance(sign)
        guard = TPGM(3, mu=1e6, exclude=None)
        guard.attach(model)
        train(model.inner, None, 4)
        trained = copy.deepcopy(model.inner)
        guard.end_task("one", [{"labels": torch.zeros(1)}])
        assert same(model.inner, trained if sign < 0 else mlp())


def test_tpgm_leaves_modes_and_gradients_as_they_were_and_forgets_nothing_on_failure():
    model = Scored(nn.Sequential(nn.Linear(20, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))).to(DOUBLE)
    guard = TPGM(4, exclude=None)
    guard.attach(model)
    train(model.inner, None, 3)
    model.inner[2].eval()
    flags = [m.training for m in model.modules()]
    marks = [torch.full_like(p, 7.0) for p in model.parameters()]
    for parameter, mark in zip(model.parameters(), marks, strict=True):
        parameter.grad = mark
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    broken = [*scored_batches(count=2), {"x": rows(16, 20, 3, DOUBLE), "labels": torch.full((16, 3), math.inf)}]
    with pytest.raises(NumericalError, match="loss of a validation batch is inf"):
        guard.end_task("one", broken)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    guard.end_task("one", scored_batches())
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is m for p, m in zip(model.parameters(), marks, strict=True))
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_tpgm_says_what_it_lacks():
    model = Scored(mlp(DOUBLE))
    guard = TPGM(2, exclude=None)
    with pytest.raises(GuardError, match="tpgm is not attached"):
        guard.end_task("one", scored_batches())
    guard.attach(model)
    certificate = guard.end_task("reference", iter(()))
    assert "nothing had moved" in certificate.notes[-1]
    train(model.inner, None, 2)
    with pytest.raises(DataError, match="no validation batch"):
        guard.end_task("one", [])
    with pytest.raises(GuardError, match="Scored returned no loss for a validation batch"):
        guard.end_task("one", [{"x": rows(4, 20, 0, DOUBLE)}])
    assert guard.tasks == ["reference"]


# --- L2-SP --------------------------------------------------------------------------------------------------------


def dense(model: nn.Module, start: dict[str, Tensor]) -> Tensor:
    """``sum ||W - W_0||_F^2`` with every ``W`` formed."""
    total = torch.zeros((), dtype=DOUBLE)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a0, b0 = start[f"{name}.lora_A.default.weight"], start[f"{name}.lora_B.default.weight"]
            total = total + (module.scaling["default"] * (b @ a - b0 @ a0)).square().sum()
        elif hasattr(module, "largo_B"):
            total = total + module.get_delta_weight("default").square().sum()
    for name, parameter in named(model).items():
        if "lora" not in name and "largo" not in name:
            total = total + (parameter - start[name]).square().sum()
    return total


@pytest.mark.parametrize("kind", [*MODELS, "pissa"])
def test_the_penalty_is_the_squared_distance_of_the_weights(kind):
    model = lora_mlp(DOUBLE, init_lora_weights="pissa") if kind == "pissa" else MODELS[kind]()
    start = {n: p.detach().clone() for n, p in named(model).items()}
    guard = L2SP(0.3, exclude=None)
    guard.attach(model)
    assert float(guard.penalty().detach()) == pytest.approx(0.0, abs=1e-20)
    train(model, None, 6)
    expected = dense(model, start)
    assert float(guard.penalty().detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    term = guard.loss(None, {})
    assert term is not None
    wanted = torch.autograd.grad(0.3 * expected, trainable(model), allow_unused=True)
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    guard.add_gradient()
    for parameter, gradient in zip(trainable(model), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, 1.0 + gradient)
    term.backward()
    for parameter, gradient in zip(trainable(model), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, 1.0 + 2 * gradient)


def test_l2sp_at_weight_zero_adds_nothing_and_at_a_large_one_holds_the_model():
    model = mlp(DOUBLE)
    guard = L2SP(0.0, exclude=None)
    guard.attach(model)
    assert guard.loss(None, {}) is None
    guard.add_gradient()
    assert all(p.grad is None for p in model.parameters())
    far = []
    for weight in (0.0, 1.0, 20.0):
        model = mlp(DOUBLE)
        guard = L2SP(weight, exclude=None)
        guard.attach(model)
        optimizer = torch.optim.SGD(trainable(model), lr=0.02)
        for x in batches() * 6:
            optimizer.zero_grad()
            (pull(model, x) + (guard.loss(None, {}) or 0.0)).backward()
            optimizer.step()
        far.append(float(guard.penalty().detach()))
    assert far[0] > 1.5 * far[1] > 15 * far[2] > 0


# --- what they share ----------------------------------------------------------------------------------------------

ALL: dict[str, Callable[[], AnchoredGuard]] = {
    "ftp": lambda: FTP(1e-2, exclude=None),
    "spd": lambda: SPD(exclude=None),
    "l2-sp": lambda: L2SP(0.1, exclude=None),
    "tpgm": lambda: TPGM(3, exclude=None),
}


@pytest.mark.parametrize("name", ["ftp", "spd"])
@pytest.mark.parametrize("kind", MODELS)
def test_resuming_is_bitwise_the_same(name, kind):
    def go(model: nn.Module, guard: AnchoredGuard, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            pull(model, batches()[step % 5], -1.0 if step > 6 else 1.0).backward()
            guard.before_step()
            optimizer.step()
            guard.after_step()

    models, guards = [MODELS[kind]() for _ in range(2)], [ALL[name]() for _ in range(3)]
    optimizers = [OPTIMIZERS["adamw"](trainable(model)) for model in models]
    for model, guard, optimizer in zip(models, guards, optimizers, strict=False):
        guard.attach(model)
        go(model, guard, optimizer, range(7))
    go(models[0], guards[0], optimizers[0], range(7, 14))
    state = guards[1].state_dict()
    for after in (True, False):  # the new guard may be attached first or last
        guard, model, optimizer = ALL[name](), copy.deepcopy(models[1]), None
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        optimizer.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
        if after:
            guard.attach(model)
        guard.load_state_dict(copy.deepcopy(state))
        guard.attach(model)
        go(model, guard, optimizer, range(7, 14))
        assert same(model, models[0])


@pytest.mark.parametrize("name", ALL)
def test_anchors_stay_over_tasks_and_go_with_the_model(name):
    model, other = Scored(lora_mlp(DOUBLE)), Scored(lora_mlp(DOUBLE, seed=1))
    guard = ALL[name]()
    guard.attach(model)
    first = {n: v.clone() for n, v in guard._starts.items()}
    train(model.inner, guard, 4)
    guard.end_task("one", scored_batches())
    guard.attach(model)
    guard.begin_task("two")
    assert guard._starts.keys() == first.keys()
    assert all(torch.equal(v, first[n]) for n, v in guard._starts.items())
    for frozen in (True, False):  # a change of what trains keeps anchors too
        model.inner.base_model.model[0].lora_A.default.weight.requires_grad_(frozen)
        guard.attach(model)
        assert all(torch.equal(v, first[n]) for n, v in guard._starts.items())
    train(model.inner, guard, 2)
    far = guard.end_task("two", scored_batches()).deviations
    assert sum(one.frobenius for one in far) > 0
    guard.attach(other)
    assert not torch.equal(guard._starts["inner.base_model.model.0.lora_A.default.weight"],
                           first["inner.base_model.model.0.lora_A.default.weight"])  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_heads_are_left_out_unless_they_are_asked_for(name):
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    guard = type(ALL[name]())()
    guard.attach(model)
    assert {t.name for t in guard._attached()} == {"body.weight", "body.bias"}
    plan = {one.name: one for one in guard.explain()}
    assert "left out by exclude" in plan["classifier.weight"].why
    assert plan["body.weight"].kinds == ("weight",)
    assert plan["body.weight"].treatment == ("protected" if name == "ftp" else "free")
    assert [one.name for one in type(ALL[name]())().explain(model)] == list(plan)
    model["body"].requires_grad_(False)
    with pytest.raises(GuardError, match=r"all 2 trainable tensors .* are left out"):
        type(ALL[name]())().attach(model)
    with pytest.raises(GuardError, match="is not attached"):
        type(ALL[name]())().explain()


@pytest.mark.parametrize("name", ["ftp", "spd"])
def test_a_step_that_was_skipped_changes_nothing(name):
    """A gradient scaler skips a step whose gradients overflowed; the guard sees the gradients and no movement."""
    model = mlp(DOUBLE)
    guard = ALL[name]()
    guard.attach(model)
    train(model, guard, 9)
    kept, before = {n: p.detach().clone() for n, p in named(model).items()}, copy.deepcopy(guard.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    guard.before_step()
    guard.after_step()
    assert all(torch.equal(p, kept[n]) for n, p in named(model).items())
    after = guard.state_dict()
    assert after.keys() == before.keys()
    if name == "ftp":
        assert torch.equal(after["radii"], before["radii"])
        assert all(torch.equal(after["moments"][k], before["moments"][k]) for k in after["moments"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_narrow_weights_work_in_float32(name, dtype):
    model = Scored(mlp(torch.float32))
    model.to(dtype)
    guard = ALL[name]()
    guard.attach(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.05)
    for x in batches(4, dtype):
        optimizer.zero_grad()
        (model(x)["logits"].float() - 3 * GOAL.float()).square().mean().backward()
        if isinstance(guard, L2SP):
            guard.add_gradient()
        guard.before_step()
        optimizer.step()
        guard.after_step()
    certificate = guard.end_task("one", scored_batches(dtype=dtype))
    assert certificate.kept is (True if name in ("ftp", "tpgm") else None)
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(math.isfinite(one.frobenius) for one in certificate.deviations)


@pytest.mark.parametrize("norm", ["rows", "tensor"])
def test_one_row_outside_its_radius_breaks_the_promise(norm):
    model = mlp(DOUBLE)
    guard = FTP(norm=norm)
    guard.attach(model)
    train(model, guard)
    assert guard.end_task("one").kept
    name, weight = next((n, p) for n, p in model.named_parameters() if p.ndim == 2)
    with torch.no_grad():  # one row alone is 1.5 radii away: the whole is still less than radius * sqrt(rows)
        weight.copy_(guard.state_dict()["anchors"][name])
        weight[0, 0] += 1.5 * guard.radii[name]
    certificate = guard.end_task("two")
    (broken,) = [one for one in certificate.deviations if one.kept is False]
    assert broken.name == name
    assert certificate.kept is False


@pytest.mark.parametrize("name", ALL)
def test_odd_shapes(name):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.empty = nn.Parameter(torch.zeros(0, 4))
            self.hollow = nn.Parameter(torch.zeros(4, 0))
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            self.unused = nn.Parameter(torch.randn(3))
            self.table = nn.Embedding(6, 5)
            self.tied = self.table

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            out = self.scale * self.conv(self.tied(x)[:, None]).mean(1) + self.empty.sum() + self.hollow.sum()
            return {"loss": (out - 3).square().mean()}

    torch.manual_seed(0)
    model = Odd()
    guard = ALL[name]()
    guard.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [{"x": torch.randint(0, 5, (4, 7)), "labels": torch.zeros(4)} for _ in range(5)]
    for batch in data:
        optimizer.zero_grad()
        (model(**batch)["loss"] + (guard.loss(None, {}) or 0.0)).backward()
        guard.before_step()
        optimizer.step()
        guard.after_step()
    certificate = guard.end_task("one", data)
    assert certificate.kept is not False
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert len([d for d in certificate.deviations if d.name.startswith(("table", "tied"))]) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2SP(-1), r"L2SP\(weight=-1\): must be a number, at least 0"),
        (lambda: SPD(math.nan), r"SPD\(weight=nan\)"),
        (lambda: SPD(True), r"SPD\(weight=True\)"),
        (lambda: FTP(0.0), r"FTP\(mu=0.0\): must be above 0"),
        (lambda: FTP("1"), r"FTP\(mu='1'\): must be a number"),
        (lambda: FTP(math.inf), r"FTP\(mu=inf\)"),
        (lambda: FTP(kappa=1.5), r"FTP\(kappa=1.5\): must be a number, between 0 and 1"),
        (lambda: FTP(norm="row"), r"FTP\(norm='row'\): did you mean 'rows'"),
        (lambda: TPGM(0), r"TPGM\(iterations=0\): must be a whole number, at least 1"),
        (lambda: TPGM(2.0), r"TPGM\(iterations=2.0\)"),
        (lambda: TPGM(samples=0), r"TPGM\(samples=0\)"),
        (lambda: TPGM(norm="l2"), r"TPGM\(norm='l2'\)"),
        (lambda: TPGM(mu=-1), r"TPGM\(mu=-1\)"),
    ],
)
def test_bad_settings_are_told(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", ALL)
def test_settings_make_the_same_guard_again(name):
    guard = ALL[name]()
    again = type(guard)(**guard.settings())
    assert again.settings() == guard.settings()
    assert guard.settings()["exclude"] is None


def test_a_state_of_another_model_is_refused():
    guard, other = FTP(exclude=None), FTP(exclude=None)
    guard.attach(mlp())
    other.load_state_dict(guard.state_dict())
    with pytest.raises(GuardError, match=r"ftp: the state is about 6 tensors, and 6 of them are not in this model"):
        other.attach(lora_mlp())


def test_a_lora_whose_b_is_zero_is_measured_from_zero_after_training_too():
    model = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0"]))
    guard = SPD(exclude=None)
    guard.attach(model)
    train(model, guard, 3)
    model.base_model.model[0].lora_A.default.weight.requires_grad_(False)
    guard.attach(model)  # looked at anew
    b = next(t for t in guard._attached() if "lora_B" in t.name)
    assert torch.equal(b.delta(), model.base_model.model[0].lora_B.default.weight)


@pytest.mark.parametrize("name", ["ftp", "spd"])
def test_a_step_has_two_halves(name):
    guard = ALL[name]()
    with pytest.raises(GuardError, match="is not attached"):
        guard.before_step()
    guard.attach(mlp())
    with pytest.raises(GuardError, match=rf"{name.upper()}.after_step without before_step"):
        guard.after_step()
    guard.before_step()  # no tensor has a gradient
    guard.after_step()


def test_tpgm_leaves_alone_what_the_validation_loss_does_not_depend_on():
    """A task of one class has a constant loss: halving what earlier tasks learned is not what it asks for."""

    class Constant(Scored):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"loss": 0.0 * self.inner(x).sum()}

    model = Constant(mlp())
    guard = TPGM(3, exclude=None)
    guard.attach(model)
    train(model.inner, None, 3)
    trained = copy.deepcopy(model)
    certificate = guard.end_task("one", scored_batches(dtype=torch.float32))
    assert same(model, trained)
    assert certificate.kept


@pytest.mark.parametrize("name", ALL)
def test_a_memory_on_disk_goes_on_in_a_new_guard(name, tmp_path):
    model = Scored(mlp(DOUBLE))
    guard = ALL[name]()
    guard.attach(model)
    train(model.inner, guard, 5)
    guard.end_task("one", scored_batches())
    guard.save_pretrained(tmp_path)
    again = type(guard).load_pretrained(tmp_path, model)
    assert again.settings() == guard.settings()
    assert again.tasks == ["one"]
    one, two = model, copy.deepcopy(model)
    again.attach(two)  # another model: its own anchors; the state brings those of the first
    again.load_state_dict(guard.state_dict())
    for net, one_guard in ((one, guard), (two, again)):
        train(net.inner, one_guard, 4)
    assert same(one, two)
    with pytest.raises(DataError, match="holds the memory of the guard"):
        next(type(ALL[n]()) for n in ALL if n != name).load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["ftp", "spd"])
def test_sparse_gradients_count_as_dense_ones(name):
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(8, 5, sparse=sparse)
        guard = ALL[name]()
        guard.attach(table)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
        for step in range(6):
            optimizer.zero_grad()
            (table(torch.tensor([1, 2, 2, step])) - (1 if step < 3 else -1)).square().mean().backward()
            guard.before_step()
            optimizer.step()
            guard.after_step()
        ends.append(table.weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_weights_that_changed_their_place_are_looked_at_anew():
    model = mlp()
    guard = SPD(exclude=None)
    guard.attach(model)
    start = model[0].weight.detach().clone()
    model.to(DOUBLE)
    guard.attach(model)
    (one,) = [t for t in guard._attached() if t.name == "0.weight"]
    assert one.parameter.dtype == DOUBLE
    assert one.delta().dtype == DOUBLE
    assert float(one.delta().norm()) == 0.0
    assert torch.equal(one.anchor.float(), start)
