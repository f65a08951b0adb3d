"""O-LoRA: its penalty is the published one, it pulls branches apart, and it claims no more than it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from branch_helpers import branch, learn, training
from guard_helpers import OPTIMIZERS, answer, change, default_loss, fit, lora_bert, lora_mlp, rows, tokens, trainable
from reference_olora import penalty
from torch import Tensor, nn

from growthring.errors import ConfigError, GuardError
from growthring.guards import InfLoRA, OLoRA
from growthring.guards.base import GuardCallback

DOUBLE = torch.float64
OLD, NEW = rows(24, 20, 1), rows(24, 20, 2)


def rows_of(model: nn.Module, *names: str) -> list[list[Tensor]]:
    """``A`` by layer, of each named branch."""
    by_branch = [list(branch(model, name, "A").values()) for name in names]
    return [list(layer) for layer in zip(*by_branch, strict=True)]


def with_penalty(guard: OLoRA) -> Any:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        term = guard.loss(None, {})
        return default_loss(model, batch) + (0.0 if term is None else term)

    return loss


def second_task(guard: OLoRA, model: nn.Module, **settings: Any) -> Any:
    learn(guard, model, "old", OLD)
    guard.prepare("new", [])
    guard.begin_task()
    fit(model, NEW, guard, loss_of=with_penalty(guard), **{"steps": 60, **settings})
    return guard.end_task("new", [])


# --- the penalty ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l1", "squared"])
@pytest.mark.parametrize("make", [lambda: lora_mlp(DOUBLE, r=3), lambda: lora_bert(r=2)], ids=["mlp", "bert"])
def test_the_penalty_is_the_twins(make: Any, norm: str) -> None:
    guard, model = OLoRA(0.25, norm=norm), make()
    guard.attach(model)
    for name in ("one", "two", "three"):
        guard.prepare(name, [])
        guard.begin_task(name)
        if name != "three":
            fill(model, guard)
            guard.end_task(name, [])
    new = [a for (a,) in rows_of(model, "task-002")]
    old = [[a.detach() for a in layer] for layer in rows_of(model, "task-000", "task-001")]
    expected = 0.25 * penalty(old, new, norm)
    assert float(guard.loss(None, {}).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    wanted = torch.autograd.grad(expected, new)
    got = torch.autograd.grad(guard.loss(None, {}), new)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(got, wanted, strict=True))


def fill(model: nn.Module, guard: OLoRA) -> None:
    """Give the branch something to be there for."""
    with torch.no_grad():
        for b in branch(model, guard.current, "B").values():
            b.add_(0.01)


@pytest.mark.parametrize("norm", ["l1", "squared"])
def test_training_equals_the_twin_step_by_step(norm: str) -> None:
    fast, slow = lora_mlp(DOUBLE, r=3), lora_mlp(DOUBLE, r=3)
    guards = [OLoRA(0.3, norm=norm), OLoRA(0.3, norm=norm)]
    for guard, model in zip(guards, (fast, slow), strict=True):
        learn(guard, model, "old", OLD.double())
        torch.manual_seed(5)
        guard.prepare("new", [])
        guard.begin_task()
    old = [[a.detach().clone() for a in layer] for layer in rows_of(slow, "task-000")]

    def plain(model: nn.Module, batch: Any) -> Tensor:
        return default_loss(model, batch) + 0.3 * penalty(old, [a for (a,) in rows_of(model, "task-001")], norm)

    a = fit(fast, NEW.double(), guards[0], steps=15, loss_of=with_penalty(guards[0]))
    b = fit(slow, NEW.double(), steps=15, loss_of=plain)
    assert a == pytest.approx(b, rel=1e-9)
    assert change(answer(fast, OLD.double()), answer(slow, OLD.double())) <= 1e-9


def test_the_first_task_is_plain_lora_bit_for_bit() -> None:
    plain, model, guard = lora_mlp(r=4), lora_mlp(r=4), OLoRA()
    fit(plain, OLD, steps=20)
    guard.attach(model)
    guard.prepare("one", [])
    guard.begin_task()
    assert guard.loss(None, {}) is None
    fit(model, OLD, guard, steps=20, loss_of=with_penalty(guard))
    assert torch.equal(answer(model, NEW), answer(plain, NEW))


def test_it_pulls_branches_apart() -> None:
    left = {}
    for weight in (0.0, 5.0):
        model = lora_mlp(r=4)
        certificate = second_task(OLoRA(weight), model, steps=200)
        left[weight] = max(s.leak for s in certificate.sites)
        assert certificate.sites[0].rank == 8
    assert left[5.0] < 0.2 * left[0.0]


def test_it_is_no_guarantee() -> None:
    """However orthogonal the branches, old inputs are not spared: that is what InfLoRA is for."""
    model = lora_mlp(r=4)
    guard = OLoRA(5.0)
    learn(guard, model, "old", OLD)
    before = answer(model, OLD)
    guard.prepare("new", [])
    guard.begin_task()
    fit(model, NEW, guard, steps=150, loss_of=with_penalty(guard))
    certificate = guard.end_task("new", [])
    assert change(answer(model, OLD), before) > 1e-2
    assert certificate.kept is None
    assert certificate.leak is None
    assert certificate.energy == 0.0


def test_the_overlap_is_measured() -> None:
    model, guard = lora_mlp(r=3), OLoRA(0.1)
    certificate = second_task(guard, model)
    old, new = ([a.detach() for a in branch(model, name, "A").values()] for name in ("task-000", "task-001"))
    for site, a, b, o in zip(certificate.sites, new, branch(model, "task-001", "B").values(), old, strict=True):
        q = torch.linalg.qr(o.T)[0]
        update = (b @ a).detach()
        assert site.leak == pytest.approx(float((update @ q).norm() / update.norm()), rel=1e-4)
    total = sum(float((o.double() @ a.double().T).abs().sum()) for o, a in zip(old, new, strict=True))
    assert f"sum to {total:.3g}" in certificate.notes[0]


def test_a_lora_that_the_model_brings_along_is_an_earlier_task() -> None:
    model, guard = lora_mlp(r=4), OLoRA()
    fit(model, OLD, steps=20)
    before = answer(model, OLD)
    guard.attach(model)
    guard.prepare("new", [])
    assert torch.equal(answer(model, OLD), before)
    assert sorted(model.active_adapters) == ["default", "task-000"]
    assert all("task-000" in n for n in training(model))
    assert float(guard.loss(None, {}).detach()) > 0.0


# --- where the penalty comes in -------------------------------------------------------------------------------------


def test_the_gradient_way_equals_the_loss_way() -> None:
    weights = []
    for by_loss in (True, False):
        model, guard = lora_mlp(DOUBLE, r=3), OLoRA(0.3)
        learn(guard, model, "old", OLD.double())
        torch.manual_seed(1)
        guard.prepare("new", [])
        guard.begin_task()
        callback, optimizer = guard.callback(loss_added=by_loss), OPTIMIZERS["adamw"](trainable(model))
        for _ in range(10):
            optimizer.zero_grad()
            (with_penalty(guard) if by_loss else default_loss)(model, NEW.double()).backward()
            callback.on_pre_optimizer_step(None, None, None)
            optimizer.step()
            callback.on_optimizer_step(None, None, None)
        weights.append(answer(model, NEW.double()))
    assert change(*weights) <= 1e-12


def test_callbacks() -> None:
    guard = OLoRA()
    assert type(guard.callback(loss_added=True)) is GuardCallback
    assert type(guard.callback()) is not GuardCallback


def test_the_gradient_where_the_loss_left_none() -> None:
    model, guard = lora_mlp(r=2), OLoRA()
    learn(guard, model, "old", OLD)
    guard.prepare("new", [])
    guard.add_gradient()
    assert all(float(a.grad.norm()) > 0 for a in branch(model, "task-001", "A").values())


def test_half_precision_autocast() -> None:
    model, guard = lora_bert(r=2), OLoRA()
    learn(guard, model, "old", tokens(4, 6, 1), steps=3)
    guard.prepare("new", [])
    guard.begin_task()
    full = guard.loss(None, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(guard.loss(None, {}), full)


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "0.5", True, None], ids=str)
def test_bad_weights(weight: Any) -> None:
    with pytest.raises(ConfigError, match="weight"):
        OLoRA(weight)


def test_bad_norm() -> None:
    with pytest.raises(ConfigError, match="squared"):
        OLoRA(norm="square")


def test_between_tasks_there_is_nothing_to_add() -> None:
    model, guard = lora_mlp(r=2), OLoRA()
    learn(guard, model, "old", OLD)
    assert guard.loss(None, {}) is None
    guard.add_gradient()


def test_without_a_branch() -> None:
    """A reference set before the first task: nothing of the data is kept, and that is said by an energy of 0."""
    model, guard = lora_mlp(), OLoRA()
    guard.attach(model)
    certificate = guard.end_task("reference", [OLD])
    assert certificate.sites == ()
    assert certificate.energy == 0.0
    with pytest.raises(GuardError, match="no branch yet"):
        guard.begin_task()


def test_a_memory_of_the_other_guard(tmp_path: Path) -> None:
    model, guard = lora_mlp(r=2), OLoRA()
    learn(guard, model, "old", OLD)
    guard.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="o-lora"):
        InfLoRA.load_pretrained(tmp_path)
