"""Negative controls: what published variants leave out, and that certificates say so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from guard_helpers import OPTIMIZERS, answer, bert, change, fit, lora_bert, lora_mlp, rows, tokens
from paradigm_helpers import (
    adapter_bert,
    adapter_mlp,
    half,
    ia3_mlp,
    images,
    moved,
    prefix,
    prefix_vit,
    prompt,
    snapshot,
)
from torch import Tensor, nn

from growthring.errors import ConfigError, GuardError
from growthring.guards import PEGP, Certificate, LinearSchedule, NullRatio
from growthring.guards.energy import KINDS


def learn(
    model: nn.Module,
    old: Any,
    new: Any,
    energy: Any = 1.0,
    *,
    optimizer: str = "adamw",
    steps: int = 40,
    **settings: Any,
) -> tuple[Certificate, float]:
    """Two tasks under a guard; its second certificate, and how far the old answers have moved."""
    fit(model, old, steps=8)
    guard = PEGP(energy, **settings)
    guard.consolidate(model, [old])
    before = answer(model, old)
    guard.begin_task()
    fit(model, new, guard, make=OPTIMIZERS[optimizer], steps=steps)
    drift = change(answer(model, old), before)
    return guard.end_task(None, [old]), drift


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "lora": (lora_mlp, rows(3, 20, 1), rows(8, 20, 2)),
    "adapter": (adapter_mlp, rows(3, 20, 1), rows(8, 20, 2)),
    "prefix": (prefix, tokens(1, 3, 1), tokens(4, 6, 2)),
}


# --- invariant 4 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("kind", MODELS)
def test_projected_gradients_alone_leak_under_adam_and_the_certificate_says_so(kind: str, optimizer: str) -> None:
    build, old, new = MODELS[kind]
    certificate, drift = learn(build(), old, new, optimizer=optimizer, project="gradient")
    assert certificate.leak > 1e-2
    assert certificate.kept is False
    assert drift > 1e-2 if kind != "prefix" else drift > 1e-3
    assert certificate.output_change == pytest.approx(drift, rel=1e-3)
    assert sum(not s.kept for s in certificate.sites) > len(certificate.sites) / 2
    certificate, drift = learn(build(), old, new, optimizer=optimizer)
    assert certificate.leak <= 1e-5
    assert certificate.kept is True
    assert drift < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_projected_gradients_are_enough_for_plain_gradient_descent(kind: str) -> None:
    """The table of the specs, section 5: without momentum, decay and scaling nothing rotates a gradient back."""
    build, old, new = MODELS[kind]
    old, new = (x.double() if isinstance(x, Tensor) else x for x in (old, new))
    certificate, drift = learn(build().double(), old, new, optimizer="sgd", project="gradient")
    assert certificate.leak <= 1e-12
    assert certificate.kept is True
    assert drift < 1e-12


def test_decay_moves_scales_whose_gradients_are_zero() -> None:
    old = half(3, 1)
    certificate, drift = learn(ia3_mlp(), old, rows(8, 20, 2), project="gradient")
    assert certificate.kept is False
    assert drift > 1e-3
    certificate, drift = learn(ia3_mlp(), old, rows(8, 20, 2), optimizer="adam", project="gradient")
    assert certificate.leak == 0.0  # without decay: a gradient of zero is a step of zero
    assert drift == 0.0


def test_what_is_held_is_held_by_either() -> None:
    model = lora_mlp(bias="lora_only")
    certificate, _ = learn(model, rows(3, 20, 1), rows(8, 20, 2), project="gradient")
    assert certificate.held == 3
    model = lora_mlp(bias="lora_only")
    fit(model, rows(3, 20, 1), steps=3)
    guard = PEGP(1.0, project="gradient")
    guard.consolidate(model, [rows(3, 20, 1)])
    guard.begin_task()
    start = snapshot(model)
    fit(model, rows(8, 20, 2), guard, steps=10)
    assert {n for n, size in moved(model, start).items() if size == 0.0} == {
        n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")
    }


# --- half of a condition is none --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        (lora_mlp, ("lora_B",)),
        (lora_mlp, ("lora_A",)),
        (adapter_mlp, ("adapter_up",)),
        (adapter_mlp, ("adapter_down",)),
        (prefix, ("prefix_key",)),
        (prefix, ("prefix_value",)),
        (prefix_vit, ("prefix_key",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_kinds_left_out_move_old_outputs(build: Callable[[], nn.Module], kinds: tuple[str, ...]) -> None:
    """The page's figure projects ``up`` alone; its equation asks for both."""
    if build is prefix_vit:
        old, new = images(1, 1), images(4, 2)
    else:
        old, new = MODELS["prefix" if build is prefix else "lora"][1:]
    certificate, drift = learn(build(), old, new, kinds=kinds)
    assert drift > 1e-3
    assert {s.kind for s in certificate.sites} == set(kinds)
    assert certificate.leak <= 1e-5  # what is protected is kept; what that is worth, the probes tell
    assert certificate.output_change == pytest.approx(drift, rel=1e-3)
    both = {
        "lora": ("lora_A", "lora_B"),
        "adap": ("adapter_down", "adapter_up"),
        "pref": ("prefix_key", "prefix_value"),
    }
    certificate, drift = learn(build(), old, new, kinds=both[kinds[0][:4]])
    assert drift < 1e-5


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_without_the_fold_biases_move_old_outputs(activation: str) -> None:
    """Specs, section 3.3: ignoring an adapter's biases breaks the invariance; holding them keeps it at a price."""
    old, new = rows(3, 20, 1), rows(8, 20, 2)
    certificate, drift = learn(adapter_mlp(activation=activation), old, new, mode="paper", unprotected="allow")
    assert drift > 1e-2
    assert any("left free" in note for note in certificate.notes)
    assert {s.dim for s in certificate.sites} == {20, 24, 8}
    certificate, drift = learn(adapter_mlp(activation=activation), old, new, mode="paper")
    assert drift < 1e-5
    assert certificate.held == 4
    model = adapter_mlp(activation=activation)
    certificate, drift = learn(model, old, new, mode="strict", unprotected="allow")
    assert drift < 1e-5  # folded in, they need no holding
    assert certificate.held == 0
    assert {s.dim for s in certificate.sites} == {21, 25, 9}


