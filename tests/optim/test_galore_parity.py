"""``GaLore`` beside the installed galore-torch 1.0, step for step; and what galore-torch gets wrong."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types

import pytest
import torch
from optim_helpers import parameters, spectrum_gradients

from growthring.optim import GaLore

STAND_INS = ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer", "tensorly")


@pytest.fixture(scope="module")
def galore_torch():
    """The package, imported with empty stand-ins for what its AdamW does not use; they are taken away at once."""
    if importlib.util.find_spec("galore_torch") is None:
        pytest.skip("galore-torch is not installed: pip install --no-deps galore-torch==1.0")
    importlib.import_module("transformers.utils.versions")  # what it needs must not find the stand-ins
    before, put_in = set(sys.modules), []
    for name in STAND_INS:
        root = name.partition(".")[0]
        if root in put_in or importlib.util.find_spec(root) is None:
            sys.modules[name] = types.ModuleType(name)
            put_in.append(name)
    if "bitsandbytes.optim.optimizer" in put_in:
        sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = torch.optim.Optimizer
    try:
        package = importlib.import_module("galore_torch")
    finally:
        for name in put_in:
            del sys.modules[name]
    yield package
    for name in [n for n in sys.modules if n.split(".")[0] == "galore_torch" and n not in before]:
        del sys.modules[name]


def theirs(galore_torch, params, plain, *, rank, refresh, scale=0.25, proj_type="std", **settings):
    projected = {
        "params": params, "rank": rank, "update_proj_gap": refresh, "scale": scale, "proj_type": proj_type,
    }  # fmt: skip
    groups = [projected, {"params": plain}] if plain else [projected]
    return galore_torch.GaLoreAdamW(groups, no_deprecation_warning=True, **settings)


def twice(shapes, seed=0):
    return tuple(parameters(shapes, seed=seed, dtype=torch.float32, size=0.1) for _ in range(2))


def step_both(one, two, ours, their, shapes, steps, limit=2e-5, seed=3):
    """Same gradients into both; the distance is relative to the whole update, and looked at after every step."""
    start = [p.detach().clone() for p in one]
    series = [
        spectrum_gradients(s, steps, seed=seed + i, dtype=torch.float32) if len(s) == 2
        else [torch.randn(s, generator=torch.Generator().manual_seed(100 * i + k)) for k in range(steps)]
        for i, s in enumerate(shapes)
    ]  # fmt: skip
    worst = 0.0
    for k in range(steps):
        for i, (p, q) in enumerate(zip(one, two, strict=True)):
            p.grad, q.grad = series[i][k].clone(), series[i][k].clone()
        ours.step()
        their.step()
        for p, q, w0 in zip(one, two, start, strict=True):
            distance = float((p.detach() - q.detach()).norm() / (q.detach() - w0).norm())
            worst = max(worst, distance)
            assert distance <= limit, (k, tuple(p.shape), distance)
    return worst


def test_the_package_is_the_one_we_compare_with(galore_torch):
    assert importlib.metadata.version("galore-torch") == "1.0"
    assert galore_torch.GaLoreAdamW.__name__ == "AdamW"


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_agrees_over_refreshes(galore_torch, shape, weight_decay):
    shapes = [shape, shape]
    one, two = twice(shapes)
    settings = {"lr": 0.01, "weight_decay": weight_decay}
    ours = GaLore(one, rank=4, refresh=5, **settings)
    their = theirs(galore_torch, two, [], rank=4, refresh=5, **settings)
    step_both(one, two, ours, their, shapes, steps=23)


def test_agrees_with_other_betas_eps_and_scale(galore_torch):
    shapes = [(24, 16), (16, 24)]
    one, two = twice(shapes)
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4}
    ours = GaLore(one, rank=3, refresh=4, scale=2.0, **settings)
    their = theirs(galore_torch, two, [], rank=3, refresh=4, scale=2.0, **settings)
    step_both(one, two, ours, their, shapes, steps=13)


def test_agrees_with_a_plain_group_beside_it(galore_torch):
    shapes = [(24, 16), (16,), (8, 8)]
    one, two = twice(shapes)
    settings = {"lr": 0.01, "weight_decay": 0.1}
    groups = [{"params": one[:1]}, {"params": one[1:], "rank": None}]
    ours = GaLore(groups, rank=4, refresh=5, **settings)
    their = theirs(galore_torch, two[:1], two[1:], rank=4, refresh=5, **settings)
    step_both(one, two, ours, their, shapes, steps=13)


def test_preset_defaults_are_theirs(galore_torch):
    """README and GaLore paper: rank 128, T 200, scale 0.25; the optimizer's own betas, eps and decay."""
    shapes = [(160, 140)]
    one, two = twice(shapes)
    ours = GaLore(one, 0.01)
    their = theirs(galore_torch, two, [], rank=128, refresh=200, lr=0.01)
    step_both(one, two, ours, their, shapes, steps=3)
    assert ours.param_groups[0]["eps"] == their.param_groups[0]["eps"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_agrees_for_a_chosen_side(galore_torch, side, shape):
    one, two = twice([shape])
    ours = GaLore(one, 0.01, rank=4, refresh=5, side=side)
    their = theirs(galore_torch, two, [], rank=4, refresh=5, proj_type=side, lr=0.01)
    step_both(one, two, ours, their, [shape], steps=13)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_agrees_with_their_full_on_both_sides(galore_torch, shape):
    """``proj_type="full"``. Beside its diagonal the first gradient's coordinates are rounding, which Adam enlarges."""
    one, two = twice([shape])
    ours = GaLore(one, 0.01, rank=4, refresh=5, side="two-sided")
    their = theirs(galore_torch, two, [], rank=4, refresh=5, proj_type="full", lr=0.01)
    step_both(one, two, ours, their, [shape], steps=13, limit=3e-2)


def test_would_notice_another_refresh(galore_torch):
    one, two = twice([(24, 16)])
    ours = GaLore(one, 0.01, rank=4, refresh=5)
    their = theirs(galore_torch, two, [], rank=4, refresh=6, lr=0.01)
    with pytest.raises(AssertionError, match=r"\(5, \(24, 16\)"):
        step_both(one, two, ours, their, [(24, 16)], steps=13)


# --- where galore-torch is wrong, and we are not --------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rank"), [((8, 24), 8), ((64, 256), 128)])
def test_theirs_crashes_for_reverse_std_with_a_rank_of_the_short_side(galore_torch, shape, rank):
    """Their direction is guessed from the projected shape; ours is stored."""
    one, two = twice([shape])
    their = theirs(galore_torch, two, [], rank=rank, refresh=5, proj_type="reverse_std", lr=0.01)
    (g,) = spectrum_gradients(shape, 1, dtype=torch.float32)
    one[0].grad, two[0].grad = g.clone(), g.clone()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        their.step()
    before = one[0].detach().clone()
    GaLore(one, 0.01, rank=min(rank, *shape), refresh=5, side="right").step()
    assert torch.isfinite(one[0]).all()
    assert not torch.equal(one[0], before)


def test_theirs_cannot_take_more_than_two_dimensions(galore_torch):
    one, two = twice([(8, 6, 3, 3)])
    their = theirs(galore_torch, two, [], rank=4, refresh=5, lr=0.01)
    two[0].grad = torch.randn(8, 6, 3, 3)
    with pytest.raises(RuntimeError):
        their.step()
    ours = GaLore(one, 0.01, rank=4, refresh=5)
    one[0].grad = torch.randn(8, 6, 3, 3)
    before = one[0].detach().clone()
    ours.step()
    assert torch.linalg.matrix_rank((one[0].detach() - before).reshape(8, -1).double(), rtol=1e-3) == 4


def test_theirs_does_not_load_its_own_state_safely(galore_torch, tmp_path):
    one, two = twice([(24, 16)])
    their = theirs(galore_torch, two, [], rank=4, refresh=5, lr=0.01)
    ours = GaLore(one, 0.01, rank=4, refresh=5)
    for p, optimizer in ((one[0], ours), (two[0], their)):
        p.grad = torch.ones(24, 16)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / f"{type(optimizer).__name__}.pt")
    with pytest.raises(Exception, match="GaLoreProjector"):
        torch.load(tmp_path / "AdamW.pt", weights_only=True)
    assert torch.load(tmp_path / "GaLore.pt", weights_only=True)["state"]


def test_theirs_stops_at_a_gradient_that_is_not_finite(galore_torch):
    one, two = twice([(24, 16)])
    bad = torch.full((24, 16), float("nan"))
    their = theirs(galore_torch, two, [], rank=4, refresh=5, lr=0.01)
    two[0].grad = bad.clone()
    with pytest.raises(RuntimeError):
        their.step()
    ours = GaLore(one, 0.01, rank=4, refresh=5)
    one[0].grad = bad.clone()
    with pytest.warns(UserWarning, match="skipped"):
        ours.step()
    assert torch.isfinite(one[0]).all()
