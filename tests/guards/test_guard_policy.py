"""What is held, what may move, what is said about it; and that a task can still be learned."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from guard_helpers import (
    OPTIMIZERS,
    answer,
    bert,
    change,
    classifier,
    fit,
    lora_bert,
    lora_mlp,
    mlp,
    protected,
    rows,
    tokens,
    trainable,
)
from torch import Tensor, nn

from growthring.errors import ConfigError
from growthring.guards import PEGP


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("build", [mlp, lora_mlp], ids=["linear", "lora"])
def test_the_first_task_is_the_plain_optimizer_bit_for_bit(build, optimizer: str) -> None:
    plain, guarded = build(), build()
    guard = PEGP(0.95)
    guard.attach(guarded)
    guard.begin_task()
    fit(plain, rows(5, 20, 1), make=OPTIMIZERS[optimizer], steps=20, clip=0.5)
    fit(guarded, rows(5, 20, 1), guard, make=OPTIMIZERS[optimizer], steps=20, clip=0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), guarded.parameters(), strict=True))


def test_a_new_input_outside_the_old_space_is_learned() -> None:
    """Specs, invariant 5: protection is not freezing."""
    model, old = lora_mlp(), rows(3, 20, 1)
    fit(model, old, steps=20)
    free = copy.deepcopy(model)
    guard, before = protected(model, old), answer(model, old)
    basis = guard._memory.space("base_model.model.0.lora_A.default.weight")
    new = basis.reject(rows(4, 20, 2))
    losses = fit(model, new, guard, steps=200)
    unguarded = fit(free, new, steps=200)
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] >= unguarded[-1] - 1e-3
    assert change(answer(model, old), before) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("build", [mlp, lora_mlp], ids=["linear", "lora"])
def test_full_old_features_freeze_the_weights_and_say_so(build, dtype: torch.dtype) -> None:
    model = build(dtype)
    if build is lora_mlp:
        fit(model, rows(8, 20, 0, dtype), steps=5)
    guard = PEGP(1.0)
    with pytest.warns(UserWarning, match=r"no free direction is left at any of \d+ sites.*Lower the energy"):
        certificate = guard.consolidate(model, [rows(60, 20, 1, dtype)], "old")
    assert certificate.free == 0
    assert guard.exhausted()
    with pytest.warns(UserWarning, match="no free direction is left at any site; this task cannot change them"):
        guard.begin_task()
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, rows(6, 20, 2, dtype), guard, steps=20)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert guard.end_task(None, [rows(6, 20, 2, dtype)]).leak == 0.0


def test_the_trainer_is_told_only_when_every_site_is_full() -> None:
    model = lora_mlp(r=4)
    fit(model, rows(6, 20, 1), steps=1)  # B is no longer zero
    guard = PEGP(1.0)
    certificate = guard.consolidate(model, [rows(6, 20, 1)])  # B's four dimensions are full, A's are not
    assert {s.free for s in certificate.sites if s.kind == "lora_B"} == {0}
    assert not guard.exhausted()
    guard.begin_task()


# --- hold and allow ---------------------------------------------------------------------------------------------


def names_of(model: nn.Module, *parts: str) -> list[str]:
    return [n for n, _ in model.named_parameters() if any(part in n for part in parts)]


def test_norms_biases_and_embeddings_are_held_from_the_second_task_on() -> None:
    model = bert()
    guard = PEGP(1.0)
    guard.attach(model)
    guard.begin_task()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit(model, tokens(2, 4, 1), guard, steps=5)
    loose = names_of(model, "LayerNorm", "bias", "embeddings")
    assert all(not torch.equal(dict(model.named_parameters())[n], start[n]) for n in loose if "key.bias" not in n)
    first = guard.end_task("old", [tokens(2, 4, 1)])
    assert first.held == 0
    guard.begin_task()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit(model, tokens(2, 4, 2), guard, steps=5)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], start[n]) for n in loose)
    assert sum(not torch.equal(now[n], start[n]) for n in now if n not in loose) >= 10
    second = guard.end_task("new", [tokens(2, 4, 2)])
    assert second.held == len(loose)
    assert second.notes == ()


def test_allowed_tensors_move_and_the_certificate_says_that_the_guarantee_ends_there() -> None:
    model, old = mlp(), rows(3, 20, 1)
    guard, before = protected(model, old, unprotected="allow"), answer(model, old)
    bias = model[0].bias.detach().clone()
    fit(model, rows(6, 20, 2), guard, steps=20)
    assert not torch.equal(model[0].bias, bias)
    assert change(answer(model, old), before) > 1e-3
    certificate = guard.end_task(None, [rows(6, 20, 2)])
    assert certificate.held == 0
    assert certificate.leak <= 1e-5  # of the weights alone
    assert certificate.output_change > 1e-3
    assert any("3 trainable tensors were left free: the guarantee does not cover them" in n for n in certificate.notes)


def test_lora_only_bias_is_held() -> None:
    model = lora_mlp(bias="lora_only")
    guard = protected(model, rows(3, 20, 1))
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    assert all(dict(model.named_parameters())[n].requires_grad for n in biases)
    fit(model, rows(6, 20, 2), guard, steps=5)
    assert all(torch.equal(p, biases[n]) for n, p in model.named_parameters() if n in biases)
    assert guard.end_task(None, [rows(6, 20, 2)]).held == len(biases)


def test_a_weight_frozen_at_first_is_held_when_it_thaws() -> None:
    """Nothing is known about its old features, so it may not move."""
    model, old = mlp(), rows(3, 20, 1)
    model[2].requires_grad_(False)
    guard = PEGP(1.0)
    guard.consolidate(model, [old])
    before = answer(model, old)
    model[2].requires_grad_(True)
    guard.attach(model)
    guard.begin_task()
    fit(model, rows(6, 20, 2), guard, steps=20)
    assert change(answer(model, old), before) < 1e-5
    assert guard.end_task(None, [old]).held == 2 + 1 + 1  # its weight and bias, and the other two biases


def test_a_site_frozen_for_one_task_keeps_its_protection() -> None:
    model, old = mlp(), rows(3, 20, 1)
    guard = PEGP(1.0)
    guard.consolidate(model, [old])
    before = answer(model, old)
    model[2].requires_grad_(False)
    guard.attach(model)
    guard.begin_task()
    fit(model, rows(3, 20, 2), guard, steps=10)
    guard.end_task(None, [rows(3, 20, 2)])
    model[2].requires_grad_(True)
    guard.attach(model)
    guard.begin_task()
    fit(model, rows(3, 20, 3), guard, steps=20)
    assert change(answer(model, old), before) < 1e-5
    assert guard.end_task(None, [old]).leak <= 1e-5


def test_a_head_of_its_own_for_a_new_task_is_free_and_noted() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(20, 16)
            self.heads = nn.ModuleDict({"a": nn.Linear(16, 2)})
            self.task = "a"

        def forward(self, x: Tensor) -> Tensor:
            return self.heads[self.task](torch.tanh(self.body(x)))

    model, old = Heads(), rows(3, 20, 1)
    guard = PEGP(1.0)
    guard.consolidate(model, [old], "a")
    before = answer(model, old)
    model.heads["b"] = nn.Linear(16, 4)
    fresh = copy.deepcopy(model.heads["b"])
    guard.attach(model)
    guard.begin_task("b")
    model.task = "b"
    fit(model, rows(6, 20, 2), guard, steps=30)
    assert not torch.equal(model.heads["b"].weight, fresh.weight)
    assert not torch.equal(model.heads["b"].bias, fresh.bias)
    model.task = "a"
    certificate = guard.end_task("b", [rows(6, 20, 2)])
    assert any("2 trainable tensors are new in this task" in n for n in certificate.notes)
    assert change(answer(model, old), before) < 1e-5


# --- warnings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["site", "norm", "sign"])
def test_changes_between_two_tasks_are_seen(which: str) -> None:
    model = bert()
    guard = PEGP(0.9)
    guard.consolidate(model, [tokens(2, 4, 1)])
    name = "encoder.layer.0.attention.self.query.weight" if which != "norm" else "embeddings.LayerNorm.weight"
    with torch.no_grad():
        parameter = dict(model.named_parameters())[name]
        parameter.mul_(-1.0) if which == "sign" else parameter.mul_(torch.linspace(0.99, 1.01, 32))
    with pytest.warns(UserWarning, match=rf"1 protected tensors changed between consolidation.*{name}"):
        guard.begin_task()


def test_changes_that_no_old_input_sees_are_not_reported() -> None:
    """A checkpoint of a guarded task, loaded in another process, is as good as the start."""
    model, old = lora_mlp(), rows(3, 20, 1)
    fit(model, old, steps=5)
    guard = PEGP(1.0)
    guard.consolidate(model, [old])
    state = guard.state_dict()
    guard.begin_task()
    fit(model, rows(5, 20, 2), guard, steps=20)
    other = PEGP(1.0)
    other.load_state_dict(state)
    other.attach(model)
    other.begin_task()  # a warning would be an error here


def test_a_task_trained_without_the_guard_does_not_go_unnoticed() -> None:
    model, old = lora_mlp(), rows(3, 20, 1)
    fit(model, old, steps=5)
    guard = PEGP(1.0)
    guard.consolidate(model, [old])
    fit(model, rows(5, 20, 2), steps=20)
    with pytest.warns(UserWarning, match="was not guarded"):
        certificate = guard.consolidate(model, [rows(5, 20, 2)])
    assert certificate.leak is None
    assert certificate.output_change > 1e-3
    assert any("trained without the guard" in n for n in certificate.notes)


def test_two_consolidations_in_a_row_are_fine() -> None:
    model = lora_mlp()
    guard = PEGP(0.9)
    guard.consolidate(model, [rows(3, 20, 1)], "reference")
    assert guard.consolidate(model, [rows(3, 20, 2)], "more").notes == ()
    assert guard.tasks == ["reference", "more"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_warn_and_are_noted(dtype: torch.dtype) -> None:
    model, old = mlp().to(dtype), rows(3, 20, 1, dtype)
    guard = PEGP(1.0)
    guard.consolidate(model, [old])
    with pytest.warns(
        UserWarning, match=r"3 protected tensors are in half precision.*Keep trainable tensors in float32"
    ):
        guard.begin_task()
    before = answer(model, old)
    fit(model, rows(6, 20, 2, dtype), guard, steps=20, make=OPTIMIZERS["sgd"])
    certificate = guard.end_task(None, [old])
    assert 1e-5 < certificate.leak < 0.1  # rounding, not a hole
    assert change(answer(model, old), before) < 0.05
    assert any("half precision" in n for n in certificate.notes)


def test_what_was_decided_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    with caplog.at_level(logging.INFO, logger="growthring"):
        guard = PEGP(0.9)
        guard.attach(model)
        guard.begin_task()
        guard.end_task(None, [rows(3, 20, 1)])
        guard.begin_task()
    assert "first task, nothing is protected yet; 3 sites will be" in caplog.text
    assert "3 sites guarded, 3 tensors held" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"samples": 0},
        {"probes": -1},
        {"max_probe_tasks": -1},
        {"unprotected": "drop"},
        {"candidates": ()},
        {"mode": "exact"},
        {"project": "step"},
        {"kinds": ["lora"]},
        {"kinds": "lora_A"},
        {"kinds": []},
        {"merge": 1.0},
        {"merge": -0.1},
        {"merge": True},
    ],
)
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        PEGP(**settings)


def test_the_classifier_head_of_a_new_task_shares_its_rows() -> None:
    """A head that is trained on: logits of old inputs stay, biases stay, the weight moves."""
    model = lora_bert(model=classifier(), task_type="SEQ_CLS")
    old = tokens(2, 4, 1)
    fit(model, old, steps=5)
    guard, before = protected(model, old), answer(model, old)
    head = next(p for n, p in model.named_parameters() if n.endswith("classifier.modules_to_save.default.weight"))
    start = head.detach().clone()
    fit(model, tokens(3, 5, 2), guard, steps=20)
    assert not torch.equal(head, start)
    assert any(p is head for p in trainable(model))
    assert change(answer(model, old), before) < 1e-5
