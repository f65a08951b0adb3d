"""Layer-wise mode: gradients projected and freed in backward give the steps that whole gradients give."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings

import pytest
import torch
from optim_helpers import assert_same_state, tiny_batch, tiny_net
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils.checkpoint import checkpoint

from growthring.errors import ConfigError
from growthring.guards import PEGP, GradientMemory
from growthring.optim import GORP, GaLore, GORPFactory, LayerWise
from growthring.subspace import Subspace

SMALL = ((12, 20), (20, 20), (20, 5))
STACKED = ((12, 20), (20, 20), (20, 20), (20, 20), (20, 5))  # small ones of one shape share a product
LARGE = ((12, 181), (181, 182), (182, 5))  # the second has more elements than matrices that are stacked


def net(sizes=SMALL, dtype=torch.float64, seed=0):
    """Linear layers with tanh between: m > n, m = n (twice of one shape) and m < n, and biases."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = []
        for n, m in sizes:
            layers += [nn.Linear(n, m), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).to(dtype)


def loss_of(model, k, micro, rows=16):
    """Losses of the micro-batches of step ``k``, which sum to its mean loss."""
    x, y = tiny_batch(rows, seed=k, dtype=next(model.parameters()).dtype)
    for part, labels in zip(x.chunk(micro), y.chunk(micro), strict=True):
        yield nn.functional.cross_entropy(model(part).double(), labels, reduction="sum") / rows


def trained(*, layerwise, micro=1, steps=30, sizes=SMALL, dtype=torch.float64, attach=None, kind=GORP, max_norm=None,
            **options):  # fmt: skip
    """Model and optimizer after ``steps`` steps of ``micro`` micro-batches."""
    model = net(sizes, dtype)
    optimizer = kind(model.named_parameters(), **({"lr": 0.01, "rank": 3, "refresh": 7} | options))
    mode = LayerWise(optimizer, max_norm=max_norm) if layerwise else None
    for k in range(steps):
        if attach is not None and k == 8:
            attach(optimizer, model)
        for loss in loss_of(model, k, micro):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, mode


def weights(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def assert_close(one, two, limit=1e-6):
    a, b = weights(one), weights(two)
    assert float((a - b).abs().max()) <= limit * float(a.abs().max())


def protecting(exact):
    def attach(optimizer, model):
        g = torch.Generator().manual_seed(5)
        spaces = {
            p: tuple(Subspace(size, torch.randn(size, 2, generator=g)) for size in (p.shape[1], p.shape[0]))
            for p in model.parameters() if p.ndim == 2
        }  # fmt: skip
        optimizer.protect(spaces, exact=exact)

    return attach


CASES = {
    "right": {"side": "right"},
    "left": {"side": "left"},
    "two-sided": {"side": "two-sided"},
    "auto-decay": {"weight_decay": 0.1, "range_finder": "gram"},
    "no-stagger": {"stagger": False, "rotate": False, "range_finder": "full"},
    "momentum": {"rule": "momentum"},
    "adafactor": {"rule": "adafactor"},
    "shared": {"rule": "shared", "range_finder": "randomized"},
    "stacked": {"sizes": STACKED},
    "stacked-left": {"sizes": STACKED, "side": "left"},
    "large": {"sizes": LARGE},
    "large-two-sided": {"sizes": LARGE, "side": "two-sided"},
    "protected": {"attach": protecting(True), "weight_decay": 0.1},
    "protected-two-sided": {"attach": protecting(True), "side": "two-sided"},
    "protected-inexactly": {"attach": protecting(False)},
    "galore": {"kind": GaLore, "weight_decay": 0.1, "scale": 1.0},
    "galore-two-sided": {"kind": GaLore, "side": "two-sided", "scale": 1.0},
    "clipped": {"max_norm": 0.05},
}


@pytest.mark.parametrize("case", CASES)
def test_accumulation_equals_one_batch_and_the_optimizer_without_the_mode(case):
    options = dict(CASES[case])
    max_norm = options.pop("max_norm", None)
    runs = {m: trained(layerwise=True, micro=m, max_norm=max_norm, **options)[0] for m in (1, 4)}
    assert_close(runs[1], runs[4])
    assert float((weights(runs[1]) - weights(net(options.get("sizes", SMALL)))).abs().max()) > 1e-3
    if max_norm is None:
        assert_close(runs[4], trained(layerwise=False, micro=4, **options)[0])
        assert_close(runs[1], trained(layerwise=False, micro=1, **options)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
def test_one_micro_batch_equals_the_optimizer_without_the_mode_bit_for_bit(dtype, sizes):
    """No two of these matrices share a product, so sums are taken in one order."""
    one, first, _ = trained(layerwise=True, steps=15, sizes=sizes, dtype=dtype)
    two, second, _ = trained(layerwise=False, steps=15, sizes=sizes, dtype=dtype)
    assert torch.equal(weights(one), weights(two))
    assert_same_state(first, second)


def test_half_precision_accumulates_wider_than_gradients_do():
    """Against float64 gradients of the same bf16 weights: coordinates round less than a bf16 ``.grad``."""
    model = net(((12, 20), (20, 5)), torch.bfloat16)
    errors = {}
    parts = [tiny_batch(1, seed=k, dtype=torch.bfloat16) for k in range(64)]
    exact = 0.0
    for x, y in parts:
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(x).float(), y), [model[0].weight])
        exact = exact + g.double()
    for layerwise in (True, False):
        copied = copy.deepcopy(model)
        optimizer = GORP(copied.parameters(), lr=0.0, rank=3, refresh=1000, stagger=False)
        mode = LayerWise(optimizer) if layerwise else None
        for k in range(2):
            optimizer.zero_grad()
            for x, y in parts:
                nn.functional.cross_entropy(copied(x).float(), y).backward()
            if k == 0:
                optimizer.step()
        p = copied[0].weight
        basis = optimizer.state[p]["basis"]
        found = optimizer._given[p] if mode else p.grad.float() @ basis
        errors[layerwise] = float((found.double() - exact @ basis.double()).norm())
    assert errors[True] < 0.1 * errors[False]


