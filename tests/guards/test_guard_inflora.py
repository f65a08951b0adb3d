"""InfLoRA: what its A may see, that it equals the plain twin, and that without its design it leaks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from branch_helpers import branch, few, learn, training
from guard_helpers import OPTIMIZERS, answer, change, default_loss, fit, lora_bert, lora_mlp, mlp, rows, tokens
from reference_inflora import DualGPM, ReferenceInfLoRA
from torch import Tensor

from growthring.errors import ConfigError, GuardError
from growthring.guards import InfLoRA, LinearSchedule, inflora
from growthring.subspace import SecondMoment, Subspace

DOUBLE = torch.float64
OLD, NEW = rows(6, 20, 1), rows(8, 20, 2)


def second_task(energy: Any = 1.0, *, model: Any = None, old: Any = OLD, new: Any = NEW, **settings: Any) -> Any:
    """A model that learned ``old`` and then ``new``; with what it said of ``old`` in between."""
    model = model or lora_mlp(r=4)
    guard = InfLoRA(energy)
    learn(guard, model, "old", old)
    before = answer(model, old)
    certificate = learn(guard, model, "new", new, **{"steps": 200, **settings})
    return model, guard, certificate, change(answer(model, old), before)


# --- the guarantee ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_old_outputs_stay_under_any_optimizer(optimizer: str) -> None:
    model, _, certificate, moved = second_task(make=OPTIMIZERS[optimizer])
    assert moved <= 1e-5
    assert certificate.leak <= 1e-6
    assert certificate.kept is True
    assert any(bool(b.any()) for b in branch(model, "task-001", "B").values())


def test_old_outputs_stay_in_float64() -> None:
    old, new = OLD.double(), NEW.double()
    *_, certificate, moved = second_task(model=lora_mlp(DOUBLE, r=4), old=old, new=new)
    assert moved <= 1e-12
    assert certificate.leak <= 1e-14


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value"], "all-linear"], ids=str)
def test_transformers_with_any_targets(targets: Any) -> None:
    old, new = tokens(2, 6, 1), tokens(2, 7, 2)
    model = lora_bert(r=4, target_modules=targets, lora_dropout=0.1)
    _, guard, certificate, moved = second_task(model=model, old=old, new=new, steps=60)
    assert certificate.kept is True
    assert moved <= 1e-5
    spaces = guard.state_dict()["spaces"]
    if targets != "all-linear":
        assert len(spaces) == 2  # query, key and value share their input
        for layer in ("0", "1"):
            same = [a for n, a in branch(model, "task-001", "A").items() if f"layer.{layer}." in n]
            assert all(torch.equal(same[0], a) for a in same)


def test_real_rows_of_padded_inputs_stay() -> None:
    old = tokens(2, 6, 1, padded=2)
    model, guard = lora_bert(r=4), InfLoRA(1.0)
    learn(guard, model, "old", old)
    before = answer(model, old)[old["attention_mask"].bool()]
    learn(guard, model, "new", tokens(2, 7, 2), steps=40)
    assert change(answer(model, old)[old["attention_mask"].bool()], before) <= 1e-5


def test_the_new_task_is_learned() -> None:
    model, guard = lora_mlp(r=4), InfLoRA(1.0)
    learn(guard, model, "old", OLD)
    before = float(default_loss(model, NEW).detach())
    learn(guard, model, "new", NEW, steps=300)
    assert float(default_loss(model, NEW).detach()) < 0.8 * before


def test_only_b_trains_and_a_is_what_it_was() -> None:
    model, guard = lora_mlp(r=4), InfLoRA(1.0)
    learn(guard, model, "old", OLD)
    guard.prepare("new", [NEW])
    guard.begin_task()
    assert training(model) == sorted(branch(model, "task-001", "B"), key=training(model).index)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    fit(model, NEW, guard, steps=20)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


# --- negative controls ----------------------------------------------------------------------------------------------


def test_a_at_random_leaks() -> None:
    model, guard = lora_mlp(r=4), InfLoRA(1.0)
    learn(guard, model, "old", OLD)
    before = answer(model, OLD)
    guard.prepare("new", [NEW])
    guard.begin_task()
    with torch.no_grad():
        for a in branch(model, "task-001", "A").values():
            a.copy_(torch.randn(a.shape, generator=torch.Generator().manual_seed(0)) / math.sqrt(3 * a.shape[1]))
    fit(model, NEW, guard, steps=100)
    certificate = guard.end_task("new", [NEW])
    assert certificate.leak > 0.1
    assert certificate.kept is False
    assert change(answer(model, OLD), before) > 1e-2


def test_a_that_trains_leaks() -> None:
    model, guard = lora_mlp(r=4), InfLoRA(1.0)
    learn(guard, model, "old", OLD)
    before = answer(model, OLD)
    guard.prepare("new", [NEW])
    guard.begin_task()
    for a in branch(model, "task-001", "A").values():
        a.requires_grad_(True)
    fit(model, NEW, guard, steps=100)
    certificate = guard.end_task("new", [NEW])
    assert certificate.leak > 1e-2
    assert certificate.kept is False
    assert change(answer(model, OLD), before) > 1e-2


def test_an_earlier_branch_that_moves_is_seen() -> None:
    model, guard = lora_mlp(r=4), InfLoRA(1.0)
    learn(guard, model, "old", OLD)
    guard.prepare("new", [NEW])
    guard.begin_task()
    fit(model, NEW, guard, steps=5)
    with torch.no_grad():
        next(iter(branch(model, "task-000", "B").values())).add_(1e-3)
    certificate = guard.end_task("new", [NEW])
    assert certificate.leak <= 1e-6
    assert certificate.kept is False
    assert "frozen, have changed" in certificate.notes[0]


def test_a_trained_head_is_named() -> None:
    model = lora_mlp(r=4, target_modules=["0", "2"])
    head = model.base_model.model[4]
    head.weight.requires_grad_(True)
    guard = InfLoRA(1.0)
    first = learn(guard, model, "old", OLD)
    second = learn(guard, model, "new", NEW)
    assert first.notes == ()
    assert "1 tensors outside the branches trained too" in second.notes[0]


# --- the twin -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.6, 0.9, 0.97])
def test_three_tasks_equal_the_twin(energy: float) -> None:
    model, plain = lora_mlp(DOUBLE, r=3, lora_alpha=6), mlp(DOUBLE)
    layers = [plain[0], plain[2], plain[4]]
    twin = ReferenceInfLoRA(
        [x.weight.detach() for x in layers], [x.bias.detach() for x in layers],
        [plain[1], plain[3], lambda y: y], rank=3, scale=2.0,
    )  # fmt: skip
    guard = InfLoRA(energy)
    for number in range(3):
        data = few(30, 20, 9, 10 + number, DOUBLE)
        guard.attach(model)
        guard.prepare(None, [data[:10], data[10:]])
        guard.begin_task()
        fit(model, data, guard, steps=25)
        guard.end_task(None, [data[:10], data[10:]])
        optimizer = OPTIMIZERS["adamw"](twin.prepare(data))
        for _ in range(25):
            optimizer.zero_grad()
            default_loss(lambda x: twin.forward(x)[0], data).backward()
            optimizer.step()
        twin.finish(data, energy)
        probe = rows(16, 20, 99, DOUBLE)
        assert change(answer(model, probe), twin.forward(probe)[0].detach()) <= 1e-9
    for memory, space in zip(twin.memory, guard._spaces.values(), strict=True):
        assert torch.allclose(space.project(torch.eye(space.dim, dtype=DOUBLE)), memory.projector(), atol=1e-9)


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95, 0.99, 1.0])
def test_the_memory_is_dualgpm(energy: float) -> None:
    """Through the change from the protected directions to the free ones, and on."""
    twin, space, modes = DualGPM(16), Subspace(16, dtype=DOUBLE), []
    for number in range(7):
        x = few(40, 16, 3, number, DOUBLE) + 1e-2 * few(40, 16, 5, 50 + number, DOUBLE)
        twin.grow(x, energy)
        space.grow(x, energy=energy)
        modes.append(twin.mode)
        assert torch.allclose(space.project(torch.eye(16, dtype=DOUBLE)), twin.projector(), atol=1e-9)
        assert space.stores_complement == (twin.mode == "retain")
    assert modes[0] == "remove"
    assert modes[-1] == "retain" or energy < 0.8


def test_energy_is_sigma_squared() -> None:
    """The released code's threshold acts on sigma to the fourth and keeps far fewer directions."""
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=DOUBLE)
    x = torch.diag(sigma) @ torch.eye(3, 20, dtype=DOUBLE)
    for energy, rank in ((0.60, 1), (0.80, 2), (0.90, 2), (1.0, 3)):
        guard, model = InfLoRA(energy), lora_mlp(DOUBLE, r=2, target_modules=["0"])
        guard.consolidate(model, [x])
        assert guard._spaces["base_model.model.0"].rank == rank
    released = DualGPM(20, power=4)
    released.grow(x, 0.80)
    assert released.basis.shape[1] == 1


