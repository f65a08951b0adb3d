"""The doors for guards, ``protect`` and ``observe``, and the rule through ``torch.compile``."""

from __future__ import annotations

import functools
import shutil
import warnings

import pytest
import torch
from optim_helpers import gradients, matrix, orthonormal, parameters, run, snapshot
from torch import nn

from growthring.errors import ConfigError
from growthring.optim import GORP, GaLore
from growthring.subspace import Subspace

# --- protect, observe ------------------------------------------------------------------------------------------------


def test_protect_takes_what_is_projected_and_names_it():
    p, small, plain, frozen = matrix(), matrix(2, 30), nn.Parameter(torch.zeros(8)), matrix(seed=3)
    frozen.requires_grad_(False)
    optimizer = GORP([p, small, plain, frozen], rank=3)
    spaces = {
        q: (Subspace(q.shape[-1], orthonormal(q.shape[-1], 2, dtype=torch.float32)), None)
        for q in (p, small, plain, frozen)
    }
    assert optimizer.protect(spaces) == {p}
    assert optimizer.protect({}) == set()
    assert optimizer.protect({matrix(seed=9): (None, None)}) == set()


def test_protect_refuses_a_space_that_does_not_fit():
    p = matrix()
    optimizer = GORP([p], rank=3)
    with pytest.raises(ConfigError, match=r"\(12, 8\).*R\^12"):
        optimizer.protect({p: (Subspace(12), None)})
    with pytest.raises(ConfigError, match=r"\(12, 8\).*R\^8"):
        optimizer.protect({p: (None, Subspace(8))})


def test_protect_of_a_conv_weight_uses_the_matrix_view():
    p = nn.Parameter(torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
    inside = Subspace(27, orthonormal(27, 5, dtype=torch.float32))
    optimizer = GORP([p], lr=0.1, rank=3, refresh=2, weight_decay=0.5)
    assert optimizer.protect({p: (inside, None)}) == {p}
    before = p.detach().clone()
    run(optimizer, [p], [gradients((8, 3, 3, 3), 7)])
    assert inside.share((p.detach() - before).reshape(8, 27)) < 1e-5


def test_protection_is_not_part_of_the_state():
    p = matrix()
    optimizer = GORP([p], rank=3)
    optimizer.protect({p: (Subspace(8, torch.eye(8)[:, :2]), None)})
    optimizer.observe(lambda *_: None)
    run(optimizer, [p], [gradients((12, 8), 2)])
    saved = optimizer.state_dict()
    q = matrix()
    fresh = GORP([q], rank=3)
    run(fresh, [q], [gradients((12, 8), 2)])
    assert set(saved) == set(fresh.state_dict())
    assert set(saved["state"][0]) == set(fresh.state_dict()["state"][0])
    assert set(saved["param_groups"][0]) == set(fresh.state_dict()["param_groups"][0])


def test_an_observer_changes_nothing():
    ends = []
    for observer in (None, lambda *_: None):
        params = parameters([(12, 8), (8, 12)], dtype=torch.float32)
        optimizer = GORP(params, lr=0.05, rank=3, refresh=2)
        optimizer.observe(observer)
        run(optimizer, params, [gradients((12, 8), 5), gradients((8, 12), 5)])
        ends.append(snapshot(params))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_skipped_matrix_is_not_shown_to_the_observer():
    p = matrix()
    optimizer = GORP([p], lr=0.05, rank=3)
    seen = []
    optimizer.observe(lambda q, *_: seen.append(q))
    run(optimizer, [p], [[torch.zeros(12, 8), torch.ones(12, 8)]])  # zero from the start: no fault, no warning
    assert len(seen) == 1


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch):
    """``torch.compile`` that captures graphs as ever and needs no compiler to run them."""
    from growthring.optim import _rules

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    _rules.compiled.cache_clear()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, while it compiles
        yield
    _rules.compiled.cache_clear()
    torch.compiler.reset()


def compiled_and_not(shapes, steps=4, **settings):
    ends = []
    for compiled in (False, True):
        params = parameters(shapes, dtype=torch.float32)
        optimizer = GORP(params, lr=0.05, rank=3, refresh=2, compile=compiled, **settings)
        run(optimizer, params, [gradients(s, steps, seed=i) for i, s in enumerate(shapes)])
        ends.append(snapshot(params))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["adam", "momentum", "adafactor", "shared"])
def test_the_captured_rule_is_the_rule(eager, rule):
    compiled_and_not([(12, 8), (8, 12)], rule=rule)


def test_the_compiled_rule_is_the_rule():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled_and_not([(12, 8)])
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if "compiler" not in str(error).lower():
                raise
            pytest.skip("there is no C++ compiler here")


def test_a_compiled_rule_takes_many_shapes(eager):
    """torch gives up on a function after eight compilations, and with fullgraph=True it raises."""
    compiled_and_not([(8 + k, 8) for k in range(12)], steps=2)


@pytest.mark.parametrize("kind", [GORP, GaLore])
def test_a_compiled_rule_follows_what_a_schedule_changes(eager, kind):
    """OneCycle moves lr and the first beta in every step, and GaLore its eps: none may be a constant of the graph."""
    p = matrix()
    optimizer = kind([p], 0.05, rank=3, compile=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
    before = p.detach().clone()
    for g in gradients((12, 8), 18):
        p.grad = g
        optimizer.step()
        schedule.step()
    assert not torch.equal(p, before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler here")
@pytest.mark.filterwarnings("ignore")  # what the compiler warns of is its own
def test_a_rule_that_is_really_compiled_takes_the_same_steps():
    ends = []
    for compiled in (False, True):
        params = parameters([(12, 8), (8, 12)], dtype=torch.float32)
        optimizer = GORP(params, lr=0.05, rank=3, refresh=2, compile=compiled)
        run(optimizer, params, [gradients((12, 8), 4), gradients((8, 12), 4)])
        ends.append(snapshot(params))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
