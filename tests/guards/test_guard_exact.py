"""The guarantee: after any number of steps of any optimizer, old inputs get the same answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from guard_helpers import (
    OPTIMIZERS,
    answer,
    bert,
    change,
    classifier,
    default_loss,
    fit,
    gpt2,
    lora_bert,
    lora_mlp,
    mlp,
    protected,
    rows,
    tokens,
    trainable,
)
from torch import Tensor, nn

from growthring.guards import PEGP

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}


def check(model: nn.Module, old: Any, new: Any, **settings: Any) -> None:
    """Learn ``old`` unguarded, protect it, learn ``new``: nothing old moves, and the new loss falls."""
    dtype = next(model.parameters()).dtype
    fit(model, old, steps=10, **{k: v for k, v in settings.items() if k in ("make", "loss_of")})
    guard = protected(model, old)
    before = answer(model, old)
    free = copy.deepcopy(model)
    losses = fit(model, new, guard, **settings)
    assert change(answer(model, old), before) < LIMIT[dtype]
    certificate = guard.end_task("new", [new])
    assert certificate.leak is not None
    assert certificate.leak <= (1e-5 if dtype == torch.float32 else 1e-12)
    assert certificate.output_change is not None
    assert certificate.output_change < LIMIT[dtype]
    assert losses[-1] < losses[0]
    # what the guard is for: the same training without it changes the old answers a lot
    fit(free, new, **settings)
    assert change(answer(free, old), before) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("build", [mlp, lora_mlp], ids=["linear", "lora"])
def test_every_optimizer(build: Callable[[torch.dtype], nn.Module], optimizer: str, dtype: torch.dtype) -> None:
    check(build(dtype), rows(4, 20, 1, dtype), rows(6, 20, 2, dtype), make=OPTIMIZERS[optimizer])


@pytest.mark.parametrize(
    "settings",
    [{"clip": 0.05}, {"accumulate": 3}, {"warmup": 50}, {"autocast": torch.bfloat16}, {"clip": 0.1, "accumulate": 2}],
    ids=["clip", "accumulate", "warmup", "autocast", "clip+accumulate"],
)
@pytest.mark.parametrize("build", [mlp, lora_mlp], ids=["linear", "lora"])
def test_every_habit_of_a_training_loop(build: Callable[[], nn.Module], settings: dict[str, Any]) -> None:
    check(build(), rows(4, 20, 1), rows(6, 20, 2), **settings)


def test_lbfgs_style_closures_need_no_gradient_hook() -> None:
    """Only the projection after the step makes it exact; an optimizer that steps many times inside is no exception."""
    model, old, new = lora_mlp(torch.float64), rows(4, 20, 1, torch.float64), rows(6, 20, 2, torch.float64)
    fit(model, old, steps=5)
    guard, before = protected(model, old), answer(model, old)
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = default_loss(model, new)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
        guard.after_step()
    assert change(answer(model, old), before) < 1e-12
    assert guard.end_task(None, [new]).leak < 1e-12


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_momentum_from_before_the_boundary(optimizer: str) -> None:
    """One optimizer over both tasks: what it still holds of the first points into the protected space."""
    model, old, new = lora_mlp(), rows(4, 20, 1), rows(6, 20, 2)
    shared = OPTIMIZERS[optimizer](trainable(model))
    fit(model, old, optimizer=shared, steps=20)
    guard, before = protected(model, old), answer(model, old)
    bare = copy.deepcopy(model)
    fit(model, new, guard, optimizer=shared, steps=1)
    assert change(answer(model, old), before) < 1e-5
    assert guard.end_task(None, [new]).leak <= 1e-5
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), bare.parameters(), strict=True))


@pytest.mark.parametrize("unscaled", [True, False], ids=["unscaled first", "scaled gradients"])
def test_grad_scaler_with_a_skipped_step(unscaled: bool) -> None:
    model, old, new = lora_mlp(), rows(4, 20, 1), rows(6, 20, 2)
    fit(model, old, steps=10)
    guard, before = protected(model, old), answer(model, old)
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(40):
        optimizer.zero_grad()
        scaler.scale(default_loss(model, new)).backward()
        if step == 7:
            trainable(model)[0].grad[0, 0] = torch.inf
        if unscaled:
            scaler.unscale_(optimizer)
        guard.before_step()
        weights = [p.detach().clone() for p in trainable(model)]
        scaler.step(optimizer)
        guard.after_step()
        scaler.update()
        if step == 7:
            assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(weights, trainable(model), strict=True))
    assert scaler.get_scale() == 128.0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert change(answer(model, old), before) < 1e-5
    assert guard.end_task(None, [new]).leak <= 1e-5


def test_several_tasks_keep_the_first() -> None:
    model = lora_mlp(r=16)
    first = rows(3, 20, 0)
    guard = PEGP(1.0)
    guard.consolidate(model, [first])
    before = answer(model, first)
    for task in range(1, 4):
        guard.begin_task()
        fit(model, rows(3, 20, task), guard, steps=50)
        certificate = guard.end_task(None, [rows(3, 20, task)])
        assert certificate.leak <= 1e-5
        assert certificate.probes == 3 * task
        assert certificate.output_change < 1e-5
    assert change(answer(model, first), before) < 1e-5


@pytest.mark.parametrize("build", [mlp, lora_mlp], ids=["linear", "lora"])
def test_gradient_projection_alone_leaks(build: Callable[[], nn.Module]) -> None:
    """Specs, invariant 4: Adam rotates a projected gradient back."""
    model, old, new = build(), rows(4, 20, 1), rows(6, 20, 2)
    fit(model, old, steps=10)
    guard, before = protected(model, old), answer(model, old)
    fit(model, new, guard, make=OPTIMIZERS["adam"], project_update=False)
    assert change(answer(model, old), before) > 1e-2
    assert guard.end_task(None, [new]).leak > 1e-2


def test_update_projection_alone_is_exact() -> None:
    model, old, new = lora_mlp(), rows(4, 20, 1), rows(6, 20, 2)
    fit(model, old, steps=10)
    guard, before = protected(model, old), answer(model, old)
    fit(model, new, guard, project_gradient=False)
    assert change(answer(model, old), before) < 1e-5
    assert guard.end_task(None, [new]).leak <= 1e-5


# --- kinds of sites ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"bias": "lora_only"}, {"lora_bias": True}, {"r": 32}],
    ids=["plain", "rslora", "dropout", "bias", "lora_bias", "wide"],
)
def test_lora_on_every_linear_layer_of_bert(config: dict[str, Any]) -> None:
    check(lora_bert(**config), tokens(2, 4, 1), tokens(4, 6, 2, padded=2), steps=60)


def test_padded_old_inputs_on_bert() -> None:
    old = tokens(2, 5, 1, padded=3)
    model = lora_bert()
    fit(model, old, steps=10)
    guard = protected(model, old)
    before = answer(model, old)
    fit(model, tokens(4, 6, 2), guard, steps=60)
    keep = old["attention_mask"].bool()
    assert change(answer(model, old)[keep], before[keep]) < 1e-5
    assert guard.end_task(None, [old]).output_change < 1e-5


def test_full_weights_of_bert_and_gpt2() -> None:
    check(bert(), tokens(2, 4, 1), tokens(4, 6, 2), steps=60, make=OPTIMIZERS["adam"])
    check(gpt2(), tokens(2, 4, 1), tokens(4, 6, 2), steps=60, make=OPTIMIZERS["adam"])


def test_lora_on_conv1d() -> None:
    """GPT-2's Conv1D stores weights transposed; LoRA on it does not."""
    model = lora_bert(model=gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    check(model, tokens(2, 4, 1), tokens(4, 6, 2), steps=60)


def test_classification_head_and_lora() -> None:
    """A head trained in full beside the adapter, as PEFT's task type does it; the old labels' logits stay."""
    model = lora_bert(model=classifier(), task_type="SEQ_CLS", target_modules=["query", "value", "dense"])
    check(model, tokens(3, 4, 1), tokens(4, 6, 2), steps=80)
    kinds = {s.kind for s in protected(model, tokens(2, 4, 1)).end_task(None, [tokens(2, 4, 1)]).sites}
    assert kinds == {"lora_A", "lora_B", "linear"}


def test_one_of_several_adapters_is_active() -> None:
    from peft import LoraConfig

    model = lora_bert()
    model.add_adapter("second", LoraConfig(r=8, target_modules="all-linear"))
    model.set_adapter("default")
    old = tokens(2, 4, 1)
    fit(model, old, steps=10)
    guard = PEGP(1.0)
    certificate = guard.consolidate(model, [old])
    assert all(".default." in s.name for s in certificate.sites)
    before = answer(model, old)
    guard.begin_task()
    second = {n: p.detach().clone() for n, p in model.named_parameters() if ".second." in n}
    fit(model, tokens(4, 6, 2), guard, steps=40)
    assert change(answer(model, old), before) < 1e-5
    assert guard.end_task(None, [old]).leak <= 1e-5
    assert all(torch.equal(p, second[n]) for n, p in model.named_parameters() if n in second)


class Shared(nn.Module):
    """One layer called three times in a forward pass, and registered twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(40, 40)
        self.again = self.inner
        self.out = nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.inner, self.again, self.inner):
            x = x + torch.tanh(layer(x))
        return self.out(x)


def test_a_module_called_several_times() -> None:
    model = Shared()
    check(model, rows(4, 40, 1), rows(6, 40, 2))
    certificate = PEGP(1.0).consolidate(model, [rows(4, 40, 1)])
    assert {s.name: s.rank for s in certificate.sites}["inner.weight"] == 12  # three inputs for each of the four rows


def test_odd_shapes() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.row = nn.Linear(9, 1, bias=False)  # 1 x d
            self.column = nn.Linear(1, 7, bias=False)  # d x 1: full after one input
            self.last = nn.Linear(16, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.column(self.row(x)), x], -1))

    model, old, new = Odd(), rows(2, 9, 1), rows(5, 9, 2)
    fit(model, old, steps=10)
    guard, before = protected(model, old), answer(model, old)
    column = model.column.weight.detach().clone()
    fit(model, new, guard, steps=100)
    assert change(answer(model, old), before) < 1e-5
    assert torch.equal(model.column.weight, column)
    certificate = guard.end_task(None, [new])
    assert certificate.leak <= 1e-5


@pytest.mark.parametrize("shape", [(4, 20), (2, 2, 20), (1, 2, 2, 20)], ids=["2d", "3d", "4d"])
def test_any_leading_shape_gives_the_same_memory(shape: tuple[int, ...]) -> None:
    model = mlp(torch.float64)
    x = rows(4, 20, 1, torch.float64)
    guards = [PEGP(1.0), PEGP(1.0)]
    guards[0].consolidate(model, [x])
    guards[1].consolidate(model, [x.reshape(shape)])
    for name, space in guards[0]._memory.spaces.items():
        p, q = (s.basis() @ s.basis().mT for s in (space, guards[1]._memory.spaces[name]))
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