def test_an_observer_sees_the_same():
    seen = {}

    def run(layerwise):
        notes = seen.setdefault(layerwise, [])

        def attach(optimizer, model):
            optimizer.observe(lambda p, c, basis_in, basis_out, m: notes.append((c.clone(), m.clone())))

        trained(layerwise=layerwise, micro=2, steps=20, attach=attach)

    run(True)
    run(False)
    assert len(seen[True]) == len(seen[False]) == 12 * len(SMALL)
    for one, two in zip(seen[True], seen[False], strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("exact", [True, False])
def test_protection_that_comes_in_the_middle_of_an_accumulation_holds(exact):
    """What was projected into a basis that is given up is projected again, into the new one."""
    model = net()
    optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=100, stagger=False)
    with LayerWise(optimizer):
        for k in range(3):
            losses = list(loss_of(model, k, 2))
            losses[0].backward()
            if k == 2:
                g = torch.Generator().manual_seed(1)
                p, before = model[2].weight, model[2].weight.detach().clone()
                space = Subspace(20, torch.randn(20, 4, generator=g))
                optimizer.protect({p: (space, None)}, exact=exact)
            losses[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = p.detach() - before
        leak = float((moved @ space.stored.to(moved)).norm() / moved.norm())
        assert float(moved.norm()) > 0
        assert (leak < 1e-5) == exact


def guarded(guard, *, layerwise):
    """A model after three tasks under a guard, and the largest leak that it measured."""
    model, leaks = net(), []
    for t in range(3):
        guard.attach(model)
        guard.begin_task()
        optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=4)
        guard.bind(optimizer)
        mode = LayerWise(optimizer) if layerwise else None
        for k in range(6):
            x, y = tiny_batch(16, seed=10 * t + k, dtype=torch.float64)
            x = x @ torch.diag((torch.arange(12) // 3 == t).double())  # three inputs a task
            for part, labels in zip(x.chunk(2), y.chunk(2), strict=True):
                nn.functional.cross_entropy(model(part), labels).backward()
            guard.before_step()
            optimizer.step()
            guard.after_step()
            optimizer.zero_grad()
        leaks += [s.leak for s in guard.end_task(f"task-{t}", [x]).sites if s.leak is not None]
        if mode is not None:
            mode.remove()
    return model, max(leaks)


def test_guards_hold():
    one, leak = guarded(GradientMemory(0.9), layerwise=True)
    two, _ = guarded(GradientMemory(0.9), layerwise=False)
    assert_close(one, two)
    assert leak < 1e-10
    assert guarded(PEGP(0.9), layerwise=True)[1] < 1e-10


# --- memory ----------------------------------------------------------------------------------------------------------


def test_only_matrices_whose_basis_is_due_keep_a_gradient():
    model = nn.Sequential(*[nn.Linear(16, 24) if i % 2 == 0 else nn.Linear(24, 16) for i in range(10)]).double()
    optimizer = GORP(model.parameters(), lr=0.01, rank=2, refresh=10)
    mode = LayerWise(optimizer)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    most = []

    def count(_):  # after the mode's own hook; the gradient that was made last would be counted if it lived
        most.append(sum(p.grad is not None for p in matrices))

    for p in matrices:
        p.register_post_accumulate_grad_hook(count)
    for k in range(12):
        for _ in range(2):
            model(torch.randn(4, 16, dtype=torch.float64)).square().mean().backward()
        due = [i for i in range(10) if k == 0 or (k + i) % 10 == 0]
        assert [i for i, p in enumerate(matrices) if p.grad is not None] == due
        held = mode.state_dict()["coordinates"]
        assert sum(t.numel() for t in held.values()) == (10 - len(due)) * 2 * 24
        assert max(most) == len(due)
        optimizer.step()
        assert all(p.grad is None for p in matrices)
        optimizer.zero_grad()
        most.clear()


def test_two_sided_coordinates_are_r_by_r():
    _, optimizer, _ = trained(layerwise=True, side="two-sided", steps=3, refresh=100)
    model = net()
    mode = LayerWise(other := GORP(model.parameters(), rank=3, refresh=100, side="two-sided"))
    other.load_state_dict(optimizer.state_dict())
    next(loss_of(model, 0, 1)).backward()
    assert [tuple(t.shape) for t in mode.state_dict()["coordinates"].values()] == [(3, 3)] * 3


# --- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attach", [None, protecting(True)], ids=["free", "protected"])
def test_clipping_is_that_of_torch_on_projected_gradients(attach):
    """The rule ``momentum`` keeps what it is given: first moments differ by the clipped coordinates."""
    model = net()
    optimizer = GORP(model.parameters(), lr=0.0, rank=3, refresh=4, rule="momentum", betas=(0.0, 0.9))
    if attach is not None:
        attach(optimizer, model)
    mode = LayerWise(optimizer)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    clipped = 0
    for k in range(9):
        stepped = []
        for max_norm in (None, 0.02):  # the learning rate is 0 and the momentum forgets: the same step twice
            mode.max_norm = max_norm
            saved = copy.deepcopy(optimizer.state_dict())
            for loss in loss_of(model, k, 2):
                loss.backward()
            optimizer.step()
            others = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            stepped.append([*(optimizer.state[p]["exp_avg"].clone() for p in matrices), *others])
            norm = mode.norm
            optimizer.zero_grad()
            if max_norm is None:
                optimizer.load_state_dict(saved)
        free, ours = stepped
        for t in free:
            t.requires_grad_()
            t.grad = t.detach().clone()
        wanted = float(nn.utils.clip_grad_norm_(free, 0.02))
        clipped += wanted > 0.02
        assert norm == pytest.approx(wanted, rel=1e-9)
        for a, b in zip(free, ours, strict=True):
            torch.testing.assert_close(b, a.grad, rtol=1e-9, atol=1e-15)
    assert clipped == 9


def test_a_norm_below_the_limit_changes_nothing_and_is_known():
    one, first, mode = trained(layerwise=True, steps=10, max_norm=1e6)
    two, second, other = trained(layerwise=True, steps=10)
    assert torch.equal(weights(one), weights(two))
    assert_same_state(first, second)
    assert mode.norm == other.norm
    assert 0.0 < mode.norm < 1e6


def test_a_norm_that_is_not_finite_leaves_what_is_finite_alone():
    model = net()
    optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=5)
    mode = LayerWise(optimizer, max_norm=1.0)
    next(loss_of(model, 0, 1)).backward()
    model[0].bias.grad.fill_(math.inf)
    optimizer.step()
    assert mode.norm == math.inf
    assert all(bool(p.isfinite().all()) for p in model.parameters() if p.ndim == 2)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, True, "1"])
