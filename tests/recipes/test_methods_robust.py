"""The LARGO-style readings, the SVD starts and the robust family as methods."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from growthring import guards
from growthring.adapters import LargoConfig
from growthring.backbones import map_modules
from growthring.errors import ConfigError
from growthring.recipes import METHODS, build, load_config, methods_robust, parse_config
from growthring.recipes.adapting import make_adapter, make_guards

READINGS = ("largo", "largo-f", "largo-p", "largo-d")
STARTS = ("pissa", "milora")
FAMILY = {
    "l2-sp": guards.L2SP,
    "ftp": guards.FTP,
    "tpgm": guards.TPGM,
    "spd": guards.SPD,
    "digrap": guards.Directional,
}
NO_CACHE = pytest.mark.usefixtures("no_cache")


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setenv("GROWTHRING_CACHE", "off")


def adapter_of(method, encoder, **settings):
    config = parse_config({"method": method, "adapter": settings or None})
    made = make_adapter(METHODS[method], config.adapter, encoder)
    assert type(made) is LargoConfig
    return made


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    return AutoModel.from_pretrained(str(tiny_encoder))


# ---------------------------------------------------------------------------------------------- what they are


@pytest.mark.parametrize(
    ("method", "init", "form"),
    [
        ("largo-f", "principal", "delta"),
        ("largo-p", "principal", "product"),
        ("largo-d", "principal", "delta"),
        ("pissa", "principal", "residual"),
        ("milora", "minor", "residual"),
    ],
)
def test_the_adapters_are_what_the_names_say(method, init, form, encoder):
    made = adapter_of(method, encoder)
    assert (made.init, made.form, made.r, made.alpha, made.svd_iterations) == (init, form, 8, 8.0, None)
    assert made.target_modules == "all-linear"
    other = adapter_of(method, encoder, r=3, target_modules="query")
    assert (other.r, other.alpha) == (3, 3.0)
    assert other.target_modules == set(map_modules(encoder).linears("query"))
    assert adapter_of(method, encoder, r=3, alpha=6).alpha == 6.0


def test_the_default_reading_is_one_of_the_three_under_another_name():
    default, reading = METHODS["largo"], METHODS[methods_robust.LARGO]
    same = {f.name for f in dataclasses.fields(default)} - {"name", "title", "summary"}
    assert methods_robust.LARGO in READINGS
    assert all(getattr(default, name) == getattr(reading, name) for name in same)
    assert methods_robust.LARGO in default.summary
    one, two = (parse_config({"method": name}).resolved() for name in ("largo", methods_robust.LARGO))
    assert (one["adapter"], one["guard"]) == (two["adapter"], two["guard"])


@pytest.mark.parametrize("name", READINGS)
def test_our_readings_are_called_that(name):
    assert "LARGO-style" in METHODS[name].title
    assert "our derivation" in METHODS[name].summary


def test_the_guards_are_what_the_names_say():
    kinds = {
        "largo": guards.Directional,
        "largo-f": guards.Radius,
        "largo-p": guards.Radius,
        "largo-d": guards.Directional,
    }
    for name, kind in (kinds | FAMILY).items():
        (guard,) = make_guards(METHODS[name], parse_config({"method": name}).guard)
        assert type(guard) is kind
        assert guard.name == METHODS[name].guard
    assert all(METHODS[name].guard is None for name in STARTS)
    assert all(METHODS[name].adapter == "linear" for name in FAMILY)


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("largo-f", {"mu": 0.3, "kappa": 0.5, "unit": "absolute", "granularity": "component"}),
        ("largo-p", {"mu": 0.03, "unit": "anchor"}),
        ("largo-d", {"mu": 0.1, "weight": 0.5}),
        ("l2-sp", {"weight": 1.0}),
        ("ftp", {"mu": 0.1, "kappa": 0.0, "norm": "tensor"}),
        ("tpgm", {"iterations": 3, "mu": 0.5, "norm": "tensor", "samples": 9}),
        ("spd", {"weight": 0.0}),
        ("digrap", {"mu": 0.1, "weight": 0.01}),
    ],
)
def test_settings_reach_the_guard(method, asked):
    config = parse_config({"method": method, "guard": asked})
    (guard,) = make_guards(METHODS[method], config.guard)
    assert {name: guard.settings()[name] for name in asked} == asked
    assert guard.settings().keys() >= config.resolved()["guard"].keys()


def test_defaults_that_a_method_sets_are_those_of_its_classes():
    signature = inspect.signature(LargoConfig).parameters
    assert parse_config({"method": "largo-f"}).adapter.init == signature["init"].default
    for method in METHODS.values():
        values = parse_config({"method": method.name}).resolved()
        for setting, allowed in method.choices.items():
            part, name = setting.split(".")
            assert values[part][name] == allowed[0]
        assert json.loads(json.dumps(method.to_dict()["choices"])) == {k: list(v) for k, v in method.choices.items()}


# ---------------------------------------------------------------------------------------------- what they refuse


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("largo-f", {"adapter": {"dropout": 0.1}}, r"adapter.dropout: 0.1: an adapter that starts from"),
        ("pissa", {"adapter": {"dropout": 0.0}}, r"adapter.dropout: 0: .* Remove dropout"),
        ("largo-f", {"adapter": {"form": "product"}},
         r"adapter.form: 'product': the method 'largo-f' takes delta or residual. Remove form, or choose another "
         r"method \(largo-p\)"),
        ("largo-p", {"adapter": {"form": "delta"}}, r"adapter.form: 'delta': .* takes product.*\(largo-f\)"),
        ("pissa", {"adapter": {"init": "minor"}}, r"adapter.init: 'minor': .* takes principal.*\(milora\)"),
        ("milora", {"adapter": {"svd_iterations": 4}}, r"adapter.svd_iterations: 4: a randomised SVD finds"),
        ("largo-d", {"adapter": {"init": "activation", "form": "residual"}}, r"adapter.form: residual takes a part"),
        ("largo-f", {"adapter": {"init": "first"}}, r"adapter.init: 'first'.*allowed: .*principal"),
        ("largo-p", {"guard": {"granularity": "component"}}, r"guard.granularity: 'component': .* takes layer"),
        ("largo-p", {"guard": {"norm": "rows"}}, r"guard.norm: has no effect.*mu, kappa, unit, granularity"),
        ("ftp", {"guard": {"norm": "l1"}}, r"guard.norm: 'l1': the method 'ftp' takes rows or tensor.*\(o-lora\)"),
        ("o-lora", {"guard": {"norm": "rows"}}, r"guard.norm: 'rows': the method 'o-lora' takes l1 or squared"),
        ("ftp", {"guard": {"mu": 0}}, r"guard.mu: must be greater than 0"),
        ("ftp", {"guard": {"kappa": 1.5}}, r"guard.kappa: must be at most 1"),
        ("pissa", {"guard": {"mu": 0.1}}, r"guard: has no effect: the method 'pissa' has no guard"),
        ("digrap", {"adapter": {"r": 4}}, r"adapter: has no effect: the method 'digrap' trains every linear weight"),
        ("sequential-lora", {"adapter": {"init": "minor"}}, r"adapter.init: has no effect"),
        ("tpgm", {"guard": {"iterations": 0}}, r"guard.iterations: must be at least 1"),
    ],
)  # fmt: skip
def test_what_has_no_effect_or_is_another_method_is_refused(method, settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"method": method, **settings})


# ---------------------------------------------------------------------------------------------- what they do


@NO_CACHE
@pytest.mark.parametrize("method", ["largo-f", "largo-p", "largo-d"])
def test_a_run_says_how_far_the_model_is(method, tiny_stream):
    config = load_config(tiny_stream(method, adapter={"r": 4, "target_modules": "attention"}))
    result = build(config).fit()
    for certificate in result.certificates:
        assert len(certificate.deviations) == 8
        for one in certificate.deviations:
            assert 0 < one.spectral <= one.frobenius * (1 + 1e-6)
            if method != "largo-d":
                assert one.kept
                assert one.frobenius <= one.bound * (1 + 1e-5)
        assert certificate.kept is (None if method == "largo-d" else True)


@NO_CACHE
@pytest.mark.parametrize("form", ["delta", "product"])
@pytest.mark.parametrize("scenario", ["task", "joint"])
def test_a_start_from_activations_sees_training_rows_before_anything_runs(form, scenario, tiny_stream):
    method = "largo-p" if form == "product" else "largo-f"
    settings = {"init": "activation", "r": 3, "target_modules": "attention_input"}
    trainer = build(load_config(tiny_stream(method, adapter=settings, train={"max_steps": 1})))
    layers = [m for m in trainer.model.modules() if hasattr(m, "largo_A0")]
    assert layers
    for layer in layers:
        a0 = layer.largo_A0["default"]
        torch.testing.assert_close(a0 @ a0.T, torch.eye(3), rtol=0, atol=1e-5)
    assert trainer.fit().matrix.to_list()


def test_tpgm_trains_its_radii_on_validation_rows_and_others_see_training_rows(tiny_stream):
    file = tiny_stream("tpgm", guard={"iterations": 2, "samples": 4}, train={"max_steps": 2})
    trainer = build(load_config(file))
    seen = []
    collate = trainer._collate

    def texts(split):
        return {tuple(row) for data in trainer._data for row in data[split].inputs}

    held_out, trained_on = texts("validation"), texts("train")
    assert not held_out & trained_on
    (guard,) = trainer.guards
    end = guard.end_task

    def watch(task, batches):
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                seen.append(tuple(ids[mask.bool()].tolist()))
        return end(task, batches)

    guard.end_task = watch
    result = trainer.fit()
    assert seen
    assert set(seen) <= held_out
    assert len(seen) <= 2 * 4
    assert all("2 steps on 1 validation batches" in c.notes[-1] for c in result.certificates)
    assert all(c.kept for c in result.certificates)
    assert collate is trainer._collate
    other = build(load_config(tiny_stream("pegp")))
    batch = other._sample(0, other.guards[0])[0]
    rows = {tuple(i[m.bool()].tolist()) for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)}
    assert rows <= {tuple(row) for row in other._data[0]["train"].inputs}


def test_the_penalty_is_in_the_loss(tiny_stream):
    ends = {}
    for weight in (0.0, 100.0):
        trainer = build(load_config(tiny_stream("l2-sp", guard={"weight": weight}, train={"max_steps": 6})))
        deviations = trainer.fit().certificates[-1].deviations
        ends[weight] = sum(one.frobenius**2 for one in deviations) ** 0.5
    assert ends[100.0] < ends[0.0] / 1.5


@NO_CACHE
@pytest.mark.parametrize(("method", "peft"), [("pissa", "pissa"), ("milora", None)])
def test_starts_take_the_way_of_the_published_ones(method, peft, tiny_encoder):
    """PiSSA's weights, step by step, are those of PEFT's own; MiLoRA's those of LoRA from the last triplets."""
    names = [f"encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")]

    def base():
        return AutoModel.from_pretrained(str(tiny_encoder), add_pooling_layer=False).eval()

    ours = get_peft_model(base(), make_adapter(METHODS[method], parse_config(
        {"method": method, "adapter": {"r": 4, "alpha": 8, "target_modules": names}}).adapter, base())
    ).double()  # fmt: skip
    start = LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=peft or True)
    theirs = get_peft_model(base(), start).double()  # PEFT decomposes in float32
    if peft is None:
        for name in names:
            layer = theirs.base_model.model.get_submodule(name)
            with torch.no_grad():
                u, s, v = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
                root = (s[-4:] / 2.0).sqrt()
                layer.lora_B.default.weight.copy_(u[:, -4:] * root)
                layer.lora_A.default.weight.copy_(root[:, None] * v[-4:])
                layer.base_layer.weight -= 2.0 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    ids = torch.randint(5, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    goal = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ways = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0, momentum=0.9)
        outs = []
        for _ in range(8):
            optimizer.zero_grad()
            out = model(input_ids=ids).last_hidden_state
            (out - goal).square().mean().backward()
            optimizer.step()
            outs.append(out.detach())
        ways.append(outs)
    for mine, other in zip(*ways, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)
    assert (ways[0][-1] - ways[0][0]).abs().max() > 2e-3
