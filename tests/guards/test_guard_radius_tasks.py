"""Radius over tasks, beside other guards, in a Trainer, and across a kill; what its certificates say."""

from __future__ import annotations

import math

import pytest
import torch
from deviation_helpers import KINDS, TARGETS, batch, farthest, loss_of, net, same, train, trainable, values
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

import growthring as gr
from growthring.errors import ConfigError, DataError, GuardError
from growthring.guards import PEGP, FreshLoRA, GradientMemory, Radius
from growthring.guards.deviation import find_deviations
from growthring.optim import GORP

MODELS = ("delta", "minor", "residual", "product", "lora", "weight")
GRANULARITIES = ("factor", "layer", "component")


def dense(model, start):
    """``||W - W_0||`` of every layer by hand, from weights merged into plain matrices."""
    found = []
    for layer in (m for m in model.modules() if hasattr(m, "get_delta_weight")):
        found.append(layer.get_delta_weight("default").detach())
    return found or [p.detach() - start[n] for n, p in trainable(model).items()]


# --- certificates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", MODELS)
def test_certificates_measure_what_is_there_and_bound_it(kind, granularity, tasks):
    model, guard = net(kind), Radius(granularity=granularity, mu=0.3)
    start = values(model)
    for task in range(tasks):
        train(model, guard, steps=range(10 * task, 10 * task + 8))
        radii = guard.radii()
        certificate = guard.end_task(None)
    assert (certificate.task, certificate.task_index, certificate.kept) == (f"task-{tasks}", tasks - 1, True)
    layers = dense(model, start)
    assert len(layers) == len(certificate.deviations)
    for layer, d in zip(layers, certificate.deviations, strict=True):
        assert d.frobenius == pytest.approx(float(layer.norm()), rel=1e-9)
        spectral = torch.linalg.matrix_norm(layer, 2) if layer.ndim > 1 else layer.norm()
        assert d.spectral == pytest.approx(float(spectral), rel=1e-9)
        assert d.spectral <= d.frobenius * (1 + 1e-12)
        assert d.frobenius <= d.bound * (1 + 1e-9)
        assert d.bound < 20 * d.frobenius  # it says something
    assert {r for d in certificate.deviations for r in d.radii} == {r for numbers in radii.values() for r in numbers}
    total = math.sqrt(sum(float(layer.square().sum()) for layer in layers))
    base = start if kind == "weight" else None
    assert gr.deviation(model, base).total == pytest.approx(total)
    assert f"{total:.4g}" in certificate.notes[0]
    plain = certificate.to_dict()["deviations"][0]
    assert plain["kept"] is True
    assert isinstance(plain["radii"], list)


def test_the_bound_of_factors_is_that_of_the_specification():
    model, guard = net("delta"), Radius()
    train(model, guard, steps=6)
    radii = guard.radii()
    for d in guard.end_task("one").deviations:
        layer = model.get_submodule(d.name.removesuffix(".default"))
        s, a0, b0 = layer.scaling["default"], layer.largo_A0["default"], layer.largo_B0["default"]
        name = d.name.removesuffix(".default")
        (a,), (b,) = radii[f"{name}.largo_A.default.weight"], radii[f"{name}.largo_B.default.weight"]
        two = [float(torch.linalg.matrix_norm(t, 2)) for t in (a0, b0)]
        assert d.bound == pytest.approx(s * (two[1] * a + two[0] * b + a * b))
        assert two[0] == pytest.approx(two[1])  # a balanced start


def test_a_product_is_bounded_by_its_radius_and_measured_by_its_factor():
    model, guard = net("product"), Radius()
    train(model, guard, steps=6)
    radii = [value for numbers in guard.radii().values() for value in numbers]
    for d, radius in zip(guard.end_task("one").deviations, radii, strict=True):
        layer = model.get_submodule(d.name.removesuffix(".default"))
        b = layer.largo_B["default"].weight.detach()
        assert d.frobenius == pytest.approx(layer.scaling["default"] * float(b.norm()))  # A_0 has orthonormal rows
        assert d.bound == radius


@pytest.mark.parametrize("kind", ["delta", "product", "lora", "weight"])
def test_what_moved_after_the_last_step_is_told(kind):
    model, guard = net(kind), Radius()
    train(model, guard, steps=6)
    with torch.no_grad():
        list(trainable(model).values())[-1].add_(1.0)
    certificate = guard.end_task("one")
    assert certificate.kept is False
    assert "1 layers are outside their bounds" in certificate.notes[1]