def test_a_limit_that_is_no_positive_number_is_refused(value):
    with pytest.raises(ConfigError, match=r"max_norm=.*: a number above 0"):
        LayerWise(GORP(net().parameters(), rank=3), max_norm=value)


# --- state -----------------------------------------------------------------------------------------------------------


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("cut", [0, 1, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_saved_inside_an_accumulation_continues_bit_for_bit(cut, dtype):
    """Cuts with all, none and one of the bases due."""

    def micro_steps(model, optimizer, todo):
        for k, part in todo:
            list(loss_of(model, k, 3))[part].backward()
            if part == 2:
                optimizer.step()
                optimizer.zero_grad()

    everything = [(k, part) for k in range(12) for part in range(3)]
    at = 3 * cut + 2  # two of three micro-batches in
    model = net(dtype=dtype)
    optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=7)
    mode = LayerWise(optimizer)
    micro_steps(model, optimizer, everything[:at])
    saved = through_a_file([optimizer.state_dict(), mode.state_dict()])
    copied = net(dtype=dtype)
    copied.load_state_dict(model.state_dict())
    other = GORP(copied.parameters(), lr=0.01, rank=3, refresh=7)
    resumed = LayerWise(other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    micro_steps(model, optimizer, everything[at:])
    micro_steps(copied, other, everything[at:])
    assert torch.equal(weights(model), weights(copied))
    assert_same_state(optimizer, other)


def test_a_lost_accumulation_would_be_noticed():
    model = net()
    optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=100)
    mode = LayerWise(optimizer)
    for loss in loss_of(model, 0, 2):
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    first, second = loss_of(model, 1, 2)
    first.backward()
    copied = copy.deepcopy(model)
    other = GORP(copied.parameters(), lr=0.01, rank=3, refresh=100)
    other.load_state_dict(optimizer.state_dict())
    LayerWise(other)
    second.backward()
    list(loss_of(copied, 1, 2))[1].backward()
    optimizer.step()
    other.step()
    assert mode.norm > 0
    assert not torch.equal(weights(model), weights(copied))


def test_the_optimizers_state_is_the_same_with_and_without_the_mode():
    _, one, mode = trained(layerwise=True, steps=9)
    _, two, _ = trained(layerwise=False, steps=9)
    assert mode.state_dict() == {"coordinates": {}, "gradients": {}}
    a, b = one.state_dict(), two.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert [list(s) for s in a["state"].values()] == [list(s) for s in b["state"].values()]
    for source, layerwise in ((a, False), (b, True)):
        model = net()
        optimizer = GORP(model.parameters(), rank=3)
        if layerwise:
            LayerWise(optimizer)
        optimizer.load_state_dict(source)
        next(loss_of(model, 0, 1)).backward()
        optimizer.step()
        assert int(optimizer.state[model[0].weight]["step"]) == 10


def test_a_state_that_does_not_fit_is_refused_whole():
    model = net()
    optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=100)
    mode = LayerWise(optimizer)
    for k in range(2):
        for loss in loss_of(model, k, 1):
            loss.backward()
        if k == 0:
            optimizer.step()
            optimizer.zero_grad()
    state = mode.state_dict()
    with pytest.raises(ConfigError, match="'coordinates' and 'gradients' are needed"):
        mode.load_state_dict(optimizer.state_dict())
    with pytest.raises(ConfigError, match=r"parameter 9, and the optimizer has 6"):
        mode.load_state_dict({"coordinates": {9: torch.zeros(20, 3)}, "gradients": {}})
    with pytest.raises(ConfigError, match=r"its basis has place for \(20, 3\)"):
        mode.load_state_dict({"coordinates": {0: torch.zeros(20, 4)}, "gradients": {}})
    with pytest.raises(ConfigError, match="it has no basis"):
        mode.load_state_dict({"coordinates": {1: torch.zeros(20, 3)}, "gradients": {}})
    with pytest.raises(ConfigError, match=r"a gradient \(3,\) is given for parameter 1"):
        mode.load_state_dict({"coordinates": {}, "gradients": {1: torch.zeros(3)}})
    fresh = LayerWise(GORP(net().parameters(), rank=3))
    with pytest.raises(ConfigError, match=r"Load the optimizer's state_dict\(\) first"):
        fresh.load_state_dict(state)
    after = mode.state_dict()
    for kind in state:
        assert state[kind].keys() == after[kind].keys()
        assert all(torch.equal(state[kind][i], after[kind][i]) for i in state[kind])


