"""How much is protected: numbers, kinds, schedules, and the choice on validation data."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from guard_helpers import answer, change, fit, lora_mlp, rows

from growthring.errors import ConfigError, GuardError
from growthring.guards import CANDIDATES, PEGP, LinearSchedule
from growthring.guards.energy import DEFAULT_ENERGY, energy_for, parse_energy


def spread(count: int, seed: int) -> torch.Tensor:
    """Rows whose energies fall slowly, so that every threshold gives another rank."""
    return rows(count, 20, seed) * torch.linspace(2.0, 0.1, 20)


def ranks(certificate: Any) -> dict[str, int]:
    return {s.name: s.rank for s in certificate.sites}


def test_more_energy_never_protects_less() -> None:
    model = lora_mlp(r=16)
    fit(model, spread(12, 1), steps=1)  # B is no longer zero
    found = [ranks(PEGP(e).consolidate(model, [spread(12, 1)])) for e in (0.5, 0.8, 0.95, 0.99, 1.0)]
    for less, more in pairwise(found):
        assert all(less[n] <= more[n] for n in less)
    assert sum(found[0].values()) < sum(found[2].values()) < sum(found[4].values())


def test_energy_is_sigma_squared() -> None:
    """Specs, invariant 9: sigma = (3, 2, 1) has shares .643, .929, 1."""
    model = torch.nn.Linear(3, 2, bias=False)
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    for energy, rank in ((0.60, 1), (0.64, 1), (0.65, 2), (0.80, 2), (0.90, 2), (0.93, 3)):
        certificate = PEGP(energy).consolidate(torch.nn.Sequential(model), [x]) if rank < 3 else None
        if certificate is None:
            with pytest.warns(UserWarning, match="no free direction"):
                certificate = PEGP(energy).consolidate(torch.nn.Sequential(model), [x])
        assert certificate.sites[0].rank == rank
        assert certificate.energy >= energy


def test_a_flat_tail_below_one_strong_direction_is_still_reached() -> None:
    """As behind a transformer's feed-forward layers: nine tenths of the energy in one of 512 directions."""
    x = rows(2048, 512, 1, torch.float64)
    x[:, 0] *= (9 * 511) ** 0.5
    x = x.float()
    model = torch.nn.Sequential(torch.nn.Linear(512, 2, bias=False))
    guard = PEGP(0.99, samples=2048)
    certificate = guard.consolidate(model, [x])
    assert certificate.energy >= 0.99
    inside = next(iter(guard._memory.spaces.values())).project(x.double())
    assert float(inside.square().sum() / x.double().square().sum()) >= 0.99 - 1e-6
    assert certificate.sites[0].free > 0


def test_one_energy_for_each_kind() -> None:
    model = lora_mlp()
    certificate = PEGP({"lora_A": 1.0, "lora_B": 0.3}).consolidate(model, [spread(10, 1)])
    by_kind = {k: {s.energy_target for s in certificate.sites if s.kind == k} for k in ("lora_A", "lora_B")}
    assert by_kind == {"lora_A": {1.0}, "lora_B": {0.3}}
    assert all(s.rank == 10 for s in certificate.sites if s.kind == "lora_A")
    assert all(s.rank < 8 for s in certificate.sites if s.kind == "lora_B")
    assert energy_for(parse_energy({"lora_A": 0.5}), "linear", 0) == DEFAULT_ENERGY["linear"]