def test_the_first_branch_reads_the_principal_inputs() -> None:
    model, guard = lora_mlp(DOUBLE, r=4), InfLoRA()
    guard.attach(model)
    data = few(50, 20, 12, 3, DOUBLE)
    guard.prepare("one", [data])
    a = next(iter(branch(model, "task-000", "A").values()))
    right = torch.linalg.svd(data, full_matrices=False)[2][:4]
    assert torch.allclose((a @ right.T).abs() * math.sqrt(3.0), torch.eye(4, dtype=DOUBLE), atol=1e-9)


# --- schedules, edges, state ----------------------------------------------------------------------------------------


def test_a_schedule_rises_over_the_tasks() -> None:
    guard, model = InfLoRA(LinearSchedule(0.95, 1.0, tasks=3)), lora_mlp(r=2)
    targets = [learn(guard, model, f"t{n}", rows(4, 20, n), steps=3).sites[0].energy_target for n in range(3)]
    assert targets == pytest.approx([0.95, 0.975, 1.0])


def test_a_reference_set_before_the_first_task() -> None:
    """The pretrained model's behaviour there is kept, and the first task is the second."""
    model, guard = lora_mlp(r=4), InfLoRA(1.0)
    guard.attach(model)
    before = answer(model, OLD)
    first = guard.end_task("reference", [OLD])
    assert first.leak is None
    assert first.sites[0].name == "base_model.model.0"
    certificate = learn(guard, model, "new", NEW, steps=100)
    assert certificate.kept is True
    assert list(model.peft_config) == ["task-001"]
    assert change(answer(model, OLD), before) <= 1e-5


