"""GORP beside its slow float64 twin: 100 steps, memory on, every rule and side."""

from __future__ import annotations

import pytest
import torch
from optim_helpers import PAIRS, orthonormal, parameters, spectrum_gradients
from reference_gorp import ReferenceGORP

from growthring.optim import GORP
from growthring.subspace import Subspace

SHAPES = [(14, 9), (9, 14), (14, 9)]
STEPS = 100
# (columns in R^n, columns in R^m) protected for each matrix: both sides, input side, output side
MEMORY = [(3, 4), (4, 0), (0, 3)]


def memory_of(shapes, counts=MEMORY):
    columns = {}
    for i, ((m, n), (k_in, k_out)) in enumerate(zip(shapes, counts, strict=True)):
        columns[i] = (
            orthonormal(n, k_in, seed=100 + i) if k_in else None,
            orthonormal(m, k_out, seed=200 + i) if k_out else None,
        )
    return columns


def spaces_of(params, columns):
    def space(basis):
        return None if basis is None else Subspace(basis.shape[0], basis, dtype=torch.float64)

    return {params[i]: (space(a), space(b)) for i, (a, b) in columns.items() if a is not None or b is not None}


def first_bases(optimizer, params, side_of):
    """The bases the real optimizer started from, as the twin takes them: ``(in R^n, in R^m)``."""
    found = []
    for i, p in enumerate(params):
        state = optimizer.state[p]
        side = side_of(i)
        basis = state["basis"].clone()
        found.append({
            "right": (basis, None),
            "left": (None, basis),
            "two-sided": (basis, None),
        }[side])  # fmt: skip
    return found


def compare(settings, *, memory=True, exact=True, shapes=SHAPES, steps=STEPS, limit=1e-6, finder="full"):
    """Step both side by side; returns the worst relative distance of the whole update, for controls."""
    params = parameters(shapes)
    start = [p.detach().clone() for p in params]
    series = [spectrum_gradients(s, steps, seed=7 + i) for i, s in enumerate(shapes)]
    real = GORP(params, lr=0.02, rank=3, range_finder=finder, **settings)
    twin = ReferenceGORP(params, lr=0.02, rank=3, warm=finder == "warm", **settings)
    if memory:
        columns = memory_of(shapes)
        real.protect(spaces_of(params, columns), exact=exact)
        twin.protect(columns, exact=exact)
    worst = 0.0
    for k in range(steps):
        gradients = [s[k] for s in series]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        real.step()
        twin.step(gradients, first=first_bases(real, params, twin.side_of) if finder == "warm" and k == 0 else None)
        if k in (0, 1, steps // 2, steps - 1):
            for p, w, w0 in zip(params, twin.weights, start, strict=True):
                distance = float((p.detach() - w).norm() / (w - w0).norm())
                worst = max(worst, distance)
                assert distance <= limit, (k, tuple(p.shape), distance)
    return worst


CASES = [(*pair, refresh) for pair in PAIRS for refresh in (1, 3, 10)]


@pytest.mark.parametrize(("rule", "side", "refresh"), CASES)
def test_twin_agrees_with_memory_on(rule, side, refresh):
    number = CASES.index((rule, side, refresh))
    compare({
        "rule": rule, "side": side, "refresh": refresh,
        "rotate": number % 2 == 0, "weight_decay": 0.1 if number % 4 < 2 else 0.0, "scale": 0.5,
    })  # fmt: skip


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("stagger", [True, False])
def test_twin_agrees_for_every_switch(rotate, weight_decay, stagger):
    compare({"rotate": rotate, "weight_decay": weight_decay, "stagger": stagger, "refresh": 3})


@pytest.mark.parametrize(("rule", "side"), PAIRS)
def test_twin_agrees_without_memory(rule, side):
    compare({"rule": rule, "side": side, "refresh": 10, "weight_decay": 0.05}, memory=False, steps=40)


@pytest.mark.parametrize(("rule", "side"), PAIRS)
def test_twin_agrees_with_the_published_sweep(rule, side):
    compare({"rule": rule, "side": side, "refresh": 10, "weight_decay": 0.05}, exact=False, steps=40)


@pytest.mark.parametrize("side", ["auto", "two-sided"])
@pytest.mark.parametrize("refresh", [1, 3, 10])
def test_twin_agrees_for_the_warm_range_finder(side, refresh):
    compare({"side": side, "refresh": refresh}, finder="warm")


@pytest.mark.parametrize("side", ["auto", "two-sided"])
def test_twin_agrees_for_the_gram_range_finder(side):
    compare({"side": side, "refresh": 3}, finder="gram")


@pytest.mark.parametrize(("rule", "side"), PAIRS)
def test_twin_agrees_when_the_memory_changes_in_the_middle(rule, side):
    """A task ends: new directions are protected off a refresh boundary, and later all of it is lifted."""
    params = parameters(SHAPES)
    start = [p.detach().clone() for p in params]
    series = [spectrum_gradients(s, 40, seed=7 + i) for i, s in enumerate(SHAPES)]
    settings = {"rule": rule, "side": side, "refresh": 7, "weight_decay": 0.1}
    real = GORP(params, lr=0.02, rank=3, range_finder="full", **settings)
    twin = ReferenceGORP(params, lr=0.02, rank=3, **settings)
    for k in range(40):
        if k in (5, 18, 31):
            columns = {5: memory_of(SHAPES, [(2, 0), (0, 2), (1, 1)]), 18: memory_of(SHAPES), 31: {}}[k]
            real.protect(spaces_of(params, columns))
            twin.protect(columns)
        gradients = [s[k] for s in series]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        real.step()
        twin.step(gradients)
        for p, w, w0 in zip(params, twin.weights, start, strict=True):
            distance = float((p.detach() - w).norm() / (w - w0).norm())
            assert distance <= 1e-6, (k, tuple(p.shape), distance)


@pytest.mark.parametrize("change", [
    {"rotate": False}, {"refresh": 4}, {"eps": 1e-3}, {"stagger": False}, {"scale": 0.501}, {"betas": (0.9, 0.99)},
])  # fmt: skip
def test_twin_would_notice(change):
    """Negative control: a twin that differs in one setting is far beyond the limit."""
    settings = {"rotate": True, "refresh": 3, "eps": 1e-8, "stagger": True, "scale": 0.5, "betas": (0.9, 0.999)}
    params = parameters(SHAPES)
    series = [spectrum_gradients(s, 12, seed=7 + i) for i, s in enumerate(SHAPES)]
    real = GORP(params, lr=0.02, rank=3, range_finder="full", **settings)
    twin = ReferenceGORP(params, lr=0.02, rank=3, **{**settings, **change})
    start = list(twin.weights)
    for k in range(12):
        gradients = [s[k] for s in series]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        real.step()
        twin.step(gradients)
    distances = [
        float((p.detach() - w).norm() / (w - w0).norm()) for p, w, w0 in zip(params, twin.weights, start, strict=True)
    ]
    assert max(distances) > 1e-5