def test_a_distributed_checkpoint_is_loaded_without_keeping_gradients_after_it():
    """DCP gives a fresh optimizer its state by a step with zero gradients, in which every matrix is skipped."""
    model, optimizer, _ = warmed()
    saved = get_optimizer_state_dict(model, optimizer)
    copied = copy.deepcopy(model)
    other = GORP(copied.parameters(), lr=0.01, rank=3, refresh=100, stagger=False)
    LayerWise(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        set_optimizer_state_dict(copied, other, copy.deepcopy(saved))
    for one, optim in ((model, optimizer), (copied, other)):
        next(loss_of(one, 1, 1)).backward()
        assert all(p.grad is None for p in one.parameters() if p.ndim == 2)
        optim.step()
    assert torch.equal(weights(model), weights(copied))


def test_loading_the_optimizers_state_drops_coordinates_of_its_old_bases():
    model = net()
    optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=100)
    mode = LayerWise(optimizer)
    for k in range(2):
        next(loss_of(model, k, 1)).backward()
        if k == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert mode.state_dict()["coordinates"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert not mode.state_dict()["coordinates"]


# --- what a training loop does ---------------------------------------------------------------------------------------


def warmed(refresh=100, model=None, **options):
    """A model and an optimizer in layer-wise mode after one step, so that no basis is due."""
    model = net() if model is None else model
    optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=refresh, stagger=False, **options)
    mode = LayerWise(optimizer)
    for loss in loss_of(model, 0, 1):
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, mode