def test_a_wider_adapter_than_there_are_directions() -> None:
    """Rows for which no direction is left are zero; nothing fails, and nothing leaks."""
    model, guard = lora_mlp(r=16), InfLoRA(1.0)
    certificate = learn(guard, model, "old", OLD)
    a = branch(model, "task-000", "A")["base_model.model.0.lora_A.task-000.weight"]
    assert int(a.any(dim=1).sum()) == 6
    assert certificate.kept is None
    assert learn(guard, model, "new", NEW).kept is True


def test_a_full_memory_says_so() -> None:
    model, guard = lora_mlp(r=2), InfLoRA(1.0)
    with pytest.warns(UserWarning, match="no free direction is left"):
        learn(guard, model, "old", rows(80, 20, 0))
    assert guard.exhausted()
    with pytest.warns(UserWarning, match="cannot learn"):
        guard.prepare("new", [NEW])
    guard.begin_task()
    fit(model, NEW, guard, steps=3)
    with pytest.warns(UserWarning, match="still zero"), pytest.warns(UserWarning, match="direction is left"):
        certificate = guard.end_task("new", [NEW])
    assert certificate.leak == 0.0


def test_a_new_task_inside_the_old_space() -> None:
    model, guard = lora_mlp(r=2, target_modules=["0"]), InfLoRA(1.0)
    learn(guard, model, "old", OLD)
    with pytest.warns(UserWarning, match="cannot learn"):
        guard.prepare("same", [2 * OLD.flip(0)])


