"""FreshLoRA: a new branch for every task, merged or kept; alone, and in front of a gradient memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from branch_helpers import branch, training
from gradient_helpers import Projected, basis
from guard_helpers import (
    OPTIMIZERS,
    answer,
    bert,
    change,
    fit,
    gpt2,
    lora_bert,
    lora_mlp,
    mlp,
    rows,
    tokens,
    trainable,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from growthring.errors import ConfigError, GuardError
from growthring.guards import FreshLoRA, GradientMemory, merge_branches

DEFAULTS = {"steps": 20, "make": OPTIMIZERS["adam"]}


def learn(guards: list[Any], model: nn.Module, data: Any, name: str | None = None, **settings: Any) -> list[Any]:
    """One task from start to end, all guards in their order."""
    for guard in guards:
        guard.attach(model)
    for guard in guards:
        guard.prepare(name, [])
    for guard in guards:
        guard.attach(model)
        guard.begin_task(name)
    make = settings.pop("make", OPTIMIZERS["adam"])
    optimizer = make(trainable(model))
    for guard in guards:
        guard.bind(optimizer)

    class All:
        def before_step(self) -> None:
            for guard in guards:
                guard.before_step()

        def after_step(self) -> None:
            for guard in guards:
                guard.after_step()

    fit(model, data, All(), optimizer=optimizer, **{"steps": 20, **settings})
    return [guard.end_task(name, []) for guard in guards]


def both(model: nn.Module) -> nn.Module:
    """LoRA on the first two layers; the weights of the last two train themselves, one of them beside its LoRA."""
    for index in (2, 4):
        layer = model.base_model.model[index]
        getattr(layer, "base_layer", layer).weight.requires_grad_(True)
    return model


def mixed(dtype: torch.dtype = torch.float32) -> nn.Module:
    return both(lora_mlp(dtype, target_modules=["0", "2"], r=4))


# --- alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [True, False])
def test_every_task_starts_from_the_model_of_the_last(merge: bool) -> None:
    model, guard = lora_mlp(), FreshLoRA(merge)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer.weight" in n}
    for task in range(3):
        before = answer(model, rows(5, 20, 9))
        guard.attach(model)
        guard.prepare(None, [])
        assert change(answer(model, rows(5, 20, 9)), before) < 1e-6  # a new branch says nothing
        (certificate,) = learn([guard], model, rows(5, 20, task))
        assert change(answer(model, rows(5, 20, 9)), before) > 1e-2
        assert certificate.leak is None
        assert certificate.kept is None
        assert certificate.notes == ()
        assert certificate.to_dict()["task"] == f"task-{task + 1}"
        active = [n for n in model.active_adapters if any(bool(p.any()) for p in branch(model, n, "B").values())]
        assert active == ([] if merge else [f"task-{i:03d}" for i in range(task + 1)][::-1])
    moved = [n for n, p in model.named_parameters() if n in base and not torch.equal(p, base[n])]
    assert len(moved) == (3 if merge else 0)
    assert guard.tasks == ["task-1", "task-2", "task-3"]


def test_merging_changes_answers_by_rounding_only() -> None:
    for model in (
        lora_mlp(),
        lora_bert(),
        lora_bert(model=gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ):
        data = rows(4, 20, 1) if isinstance(model.base_model.model, nn.Sequential) else tokens(3, 4, 1)
        guard = FreshLoRA()
        guard.attach(model)
        guard.prepare("a", [])
        guard.begin_task("a")
        fit(model, data, guard, make=OPTIMIZERS["adam"], steps=15)
        before = answer(model, data)
        guard.end_task("a")
        assert change(answer(model, data), before) < 1e-5
        with model.disable_adapter():  # the branch is in the weights
            assert change(answer(model, data), before) < 1e-5


def test_a_merged_and_a_kept_run_say_the_same() -> None:
    ends = []
    for merge in (True, False):
        model, guard = lora_mlp(torch.float64), FreshLoRA(merge, seed=3)
        for task in range(3):
            learn([guard], model, rows(5, 20, task, torch.float64))
        ends.append(answer(model, rows(5, 20, 9, torch.float64)))
    assert change(*ends) < 1e-9


def test_first_weights_are_seeded_by_the_task_alone() -> None:
    starts = {}
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model, guard = lora_mlp(), FreshLoRA(seed=seed)
        torch.manual_seed(noise)
        guard.attach(model)
        guard.prepare(None, [])
        first = {n: p.detach().clone() for n, p in branch(model, guard.current, "A").items()}
        guard.prepare(None, [])  # begun again
        assert all(torch.equal(p, first[n]) for n, p in branch(model, guard.current, "A").items())
        starts[seed, noise] = torch.cat([p.flatten() for p in first.values()])
        for p in first.values():
            bound = p.shape[1] ** -0.5
            assert 0.9 * bound < float(p.abs().max()) <= bound
    assert torch.equal(starts[0, 1], starts[0, 2])
    assert not torch.equal(starts[0, 1], starts[1, 1])


def test_base_weights_may_train_beside_it() -> None:
    for merge in (True, False):
        model, guard = mixed(), FreshLoRA(merge)
        for task in range(2):
            learn([guard], model, rows(5, 20, task))
            weights = [n for n in training(model) if "lora" not in n]
            assert weights == ["base_model.model.2.base_layer.weight", "base_model.model.4.weight"]
        assert sum("lora" in n for n in training(model)) in (0, 4)
        assert {p.name for p in guard.explain(model)} == {n for n in training(model) if "lora" in n}


# --- in front of a gradient memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "momentum", "projected"])
@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("first", ["branches first", "memory first"])
def test_branches_and_full_weights_stay_out_of_old_gradients(merge: bool, side: str, name: str, first: str) -> None:
    """The whole change of a layer, weight and branch together, is outside; the memory outlives adapters."""
    make = Projected if name == "projected" else OPTIMIZERS[name]
    model, fresh, guard = mixed(), FreshLoRA(merge), GradientMemory(0.7, side=side)
    guards = [fresh, guard] if first == "branches first" else [guard, fresh]
    layers = {"0": "0", "2": "2", "4": "4"}

    def whole() -> dict[str, torch.Tensor]:
        plain = copy.deepcopy(model)
        merged = plain.merge_and_unload()
        return {i: merged[int(i)].weight.detach().double().clone() for i in layers}

    for task in range(3):
        spaces, before = copy.deepcopy(guard._spaces), whole()
        certificates = learn(guards, model, rows(4, 20, task), f"t{task}", make=make)
        certificate = certificates[guards.index(guard)]
        assert not any("go on from an earlier task" in n for n in certificate.notes)
        after = whole()
        for i in layers:
            moved = after[i] - before[i]
            assert float(moved.norm()) > 0 or side != "input"
            for key, delta in (
                (f"base_model.model.{i}.weight", moved),
                (f"base_model.model.{i}.weight[out]", moved.mT),
            ):
                if key in spaces and float(moved.norm()):
                    assert spaces[key].share(delta) < 1e-5
        if task:
            assert certificate.kept
            assert certificate.leak <= 1e-5
            assert len(spaces) == (6 if side == "both" else 3)
    kinds = {s.kind for s in certificate.sites}
    assert kinds == {"input": {"lora_A", "linear"}, "output": {"lora_B", "linear"}}.get(
        side, {"lora_A", "lora_B", "linear"}
    )


def test_without_fresh_branches_the_product_leaks_and_is_told() -> None:
    """The control: an A that goes on reads protected inputs, and its B, which is free, changes what they become."""
    model, guard = lora_mlp(r=4), GradientMemory(0.7)
    learn([guard], model, rows(4, 20, 1))
    merged = [copy.deepcopy(model).merge_and_unload()[0].weight.detach().double()]
    (plan,) = [p for p in guard.explain() if p.name == "base_model.model.0.lora_A.default.weight"]
    assert "older than the task" in plan.why
    assert plan.cost
    (certificate,) = learn([guard], model, rows(4, 20, 2))
    merged.append(copy.deepcopy(model).merge_and_unload()[0].weight.detach().double())
    assert guard._spaces["base_model.model.0.weight"].share(merged[1] - merged[0]) > 1e-2
    assert any("go on from an earlier task" in n for n in certificate.notes)


def test_a_new_a_is_moved_out_and_no_output_changes() -> None:
    model, fresh, guard = mixed(), FreshLoRA(), GradientMemory(0.7)
    learn([fresh, guard], model, rows(4, 20, 1))
    fresh.attach(model)
    fresh.prepare(None, [])
    guard.attach(model)
    before = answer(model, rows(6, 20, 5))
    a = model.base_model.model[0].lora_A[fresh.current].weight
    assert guard._spaces["base_model.model.0.weight"].share(a.detach()) > 1e-2
    rows_of = {p.name: p for p in guard.explain()}
    assert rows_of[f"base_model.model.0.lora_A.{fresh.current}.weight"].cost == ""
    assert rows_of[f"base_model.model.0.lora_B.{fresh.current}.weight"].treatment == "free"
    guard.begin_task()
    assert guard._spaces["base_model.model.0.weight"].share(a.detach()) < 1e-6
    assert torch.equal(answer(model, rows(6, 20, 5)), before)


def test_a_weight_and_its_branch_share_one_memory() -> None:
    model, fresh, guard = mixed(), FreshLoRA(), GradientMemory(0.9)
    learn([fresh, guard], model, rows(4, 20, 1))
    assert sorted(guard._spaces) == [f"base_model.model.{i}.weight" for i in (0, 2, 4)]
    assert guard._spaces["base_model.model.2.weight"].dim == 24
    assert basis(guard, "base_model.model.2.weight").shape[0] == 24


# --- refusals, state, files -------------------------------------------------------------------------------------


def test_bad_settings_and_models() -> None:
    for settings in ({"merge": "yes"}, {"merge": 1}, {"seed": -1}, {"seed": 1.5}, {"seed": True}):
        with pytest.raises(ConfigError, match="FreshLoRA"):
            FreshLoRA(**settings)
    with pytest.raises(GuardError, match="has no LoRA"):
        FreshLoRA().attach(mlp())
    guard = FreshLoRA()
    guard.attach(lora_mlp())
    with pytest.raises(GuardError, match="no branch yet"):
        guard.begin_task()

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    tied = get_peft_model(Tied(), LoraConfig(r=2, target_modules=["a"]))
    with pytest.raises(GuardError, match="shares its weight"):
        FreshLoRA().attach(tied)
    FreshLoRA(merge=False).attach(tied)
    wrapped = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]))
    torch.nn.utils.parametrizations.weight_norm(wrapped.base_model.model[0].base_layer)
    with pytest.raises(GuardError, match="merge=False"):
        FreshLoRA().attach(wrapped)


def test_half_precision_bases_are_told() -> None:
    model = lora_mlp().to(torch.bfloat16)
    (certificate,) = learn([FreshLoRA()], model, rows(4, 20, 1, torch.bfloat16), steps=3)
    assert any("half precision" in n for n in certificate.notes)


@pytest.mark.parametrize("merge", [True, False])
def test_state_in_the_middle_of_a_task(merge: bool) -> None:
    model, guards = mixed(), [FreshLoRA(merge), GradientMemory(0.7)]
    learn(guards, model, rows(4, 20, 1))
    for guard in guards:
        guard.attach(model)
        guard.prepare("b", [])
        guard.begin_task("b")
    optimizer = OPTIMIZERS["adam"](trainable(model))
    for _ in range(3):
        fit(model, rows(4, 20, 2), guards[1], optimizer=optimizer, steps=1)
    states, weights = [copy.deepcopy(g.state_dict()) for g in guards], copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())
    fit(model, rows(4, 20, 2), guards[1], optimizer=optimizer, steps=4)
    ends = [g.end_task("b", []) for g in guards]

    other, again = mixed(), [FreshLoRA(merge), GradientMemory(0.7)]
    again[0].load_state_dict(states[0])
    again[0].attach(other)
    other.load_state_dict(weights)
    again[0].begin_task("b")
    again[1].attach(other)
    again[1].load_state_dict(states[1])
    resumed = OPTIMIZERS["adam"](trainable(other))
    resumed.load_state_dict(moments)
    fit(other, rows(4, 20, 2), again[1], optimizer=resumed, steps=4)
    assert [g.end_task("b", []) for g in again] == ends
    assert change(answer(other, rows(4, 20, 7)), answer(model, rows(4, 20, 7))) == 0.0


def test_the_wrong_base_is_told(tmp_path: Path) -> None:
    """Only the adapter was kept, and the weights that took up the branches were not: the defect of the release."""
    model, guard = lora_mlp(), FreshLoRA()
    learn([guard], model, rows(4, 20, 1))
    guard.save_pretrained(tmp_path)
    fine = FreshLoRA.load_pretrained(tmp_path, model)
    assert fine.settings() == guard.settings()
    fine.prepare(None, [])
    wrong = FreshLoRA.load_pretrained(tmp_path, lora_mlp())
    with pytest.warns(UserWarning, match="compute something else"):
        wrong.prepare(None, [])


@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")  # PEFT before 0.19
def test_kept_branches_are_one_stock_lora_and_merged_ones_plain_weights(tmp_path: Path) -> None:
    data = tokens(3, 4, 5)
    for merge in (False, True):
        model, guard = lora_bert(), FreshLoRA(merge)
        for task in range(2):
            learn([guard], model, tokens(3, 4, task), steps=8)
        before, folder = answer(model, data), tmp_path / str(merge)
        if merge:
            model.merge_and_unload().save_pretrained(folder)
            loaded = type(bert()).from_pretrained(folder, add_pooling_layer=False)
        else:
            merge_branches(model)
            model.save_pretrained(str(folder))
            loaded = PeftModel.from_pretrained(bert(), str(folder))
        assert change(answer(loaded, data), before) < 1e-5
