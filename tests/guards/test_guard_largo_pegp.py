"""PEGP over LARGO-style layers: what it finds, that it is exact, and that the condition is the right one."""

from __future__ import annotations

import pytest
import torch
from deviation_helpers import KINDS, trainable
from peft import get_peft_model
from torch import nn

from growthring.adapters import LargoConfig
from growthring.guards import PEGP
from growthring.guards.sites import find_sites, unprotected

FORMS = ("delta", "minor", "residual", "product")


def wide(kind, dtype=torch.float64):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 12))
    return get_peft_model(base, KINDS[kind](8)).to(dtype)


def rows(task, dtype=torch.float64):
    return torch.randn(2, 24, generator=torch.Generator().manual_seed(500 + task), dtype=torch.float64).to(dtype)


def learn(model, guard, task, project=True, decay=0.1, steps=12):
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-2, weight_decay=decay)
    guard.attach(model)
    guard.begin_task(str(task))
    for step in range(steps):
        optimizer.zero_grad()
        goal = torch.cos(torch.arange(24.0) + step + task).view(2, 12).to(rows(0))
        (model(rows(task, next(model.parameters()).dtype)) - goal).square().mean().backward()
        if project:
            guard.before_step()
        optimizer.step()
        if project:
            guard.after_step()


@pytest.mark.parametrize("form", FORMS)
def test_both_factors_are_sites(form):
    model = wide(form)
    sites = find_sites(model)
    kinds = [site.kind for site in sites]
    assert kinds == (["largo_B"] * 3 if form == "product" else ["largo_A", "largo_B"] * 3)
    assert unprotected(model, sites) == []
    by_name = {site.name: site for site in sites}
    if form != "product":
        assert by_name["base_model.model.0.largo_A.default.weight"].dim == 24
    assert by_name["base_model.model.0.largo_B.default.weight"].dim == 8
    assert {plan.treatment for plan in PEGP().explain(model)} == {"protected"}


def test_the_factors_of_an_embedding():
    """``dA`` is a table, which no condition holds; ``dB`` sees what it gives."""
    model = get_peft_model(nn.Sequential(nn.Embedding(9, 8)), LargoConfig(r=3, target_modules=["0"]))
    sites = find_sites(model)
    assert [site.kind for site in sites] == ["largo_B"]
    assert unprotected(model, sites) == ["base_model.model.0.largo_embedding_A.default.weight"]


@pytest.mark.parametrize("form", FORMS)
def test_old_outputs_stay_under_adamw_with_decay(form):
    model, guard = wide(form), PEGP(energy=1.0)
    old = {}
    for task in range(3):
        learn(model, guard, task)
        certificate = guard.end_task(str(task), [rows(task)])
        old[task] = model(rows(task)).detach()
        assert certificate.kept is (True if task else None)
        for earlier, output in old.items():
            moved = float((model(rows(earlier)).detach() - output).abs().max() / output.abs().max())
            assert moved < 1e-10
    assert float((model(rows(9)).detach() - wide(form)(rows(9)).detach()).abs().max()) > 1e-3  # it learned


@pytest.mark.parametrize("form", FORMS)
def test_without_the_projection_they_do_not(form):
    model, guard = wide(form), PEGP(energy=1.0)
    learn(model, guard, 0)
    guard.end_task("0", [rows(0)])
    old = model(rows(0)).detach()
    learn(model, guard, 1, project=False)
    assert float((model(rows(0)).detach() - old).abs().max() / old.abs().max()) > 1e-2


def test_features_are_those_that_the_factors_multiply():
    """``x`` for dA, ``(A_0 + dA) x`` for dB: a basis of ``dA x`` alone would let dB move old outputs."""
    model, guard = wide("delta"), PEGP(energy=1.0)
    learn(model, guard, 0)
    guard.end_task("0", [rows(0)])
    layer = model.base_model.model[0]
    x = rows(0)
    u = x @ (layer.largo_A0["default"] + layer.largo_A["default"].weight).detach().T
    for name, seen in (("largo_A", x), ("largo_B", u)):
        space = guard._memory.space(f"base_model.model.0.{name}.default.weight")
        assert float(space.reject(seen.to(space.dtype)).norm() / seen.norm()) < 1e-6


def test_float32_keeps_within_the_limit():
    model, guard = wide("delta", torch.float32), PEGP(energy=1.0)
    for task in range(2):
        learn(model, guard, task)
        certificate = guard.end_task(str(task), [rows(task, torch.float32)])
    assert certificate.kept is True
    assert certificate.leak < 1e-5


def test_energies_can_be_given_for_each_factor():
    model, guard = wide("delta"), PEGP(energy={"largo_A": 0.5, "largo_B": 1.0})
    learn(model, guard, 0)
    sites = guard.end_task("0", [rows(0)]).sites
    assert {s.energy_target for s in sites if s.kind == "largo_A"} == {0.5}
    assert {s.energy_target for s in sites if s.kind == "largo_B"} == {1.0}