@pytest.mark.parametrize("take", ["preparing", "ending"])
def test_no_batch(take: str) -> None:
    model, guard = lora_mlp(), InfLoRA()
    guard.attach(model)
    with pytest.raises(GuardError, match="no batch"):
        guard.prepare("one", []) if take == "preparing" else guard.end_task("one", [])


@pytest.mark.parametrize("energy", [0.0, 1.5, "auto", {"lora_A": 0.9}, None, float("nan")], ids=str)
def test_bad_energies(energy: Any) -> None:
    with pytest.raises(ConfigError, match="energy"):
        InfLoRA(energy)


def test_bad_samples() -> None:
    with pytest.raises(ConfigError, match="samples"):
        InfLoRA(samples=0)


def test_samples_bounds_what_is_read() -> None:
    def batches() -> Any:
        yield rows(5, 20, 0)
        yield rows(5, 20, 1)
        raise AssertionError("read on")

    guard, model = InfLoRA(1.0, samples=8), lora_mlp()
    guard.attach(model)
    guard.end_task("one", batches())
    assert guard._spaces["base_model.model.0"].rank == 8


def test_bounded_memory() -> None:
    model, guard = lora_mlp(r=2, target_modules=["0"]), InfLoRA(0.999)
    for number in range(8):
        guard.consolidate(model, [few(30, 20, 2, number)])
        assert guard._spaces["base_model.model.0"].stored.numel() <= 20 * 20 / 2


def test_half_precision_is_not_called_kept() -> None:
    model = lora_mlp(torch.bfloat16, r=4)
    guard = InfLoRA(1.0)
    guard.consolidate(model, [OLD.bfloat16()])
    guard.prepare("new", [NEW.bfloat16()])
    with torch.no_grad():
        for a in branch(model, "task-001", "A").values():
            a.copy_(a.bfloat16())
    guard.begin_task()
    fit(model, NEW.bfloat16(), guard, steps=20)
    certificate = guard.end_task("new", [NEW.bfloat16()])
    assert certificate.leak > 1e-5
    assert certificate.kept is False


@pytest.mark.parametrize("rank", [0, 12, 45])
def test_wide_inputs_are_iterated_for(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same directions as a whole eigendecomposition gives, and as far outside the old space."""
    x = rows(200, 60, 1, DOUBLE) * 0.8 ** torch.arange(60)
    space = Subspace(60, rows(60, rank, 2, DOUBLE))
    exact = inflora.directions(SecondMoment(60).update(x), space, 5)
    monkeypatch.setattr(inflora, "ITERATE_ABOVE", 10)
    found = inflora.directions(SecondMoment(60).update(x), space, 5)
    assert found.shape == exact.shape == (5, 60)
    assert torch.allclose((found @ exact.T).abs(), torch.eye(5, dtype=DOUBLE), atol=1e-3)
    assert space.share(found) <= 1e-6


def test_wide_inputs_without_a_free_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflora, "ITERATE_ABOVE", 10)
    space = Subspace(30, torch.eye(30))
    assert inflora.directions(SecondMoment(30).update(rows(50, 30, 1)), space, 4).shape == (0, 30)


def _spaces(guard: InfLoRA) -> dict[str, Tensor]:
    return {n: s["columns"] for n, s in guard.state_dict()["spaces"].items()}


def test_the_order_of_batches_does_not_matter() -> None:
    one, two = InfLoRA(0.9), InfLoRA(0.9)
    one.consolidate(lora_mlp(DOUBLE), [NEW.double()])
    two.consolidate(lora_mlp(DOUBLE), [NEW.double().flip(0)[:7], NEW.double().flip(0)[7:]])
    for name, columns in _spaces(one).items():
        other = _spaces(two)[name]
        assert torch.allclose(columns @ columns.T, other @ other.T, atol=1e-9)