def test_zero_grad_drops_what_was_accumulated():
    model, optimizer, mode = warmed()
    before = weights(model)
    next(loss_of(model, 1, 1)).backward()
    assert len(mode.state_dict()["coordinates"]) == 3
    optimizer.zero_grad()
    assert mode.state_dict() == {"coordinates": {}, "gradients": {}}
    optimizer.step()
    assert torch.equal(weights(model), before)


def test_a_step_without_backward_does_nothing():
    for make in (warmed, lambda: (m := net(), o := GORP(m.parameters(), rank=3), LayerWise(o))):
        model, optimizer, mode = make()
        before, steps = weights(model), [float(s["step"]) for s in optimizer.state.values()]
        optimizer.step()
        optimizer.step()
        assert torch.equal(weights(model), before)
        assert [float(s["step"]) for s in optimizer.state.values()] == steps
        assert mode.norm == 0.0


def test_a_second_step_does_not_use_coordinates_again():
    model, optimizer, _ = warmed(weight_decay=0.1)
    next(loss_of(model, 1, 1)).backward()
    optimizer.step()
    before = model[2].weight.detach().clone()
    optimizer.step()  # biases still have their gradient, as with every optimizer
    assert torch.equal(model[2].weight, before)


def test_parameters_without_a_gradient_in_some_micro_batches():
    """Half of the model is used in one micro-batch, all of it in the other, in steps due and not."""

    def run(layerwise):
        model = net()
        optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=3)
        mode = LayerWise(optimizer) if layerwise else None
        for k in range(9):
            x, _ = tiny_batch(4, seed=k, dtype=torch.float64)
            model[:2](x).square().sum().backward()
            if k % 2:
                model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer, mode

    (one, first, _), (two, second, _) = run(True), run(False)
    assert_close(one, two)
    assert [float(s["step"]) for s in first.state.values()] == [float(s["step"]) for s in second.state.values()]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)
        self.twin = nn.Linear(12, 12)
        self.twin.weight = self.layer.weight

    def forward(self, x):
        return self.head(torch.tanh(self.twin(torch.tanh(self.layer(torch.tanh(self.layer(x)))))))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = Tied(), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)


def ticks(model, *, layerwise, steps=8):
    """Train, counting how often a hook took a gradient of the tied weight in each backward."""
    optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=4)
    mode = LayerWise(optimizer) if layerwise else None
    for k in range(steps):
        for loss in loss_of(model, k, 2):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if mode is not None:
        mode.remove()
    return model


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "not-reentrant"])
def test_tied_weights_and_gradient_checkpointing(reentrant):
    torch.manual_seed(0)
    model = (Tied() if reentrant is None else Checkpointed(reentrant)).double()
    twin = copy.deepcopy(model)
    assert_close(ticks(model, layerwise=True), ticks(twin, layerwise=False))