def test_a_loaded_adapter_that_does_not_move_is_within_its_bounds():
    model = net("delta")
    train(model, (), steps=5)
    guard = Radius()
    guard.attach(model)
    guard.begin_task()
    certificate = guard.end_task("nothing")
    assert certificate.kept is True
    assert all(d.frobenius > 0 for d in certificate.deviations)


def test_a_loaded_adapter_is_not_halved_by_the_first_step():
    """The first radius is between where the tensor was and where the step took it."""
    model = net("delta")
    train(model, (), steps=20)
    guard = Radius()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.3)
    guard.attach(model)
    guard.begin_task()
    before = guard._task._balls.sizes()
    train(model, guard, optimizer, steps=1)
    assert bool((guard._task._balls.sizes() > 0.9 * before).all())


# --- tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_later_task_is_measured_from_where_it_begins(kind):
    """Radius 0.01 in the second task: what the first one learned is moved by no more than that."""
    model, guard = net(kind), Radius(mu=0.3)
    train(model, guard, steps=10)
    guard.end_task("one")
    first = values(model)
    tight = Radius(fixed=1e-2)
    tight.attach(model)
    tight.load_state_dict(guard.state_dict())
    train(model, tight, steps=10)
    assert farthest(values(model), first) <= 1e-2
    assert farthest(values(model), first) > 1e-4
    assert tight.end_task("two").kept is True
    # around the pretrained model, the first task would have gone
    again = net(kind)
    with torch.no_grad():
        for name, p in trainable(again).items():
            p.copy_(first[name])
    other = Radius(fixed=1e-2)
    other._anchors = dict(guard._anchors)
    train(again, other, steps=10)
    assert farthest(values(again), first) > 0.02


def rows(task):
    """Two inputs a task: their features leave room for others in every layer."""
    return torch.randn(2, 24, generator=torch.Generator().manual_seed(500 + task), dtype=torch.float64)


def wide(kind):
    """24 -> 20 -> 20 -> 12, without biases, which PEGP would hold."""
    torch.manual_seed(0)
    layers = [nn.Linear(n, m, bias=False) for n, m in ((24, 20), (20, 20), (20, 12))]
    base = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    return (base if kind == "weight" else get_peft_model(base, KINDS[kind](8))).double()