def test_the_fold_leaves_biases_room_to_move() -> None:
    model, old = adapter_mlp(), rows(3, 20, 1)
    guard = PEGP(1.0)
    guard.consolidate(model, [old])
    guard.begin_task()
    start = snapshot(model)
    fit(model, rows(8, 20, 2), guard, steps=20)
    biases = {n: size for n, size in moved(model, start).items() if n.endswith("bias")}
    assert len(biases) == 4
    assert min(biases.values()) > 1e-3


# --- the paper's conditions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lambda: prefix(tokens=10), prefix_vit], ids=["peft", "vit"])
def test_the_papers_prefix_leaves_values_free(build: Callable[[], nn.Module]) -> None:
    model = build()
    old, new = (images(1, 1), images(4, 2)) if build is prefix_vit else (tokens(1, 3, 1), tokens(4, 6, 2))
    certificate, drift = learn(model, old, new, mode="paper")
    assert {(s.kind, s.dim) for s in certificate.sites} == {("prefix_key", 32)}
    assert certificate.kept
    assert certificate.held == 0
    assert drift > 1e-3


def test_the_papers_prompt_and_the_strict_one() -> None:
    """The paper's condition lets more through than the strict one, at the same energy and on the same tokens."""
    drifts = {}
    for mode in ("strict", "paper"):
        model, old = prompt(tokens=5), tokens(1, 2, 1)
        fit(model, old, steps=5)
        guard = PEGP(1.0, mode=mode)
        guard.consolidate(model, [old])
        before = answer(model, old)[:, 5:]
        guard.begin_task()
        start = model.get_parameter("prompt_encoder.default.embedding.weight").detach().clone()
        with torch.no_grad():  # the same random step for both, as long as what is left of it allows
            step = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
            model.get_parameter("prompt_encoder.default.embedding.weight").add_(step)
        guard.after_step()
        now = model.get_parameter("prompt_encoder.default.embedding.weight")
        with torch.no_grad():
            now.copy_(start + 0.1 * (now - start) / (now - start).norm())
        drifts[mode] = change(answer(model, old)[:, 5:], before)
    assert 0.0 < drifts["strict"] < drifts["paper"] / 3