def test_a_tied_weight_accumulates_once_in_a_backward():
    torch.manual_seed(0)
    model, calls = Tied().double(), []
    model.layer.weight.register_post_accumulate_grad_hook(lambda p: calls.append(1))
    optimizer = GORP(model.parameters(), rank=3)
    LayerWise(optimizer)
    for loss in loss_of(model, 0, 2):
        loss.backward()
    assert len(calls) == 2


def test_evaluation_between_micro_batches_changes_nothing():
    model, optimizer, mode = warmed()
    first, second = loss_of(model, 1, 2)
    first.backward()
    before = mode.state_dict()["coordinates"]
    model.eval()
    with torch.no_grad():
        model(tiny_batch(4, dtype=torch.float64)[0])
    grads = torch.autograd.grad(next(loss_of(model, 3, 1)), list(model.parameters()))
    assert len(grads) == 6
    model.train()
    after = mode.state_dict()["coordinates"]
    assert all(torch.equal(before[i], after[i]) for i in before)
    second.backward()
    optimizer.step()


def test_the_learning_rate_is_read_in_the_step():
    model, optimizer, _ = warmed()
    twin, other, _ = warmed()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    next(loss_of(model, 1, 1)).backward()
    next(loss_of(twin, 1, 1)).backward()
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step"):
        scheduler.step()  # after backward, before the step
    optimizer.step()
    other.step()
    start = weights(warmed()[0])
    moved, full = weights(model) - start, weights(twin) - start
    torch.testing.assert_close(moved, 0.1 * full, rtol=1e-6, atol=1e-12)


def test_a_closure_makes_the_gradients_of_its_step():
    one, two = net(), net()
    first, second = (GORP(m.parameters(), lr=0.01, rank=3, refresh=4) for m in (one, two))
    mode = LayerWise(first, max_norm=1e9)
    for k in range(8):
        for model, optimizer in ((one, first), (two, second)):

            def closure(model=model, optimizer=optimizer, k=k):
                optimizer.zero_grad()
                loss = next(loss_of(model, k, 1))
                loss.backward()
                return loss

            assert float(optimizer.step(closure).detach()) > 0
    assert mode.norm > 0
    assert_close(one, two)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_an_unusable_gradient_skips_its_matrix_as_without_the_mode(value):
    """In a step that is not due, then on: both keep the basis and go on."""

    def run(layerwise):
        model = net()
        optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=4)
        mode = LayerWise(optimizer, max_norm=1e9) if layerwise else None
        hit = model[2].weight
        handle = None
        for k in range(9):
            if k in (2, 3):
                handle = hit.register_hook(lambda g: torch.full_like(g, value))
            next(loss_of(model, k, 1)).backward()
            if k == 2:
                with pytest.warns(UserWarning, match="zero, NaN or infinite"):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
            if handle is not None:
                handle.remove()
        assert mode is None or math.isfinite(mode.norm)
        return model, optimizer

    (one, first), (two, second) = run(True), run(False)
    assert_close(one, two)
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert all(int(a[k]) == int(b[k]) for k in ("step", "skipped", "refreshes") if k in a)
    assert sum(int(s.get("skipped", 0)) for s in first.state.values()) == 2