def learn(model, guards, optimizer, task, steps=10):
    for guard in guards:
        guard.attach(model)
        guard.begin_task(str(task))
        guard.bind(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        (model(rows(task)) - torch.cos(torch.arange(24.0) + step + task).view(2, 12)).square().mean().backward()
        for guard in guards:
            guard.before_step()
        optimizer.step()
        for guard in guards:
            guard.after_step()


def stream(kind, guards, make, tasks=3):
    """Certificates of every task, and how far outputs of the first have moved since it ended."""
    model, found, old = wide(kind), [], torch.zeros(0)
    for task in range(tasks):
        learn(model, guards, make(model), task)
        old = old if task else model(rows(0)).detach()
        found.append([guard.end_task(str(task), [rows(task)]) for guard in guards])
    return model, found, float((model(rows(0)).detach() - old).abs().max() / old.abs().max())


MAKE = {
    "adamw": lambda model: torch.optim.AdamW(trainable(model).values(), lr=2e-2, weight_decay=0.0),
    "sgd": lambda model: torch.optim.SGD(trainable(model).values(), lr=0.5, momentum=0.9),
    "gorp": lambda model: GORP(model.named_parameters(), lr=2e-2, rank=2, refresh=3),
}


@pytest.mark.parametrize("order", ["PEGP, Radius", "Radius, PEGP"])
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("kind", ["delta", "product", "lora", "weight"])
def test_pegps_guarantee_and_the_radius_hold_together(kind, make, order):
    """Later tasks too: balls are around where a task begins, so scaling stays in PEGP's subspace."""
    pegp, radius = PEGP(energy=1.0, samples=64), Radius(mu=0.2)
    guards = [pegp, radius] if order == "PEGP, Radius" else [radius, pegp]
    _, found, change = stream(kind, guards, MAKE[make])
    assert change < 1e-9
    for certificates in found[1:]:
        for certificate in certificates:
            assert certificate.kept is True
        assert max(c.leak for c in certificates if c.guard == "pegp") < 1e-9
        deviations = next(c.deviations for c in certificates if c.guard == "radius")
        assert any(d.frobenius > 0 for d in deviations)


def test_a_ball_around_the_pretrained_model_would_break_pegp(monkeypatch):
    """The negative control: with balls of later tasks around the pretrained model, as those of the first."""
    pegp, radius = PEGP(energy=1.0, samples=64), Radius(mu=0.2)

    class Forgets(list):
        def __bool__(self):
            return False

    radius.tasks = Forgets()
    model = wide("delta")
    learn(model, [pegp, radius], MAKE["adamw"](model), 0)
    pegp.end_task("0", [rows(0)])
    radius.end_task("0")
    radius.fixed = 0.01
    learn(model, [pegp, radius], MAKE["adamw"](model), 1)
    assert pegp.end_task("1", [rows(1)]).kept is False


def test_it_binds_beside_pegp():
    """The radius is a constraint of its own: without it a task goes farther."""
    ends = []
    for guards in ([PEGP(energy=1.0, samples=64)], [PEGP(energy=1.0, samples=64), Radius(mu=0.03)]):
        model, _, change = stream("delta", guards, MAKE["adamw"])
        assert change < 1e-9
        ends.append(gr.deviation(model).total)
    assert ends[1] < 0.7 * ends[0]


@pytest.mark.parametrize("saved", [True, False])
def test_beside_a_loaded_pegp_it_needs_its_own_memory(saved, tmp_path):
    """A new one takes its first task for the first of all; PEGP's certificate says so."""
    pegp, radius = PEGP(energy=1.0, samples=64), Radius(mu=0.05)
    model = wide("delta")
    learn(model, [pegp, radius], MAKE["adamw"](model), 0)
    for guard in (pegp, radius):
        guard.end_task("0", [rows(0)])
        guard.save_pretrained(tmp_path / guard.name)
    pegp = PEGP.load_pretrained(tmp_path / "pegp")
    radius = Radius.load_pretrained(tmp_path / "radius") if saved else Radius(mu=0.05, first=0.1)
    learn(model, [pegp, radius], MAKE["adamw"](model), 1, steps=40)
    assert radius.end_task("1").kept is True
    assert pegp.end_task("1", [rows(1)]).kept is saved


def test_gradient_memory_and_radius():
    memory, radius = GradientMemory(energy=0.9), Radius()
    _, found, _ = stream("delta", [memory, radius], MAKE["adamw"])
    assert all(certificate.kept is True for certificates in found[1:] for certificate in certificates)


def test_a_fresh_branch_for_every_task():
    model = get_peft_model(net("weight", dtype=torch.float32), LoraConfig(r=3, target_modules=TARGETS))
    fresh, radius = FreshLoRA(), Radius()
    for task in range(3):
        fresh.attach(model)
        fresh.prepare(str(task), [])
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.0)
        for guard in (fresh, radius):
            guard.attach(model)
            guard.begin_task(str(task))
            guard.bind(optimizer)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            radius.before_step()
            optimizer.step()
            radius.after_step()
        certificate = radius.end_task(str(task))
        fresh.end_task(str(task), [])
        assert certificate.kept is True
        assert len(certificate.deviations) == 3
        assert all(d.bound == d.radii[0] for d in certificate.deviations)  # products, as in a first task


# --- over a kill ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("kind", ["delta", "product", "lora", "weight", "pissa"])
def test_it_goes_on_bit_for_bit(kind, later, folder, tmp_path):
    dtype = torch.float32 if kind == "pissa" else torch.float64
    ends = []
    for kill in (False, True):
        model, guard = net(kind, dtype=dtype), Radius(mu=0.2)
        if later:
            train(model, guard, steps=6)
            guard.end_task("one")
        optimizer = train(model, guard, steps=range(10, 16))
        if kill:
            again = net(kind, dtype=dtype)
            with torch.no_grad():
                for p, q in zip(again.parameters(), model.parameters(), strict=True):
                    p.copy_(q)
            other = torch.optim.AdamW(trainable(again).values(), lr=1e-2, weight_decay=0.0)
            other.load_state_dict(optimizer.state_dict())
            if folder:
                guard.save_pretrained(tmp_path)
                guard = Radius.load_pretrained(tmp_path, again)
            else:
                torch.save(guard.state_dict(), tmp_path / "state")
                guard = Radius(mu=0.2)
                guard.attach(again)
                guard.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
            model, optimizer = again, other
        train(model, guard, optimizer, steps=range(16, 22))
        ends.append((values(model), guard.end_task(None).to_dict()))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_without_its_state_it_goes_on_otherwise():
    """The negative control of the test above."""
    ends = []
    for kill in (False, True):
        model, guard = net("delta"), Radius()
        optimizer = train(model, guard, steps=6)
        train(model, Radius() if kill else guard, optimizer, steps=range(6, 12))
        ends.append(values(model))
    assert farthest(*ends) > 1e-6


