"""GradientMemory: updates stay out of the directions of old gradients, under any optimizer; and what it remembers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gradient_helpers import ALL_OPTIMIZERS, basis, few, learn, matrices, projector, trainable
from guard_helpers import answer, bert, default_loss, fit, gpt2, mlp, rows, tokens
from reference_gradient_memory import ReferenceGradientMemory
from torch import Tensor, nn

from growthring.errors import ConfigError, GuardError
from growthring.guards import PEGP, GradientMemory, LinearSchedule

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}


def measured_leak(guard: GradientMemory, before: dict[str, Tensor], model: nn.Module) -> float:
    """The worst leak of plain linear layers, written out; bases as they were while the task trained."""
    worst = 0.0
    for name, old in before.items():
        change = (dict(model.named_parameters())[name].detach() - old).double()
        for key, moved in ((name, change), (f"{name}[out]", change.mT)):
            if key in guard._spaces and float(change.norm()):
                worst = max(worst, float((moved @ basis(guard, key)).norm() / change.norm()))
    return worst


# --- beside the twin --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "adafactor"])
@pytest.mark.parametrize("energy", [0.999, 0.8])
def test_three_tasks_beside_the_twin(side: str, optimizer: str, energy: float) -> None:
    fast = mlp(torch.float64, bias=False)
    slow = copy.deepcopy(fast)
    guard = GradientMemory(energy, side=side)
    twin = ReferenceGradientMemory(dict(slow.named_parameters()), side)
    for task in range(3):
        x = rows(3, 20, task, torch.float64)
        guard.attach(fast)
        guard.begin_task()
        twin.begin()
        ours, theirs = (ALL_OPTIMIZERS[optimizer](trainable(m)) for m in (fast, slow))
        for _ in range(20):
            for model, opt, keeper in ((fast, ours, guard), (slow, theirs, twin)):
                opt.zero_grad()
                default_loss(model, x).backward()
                keeper.before_step()
                opt.step()
                keeper.after_step()
        for (name, a), (_, b) in zip(fast.named_parameters(), slow.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        certificate = guard.end_task(None)
        twin.end(energy)
        ranks = {s.name: s.rank for s in certificate.sites}
        wanted = {n: s.shape[1] for n, s in twin.inside.items()} if side != "output" else {}
        if side != "input":
            wanted |= {f"{n}[out]": s.shape[1] for n, s in twin.outside.items()}
        assert ranks == wanted
        for name, s in twin.inside.items():
            if side != "output":
                torch.testing.assert_close(projector(guard, name), s @ s.T, rtol=0, atol=1e-7)
    assert 0 < certificate.free < certificate.dims


def test_the_comparison_with_the_twin_has_teeth() -> None:
    """Without the second sweep the twin goes elsewhere."""
    fast = mlp(torch.float64, bias=False)
    guard = GradientMemory(0.9)
    learn(guard, fast, rows(3, 20, 0, torch.float64))
    slow = copy.deepcopy(fast)
    guard.begin_task()
    twin = ReferenceGradientMemory(dict(slow.named_parameters()), "input")
    twin.begin()
    twin.inside = {n: basis(guard, n) for n in twin.inside}
    for model, keeper in ((fast, guard), (slow, twin)):
        opt = ALL_OPTIMIZERS["adam"](trainable(model))
        for _ in range(5):
            opt.zero_grad()
            default_loss(model, rows(3, 20, 1, torch.float64)).backward()
            keeper.before_step()
            opt.step()
            if keeper is guard:
                keeper.after_step()
    assert float((fast[0].weight - slow[0].weight).detach().abs().max()) > 1e-3


# --- the guarantee ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("side", ["input", "both"])
@pytest.mark.parametrize("name", sorted(ALL_OPTIMIZERS))
def test_no_optimizer_leaks(name: str, side: str, dtype: torch.dtype) -> None:
    model, guard = mlp(dtype), GradientMemory(0.9, side=side)
    first = learn(guard, model, rows(4, 20, 1, dtype), make=ALL_OPTIMIZERS[name])
    assert first.leak is None
    assert first.kept is None
    assert first.task == "task-1"
    spaces, before = copy.deepcopy(guard._spaces), matrices(model)
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 1}
    guard.begin_task()
    losses = fit(model, rows(8, 20, 2, dtype), guard, make=ALL_OPTIMIZERS[name], steps=60)
    leak = measured_leak(guard, before, model)
    certificate = guard.end_task("second")
    assert leak <= LIMIT[dtype]
    assert certificate.leak == pytest.approx(leak, abs=1e-7)
    assert certificate.kept
    assert certificate.protected_tasks == 1
    assert certificate.held == len(biases)
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(model.named_parameters())[n], b) for n, b in biases.items())
    assert all(guard._spaces[k].rank > s.rank for k, s in spaces.items() if s.free > 8)


@pytest.mark.parametrize(
    "settings",
    [
        {"clip": 0.01},
        {"accumulate": 3},
        {"autocast": torch.bfloat16},
        {"warmup": 10},
        {"clip": 0.5, "accumulate": 2, "autocast": torch.bfloat16},
    ],
    ids=["clipping", "accumulation", "autocast", "warm-up", "all"],
)
def test_what_loops_do_changes_nothing(settings: dict[str, Any]) -> None:
    model, guard = mlp(), GradientMemory(0.9, side="both")
    learn(guard, model, rows(4, 20, 1), **settings)
    certificate = learn(guard, model, rows(8, 20, 2), **settings)
    assert certificate.leak is not None
    assert certificate.leak <= 1e-5
    assert certificate.kept


@pytest.mark.parametrize("name", ["momentum", "adamw", "nadam", "rmsprop"])
def test_momentum_from_the_task_before_does_not_leak(name: str) -> None:
    model, guard = mlp(), GradientMemory(0.95)
    optimizer = ALL_OPTIMIZERS[name](trainable(model))
    learn(guard, model, rows(4, 20, 1), optimizer=optimizer)
    before = matrices(model)
    free, carried = copy.deepcopy((model, optimizer))
    fit(free, rows(8, 20, 2), guard=None, optimizer=carried, steps=1)
    assert measured_leak(guard, before, free) > 0.1  # the control: what the old moments would do
    certificate = learn(guard, model, rows(8, 20, 2), optimizer=optimizer)
    assert certificate.kept
    assert certificate.leak <= 1e-5


def test_the_published_rule_leaks_under_adam_and_says_so() -> None:
    """One sweep before the optimizer: Adam turns the update back. Under plain SGD it is exact."""
    leaks = {}
    for name in ("adamw", "sgd"):
        model, guard = mlp(), GradientMemory(0.9, project="gradient")
        learn(guard, model, rows(4, 20, 1), make=ALL_OPTIMIZERS[name])
        certificate = learn(guard, model, rows(8, 20, 2), make=ALL_OPTIMIZERS[name])
        leaks[name] = certificate.leak
        assert certificate.kept is (name == "sgd")
    assert leaks["adamw"] > 1e-2
    assert leaks["sgd"] < 1e-5


def test_protected_inputs_keep_what_the_layer_says() -> None:
    """Invariant 7: an x in the protected space sees the same layer before and after."""
    model, guard = nn.Sequential(nn.Linear(20, 9)), GradientMemory(1.0)
    old = few(6, 20, 3, seed=1)
    assert learn(guard, model, old).sites[0].rank == 3
    before = answer(model, old)
    learn(guard, model, rows(8, 20, 5), steps=50)
    assert float((answer(model, old) - before).abs().max()) < 1e-5
    assert guard._spaces["0.weight"].rank == 11


# --- what the memory is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_bases_are_orthonormal_and_only_grow(dtype: torch.dtype) -> None:
    model, guard = mlp(dtype), GradientMemory(0.9, side="both")
    past: dict[str, list[Tensor]] = {}
    old: dict[str, Tensor] = {}
    for task in range(4):
        guard.attach(model)
        guard.begin_task()
        optimizer = ALL_OPTIMIZERS["adamw"](trainable(model))
        gradients: dict[str, Tensor] = {}
        for _ in range(15):
            optimizer.zero_grad()
            default_loss(model, rows(3, 20, task, dtype)).backward()
            guard.before_step()
            for n, p in model.named_parameters():
                if p.ndim == 2:
                    g = p.grad.double()
                    gradients[n] = gradients.get(n, 0) + g.mT @ g
                    gradients[f"{n}[out]"] = gradients.get(f"{n}[out]", 0) + g @ g.mT
            optimizer.step()
            guard.after_step()
        certificate = guard.end_task(None)
        for key, moment in gradients.items():
            past.setdefault(key, []).append(moment)
        for key, space in guard._spaces.items():
            s = space.basis().double()
            assert float((s.mT @ s - torch.eye(s.shape[1])).abs().max()) < LIMIT[dtype]
            assert s.shape[1] <= space.dim
            assert space.stored.shape[1] <= space.dim / 2 + 1
            if key in old:
                assert s.shape[1] >= old[key].shape[1]
                assert float((old[key] - s @ (s.mT @ old[key])).norm()) < 10 * LIMIT[dtype]
            for moment in past[key]:
                if float(moment.trace()):
                    assert float((s.mT @ moment @ s).trace() / moment.trace()) >= 0.9 - 1e-6
            old[key] = s
        assert certificate.energy >= 0.9


def test_the_smallest_rank_that_reaches_the_share_is_kept() -> None:
    """Invariant of the spectrum (10, 1, 1, 1): the release keeps none of it at 0.9."""
    guard = GradientMemory(0.9)
    model = nn.Linear(4, 4, bias=False)
    guard.attach(model)
    guard.begin_task()
    model.weight.grad = torch.diag(torch.tensor([10.0, 1, 1, 1]))
    guard.before_step()
    guard.after_step()
    certificate = guard.end_task(None)
    assert certificate.sites[0].rank == 1
    assert certificate.energy == pytest.approx(100 / 103)
    assert certificate.sites[0].energy_target == 0.9


def test_a_full_space_freezes_the_matrix_bit_for_bit() -> None:
    model, guard = mlp(), GradientMemory(1.0)

    def fill() -> None:
        for seed in range(9):
            guard.attach(model)
            guard.begin_task()
            for p in model.parameters():
                p.grad = rows(*p.shape, seed) if p.ndim == 2 else torch.zeros_like(p)
            guard.before_step()
            guard.after_step()
            guard.end_task(None)
            if guard.exhausted():
                return

    with pytest.warns(UserWarning, match="no free direction is left"):
        fill()
    assert all(space.free == 0 for space in guard._spaces.values())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="no free direction is left"):
        certificate = learn(guard, model, rows(5, 20, 1))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert certificate.leak == 0.0
    assert certificate.free == 0
    assert any("nothing new is protected" in note for note in certificate.notes)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize("source", ["gradient", "momentum", "exp_avg"])
def test_an_empty_memory_is_the_plain_optimizer_bit_for_bit(name: str, source: str) -> None:
    guarded, plain = mlp(), mlp()
    learn(
        GradientMemory(0.9, source=source, side="both"),
        guarded,
        rows(4, 20, 1),
        optimizer=ALL_OPTIMIZERS[name](trainable(guarded)),
    )
    fit(plain, rows(4, 20, 1), steps=25, make=ALL_OPTIMIZERS[name])
    assert all(torch.equal(a, b) for a, b in zip(guarded.parameters(), plain.parameters(), strict=True))


def test_a_gradient_with_nan_is_left_out_and_counted() -> None:
    reports = []
    for broken in (False, True):
        model, guard = mlp(), GradientMemory(0.9, side="both")
        guard.attach(model)
        guard.begin_task()
        for step in range(4):
            for n, p in model.named_parameters():
                p.grad = rows(p.shape[0], p[0].numel(), step).reshape(p.shape)
                if step == 3:
                    p.grad = torch.full_like(p, float("nan")) if n == "2.weight" and broken else torch.zeros_like(p)
            if broken and step == 3:
                model[0].weight.grad[0, 0] = float("inf")
            guard.before_step()
            guard.after_step()
        reports.append((guard.end_task(None), guard))
    (clean, a), (dirty, b) = reports
    assert not any("left out" in n for n in clean.notes)
    assert any("4 gradients held NaN or infinity" in n for n in dirty.notes)  # two matrices, two sides
    for key, space in a._spaces.items():
        assert torch.equal(space.stored, b._spaces[key].stored)
        assert bool(b._spaces[key].stored.isfinite().all())


def test_wide_sides_are_sketched_and_random_mixtures_stand_for_many_rows() -> None:
    model, guard = nn.Linear(4200, 40, bias=False), GradientMemory(0.95, rows=8)
    guard.attach(model)
    guard.begin_task()
    inputs = few(40, 4200, 3, 1)
    for seed in range(6):
        model.weight.grad = rows(40, 40, seed) @ inputs
        guard.before_step()
        guard.after_step()
    assert guard._task.statistics._moments["weight"].form == "sketch"
    certificate = guard.end_task(None)
    assert certificate.sites[0].rank <= 3
    assert float((inputs - inputs @ projector(guard, "weight").float()).norm() / inputs.norm()) < 0.4


# --- sites ------------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Odd convolutions: grouped, transposed, one-dimensional, one output channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 3, 2, stride=2, bias=False)
        self.line = nn.Conv1d(3, 5, 2, bias=False)
        self.one = nn.Linear(5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(torch.tanh(self.first(x))))
        return self.one(torch.tanh(self.line(x.flatten(2))).mean(2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels_last"])
@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_convolutions_are_matrices(side: str, layout: torch.memory_format) -> None:
    model, guard = Convolutions().to(memory_format=layout), GradientMemory({"conv": 0.9, "linear": 0.5}, side=side)
    first = learn(guard, model, rows(3, 64, 1).reshape(3, 4, 4, 4))
    dims = {s.name: s.dim for s in first.sites}
    inside = {"first.weight": 18, "up.weight": 6, "line.weight": 6, "one.weight": 5}
    outside = {"first.weight[out]": 6, "up.weight[out]": 12, "line.weight[out]": 5, "one.weight[out]": 1}
    assert dims == {"input": inside, "output": outside, "both": inside | outside}[side]
    assert {s.kind for s in first.sites} == {"conv", "linear"}
    assert {s.energy_target for s in first.sites if s.kind == "linear"} == {0.5}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    certificate = learn(guard, model, rows(3, 64, 2).reshape(3, 4, 4, 4))
    assert certificate.kept
    assert certificate.leak <= 1e-5
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert "line.weight" in moved
    if side == "output":
        assert "one.weight" not in moved  # one output: full after one task


def test_a_convolution_keeps_what_it_says_of_protected_patches() -> None:
    torch.manual_seed(0)
    model, guard = nn.Sequential(nn.Conv2d(4, 5, 3)), GradientMemory(1.0)
    old = rows(1, 100, 1).reshape(1, 4, 5, 5)
    learn(guard, model, old)
    assert guard._spaces["0.weight"].rank == 9  # its patches
    patches = nn.functional.unfold(old, 3)[0]
    assert float((patches - projector(guard, "0.weight").float() @ patches).norm()) < 1e-5
    before, new = answer(model, old), rows(2, 100, 2).reshape(2, 4, 5, 5)
    other = answer(model, new)
    learn(guard, model, new, steps=30)
    assert float((answer(model, old) - before).abs().max()) < 1e-5
    assert float((answer(model, new) - other).abs().max()) > 1e-2


def test_the_input_side_of_conv1d_is_its_first_dimension() -> None:
    """GPT-2 stores weights transposed: one input x must be kept by both kinds of layer alike."""
    from transformers.pytorch_utils import Conv1D

    for layer in (nn.Linear(7, 5), Conv1D(5, 7)):
        model, guard = nn.Sequential(layer), GradientMemory(0.99)
        old = rows(1, 7, 1)
        certificate = learn(guard, model, old)
        assert [(s.dim, s.rank) for s in certificate.sites] == [(7, 1)]
        s = basis(guard, "0.weight")[:, 0].float()
        assert float((old[0] / old[0].norm() @ s).abs()) == pytest.approx(1.0, abs=1e-5)
        before = answer(model, old)
        assert learn(guard, model, rows(4, 7, 2)).kept
        assert float((answer(model, old) - before).abs().max()) < 1e-6


def test_transformers() -> None:
    for model in (bert(), gpt2()):
        guard = GradientMemory(0.9)
        learn(guard, model, tokens(2, 4, 1), steps=8)
        certificate = learn(guard, model, tokens(4, 6, 2, padded=2), steps=15)
        assert certificate.kept
        assert certificate.leak <= 1e-5
        assert all(s.kind == "linear" for s in certificate.sites)


def test_tied_weights() -> None:
    """A weight of an embedding is held; one that two linear layers share is one site, with all its gradients."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.a, self.b, self.out = (
                nn.Embedding(9, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 9),
            )
            self.b.weight, self.out.weight = self.a.weight, self.words.weight

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.out(self.b(torch.tanh(self.a(self.words(input_ids)))))

    model, guard = Tied(), GradientMemory(0.9)
    ids = torch.arange(6).reshape(2, 3)
    first = learn(guard, model, {"input_ids": ids})
    assert [s.name for s in first.sites] == ["a.weight"]
    words = model.words.weight.detach().clone()
    second = learn(guard, model, {"input_ids": ids + 2})
    assert second.kept
    assert second.held == 4
    assert torch.equal(model.words.weight, words)


