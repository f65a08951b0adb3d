"""A reference protected before any training: B of LoRA is zero still, and must stay able to learn."""

from __future__ import annotations

import copy

import pytest
import torch
from guard_helpers import answer, bert, change, fit, lora_bert, lora_mlp, rows, tokens
from peft import PromptTuningConfig, get_peft_model
from torch import nn

from growthring.guards import PEGP
from growthring.guards.survey import Survey


def _factors(model: nn.Module, factor: str) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if f"lora_{factor}" in n}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_all_of_a_reference_is_kept_and_the_task_is_learned(dtype: torch.dtype, limit: float) -> None:
    model, reference, new = lora_mlp(dtype, r=8), rows(6, 20, 1, dtype), rows(6, 20, 2, dtype)
    before = answer(model, reference)
    guard = PEGP(1.0)
    certificate = guard.consolidate(model, [reference], "reference")
    assert torch.equal(answer(model, reference), before)  # B is zero: moving A changes no output
    assert any("factors B are zero" in note for note in certificate.notes)
    assert {s.free for s in certificate.sites if s.kind == "lora_B"} == {8}
    guard.begin_task()
    losses = fit(model, new, guard, steps=200)
    assert losses[-1] < 0.8 * losses[0]
    ended = guard.end_task("new", [new])
    assert ended.kept
    assert ended.held == 0
    assert change(answer(model, reference), before) <= limit


def test_without_moving_a_nothing_could_be_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Survey, "resting", lambda self, memory: {})
    model, guard = lora_mlp(r=4), PEGP(1.0)
    certificate = guard.consolidate(model, [rows(6, 20, 1)], "reference")
    assert {s.free for s in certificate.sites if s.kind == "lora_B"} == {0}
    guard.begin_task()
    start = copy.deepcopy(model)
    fit(model, rows(6, 20, 2), guard, steps=20)
    assert torch.equal(answer(model, rows(6, 20, 2)), answer(start, rows(6, 20, 2)))


@pytest.mark.parametrize("energy", [{"lora_A": 0.9, "lora_B": 0.99}, {"lora_A": 0.99, "lora_B": 0.9}, 0.7])
def test_each_certificate_reaches_its_energy(energy: object) -> None:
    model, reference = lora_bert(), tokens(8, 9, 1, padded=3)
    certificate = PEGP(energy).consolidate(model, [reference])
    assert all(s.energy >= s.energy_target * (1 - 1e-6) for s in certificate.sites)
    bound = {s.name: s.rank for s in certificate.sites if s.kind == "lora_B"}
    if energy == {"lora_A": 0.99, "lora_B": 0.9}:
        assert set(bound.values()) == {0}  # what A no longer reads needs no protection behind it
    if energy == {"lora_A": 0.9, "lora_B": 0.99}:
        assert min(bound.values()) >= 1


def test_a_shared_input_keeps_one_basis_and_every_a_leaves_it() -> None:
    model, reference = lora_bert(r=8), tokens(2, 5, 1)
    guard = PEGP(1.0)
    old = {n: a.clone() for n, a in _factors(model, "A").items()}
    guard.consolidate(model, [reference])
    for name, a in _factors(model, "A").items():
        space = guard._memory.space(name)
        assert space is not None
        assert space.share(a) <= 1e-6
        assert not torch.equal(a, old[name])
        assert torch.allclose(space.reject(old[name]), a, atol=1e-6)


def test_only_zero_factors_rest() -> None:
    model = lora_mlp(r=4)
    with torch.no_grad():
        next(iter(_factors(model, "B").values()))[0, 0] = 1e-3
    start = {n: a.clone() for n, a in _factors(model, "A").items()}
    certificate = PEGP(1.0).consolidate(model, [rows(6, 20, 1)])
    moved = [n for n, a in _factors(model, "A").items() if not torch.equal(a, start[n])]
    assert len(moved) == 2
    assert sorted(s.free for s in certificate.sites if s.kind == "lora_B") == [0, 4, 4]


def test_auto_energy_leaves_a_alone() -> None:
    model = lora_mlp(r=4)
    start = {n: a.clone() for n, a in _factors(model, "A").items()}
    PEGP("auto").consolidate(model, [rows(6, 20, 1)])
    assert all(torch.equal(a, start[n]) for n, a in _factors(model, "A").items())


def test_the_memory_comes_back(tmp_path) -> None:
    model, guard = lora_mlp(r=8), PEGP(0.95)
    guard.consolidate(model, [rows(6, 20, 1)])
    guard.save_pretrained(tmp_path)
    again = PEGP.load_pretrained(tmp_path, model)
    again.begin_task()
    losses = fit(model, rows(6, 20, 2), again, steps=100)
    assert losses[-1] < 0.9 * losses[0]
    assert again.end_task(None, [rows(6, 20, 2)]).held == 0


def test_a_prompt_whose_slots_are_full_is_exhausted_although_directions_are_free() -> None:
    """One slot: the mass on it fills R^1, and across it no direction of the 32 can move."""
    torch.manual_seed(0)
    model = get_peft_model(bert(), PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=1))
    guard = PEGP(0.9)
    with pytest.warns(UserWarning, match="no free direction is left"):
        certificate = guard.consolidate(model, [tokens(4, 6, 1)])
    assert certificate.free > 0
    assert guard.exhausted()
