"""Whatever the shape, rank, side, rule and finder: what must hold of a step."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optim_helpers import orthonormal
from torch import nn

from growthring.optim import GORP
from growthring.subspace import RANGE_FINDERS, Subspace

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@st.composite
def situations(draw):
    m, n = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    side = draw(st.sampled_from(["auto", "right", "left", "two-sided"]))
    rules = ["adam", "momentum", "adafactor"] + ([] if side == "two-sided" else ["shared"])
    return {
        "shape": (m, n),
        "inside": draw(st.integers(0, n)),
        "outside": draw(st.integers(0, m)),
        "seed": draw(st.integers(0, 1000)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "when": draw(st.integers(0, 3)),
        "options": {
            "rank": draw(st.integers(1, min(m, n))),
            "refresh": draw(st.integers(1, 4)),
            "side": side,
            "rule": draw(st.sampled_from(rules)),
            "range_finder": draw(st.sampled_from(RANGE_FINDERS)),
            "rotate": draw(st.booleans()),
            "stagger": draw(st.booleans()),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "scale": draw(st.sampled_from([0.25, 1.0])),
        },
    }


def gradient(situation, k):
    generator = torch.Generator().manual_seed(situation["seed"] * 100 + k)
    return torch.randn(situation["shape"], generator=generator, dtype=torch.float64).to(situation["dtype"])


@QUICK
@given(situations())
def test_every_step_is_finite_low_rank_and_outside_what_is_protected(situation):
    m, n = situation["shape"]
    p = nn.Parameter(gradient(situation, 99))
    optimizer = GORP([p], lr=0.1, **situation["options"])
    inside = Subspace(n, orthonormal(n, situation["inside"], seed=1), dtype=torch.float64)
    outside = Subspace(m, orthonormal(m, situation["outside"], seed=2), dtype=torch.float64)
    rank = situation["options"]["rank"]
    for k in range(7):
        if k == situation["when"]:
            assert optimizer.protect({p: (inside, outside)}) == {p}
        before = p.detach().clone()
        p.grad = gradient(situation, k)
        optimizer.step()
        delta = p.detach() - before
        assert torch.isfinite(p).all()
        size = float(delta.norm())
        if k >= situation["when"] and size > 0:
            rounding = 8 * torch.finfo(p.dtype).eps * float(before.norm())
            assert inside.share(delta) * size <= 1e-5 * size + rounding
            assert outside.share(delta.mT) * size <= 1e-5 * size + rounding
        if not situation["options"]["weight_decay"] and size > 0:
            values = torch.linalg.svdvals(delta.double())
            assert float(values[rank:].norm()) <= 1e-5 * size + 8 * torch.finfo(p.dtype).eps * float(before.norm())
    state = optimizer.state[p]
    for key in ("basis", "basis_out"):
        if key in state:
            gram = state[key].mT @ state[key]
            free = gram.diagonal() > 0.5  # where fewer than r directions are free the last columns are zero
            assert (gram - torch.diag(free.to(gram))).abs().max() < 1e-5
    assert all(torch.isfinite(v).all() for v in state.values())


@QUICK
@given(situations())
def test_a_transposed_problem_has_the_transposed_solution(situation):
    """Left of W is right of W^T: one code path, whatever the side."""
    m, n = situation["shape"]
    side = situation["options"]["side"]
    if m == n and side == "auto":
        return  # both are on the right, and the transposed problem has another solution
    swap = {"auto": "auto", "right": "left", "left": "right"}
    if side not in swap:
        return
    start = gradient(situation, 99).double()
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.mT.contiguous())
    options = situation["options"] | {"range_finder": "full"}
    one, two = GORP([p], lr=0.1, **options), GORP([q], lr=0.1, **options | {"side": swap[side]})
    inside = Subspace(n, orthonormal(n, situation["inside"] // 2, seed=1), dtype=torch.float64)
    one.protect({p: (inside, None)})
    two.protect({q: (None, inside)})
    for k in range(5):
        g = gradient(situation, k).double()
        p.grad, q.grad = g, g.mT.contiguous()
        one.step()
        two.step()
    if inside.free >= options["rank"]:
        torch.testing.assert_close(p.detach(), q.detach().mT, rtol=1e-6, atol=1e-8)