def test_a_gradient_beside_its_basis_finds_a_new_one_in_the_next_step():
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = GORP([p], lr=0.1, rank=2, refresh=1000)
    LayerWise(optimizer)
    pull = torch.zeros(8, 6)
    pull[:, 4] = 1.0
    for k in range(3):
        if k == 1:
            optimizer.state[p]["basis"] = torch.eye(6)[:, :2].clone()
        (p * (torch.ones(8, 6) if k == 0 else pull)).sum().backward()
        assert (p.grad is not None) == (k != 1)
        if k == 1:
            with pytest.warns(UserWarning, match="skipped"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state[p]
    assert [int(state[key]) for key in ("step", "skipped", "refreshes")] == [2, 1, 2]
    assert float(p[:, 4].detach().mean()) < 1.5 * float(p[:, 5].detach().mean()) < 0


def test_parameters_that_freeze_thaw_or_come_later_are_taken_along():
    def run(layerwise):
        model = net()
        model[2].weight.requires_grad_(False)
        optimizer = GORP(
            [p for n, p in model.named_parameters() if not n.startswith("4.")], lr=0.01, rank=3, refresh=4
        )
        mode = LayerWise(optimizer) if layerwise else None
        for k in range(14):
            if k == 4:
                model[2].weight.requires_grad_(True)
            if k == 6:
                optimizer.add_param_group({"params": list(model[4].parameters()), "refresh": 3})
            if k == 9:
                model[0].weight.requires_grad_(False)
            for loss in loss_of(model, k, 2):
                loss.backward()
            if mode is not None and k == 13:
                left = {n for n, p in model.named_parameters() if p.grad is not None and p.ndim == 2}
                assert left == set()
            optimizer.step()
            optimizer.zero_grad()
            model.zero_grad()
        return model

    assert_close(run(True), run(False))


def test_convolutions_and_channels_last():
    def run(layerwise):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)).double()
        model = model.to(memory_format=torch.channels_last)
        optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=4)
        mode = LayerWise(optimizer) if layerwise else None
        for k in range(9):
            g = torch.Generator().manual_seed(k)
            for _ in range(2):
                model(torch.randn(4, 3, 8, 8, generator=g).double()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, mode

    assert_close(run(True)[0], run(False)[0])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_another_optimizer_is_refused():
    with pytest.raises(ConfigError, match=r"LayerWise\(optimizer=AdamW\(...\)\): GORP or GaLore is needed"):
        LayerWise(torch.optim.AdamW(net().parameters()))


def test_the_mode_twice_is_refused_and_so_is_a_second_optimizer_on_the_same_parameters():
    model, optimizer, mode = warmed()
    with pytest.raises(ConfigError, match="already"):
        LayerWise(optimizer)
    other = GORP(model.parameters(), rank=3)
    late = LayerWise(other)
    with pytest.raises(ConfigError, match="freed by another hook"):
        next(loss_of(model, 1, 1)).backward()
    mode.remove()
    other.zero_grad()
    next(loss_of(model, 1, 1)).backward()
    other.step()
    assert late.norm > 0


@pytest.mark.parametrize("unscale", [True, False])
def test_a_gradient_scaler_is_refused_before_anything_changes(unscale):
    model, optimizer, _ = warmed()
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(optimizer.state_dict())
    start = weights(model)
    scaler.scale(next(loss_of(model, 1, 1)).float()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(ConfigError, match="GradScaler"):
        scaler.step(optimizer)
    assert torch.equal(weights(model), start)
    assert all(torch.equal(a["step"], b["step"]) for a, b in
               zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True))  # fmt: skip


def test_a_disabled_scaler_and_one_without_the_mode_are_taken():
    model, optimizer, mode = warmed()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(next(loss_of(model, 1, 1))).backward()
    scaler.step(optimizer)
    assert mode.norm > 0
    mode.remove()
    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(next(loss_of(model, 2, 1)).float()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert float(optimizer.state[model[0].weight]["step"]) == 3


def test_several_processes_without_an_average_are_refused(monkeypatch):
    import torch.distributed as dist

    model, optimizer, mode = warmed()
    next(loss_of(model, 1, 1)).backward()
    before = weights(model)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    with pytest.raises(ConfigError, match=r"2 processes train 3 matrices .*average_over"):
        optimizer.step()
    assert torch.equal(weights(model), before)
    mode.remove()
    with pytest.raises(ConfigError, match=r"DDP.*fully_shard"):
        LayerWise(optimizer)


def test_a_sparse_gradient_is_refused_in_backward():
    table = nn.Embedding(10, 6, sparse=True)
    optimizer = GORP(table.parameters(), rank=2)
    LayerWise(optimizer)
    with pytest.raises(ConfigError, match="sparse gradient"):
        table(torch.tensor([1, 2])).sum().backward()


# --- ends and copies -------------------------------------------------------------------------------------------------


def hooks(model):
    return sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())


def test_remove_and_the_end_of_a_block_leave_a_plain_optimizer():
    model = net()
    optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=5)
    twin = trained(layerwise=False, micro=2, steps=8, refresh=5)[0]
    with LayerWise(optimizer) as mode:
        assert hooks(model) == 3
        for k in range(3):
            for loss in loss_of(model, k, 2):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses = list(loss_of(model, 3, 2))
        losses[0].backward()
    assert hooks(model) == 0
    losses[1].backward()  # coordinates of the first and a gradient of the second
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    for k in range(4, 8):
        for loss in loss_of(model, k, 2):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(model, twin)
    mode.remove()  # again: nothing
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    LayerWise(optimizer)