def test_between_tasks_it_is_saved_and_loaded_without_a_model(tmp_path):
    model, guard = net("weight"), Radius(mu=0.2, granularity="layer", exclude=None)
    train(model, guard, steps=6)
    guard.end_task("one")
    guard.save_pretrained(tmp_path)
    loaded = Radius.load_pretrained(tmp_path)
    assert loaded.settings() == guard.settings()
    assert loaded.tasks == ["one"]
    again = net("weight")
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    for m, g in ((model, guard), (again, loaded)):
        train(m, g, steps=5)
    assert same(values(model), values(again))
    assert guard.end_task("two") == loaded.end_task("two")


def test_a_state_inside_a_task_needs_its_model(tmp_path):
    model, guard = net("delta"), Radius()
    train(model, guard, steps=2)
    guard.save_pretrained(tmp_path)
    with pytest.raises(GuardError, match=r"attach\(model\) first"):
        Radius.load_pretrained(tmp_path)
    with pytest.raises(GuardError, match=r"other balls than this model: \d+ differ"):
        Radius.load_pretrained(tmp_path, net("product"))
    (tmp_path / "memory.safetensors").unlink()
    with pytest.raises(DataError, match="not whole"):
        Radius.load_pretrained(tmp_path, net("delta"))


def test_another_model_is_another_beginning():
    guard = Radius()
    train(net("weight"), guard, steps=3)
    guard.end_task("one")
    other = net("weight", seed=1)
    start = values(other)
    guard.attach(other)
    assert guard.tasks == []
    assert all(torch.equal(guard._anchors[name], start[name]) for name in start)


def test_a_state_of_another_model_is_refused(tmp_path):
    model, guard = net("weight"), Radius()
    train(model, guard, steps=2)
    guard.end_task("one")
    guard.save_pretrained(tmp_path)
    other = nn.Sequential()
    other.body = net("weight")
    loaded, said = Radius.load_pretrained(tmp_path), r"6 of them are not in this model \(the first: 0\.weight"
    with pytest.raises(GuardError, match=said):
        loaded.attach(other)
    with pytest.raises(GuardError, match=said):
        Radius.load_pretrained(tmp_path, other)


# --- wrapped models, several adapters, a Trainer --------------------------------------------------------------------


def test_wrapped_by_compile_it_is_the_same_task():
    model, guard = net("weight"), Radius()
    optimizer = train(model, guard, steps=4)
    before = guard.radii()
    guard.attach(torch.compile(model, backend="eager"))
    assert guard.radii() == before
    train(model, guard, optimizer, steps=range(4, 8))
    whole, other = net("weight"), Radius()
    train(whole, other, steps=8)
    assert same(values(model), values(whole))


def test_only_adapters_that_train_are_held():
    model = net("delta")
    model.add_adapter("second", gr.adapters.LargoConfig(r=2, target_modules=TARGETS))
    model.set_adapter("second")
    guard = Radius()
    train(model, guard, steps=3)
    assert len(guard.radii()) == 6
    assert all(".second." in name for name in guard.radii())


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net("delta", dtype=torch.float32)
        self.head = nn.Linear(4, 2)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_a_plain_trainer(tmp_path, accumulate):
    torch.manual_seed(0)
    model, guard = Head(), Radius(mu=0.1)
    start = model.head.weight.detach().clone()
    data = [{"x": batch(i, torch.float32)[0][0], "labels": torch.tensor(i % 2)} for i in range(32)]
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=accumulate, max_steps=5,
        learning_rate=1e-2, max_grad_norm=0.5, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=data, callbacks=[guard.callback()]).train()
    assert not torch.equal(start, model.head.weight)  # the head is not held
    assert guard._task._adam.count.max() == 4  # one for each step of the optimizer, but the first
    certificate = guard.end_task("one")
    assert certificate.kept is True
    assert len(certificate.deviations) == 3


# --- what it says and refuses ---------------------------------------------------------------------------------------


def test_it_explains_every_tensor():
    model = Head()
    guard = Radius()
    plans = {p.name: p for p in guard.explain(model)}
    assert set(plans) == set(trainable(model))
    assert plans["head.weight"].treatment == "free"
    assert "exclude" in plans["head.weight"].why
    others = [p for name, p in plans.items() if not name.startswith("head.")]
    assert all(p.treatment == "protected" and "pretrained model is at most gamma" in p.condition for p in others)
    lora = {p.name: p for p in guard.explain(net("lora"))}
    assert "scaled" in lora["base_model.model.0.lora_A.default.weight"].why
    assert not lora["base_model.model.0.lora_B.default.weight"].why


