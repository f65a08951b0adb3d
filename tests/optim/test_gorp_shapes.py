"""What is projected and what is plain AdamW's; shapes, layouts and dtypes at the edge of what is taken."""

from __future__ import annotations

import contextlib

import pytest
import torch
from optim_helpers import (
    SIDES,
    gradients,
    matrix,
    orthonormal,
    parameters,
    run,
    snapshot,
    spectrum_gradients,
    tiny_net,
    train,
)
from torch import nn

from growthring.errors import ConfigError
from growthring.optim import GORP
from growthring.subspace import RANGE_FINDERS, Subspace

# --- what is plain AdamW ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_rest_is_adamw_bit_for_bit(dtype):
    """One dimension, below the rank, rank=None: torch's AdamW with its fused kernel, as it is on the CPU."""
    shapes = [(12,), (3, 40), (12, 8), ()]
    settings = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    ours_p, theirs_p, loop_p = (parameters(shapes, dtype=dtype) for _ in range(3))
    groups = [
        {"params": [ours_p[i] for i in (0, 1, 3)] + [matrix(16, 16, dtype)]},
        {"params": [ours_p[2]], "rank": None},
    ]
    ours = GORP(groups, rank=8, **settings)
    theirs = torch.optim.AdamW(theirs_p, fused=True, **settings)
    loop = torch.optim.AdamW(loop_p, **settings)
    series = [[g.to(dtype) for g in gradients(s, 12, seed=i)] for i, s in enumerate(shapes)]
    for optimizer, params in ((ours, ours_p), (theirs, theirs_p), (loop, loop_p)):
        run(optimizer, params, series)
    assert all(torch.equal(a, b) for a, b in zip(ours_p, theirs_p, strict=True))
    if dtype != torch.bfloat16:
        for a, b in zip(ours_p, loop_p, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("odd", ["parameter", "gradient", "expanded gradient"])
def test_the_rest_in_any_layout_is_adamw(odd):
    """torch's fused kernel on the CPU walks memory, not strides: a gradient laid out unlike its weight spoils it."""
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    series = [torch.randn(6, 4, generator=torch.Generator().manual_seed(k)) for k in range(1, 6)]
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    if odd == "parameter":
        p = nn.Parameter(start.t().contiguous().t())
    elif odd == "gradient":
        series = [g.t().contiguous().t() for g in series]
    else:
        series = [g[:, :1].expand(6, 4) for g in series]
    ours, theirs = GORP([p], lr=0.1, rank=None), torch.optim.AdamW([q], lr=0.1, weight_decay=0.0)
    for g in series:
        p.grad, q.grad = g, g.contiguous()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_rank_none_for_the_whole_optimizer_is_adamw():
    model, twin = tiny_net(), tiny_net()
    ours = GORP(model.parameters(), lr=0.01, rank=None, weight_decay=0.1)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    assert train(model, ours, 8) == train(twin, theirs, 8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


# --- shapes ----------------------------------------------------------------------------------------------------------

ODD = [
    (1, 1),
    (1, 7),
    (7, 1),
    (2, 3),
    (3, 2),
    (5, 5),
    (3, 40),
    (40, 3),
    (6, 4, 3, 3),
    (2, 3, 4),
    (1, 9, 2),
    (64, 1, 3, 3),
]


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("side", ["auto", *SIDES])
def test_invariant_15_odd_shapes_do_not_crash(shape, side):
    """1-row, 1-column, m < n, m = n, more than two dimensions; each at its least and its greatest rank."""
    m = shape[0]
    n = torch.Size(shape[1:]).numel()
    for rank in sorted({1, min(m, n)}):
        p = parameters([shape], dtype=torch.float32)[0]
        before = p.detach().clone()
        optimizer = GORP([p], lr=0.01, rank=rank, refresh=2, side=side)
        run(optimizer, [p], [gradients(shape, 5)])
        assert torch.isfinite(p).all()
        assert not torch.equal(p, before)
        assert int(optimizer.state[p]["step"]) == 5
        (plan,) = optimizer.explain()
        assert plan.treatment == "projected"
        assert plan.shape == shape
        assert plan.rank == rank
        assert plan.side == side if side != "auto" else ("right" if m >= n else "left")


@pytest.mark.parametrize("finder", RANGE_FINDERS)
@pytest.mark.parametrize("side", SIDES)
def test_every_finder_takes_the_full_rank(finder, side):
    for shape in ((9, 5), (5, 9), (5, 5)):
        p = parameters([shape], dtype=torch.float32)[0]
        optimizer = GORP([p], lr=0.01, rank=5, refresh=2, side=side, range_finder=finder)
        run(optimizer, [p], [gradients(shape, 5)])
        assert torch.isfinite(p).all()


def test_a_conv_weight_is_the_matrix_of_its_rows():
    p = nn.Parameter(torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
    q = nn.Parameter(p.detach().reshape(8, 27).clone())
    series = gradients((8, 3, 3, 3), 7)
    for parameter, given in ((p, series), (q, [g.reshape(8, 27) for g in series])):
        run(GORP([parameter], lr=0.01, rank=3, refresh=3, weight_decay=0.1), [parameter], [given])
    assert torch.equal(p.detach().reshape(8, 27), q.detach())


@pytest.mark.parametrize(
    "layout", ["transposed", "strided", "channels_last", "expanded gradient", "transposed gradient"]
)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rule", ["adam", "adafactor"])
def test_layouts_in_memory_do_not_matter(layout, side, rule):
    shape = (8, 4, 3, 3) if layout == "channels_last" else (12, 8)
    plain = parameters([shape], dtype=torch.float32)[0]
    data = plain.detach().clone()
    series = gradients(shape, 7)
    if layout == "transposed":
        data = data.t().contiguous().t()
    elif layout == "strided":
        data = torch.stack([data, data], dim=-1)[..., 0]
    elif layout == "channels_last":
        data = data.to(memory_format=torch.channels_last)
    odd = nn.Parameter(data)
    given = series
    if layout == "expanded gradient":
        series = [g[:, :1].expand(shape) for g in series]
        given = series
        series = [g.contiguous() for g in series]
    if layout == "transposed gradient":
        given = [g.t().contiguous().t() for g in series]
    ours = GORP(
        [odd], lr=0.01, rank=1 if "expanded" in layout else 3, refresh=3, side=side, rule=rule, weight_decay=0.1
    )
    theirs = GORP(
        [plain], lr=0.01, rank=1 if "expanded" in layout else 3, refresh=3, side=side, rule=rule, weight_decay=0.1
    )
    for g in given:
        odd.grad = g
        ours.step()
        odd.grad = None
    run(theirs, [plain], [series])
    torch.testing.assert_close(odd, plain, rtol=1e-4, atol=1e-5)
    assert odd.stride() == data.stride()


def test_batched_matrices_are_those_stepped_alone():
    shapes = [(12, 8)] * 3 + [(8, 12)] * 2 + [(12, 8)]
    together = parameters(shapes)
    series = [[g.double() for g in gradients(s, 9, seed=i)] for i, s in enumerate(shapes)]
    optimizer = GORP(together, lr=0.01, rank=3, refresh=4, stagger=False, range_finder="full", weight_decay=0.1)
    run(optimizer, together, series)
    for i, _ in enumerate(shapes):
        alone = parameters(shapes)[i]
        run(
            GORP([alone], lr=0.01, rank=3, refresh=4, stagger=False, range_finder="full", weight_decay=0.1),
            [alone], [series[i]],
        )  # fmt: skip
        torch.testing.assert_close(alone, together[i], rtol=1e-9, atol=1e-10)


def test_a_large_matrix_steps_as_a_small_one():
    """Above some size matrices are stepped one by one and with other kernels; the numbers must not care."""
    from reference_gorp import ReferenceGORP

    p = parameters([(300, 200)])[0]
    series = spectrum_gradients((300, 200), 5)
    twin = ReferenceGORP([p], lr=0.01, rank=4, refresh=3, weight_decay=0.1)
    start = twin.weights[0]
    run(GORP([p], lr=0.01, rank=4, refresh=3, range_finder="full", weight_decay=0.1), [p], [series])
    for g in series:
        twin.step([g])
    assert (p.detach() - twin.weights[0]).norm() / (twin.weights[0] - start).norm() < 1e-6


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rule", ["adam", "momentum", "adafactor"])
@pytest.mark.parametrize("count", [1, 3])
def test_weights_of_every_floating_dtype(dtype, side, rule, count):
    """The state is float32 or wider, and the update is formed there and rounded once."""
    shapes = [(12, 8)] * count
    params, wide = parameters(shapes, dtype=dtype), parameters(shapes, dtype=torch.float32)
    for p, w in zip(params, wide, strict=True):
        w.data.copy_(p.detach())
    series = [[g.to(dtype) for g in gradients(s, 6, seed=i)] for i, s in enumerate(shapes)]
    settings = {"lr": 0.05, "rank": 3, "refresh": 3, "side": side, "rule": rule, "weight_decay": 0.1}
    run(GORP(wide, **settings), wide, [[g.float() for g in s] for s in series])
    optimizer = GORP(params, **settings)
    run(optimizer, params, series)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for p, w in zip(params, wide, strict=True):
        assert p.dtype == dtype
        state = optimizer.state[p]
        assert all(v.dtype == wanted for k, v in state.items() if k in ("basis", "basis_out", "exp_avg", "exp_avg_sq"))
        error = (p.detach().double() - w.detach().double()).norm() / w.detach().double().norm()
        assert error < {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float64: 1e-4}[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_protection_of_half_precision_weights_leaks_only_their_rounding(dtype):
    p = matrix(32, 24, dtype)
    p.data.zero_()
    inside = Subspace(24, orthonormal(24, 6, dtype=torch.float32))
    optimizer = GORP([p], lr=0.5, rank=4, refresh=3, rule="momentum")
    optimizer.protect({p: (inside, None)})
    run(optimizer, [p], [[g.to(dtype) for g in gradients((32, 24), 1)]])
    assert inside.share(p.detach().double()) < 2 * torch.finfo(dtype).eps


def test_complex_parameters_are_refused():
    with pytest.raises(ConfigError, match=r"\(4, 3\) is complex.*view_as_real"):
        GORP([nn.Parameter(torch.zeros(4, 3, dtype=torch.complex64))], rank=2)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(10, 8, sparse=True)
    optimizer = GORP(table.parameters(), rank=2)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match=r"\(10, 8\) has a sparse gradient.*sparse=False"):
        optimizer.step()
    plain = GORP([{"params": table.parameters(), "rank": None}])
    with pytest.raises(ConfigError, match="sparse gradient"):
        plain.step()


# --- what is set around a step --------------------------------------------------------------------------------------


@contextlib.contextmanager
def around(how):
    """What people set for their model and forget for their optimizer."""
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    elif how == "short products":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    elif how == "default dtype":
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
    elif how == "wide default dtype":
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
    else:
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("how", ["autocast", "short products", "default dtype", "wide default dtype", "deterministic"])
@pytest.mark.parametrize("finder", RANGE_FINDERS)
def test_precision_does_not_depend_on_what_is_set_around_a_step(how, finder):
    """A product in bfloat16 leaves 3e-3 of what it should remove: no setting for the model may shorten ours."""
    shapes = [(256, 192), (48, 32), (48, 32), (32, 48), (8,)]  # stepped alone, in a batch, on the left, as AdamW
    series = [gradients(s, 5, seed=i) for i, s in enumerate(shapes)]
    inside = [Subspace(s[1], orthonormal(s[1], 9, dtype=torch.float32)) for s in shapes[:4]]
    outside = [Subspace(s[0], orthonormal(s[0], 9, dtype=torch.float32)) for s in shapes[:4]]
    ends = []
    for setting in (contextlib.nullcontext(), around(how)):
        params = parameters(shapes, dtype=torch.float32, size=0.1)
        optimizer = GORP(params, lr=0.05, rank=4, refresh=2, range_finder=finder, weight_decay=0.1)
        start = snapshot(params)
        with setting:
            optimizer.protect(dict(zip(params, zip(inside, outside, strict=True), strict=False)))
            run(optimizer, params, series)
        for p, w, i, o in zip(params, start, inside, outside, strict=False):
            assert i.share(p.detach() - w) < 1e-5
            assert o.share((p.detach() - w).mT) < 1e-5
            basis = optimizer.state[p]["basis"]
            assert basis.dtype == torch.float32
            assert (basis.mT @ basis - torch.eye(4)).abs().max() < 1e-5
        ends.append(snapshot(params))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
