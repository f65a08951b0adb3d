"""LoRA, bottleneck adapters and IA3: old outputs stay at energy 1, and the new task is learned beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_helpers import (
    OPTIMIZERS,
    answer,
    change,
    default_loss,
    fit,
    lora_bert,
    lora_mlp,
    protected,
    rows,
    tokens,
    trainable,
)
from paradigm_helpers import (
    adapter_bert,
    adapter_mlp,
    bert,
    gpt2,
    guarded_step,
    half,
    ia3_mlp,
    images,
    llama,
    loss_at,
    moved,
    prefix,
    prefix_vit,
    prompt,
    prompt_vit,
    snapshot,
    vit,
)
from peft import IA3Config, LoraConfig, get_peft_model
from reference_prompts import ReferenceFolded, ReferenceScales
from torch import Tensor, nn

from growthring.adapters import BottleneckConfig
from growthring.errors import GuardError
from growthring.guards import PEGP

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}


def learn_and_keep(model: nn.Module, old: Any, new: Any, *, room: bool = True, **habits: Any) -> PEGP:
    """Learn ``old``, protect it, learn ``new``: the old answers stay, every tensor has moved, the new loss falls."""
    dtype = next(model.parameters()).dtype
    fit(model, old, steps=8, **{k: v for k, v in habits.items() if k == "make"})
    free = copy.deepcopy(model)
    guard = PEGP(1.0)
    first = guard.consolidate(model, [old])
    assert all(s.free > 0 for s in first.sites) or not room
    guard.begin_task()
    before, start, loss = answer(model, old), snapshot(model), loss_at(model, new)
    fit(model, new, guard, **{"steps": 40, **habits})
    assert change(answer(model, old), before) < LIMIT[dtype]
    assert loss_at(model, new) < loss
    if room:
        assert min(moved(model, start).values()) > 1e-3
    certificate = guard.end_task(None, [old])
    assert certificate.leak <= LIMIT[dtype]
    assert certificate.kept
    assert certificate.output_change < LIMIT[dtype]
    fit(free, new, **{"steps": 40, **habits})
    assert change(answer(free, old), before) > 1e-2  # without the guard they do not stay
    return guard


# --- invariants 3 and 5 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_adapters_with_biases(mode: str, activation: str, optimizer: str, dtype: torch.dtype) -> None:
    model = adapter_mlp(dtype, mode=mode, activation=activation, scaling=0.7)
    assert sum(n.endswith("bias") for n, p in model.named_parameters() if p.requires_grad) == 4
    learn_and_keep(model, rows(3, 20, 1, dtype), rows(8, 20, 2, dtype), make=OPTIMIZERS[optimizer])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
def test_lora(optimizer: str, dtype: torch.dtype) -> None:
    learn_and_keep(lora_mlp(dtype), rows(3, 20, 1, dtype), rows(8, 20, 2, dtype), make=OPTIMIZERS[optimizer])


@pytest.mark.parametrize(
    "habits",
    [{"clip": 0.05}, {"accumulate": 3}, {"autocast": torch.bfloat16}, {"warmup": 20, "clip": 0.1, "accumulate": 2}],
    ids=["clip", "accumulate", "autocast", "all"],
)
@pytest.mark.parametrize("kind", ["adapter", "prefix", "ia3"])
def test_every_habit_of_a_training_loop(kind: str, habits: dict[str, Any]) -> None:
    if kind == "adapter":
        learn_and_keep(adapter_mlp(activation="gelu"), rows(3, 20, 1), rows(8, 20, 2), **habits)
    elif kind == "ia3":
        learn_and_keep(ia3_mlp(), half(3, 1), rows(8, 20, 2), room=False, **habits)
    else:
        learn_and_keep(prefix(), tokens(1, 3, 1), tokens(4, 6, 2, padded=2), **habits)


@pytest.mark.parametrize(
    ("build", "images_too"),
    [
        (adapter_bert, False),
        (lambda: adapter_bert(mode="sequential", activation="relu", placement="attention"), False),
        (lambda: adapter_bert(mode="sequential", placement="mlp", dropout=0.2), False),
        (lambda: get_peft_model(llama(), BottleneckConfig(r=16, init_weights=False)), False),
        (lambda: get_peft_model(gpt2(), BottleneckConfig(r=16, init_weights=False, activation="silu")), False),
        (lambda: get_peft_model(vit(), BottleneckConfig(r=16, init_weights=False)), True),
        (lambda: get_peft_model(vit(), BottleneckConfig(r=16, mode="sequential", init_weights=False)), True),
        (lambda: get_peft_model(llama(), LoraConfig(r=16, target_modules="all-linear")), False),
    ],
    ids=["bert", "houlsby", "mlp", "llama", "gpt2", "vit", "vit sequential", "lora llama"],
)
def test_whole_models(build: Callable[[], nn.Module], images_too: bool) -> None:
    old, new = (images(1, 1), images(4, 2)) if images_too else (tokens(1, 4, 1), tokens(4, 6, 2, padded=2))
    learn_and_keep(build(), old, new, room=False, steps=40)


@pytest.mark.parametrize("build", [lora_mlp, adapter_mlp], ids=["lora", "adapter"])
def test_what_lies_beside_the_old_features_is_learned(build: Callable[[torch.dtype], nn.Module]) -> None:
    """Specs, invariant 5: the new inputs share no direction with the old ones, and their loss falls a lot."""
    model = build(torch.float64)
    old, new = (torch.zeros(4, 20, dtype=torch.float64) for _ in "ab")
    old[:, :6], new[:, 8:] = rows(4, 6, 1, torch.float64), rows(4, 12, 2, torch.float64)
    fit(model, old, steps=10)
    guard, before, loss = protected(model, old), answer(model, old), loss_at(model, new)
    fit(model, new, guard, steps=200)
    assert loss_at(model, new) < 0.7 * loss
    assert change(answer(model, old), before) < 1e-12


# --- beside the twins -------------------------------------------------------------------------------------------


def adapter_features(model: nn.Module, x: Tensor, mode: str) -> dict[str, Tensor]:
    """Written out: h = f(x) + s up(tanh(down(x))), or h + s up(tanh(down(h))) with h = f(x)."""
    root, found = model.base_model.model, {}
    with torch.no_grad():
        for index in (0, 2, 4):
            layer = root[index]
            base = getattr(layer, "base_layer", layer)
            h = x @ base.weight.T + base.bias
            if index != 4:
                down, up = layer.adapter_down["default"], layer.adapter_up["default"]
                z = h if mode == "sequential" else x
                middle = torch.tanh(z @ down.weight.T + down.bias)
                found[f"{index} down"], found[f"{index} up"] = z, middle
                h = h + 0.5 * (middle @ up.weight.T + up.bias)
            x = h.relu()
    found["out"] = h
    return found


@pytest.mark.parametrize("energy", [1.0, 0.8])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_adapters_beside_the_twin(mode: str, optimizer: str, energy: float) -> None:
    fast = adapter_mlp(torch.float64, mode=mode, activation="tanh", scaling=0.5)
    slow = copy.deepcopy(fast)
    guard = PEGP(energy)
    guard.attach(fast)
    root = slow.base_model.model
    pairs = {f"{i} {s}": getattr(root[i], f"adapter_{s}")["default"] for i in (0, 2) for s in ("down", "up")}
    twin = ReferenceFolded({n: (linear.weight, linear.bias) for n, linear in pairs.items()})
    for task in range(3):
        x = rows(2, 20, 20 + task, torch.float64)
        torch.testing.assert_close(answer(slow, x), adapter_features(slow, x, mode)["out"], rtol=0, atol=1e-12)
        guard.begin_task()
        twin.begin()
        optimizers = [OPTIMIZERS[optimizer](trainable(m)) for m in (fast, slow)]
        for _ in range(20):
            guarded_step(fast, guard, optimizers[0], default_loss(fast, x))
            guarded_step(slow, twin, optimizers[1], default_loss(slow, x))
            limit = 1e-10 if energy == 1.0 else 1e-6
            for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=limit, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
        for name, (w, b) in twin.layers.items():
            assert float((twin.joined(w, b) - twin.anchor[name]).norm()) > 1e-3
        certificate = guard.end_task(None, [x])
        found = adapter_features(slow, x, mode)
        twin.remember({name: found[name] for name in twin.layers}, energy)
        # sites stand in the order of the model: down before up, layer by layer
        by_name = {s.name.split("base_model.model.")[1]: s.rank for s in certificate.sites}
        ranks = {
            f"{i}.adapter_{s}.default.weight": twin.basis[f"{i} {s}"].shape[1] for i in (0, 2) for s in ("down", "up")
        }
        assert by_name == ranks


def ia3_features(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Written out: layer 0 scales what comes out of W, layers 2 and 4 what goes in."""
    root, found = model.base_model.model, {}
    with torch.no_grad():
        for index in (0, 2, 4):
            base, scale = root[index].base_layer, root[index].ia3_l["default"].flatten()
            if index == 0:
                h = x @ base.weight.T + base.bias
                found["0"], h = h, h * scale
            else:
                found[str(index)] = x
                h = (x * scale) @ base.weight.T + base.bias
            x = h.relu()
    found["out"] = h
    return found


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_scales_beside_the_twin(optimizer: str) -> None:
    fast = ia3_mlp(torch.float64)
    slow = copy.deepcopy(fast)
    guard = PEGP(1.0)
    guard.attach(fast)
    twin = ReferenceScales({str(i): slow.base_model.model[i].ia3_l["default"] for i in (0, 2, 4)})
    for task in range(3):
        x = half(2, task, torch.float64) if task < 2 else rows(4, 20, task, torch.float64)
        torch.testing.assert_close(answer(slow, x), ia3_features(slow, x)["out"], rtol=0, atol=1e-12)
        guard.begin_task()
        twin.begin()
        optimizers = [OPTIMIZERS[optimizer](trainable(m)) for m in (fast, slow)]
        for _ in range(20):
            guarded_step(fast, guard, optimizers[0], default_loss(fast, x))
            guarded_step(slow, twin, optimizers[1], default_loss(slow, x))
            for name, vector in twin.vectors.items():
                torch.testing.assert_close(
                    fast.base_model.model[int(name)].ia3_l["default"], vector, rtol=0, atol=1e-12
                )
        assert any(float((v - twin.anchor[n]).detach().norm()) > 1e-3 for n, v in twin.vectors.items())
        certificate = guard.end_task(None, [x])
        found = ia3_features(slow, x)
        twin.remember({n: found[n] for n in twin.vectors})
        assert [s.rank for s in certificate.sites] == [int(used.sum()) for used in twin.used.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
def test_scales_of_features_that_were_there_stay_exactly(optimizer: str, dtype: torch.dtype) -> None:
    model, old = ia3_mlp(dtype), half(3, 1, dtype)
    guard = learn_and_keep(model, old, rows(8, 20, 2, dtype), room=False, make=OPTIMIZERS[optimizer])
    first = guard._memory.space("base_model.model.0.ia3_l.default")
    assert first.free == 6  # the units that read only what old inputs lack
    guard.begin_task()
    before = answer(model, old)
    fit(model, rows(8, 20, 3, dtype), guard, steps=30, make=OPTIMIZERS[optimizer])
    assert torch.equal(answer(model, old), before)  # not a bit


def test_a_scale_of_zero_is_held_like_any_other() -> None:
    """What is scaled counts, not what is left of it."""
    model, old = ia3_mlp(), half(3, 1)
    with torch.no_grad():
        for index in (0, 2, 4):
            model.base_model.model[index].ia3_l["default"].view(-1)[10:] = 0.0
    guard, before = protected(model, old), answer(model, old)
    with torch.no_grad():
        for index in (0, 2, 4):
            model.base_model.model[index].ia3_l["default"].add_(1.0)
    guard.after_step()
    assert torch.equal(answer(model, old), before)


def test_one_row_among_many_is_enough_to_hold_a_scale() -> None:
    """Scales are counted over every row; elsewhere a part of many rows is enough."""
    model, x = ia3_mlp(), half(20_000, 1)
    x[7_777, 10:] = 1.0
    guard = PEGP(1.0, samples=20_000)
    certificate = guard.consolidate(model, [x])
    assert certificate.sites[0].free == 0


def test_scales_of_a_decoder_and_a_thinner_energy() -> None:
    model = get_peft_model(
        llama(),
        IA3Config(
            task_type="FEATURE_EXTRACTION",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    )
    guard = PEGP(0.7)
    certificate = guard.consolidate(model, [tokens(2, 4, 1)])
    assert {s.kind for s in certificate.sites} == {"ia3"}
    assert all(s.energy >= 0.7 and s.free > 0 for s in certificate.sites)
    guard.begin_task()
    before = snapshot(model)
    fit(model, tokens(4, 6, 2), guard, steps=10)
    for site in certificate.sites:
        space, step = guard._memory.space(site.name), model.get_parameter(site.name).detach() - before[site.name]
        axes = space.basis().abs().sum(1) > 0.5
        assert int(axes.sum()) == site.rank  # axes, not mixtures
        assert float(step.flatten()[axes].abs().max()) == 0.0
        assert float(step.flatten()[~axes].abs().min()) > 0.0


# --- shapes, mixtures and what freezes later ---------------------------------------------------------------------


def test_odd_shapes() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.thin, self.wide = nn.Linear(9, 1), nn.Linear(10, 7, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(torch.cat([self.thin(x), x], -1))

    for mode in ("parallel", "sequential"):
        config = BottleneckConfig(r=1, target_modules=["thin", "wide"], mode=mode, init_weights=False)
        model = get_peft_model(Odd(), config)
        old, new = rows(2, 9, 1), rows(5, 9, 2)
        fit(model, old, steps=5)
        guard, before = protected(model, old), answer(model, old)
        fit(model, new, guard, steps=60)
        assert change(answer(model, old), before) < 1e-5
        assert guard.end_task(None, [old]).kept


@pytest.mark.parametrize("lead", [(4,), (2, 2), (1, 2, 2)])
def test_any_leading_shape_gives_the_same_memory(lead: tuple[int, ...]) -> None:
    model, x = adapter_mlp(torch.float64), rows(4, 20, 1, torch.float64)
    certificates = [PEGP(1.0).consolidate(model, [y]) for y in (x, x.reshape(*lead, 20))]
    assert [s.rank for s in certificates[0].sites] == [s.rank for s in certificates[1].sites]
    assert {s.dim for s in certificates[0].sites} == {21, 25, 9}


@pytest.mark.filterwarnings("ignore:.*modify a model with PEFT:UserWarning", "ignore:Already found:UserWarning")
def test_tuners_inside_one_another() -> None:
    """LoRA inside an adapter inside a prefix, all of them training, on one model."""
    model = lora_bert(model=bert(), target_modules=["query", "value"])
    model = get_peft_model(model, BottleneckConfig(r=16, target_modules=["intermediate.dense"], init_weights=False))
    model = prefix(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("lora_", "adapter_", "prompt_encoder")))
    guard = learn_and_keep(model, tokens(1, 3, 1), tokens(4, 6, 2))
    names = [s.name for s in guard.end_task(None, [tokens(1, 3, 1)]).sites]
    assert len(names) == len(set(names)) == 2 * 2 * 2 + 2 * 2 + 2 * 2 * 2


@pytest.mark.filterwarnings("ignore:.*modify a model with PEFT:UserWarning", "ignore:Already found:UserWarning")
def test_an_adapter_around_a_prefix_of_ours() -> None:
    """A tuner layer passes on the attributes of what it wraps; a prefix is found once all the same."""
    model = get_peft_model(
        prefix_vit(), BottleneckConfig(r=16, target_modules=["attention"], mode="sequential", init_weights=False)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter_" in name or "prefix_" in name)
    guard = learn_and_keep(model, images(1, 1), images(4, 2), room=False)
    kinds = [s.kind for s in guard.end_task(None, [images(1, 1)]).sites]
    assert {k: kinds.count(k) for k in set(kinds)} == {
        "prefix_key": 4,
        "prefix_value": 4,
        "adapter_down": 2,
        "adapter_up": 2,
    }


def test_two_adapters_at_once() -> None:
    model = adapter_mlp()
    model.add_adapter("second", BottleneckConfig(r=5, target_modules=["0"], init_weights=False, activation="tanh"))
    model.base_model.set_adapter(["default", "second"])
    guard = learn_and_keep(model, rows(3, 20, 1), rows(8, 20, 2), room=False)
    certificate = guard.end_task(None, [rows(3, 20, 1)])
    assert len(certificate.sites) == 6
    # both read the same input and share what is remembered of it
    assert len({guard._memory.site_space[s.name] for s in certificate.sites if "0.adapter_down" in s.name}) == 1


@pytest.mark.parametrize("build", [adapter_mlp, lora_mlp, ia3_mlp], ids=["adapter", "lora", "ia3"])
def test_frozen_for_a_task_and_trained_again(build: Callable[[], nn.Module]) -> None:
    """While its tensors are frozen the first layer still learns what there is to keep."""
    model, first, second = build(), rows(2, 20, 1), rows(2, 20, 2)
    fit(model, first, steps=5)
    guard = PEGP(1.0)
    ranks = [{s.name: s.rank for s in guard.consolidate(model, [first]).sites}]
    mine = [p for n, p in model.named_parameters() if p.requires_grad and ".model.0." in n]
    for parameter in mine:
        parameter.requires_grad_(False)
    guard.attach(model)
    guard.begin_task()
    fit(model, second, guard, steps=10)
    ranks.append({s.name: s.rank for s in guard.end_task(None, [second]).sites})
    assert ranks[0].keys() == ranks[1].keys()
    assert all(ranks[1][n] > r for n, r in ranks[0].items() if ".model.0.lora_A" in n or ".model.0.adapter_down" in n)
    for parameter in mine:
        parameter.requires_grad_(True)
    guard.attach(model)
    guard.begin_task()
    both = torch.cat([first, second])
    before = answer(model, both)
    fit(model, rows(6, 20, 3), guard, steps=30)
    assert change(answer(model, both), before) < 1e-5
    assert guard.end_task(None, [second]).kept


def test_a_bias_alone_cannot_freeze_or_thaw_later() -> None:
    """``[W b]`` was protected as one matrix: half of it cannot go its own way, and that is said."""
    model = adapter_mlp()
    guard = PEGP(1.0)
    guard.consolidate(model, [rows(2, 20, 1)])
    model.base_model.model[0].adapter_down["default"].bias.requires_grad_(False)
    with pytest.raises(GuardError, match="sees 20 features, but the memory holds a basis of R"):
        guard.attach(model)


def test_biases_frozen_from_the_start_need_no_column() -> None:
    model = adapter_mlp()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(False)
    guard = learn_and_keep(model, rows(3, 20, 1), rows(8, 20, 2))
    assert {s.dim for s in guard.end_task(None, [rows(3, 20, 1)]).sites} == {20, 24, 8}
    for parameter in trainable(model)[:-1]:  # frozen later as well: the dimension stays
        parameter.requires_grad_(False)
    guard.attach(model)


def test_changes_of_a_bias_between_tasks_are_seen() -> None:
    model, old = adapter_mlp(), rows(3, 20, 1)
    guard = PEGP(1.0)
    guard.consolidate(model, [old])
    with torch.no_grad():
        model.base_model.model[0].adapter_up["default"].bias += 0.5
    with pytest.warns(UserWarning, match="changed between consolidation and this task"):
        guard.begin_task()


# --- storage ----------------------------------------------------------------------------------------------------

STORED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "prefix": (prefix, lambda seed: tokens(1, 2, seed)),
    "prompt": (lambda: prompt(tokens=5), lambda seed: tokens(1, 2, seed)),
    "adapter": (adapter_mlp, lambda seed: rows(2, 20, seed)),
    "ia3": (ia3_mlp, lambda seed: half(2, seed)),
    "prefix vit": (prefix_vit, lambda seed: images(1, seed)),
    "prompt vit": (prompt_vit, lambda seed: images(1, seed)),
}


@pytest.mark.filterwarnings("ignore:.*no free direction:UserWarning")
@pytest.mark.parametrize("mode", ["strict", "paper"])
@pytest.mark.parametrize("kind", STORED)
def test_stopped_in_the_middle_of_a_task(kind: str, mode: str, tmp_path: Path) -> None:
    """Specs, invariant 13: saved and loaded within the second task, it goes on bit for bit."""
    build, batch = STORED[kind]
    model = build()
    guard = PEGP(0.9, mode=mode)
    guard.attach(model)
    guard.begin_task()
    fit(model, batch(1), guard, steps=4)
    guard.end_task("first", [batch(1)])
    guard.begin_task()
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    torch.manual_seed(3)
    fit(model, batch(2), guard, optimizer=optimizer, steps=4)
    guard.save_pretrained(tmp_path)
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    other = build()
    other.load_state_dict(weights)
    again = PEGP.load_pretrained(tmp_path, other)
    assert again.settings() == guard.settings()
    taken_up = OPTIMIZERS["adamw"](trainable(other))
    taken_up.load_state_dict(moments)
    results = []
    for one, keeper, opt in ((model, guard, optimizer), (other, again, taken_up)):
        torch.manual_seed(4)
        fit(one, batch(2), keeper, optimizer=opt, steps=4)
        results.append(keeper.end_task("second", [batch(2)]))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert results[0] == results[1]
    # and on into a third task
    for one, keeper in ((model, guard), (other, again)):
        keeper.begin_task()
        torch.manual_seed(5)
        fit(one, batch(3), keeper, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    # teeth: without its anchors the loaded guard would have gone elsewhere
    assert any(not torch.equal(a, weights[n]) for n, a in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*no free direction:UserWarning")
@pytest.mark.parametrize("kind", ["prefix", "adapter", "ia3"])
def test_auto_energy_is_stored_before_it_is_chosen(kind: str, tmp_path: Path) -> None:
    build, batch = STORED[kind]
    model = build()
    guard = PEGP("auto")
    guard.consolidate(model, [batch(1)])
    again = PEGP.load_pretrained(guard.save_pretrained(tmp_path), model)
    chosen = [g.tune(lambda energy: -abs(energy["linear"] - 0.9)) for g in (guard, again)]
    assert chosen[0] == chosen[1]
    for name, space in guard._memory.spaces.items():
        assert torch.equal(space.stored, again._memory.spaces[name].stored)