# --- policy, words, bad input -----------------------------------------------------------------------------------


def test_explain_says_what_happens_to_every_tensor() -> None:
    model = mlp()
    plans = {p.name: p for p in GradientMemory(side="both").explain(model)}
    assert list(plans) == [n for n, _ in model.named_parameters()]
    assert plans["0.weight"].treatment == "protected"
    assert "dW u = 0" in plans["0.weight"].condition
    assert "u^T dW = 0" in plans["0.weight"].condition
    assert plans["0.bias"].treatment == "held"
    assert {p.treatment for p in GradientMemory(unprotected="allow").explain(model)} == {"protected", "free"}
    assert all(plan.to_dict()["name"] for plan in plans.values())


def test_unprotected_tensors() -> None:
    for policy, treatment in (("freeze", "frozen"), ("allow", "free")):
        model, guard = mlp(), GradientMemory(0.9, unprotected=policy)
        guard.attach(model)
        assert {p.treatment for p in guard.explain() if "bias" in p.name} == {treatment}
        assert model[0].bias.requires_grad is (policy == "allow")
        learn(guard, model, rows(4, 20, 1))
        bias = model[0].bias.detach().clone()
        certificate = learn(guard, model, rows(4, 20, 2))
        assert torch.equal(model[0].bias, bias) is (policy == "freeze")
        assert any("3 trainable tensors were left free" in n for n in certificate.notes) is (policy == "allow")
        assert certificate.held == 0