def test_an_optimizer_that_is_gone_takes_its_hooks_work_with_it():
    model, optimizer, mode = warmed()
    del optimizer, mode
    gc.collect()
    next(loss_of(model, 1, 1)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_mode_lives_as_long_as_its_optimizer():
    model = net()
    optimizer = GORP(model.parameters(), lr=0.01, rank=3)
    LayerWise(optimizer)  # nobody keeps it
    for k in range(2):
        gc.collect()
        next(loss_of(model, k, 1)).backward()
        if k == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert model[0].weight.grad is None


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_of_model_and_optimizer_are_plain(how):
    model, optimizer, mode = warmed()
    next(loss_of(model, 1, 1)).backward()
    if how == "save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied, twin = torch.load(buffer, weights_only=False), None
    else:
        both = (model, optimizer)
        copied, twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert hooks(copied) == 0
    assert hooks(model) == 3
    copied.zero_grad()
    next(loss_of(copied, 1, 1)).backward()
    assert all(p.grad is not None for p in copied.parameters())
    if twin is not None:
        start = weights(copied)
        twin.step()
        assert not torch.equal(weights(copied), start)
    optimizer.step()
    assert mode.norm > 0


# --- transformers.Trainer --------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        x, y = tiny_batch(1, seed=i)
        return {"x": x[0], "labels": y[0]}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny_net()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(tmp_path, *, callbacks=(), optimizer=None, model=None, **settings):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=4, disable_tqdm=True,
        gradient_accumulation_steps=2, max_steps=7, logging_steps=1, seed=3,
        **({"max_grad_norm": 0, "save_strategy": "no", "learning_rate": 0.01} | settings),
    )  # fmt: skip
    made = {"optimizers": (optimizer, None)} if optimizer is not None else {
        "optimizer_cls_and_kwargs": (GORPFactory, {"lr": 0.01, "rank": 3, "refresh": 3})
    }  # fmt: skip
    return Trainer(
        Classifier() if model is None else model, args, train_dataset=Rows(), callbacks=list(callbacks), **made
    )


def test_a_trainer_that_accumulates_takes_the_same_steps(tmp_path):
    plain = trainer(tmp_path)
    plain.train()
    callback = LayerWise.callback()
    ours = trainer(tmp_path, callbacks=[callback])
    left = []

    class Look(type(callback).__mro__[1]):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            left.append(sum(p.grad is not None for p in model.parameters() if p.ndim == 2))

    ours.add_callback(Look())
    ours.train()
    assert left == [2, 0, 1, 1, 0, 1, 1]
    for a, b in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert hooks(ours.model) == 0
    norms = [log["grad_norm"] for log in ours.state.log_history if "grad_norm" in log]
    assert len(norms) == 7
    assert min(norms) > 0
    assert callback.layerwise is None


def test_a_trainer_takes_the_optimizer_as_it_is_and_resumes(tmp_path):
    def run(folder, layerwise, **train):
        model = Classifier()
        optimizer = GORPFactory()(model, lr=0.01, rank=3, refresh=3)
        if layerwise:
            LayerWise(optimizer, max_norm=0.5)
        one = trainer(folder, optimizer=optimizer, model=model, save_strategy="steps", save_steps=4)
        one.train(**train)
        return model

    whole = run(tmp_path / "a", True)
    again = run(tmp_path / "b", True, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    free = run(tmp_path / "c", False)
    assert not torch.equal(free.net[0].weight, whole.net[0].weight)  # the limit was met


def test_the_callback_refuses_what_would_clip_the_rest_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"max_grad_norm=1\.0.*Set max_grad_norm=0"):
        trainer(tmp_path, callbacks=[LayerWise.callback()], max_grad_norm=1.0).train()


def test_the_callback_refuses_another_optimizer(tmp_path):
    model = Classifier()
    with pytest.raises(ConfigError, match="GORP or GaLore is needed"):
        trainer(
            tmp_path, callbacks=[LayerWise.callback()], model=model, optimizer=torch.optim.AdamW(model.parameters())
        ).train()
