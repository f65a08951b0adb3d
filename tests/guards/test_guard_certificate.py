"""Certificates: every figure is measured."""

from __future__ import annotations

import json

import pytest
import torch
from guard_helpers import answer, change, fit, lora_bert, lora_mlp, mlp, protected, rows, tokens

from growthring.errors import NumericalError
from growthring.guards import PEGP, Certificate, SiteCertificate
from growthring.guards.batches import relative_change


def trained() -> tuple[torch.nn.Module, PEGP, torch.Tensor]:
    model, old = lora_mlp(), rows(4, 20, 1)
    fit(model, old, steps=5)
    guard = protected(model, old)
    fit(model, rows(6, 20, 2), guard, steps=20)
    return model, guard, old


def test_the_first_certificate() -> None:
    certificate = PEGP(0.9).consolidate(lora_mlp(), [rows(4, 20, 1)], "letters")
    assert (certificate.guard, certificate.task, certificate.task_index) == ("pegp", "letters", 0)
    assert certificate.protected_tasks == 0
    assert certificate.leak is None
    assert certificate.output_change is None
    assert certificate.probes == certificate.held == 0
    assert certificate.dims == 20 + 8 + 24 + 8 + 16 + 8
    assert (
        certificate.free
        == sum(s.free for s in certificate.sites)
        == certificate.dims - sum(s.rank for s in certificate.sites)
    )
    assert 0.9 <= certificate.energy == min(s.energy for s in certificate.sites) <= 1.0
    assert {s.energy_target for s in certificate.sites} == {0.9}


def test_a_clean_task() -> None:
    _, guard, _ = trained()
    certificate = guard.end_task("second", [rows(6, 20, 2)])
    assert certificate.task_index == certificate.protected_tasks == 1
    assert certificate.leak == max(s.leak for s in certificate.sites) <= 1e-5
    assert certificate.leak > 0.0  # rounding is measured too
    assert certificate.output_change <= 1e-5
    assert certificate.probes == 4
    assert certificate.notes == ()


def test_a_weight_corrupted_after_training_shows() -> None:
    model, guard, _ = trained()
    name = "base_model.model.2.lora_A.default.weight"
    with torch.no_grad():
        dict(model.named_parameters())[name].add_(0.05)
    certificate = guard.end_task(None, [rows(6, 20, 2)])
    assert certificate.leak > 1e-2
    assert next(s.leak for s in certificate.sites if s.name == name) == certificate.leak
    assert all(s.leak <= 1e-5 for s in certificate.sites if s.name != name)
    assert certificate.output_change > 1e-3


def test_a_weight_that_no_site_watches_shows_in_the_outputs() -> None:
    model, guard, old = trained()
    before = answer(model, old)
    with torch.no_grad():
        model.base_model.model[2].base_layer.weight.add_(0.05)
    certificate = guard.end_task(None, [rows(6, 20, 2)])
    assert certificate.leak <= 1e-5
    assert certificate.output_change == pytest.approx(change(answer(model, old), before), rel=1e-2)


def test_a_held_tensor_that_moved_is_noted() -> None:
    model, old = mlp(), rows(3, 20, 1)
    guard = protected(model, old)
    with torch.no_grad():
        model[2].bias.add_(0.1)
    certificate = guard.end_task(None, [old])
    assert certificate.output_change > 1e-3
    assert any("1 held tensors have moved since the last step (the first: 2.bias)" in n for n in certificate.notes)


def test_a_move_below_rounding_is_explained() -> None:
    """What float32 cannot store is a large part of a tiny update; the outputs do not care."""
    model, old = mlp(), rows(4, 20, 1)
    guard = protected(model, old)
    fit(model, rows(6, 20, 2), guard, steps=2, make=lambda p: torch.optim.AdamW(p, lr=1e-6))
    certificate = guard.end_task(None, [old])
    assert certificate.leak > 1e-5
    assert certificate.output_change < 1e-6
    assert any("moved by so little that rounding them" in n for n in certificate.notes)


def test_it_is_json() -> None:
    _, guard, _ = trained()
    certificate = guard.end_task(None, [rows(6, 20, 2)])
    document = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))
    assert document["task"] == "task-2"
    assert document["notes"] == []
    assert set(document) == set(Certificate.__dataclass_fields__)
    assert set(document["sites"][0]) == {
        "name",
        "kind",
        "dim",
        "rank",
        "free",
        "energy_target",
        "energy",
        "leak",
        "rounding",
    }
    assert len(document["sites"]) == 6


def test_diverged_weights_are_an_error_and_not_a_change_of_zero() -> None:
    model, guard, _ = trained()
    with torch.no_grad():
        model.base_model.model[4].base_layer.bias.fill_(torch.nan)
    with pytest.raises(NumericalError, match="training has diverged"):
        guard.end_task(None, [rows(6, 20, 2)])
    assert guard.tasks == ["old"]


def test_relative_change() -> None:
    old = torch.tensor([[1.0, -2.0], [0.5, 1.0]])
    assert relative_change(old, old) == 0.0
    assert relative_change(old + torch.tensor([0.0, 0.5]), old) == 0.25
    assert relative_change(torch.cat([old, old * 100], 1), old) == 0.0  # a head that grew
    assert relative_change(old * 2, old, torch.tensor([0, 1])) == 1.0
    assert relative_change(torch.ones(2), torch.zeros(2)) == 1.0  # zeros that moved are not "no change"
    masked = torch.tensor([1.0, -torch.inf])
    assert relative_change(masked * 2, masked) == 1.0
    with pytest.raises(NumericalError, match="NaN or infinity"):
        relative_change(torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, 1.0]))


def test_probes_are_bounded_and_can_be_left_out() -> None:
    model = lora_mlp()
    guard = PEGP(0.5, probes=2, max_probe_tasks=3)
    for task in range(5):
        assert guard.consolidate(model, [rows(4, 20, task)]).probes == 2 * min(task, 3)
    none = PEGP(0.5, probes=0)
    none.consolidate(model, [rows(4, 20, 1)])
    certificate = none.consolidate(model, [rows(4, 20, 2)])
    assert certificate.probes == 0
    assert certificate.output_change is None
    assert not none.state_dict()["probes"]


def test_probes_are_copies() -> None:
    model, x = lora_mlp(), rows(4, 20, 1)
    guard = PEGP(0.5)
    guard.consolidate(model, [x])
    x.mul_(100.0)  # the caller uses its batch again
    assert guard.consolidate(model, [rows(4, 20, 2)]).output_change < 1e-6


def test_padding_rows_are_no_outputs() -> None:
    """What a model says at padded positions is nobody's answer."""
    model, old = lora_bert(), tokens(2, 6, 1, padded=3)
    fit(model, old, steps=5)
    guard = protected(model, old)
    fit(model, tokens(3, 5, 2), guard, steps=30)
    before = answer(model, old)
    assert guard.end_task(None, [tokens(3, 5, 2)]).output_change < 1e-5
    assert torch.equal(answer(model, old), before)


def test_a_leak_that_rounding_explains_is_kept_and_a_larger_one_is_not() -> None:
    """The verdict allows 1e-5, or what float32 storage causes."""

    def site(leak: float | None, rounding: float | None) -> SiteCertificate:
        return SiteCertificate("w", "linear", 8, 4, 4, 0.9, 0.95, leak, rounding)

    assert site(None, None).kept
    assert site(1e-5, 0.0).kept
    assert site(5e-5, 6e-5).kept
    assert not site(5e-5, 4e-5).kept
    assert site(5e-3, 1e-2).kept
    assert not site(1e-2, 5e-3).kept
    assert not site(float("nan"), 0.0).kept