def test_it_explains_the_task_under_way():
    """A new adapter in a later task: its ball is that of the product, before it has moved and after."""
    model, guard = net("lora"), Radius()
    train(model, guard, steps=3)
    guard.end_task("one")
    model.add_adapter("b", LoraConfig(r=2, target_modules=TARGETS))
    model.double().set_adapter("b")
    before = guard.explain(model)
    train(model, guard, steps=3)
    assert guard.explain() == before
    assert all("||s dB A||_F from where the task began" in p.condition for p in before)


@pytest.mark.parametrize(
    ("kind", "refused"), [("delta", False), ("product", False), ("lora", False), ("weight", True), ("pissa", True)]
)
def test_decay_away_from_the_pretrained_model_is_refused(kind, refused):
    model, guard = net(kind, dtype=torch.float32), Radius()
    guard.attach(model)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.1)
    if refused:
        with pytest.raises(
            GuardError, match=r"decays \d+ tensors towards zero .*weight_decay=0\.1.*Set weight_decay=0"
        ):
            guard.bind(optimizer)
    else:
        guard.bind(optimizer)
    heads = [{"params": [p], "weight_decay": 0.0} for p in trainable(model).values()]
    guard.bind(torch.optim.AdamW([*heads, {"params": [nn.Parameter(torch.ones(2))]}], lr=1e-2, weight_decay=0.1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mu": 0.0}, r"Radius\(mu=0.0\): must be above 0"),
        ({"mu": "fast"}, r"Radius\(mu='fast'\)"),
        ({"mu": float("nan")}, r"Radius\(mu=nan\)"),
        ({"kappa": 1.5}, r"Radius\(kappa=1.5\): must be in \[0, 1\]"),
        ({"unit": "steps"}, r"unit='steps'.*step"),
        ({"granularity": "rows"}, r"granularity='rows'"),
        ({"first": 0.0}, r"first=0.0"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\).*two numbers"),
        ({"betas": (0.9, 1.0)}, r"betas=1.0"),
        ({"fixed": -1.0}, r"fixed=-1.0.*at least 0"),
        ({"fixed": True}, r"fixed=True"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ConfigError, match=said):
        Radius(**settings)


def test_misuse():
    guard = Radius()
    with pytest.raises(GuardError, match="not attached"):
        guard.begin_task()
    with pytest.raises(GuardError, match="not attached"):
        guard.explain()
    guard.attach(net("delta"))
    for call in (guard.before_step, guard.after_step, guard.radii):
        with pytest.raises(GuardError, match="outside a task"):
            call()
    guard.begin_task()
    with pytest.raises(GuardError, match="without before_step"):
        guard.after_step()


def test_a_reference_that_nothing_trains_on_is_a_task():
    model, guard = net("lora"), Radius()
    with pytest.raises(GuardError, match="not attached"):
        guard.end_task("reference")
    guard.attach(model)
    certificate = guard.end_task("reference", [])
    assert certificate.kept is True
    assert all(d.frobenius == d.bound == 0.0 for d in certificate.deviations)
    train(model, guard, steps=5)
    whole, other = net("lora"), Radius()
    train(whole, other, steps=5)
    assert same(values(model), values(whole))
    assert guard.radii() == other.radii()


def test_an_anchor_of_zero_has_no_unit():
    model = net("weight")
    nn.init.zeros_(model[0].bias)
    guard = Radius(unit="anchor")
    guard.attach(model)
    with pytest.raises(GuardError, match=r"1 balls are around zero \(the first: 0.bias\)"):
        guard.begin_task()


def test_attention_with_one_weight_for_three_has_no_unit():
    base = nn.Sequential()
    base.attention = nn.MultiheadAttention(8, 2)
    guard = Radius(unit="anchor")
    guard.attach(get_peft_model(base, LoraConfig(r=2, target_modules=["attention"])))
    with pytest.raises(GuardError, match=r"attention\.default has no single weight.*unit='step'"):
        guard.begin_task()


def test_no_bound_is_kept_on_disk(tmp_path):
    guard = Radius(fixed=float("inf"))
    guard.save_pretrained(tmp_path)
    assert Radius.load_pretrained(tmp_path).fixed == math.inf


def test_the_settings_are_those_of_the_constructor():
    guard = Radius(0.2, kappa=0.5, unit="absolute", granularity="layer", first=0.25, betas=(0.8, 0.9), fixed=1.0)
    assert Radius(**guard.settings()).settings() == guard.settings()


def test_nothing_left_to_hold():
    model = nn.Sequential()
    model.head = nn.Linear(3, 2)
    with pytest.raises(GuardError, match=r"all 2 trainable tensors .*exclude="):
        Radius().attach(model)
    assert len(find_deviations(model, None)) == 2