def test_a_schedule_rises_over_the_tasks() -> None:
    schedule = LinearSchedule(0.5, 1.0, 3)
    assert [schedule.at(t) for t in range(5)] == [0.5, 0.75, 1.0, 1.0, 1.0]
    assert LinearSchedule(0.5, 0.9, 1).at(0) == 0.9
    model = lora_mlp()
    for energy in (schedule, {"start": 0.5, "end": 1.0, "tasks": 3}, {"lora_A": schedule, "lora_B": schedule}):
        guard = PEGP(energy)
        targets = [guard.consolidate(model, [spread(4, t)]).sites[0].energy_target for t in range(3)]
        assert targets == [0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (0.0, r"energy=0\.0: .*number in \(0, 1\]"),
        (1.1, r"energy=1\.1"),
        (-1, "energy=-1"),
        (float("nan"), "energy=nan"),
        (True, "energy=True"),
        (None, "energy=None: give a number"),
        ("high", "energy='high': give a number.*'auto'"),
        ([0.9], r"energy=\[0\.9\]"),
        ({}, r"energy=\{\}: name at least one of lora_A, lora_B, largo_A, largo_B, adapter_down, .*, linear"),
        ({"lora_a": 0.9}, r"unknown kind of site 'lora_a'; did you mean .*'lora_A'"),
        ({"lora_A": 2}, r"energy\['lora_A'\]=2"),
        ({"lora_A": "0.9"}, r"energy\['lora_A'\]='0\.9'"),
        ({"start": 0.9, "end": 1.0}, "exactly the keys start, end and tasks"),
        ({"start": 0.9, "end": 1.0, "tasks": 0}, "energy: LinearSchedule.tasks is 0; it must be a whole number"),
        ({"start": 0.9, "end": 1.0, "tasks": 2.5}, r"tasks is 2\.5"),
        ({"start": "x", "end": 1.0, "tasks": 2}, r"energy: LinearSchedule\.start='x'"),
        ({"lora_A": {"start": 0.9, "end": 1.5, "tasks": 2}}, r"energy\['lora_A'\]: LinearSchedule\.end=1\.5"),
    ],
)
def test_wrong_energies(energy: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PEGP(energy)


def test_wrong_candidates() -> None:
    with pytest.raises(ConfigError, match="none of them 'auto'"):
        PEGP("auto", candidates=(0.9, "auto"))
    with pytest.raises(ConfigError, match=r"energy=3"):
        PEGP("auto", candidates=(3,))


# --- auto -------------------------------------------------------------------------------------------------------


def waiting(**settings: Any) -> tuple[torch.nn.Module, PEGP]:
    model = lora_mlp()
    guard = PEGP("auto", **settings)
    guard.attach(model)
    guard.begin_task()
    fit(model, spread(6, 1), guard, steps=5)
    certificate = guard.end_task("first", [spread(40, 1)])
    assert any("not chosen yet" in n for n in certificate.notes)
    return model, guard


def memory_like(model: torch.nn.Module, energy: Any) -> PEGP:
    guard = PEGP(energy)
    guard.consolidate(model, [spread(40, 1)])
    return guard


def test_the_second_task_may_not_start_before_the_choice() -> None:
    _, guard = waiting()
    with pytest.raises(GuardError, match=r"energy='auto' has to be chosen.*guard\.tune"):
        guard.begin_task()


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ([0.1, 0.9, 0.5, 0.9], 1),  # the more protective of two equals
        ([0.7, 0.7, 0.7, 0.7], 0),
        ([0.1, 0.2, 0.3, 0.4], 3),
        ([float("nan"), 0.2, 0.3, 0.1], 2),  # a trial that diverged wins nothing
    ],
)
def test_the_best_score_wins(scores: list[float], chosen: int) -> None:
    model, guard = waiting()
    tried: list[Any] = []

    def trial(energy: Any) -> float:
        tried.append(energy)
        assert guard.energy == energy
        assert ranks_of(guard) == ranks_of(memory_like(model, energy))
        return scores[len(tried) - 1]

    assert guard.tune(trial) == CANDIDATES[chosen] == guard.energy
    assert tried == list(CANDIDATES)
    assert ranks_of(guard) == ranks_of(memory_like(model, CANDIDATES[chosen]))
    guard.begin_task()
    with pytest.raises(GuardError, match="only for energy='auto', after the first task"):
        guard.tune(trial)


def ranks_of(guard: PEGP) -> dict[str, int]:
    return {n: s.rank for n, s in guard._memory.spaces.items()}


def test_trials_that_train_leave_no_trace() -> None:
    model, guard = waiting()
    start = copy.deepcopy(model.state_dict())
    old = spread(6, 1)
    before = answer(model, old)

    def trial(energy: Any) -> float:
        guard.attach(model)
        guard.begin_task("trial")
        fit(model, spread(6, 2), guard, steps=10)
        model.load_state_dict(start)
        return 1.0 if energy == CANDIDATES[2] else 0.0

    guard.tune(trial)
    guard.begin_task("second")
    fit(model, spread(6, 2), guard, steps=20)
    certificate = guard.end_task("second", [spread(6, 2)])
    assert certificate.leak <= 1e-5
    assert guard.tasks == ["first", "second"]
    assert change(answer(model, old), before) < 1.0
    # the same as if the energy had been known from the start
    twin = lora_mlp()
    twin.load_state_dict(start)
    plain = PEGP(CANDIDATES[2])
    plain.consolidate(twin, [spread(40, 1)])
    plain.begin_task()
    fit(twin, spread(6, 2), plain, steps=20)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_trial_that_fails_leaves_the_choice_open() -> None:
    _, guard = waiting()

    def trial(energy: Any) -> float:
        if energy == CANDIDATES[1]:
            raise KeyboardInterrupt
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        guard.tune(trial)
    assert guard.energy == "auto"
    with pytest.raises(GuardError, match="has to be chosen"):
        guard.begin_task()
    assert guard.tune(lambda energy: 1.0) == CANDIDATES[0]


def test_candidates_of_everything_are_exact() -> None:
    """A candidate of 1.0 asks for directions that float32 products would lose."""
    model = torch.nn.Sequential(torch.nn.Linear(20, 4, bias=False))
    x = rows(6, 20, 1)
    x[5] *= 1e-4
    guard = PEGP("auto", candidates=(1.0, 0.9))
    guard.consolidate(model, [x])
    guard.tune(lambda energy: 1.0 if energy == 1.0 else 0.0)
    assert next(iter(guard._memory.spaces.values())).rank == 6


def test_a_pending_choice_can_be_saved(tmp_path) -> None:
    model, guard = waiting()
    guard.save_pretrained(tmp_path)
    with pytest.raises(GuardError, match="give load_pretrained the model"):
        PEGP.load_pretrained(tmp_path)
    again = PEGP.load_pretrained(tmp_path, model)
    with pytest.raises(GuardError, match="has to be chosen"):
        again.begin_task()
    choose = {str(CANDIDATES[1]): 1.0}
    for one in (guard, again):
        one.tune(lambda energy: choose.get(str(energy), 0.0))
    assert again.energy == guard.energy == CANDIDATES[1]
    for name, space in guard._memory.spaces.items():
        assert torch.equal(space.stored, again._memory.spaces[name].stored)