def test_schedules_and_kinds_of_energy() -> None:
    model, guard = mlp(), GradientMemory({"linear": LinearSchedule(0.5, 0.9, tasks=2)})
    assert learn(guard, model, rows(6, 20, 1)).sites[0].energy_target == 0.5
    assert learn(guard, model, rows(6, 20, 2)).sites[0].energy_target == 0.9
    assert GradientMemory(**GradientMemory(LinearSchedule(0.5, 0.9, 2)).settings()).energy == LinearSchedule(
        0.5, 0.9, 2
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"energy": 0.0}, "0.0"),
        ({"energy": 1.5}, "1.5"),
        ({"energy": float("nan")}, "nan"),
        ({"energy": "auto"}, "LinearSchedule"),
        ({"energy": {"times": 10.0}}, "LinearSchedule"),
        ({"energy": {"ia3": 0.9}}, "linear"),
        ({"energy": {"convv": 0.9}}, "conv"),
        ({"energy": {}}, "at least one"),
        ({"side": "left"}, "input"),
        ({"source": "gradients"}, "gradient"),
        ({"project": "both"}, "update"),
        ({"unprotected": "keep"}, "hold"),
        ({"rows": 0}, "at least 1"),
        ({"rows": True}, "at least 1"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GradientMemory(**settings)


def test_calls_out_of_order_and_models_without_sites() -> None:
    guard, model = GradientMemory(), mlp()
    with pytest.raises(GuardError, match="not attached"):
        guard.begin_task()
    guard.attach(model)
    for call in (guard.before_step, guard.after_step, lambda: guard.end_task("x"), lambda: guard.consolidate(model)):
        with pytest.raises(GuardError, match="outside a task"):
            call()
    with pytest.raises(GuardError, match="no parameter of the model is trainable"):
        guard.attach(mlp().requires_grad_(False))
    with pytest.raises(GuardError, match="found no site"):
        guard.attach(nn.LayerNorm(4))
    with pytest.raises(GuardError, match="meta device"):
        guard.attach(nn.Linear(4, 4, device="meta"))


@pytest.mark.parametrize("kind", [GradientMemory, PEGP])
def test_shards_are_refused(kind: type[GradientMemory] | type[PEGP]) -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.device_mesh = object()  # type: ignore[assignment]  # as a DTensor has one
    with pytest.raises(GuardError, match="1 trainable tensors are DTensors"):
        kind().attach(layer)


def test_a_task_without_steps_or_gradients_is_told() -> None:
    model, guard = mlp(), GradientMemory()
    guard.attach(model)
    guard.begin_task()
    certificate = guard.end_task("empty", [])
    assert any("in 0 steps: nothing new is protected" in n for n in certificate.notes)
    assert certificate.to_dict()["sites"] == []
    assert certificate.dims == 0
    second = learn(guard, model, rows(4, 20, 1))
    assert second.kept is second.leak is None  # nothing was protected while it trained
    assert learn(guard, model, rows(4, 20, 1)).kept


def test_weights_changed_between_tasks_are_told() -> None:
    model, guard = mlp(), GradientMemory(0.9)
    learn(guard, model, rows(4, 20, 1))
    with torch.no_grad():
        model[2].weight += 0.1 * basis(guard, "2.weight")[:, 0].float()
    with pytest.warns(UserWarning, match=r"2\.weight"):
        guard.begin_task()
    guard.end_task(None)
    with torch.no_grad():
        space = guard._spaces["0.weight"]
        model[0].weight += space.reject(torch.randn_like(model[0].weight))
    guard.begin_task()  # outside what is protected: no warning


def test_half_precision_weights_warn() -> None:
    model, guard = mlp(torch.bfloat16), GradientMemory(0.9)
    learn(guard, model, rows(4, 20, 1, torch.bfloat16), steps=5)
    guard.attach(model)
    with pytest.warns(UserWarning, match="half precision"):
        guard.begin_task()
    fit(model, rows(4, 20, 2, torch.bfloat16), guard, steps=5)
    certificate = guard.end_task(None)
    assert certificate.kept is False
    assert any("half precision" in n for n in certificate.notes)