@pytest.mark.parametrize("build", [lora_mlp, ia3_mlp])
def test_for_lora_and_scales_the_modes_agree(build: Callable[[], nn.Module]) -> None:
    models = [build(), build()]
    for model, mode in zip(models, ("strict", "paper"), strict=True):
        guard = PEGP(0.9, mode=mode)
        guard.consolidate(model, [rows(3, 20, 1)])
        guard.begin_task()
        fit(model, rows(8, 20, 2), guard, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


# --- freezing ---------------------------------------------------------------------------------------------------


def test_freeze_freezes_from_the_first_task_on() -> None:
    model = bert()
    loose = {n for n, p in model.named_parameters() if p.ndim == 1 or "embeddings" in n}
    guard = PEGP(1.0, unprotected="freeze")
    guard.attach(model)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == loose
    guard.begin_task()
    start = snapshot(model)
    old, new = tokens(1, 4, 1), tokens(4, 6, 2)
    fit(model, old, guard, steps=5)
    certificate = guard.end_task(None, [old])
    before = answer(model, old)
    assert certificate.held == 0
    guard.begin_task()
    fit(model, new, guard, steps=20)
    assert change(answer(model, old), before) < 1e-5
    assert guard.end_task(None, [old]).kept
    stayed = {n for n, p in model.named_parameters() if torch.equal(p, start[n])}
    assert stayed == loose


def test_freeze_leaves_alone_what_kinds_leave_out() -> None:
    model = adapter_mlp()
    guard = PEGP(1.0, unprotected="freeze", kinds=["adapter_up"])
    guard.attach(model)
    assert all(p.requires_grad for n, p in model.named_parameters() if "adapter_" in n)
    paper = adapter_mlp()
    PEGP(1.0, unprotected="freeze", mode="paper").attach(paper)
    assert {n for n, p in paper.named_parameters() if "adapter_" in n and not p.requires_grad} == {
        n for n, _ in paper.named_parameters() if "adapter_" in n and n.endswith("bias")
    }


def test_freezing_again_after_loading(tmp_path: Any) -> None:
    model = lora_mlp(bias="lora_only")
    guard = PEGP(0.9, unprotected="freeze")
    guard.consolidate(model, [rows(3, 20, 1)])
    fresh = lora_mlp(bias="lora_only")
    again = PEGP.load_pretrained(guard.save_pretrained(tmp_path), fresh)
    assert again.unprotected == "freeze"
    frozen = [{n for n, p in m.named_parameters() if not p.requires_grad} for m in (model, fresh)]
    assert frozen[0] == frozen[1]
    assert again.explain() == guard.explain()


# --- energies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [NullRatio(10.0), LinearSchedule(0.8, 1.0, 3), {"adapter_down": NullRatio(2.0)}])
def test_rules_for_adapters(rule: Any) -> None:
    certificate, drift = learn(adapter_mlp(), rows(3, 20, 1), rows(8, 20, 2), rule)
    assert certificate.kept
    free, _ = learn(adapter_mlp(), rows(3, 20, 1), rows(8, 20, 2), 0.3)
    assert drift < (free.output_change or 0.0) * 2


def test_every_kind_has_an_energy_of_its_own() -> None:
    """Ranks grow with the energy of their kind and of no other."""
    model = prefix()
    batch = tokens(3, 6, 1)
    low = dict.fromkeys(KINDS, 0.5)
    ranks = {}
    for kind in (None, "prefix_key", "prefix_value"):
        energy = {**low, kind: 0.99} if kind else low
        sites = PEGP(energy).consolidate(model, [batch]).sites
        ranks[kind] = {k: sum(s.rank for s in sites if s.kind == k) for k in ("prefix_key", "prefix_value")}
    assert ranks["prefix_key"]["prefix_key"] > ranks[None]["prefix_key"]
    assert ranks["prefix_key"]["prefix_value"] == ranks[None]["prefix_value"]
    assert ranks["prefix_value"]["prefix_value"] > ranks[None]["prefix_value"]
    assert ranks["prefix_value"]["prefix_key"] == ranks[None]["prefix_key"]


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "Strict"}, "mode='Strict'.*strict"),
        ({"mode": None}, "mode=None"),
        ({"project": "updates"}, "project='updates'.*update"),
        ({"kinds": ["lora_a"]}, "kinds='lora_a'.*lora_A"),
        ({"kinds": "lora_A"}, "give a list"),
        ({"kinds": "adapter"}, "kinds='adapter'"),
        ({"kinds": []}, "at least one"),
        ({"merge": 1.0}, r"merge=1.0.*\[0, 1\)"),
        ({"merge": -0.1}, "merge=-0.1"),
        ({"merge": True}, "merge=True"),
        ({"merge": float("nan")}, "merge=nan"),
        ({"merge": "0.5"}, "merge='0.5'"),
        ({"merge": None}, "merge=None"),
        ({"unprotected": "frozen"}, "unprotected='frozen'.*freeze"),
        ({"energy": {"adapter": 0.9}}, "unknown kind of site 'adapter'.*adapter_"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PEGP(**settings)


def test_settings_come_back() -> None:
    settings = {"mode": "paper", "project": "gradient", "kinds": ["lora_B"], "merge": 0.25, "unprotected": "freeze"}
    guard = PEGP(0.9, **settings)
    assert {key: guard.settings()[key] for key in settings} == settings
    assert PEGP(**guard.settings()).settings() == guard.settings()


def test_kinds_that_match_nothing() -> None:
    for build, kinds in ((lora_bert, ["adapter_up", "ia3"]), (adapter_bert, ["lora_A"]), (prefix, ["prompt_key"])):
        model = build()
        with pytest.raises(GuardError, match=f"no site of the kinds {', '.join(kinds)} among"):
            PEGP(kinds=kinds).attach(model)
    with pytest.raises(GuardError, match="no site of the kinds prefix_value"):
        PEGP(kinds=["prefix_value"], mode="paper").attach(prefix())


def test_a_memory_of_another_mode_is_not_taken_for_this_one(tmp_path: Any) -> None:
    """The mode is stored with the memory; a state of one mode does not fit the sites of the other."""
    model = prefix()
    guard = PEGP(0.9, mode="paper")
    guard.consolidate(model, [tokens(1, 3, 1)])
    assert PEGP.load_pretrained(guard.save_pretrained(tmp_path), model).mode == "paper"
    strict = PEGP(0.9)
    strict.load_state_dict(copy.deepcopy(guard.state_dict()))
    with pytest.raises(GuardError, match="are not in this model"):
        strict.attach(model)


def test_gradients_and_updates_agree_on_the_first_task() -> None:
    models: list[Tensor] = []
    for project in ("update", "gradient"):
        model = adapter_mlp()
        guard = PEGP(1.0, project=project)
        guard.attach(model)
        guard.begin_task()
        fit(model, rows(4, 20, 1), guard, steps=5)
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    plain = adapter_mlp()
    fit(plain, rows(4, 20, 1), steps=5)
    models.append(torch.cat([p.detach().flatten() for p in plain.parameters()]))
    assert torch.equal(models[0], models[1])
    assert torch.equal(models[0], models[2])
