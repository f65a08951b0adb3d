from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapter_helpers import gpt2, llama, vit
from largo_helpers import ALL, IDS, LINEAR, Kinds, deviation, kinds, layers, moved, plain
from peft import PeftModel, get_peft_model
from torch import nn

from growthring.adapters import LargoConfig, LargoLayer
from growthring.errors import ConfigError

FORMS = ["delta", "residual", "product"]
TOLERANCE = {"atol": 1e-12, "rtol": 1e-12}


# --- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["principal", "minor"])
@pytest.mark.parametrize("form", ["delta", "product"])
def test_it_starts_bitwise_as_the_base_model(form, init, dtype):
    model = kinds(dtype, form=form, init=init, alpha=7, target_modules=ALL if form == "delta" else LINEAR)
    assert torch.equal(model(IDS), Kinds(dtype)(IDS))
    assert not torch.equal(moved(model)(IDS), Kinds(dtype)(IDS))


@pytest.mark.parametrize("init", ["principal", "minor"])
def test_the_residual_form_starts_as_the_base_model_to_rounding(init):
    model = kinds(torch.float64, form="residual", init=init, alpha=7)
    torch.testing.assert_close(model(IDS), Kinds(torch.float64)(IDS), **TOLERANCE)
    for layer in layers(model).values():
        part = layer.scaling["default"] * layer.largo_B0["default"] @ layer.largo_A0["default"]
        weight = layer._base().weight()
        torch.testing.assert_close(layer.largo_residual["default"] + part, weight, **TOLERANCE)


@pytest.mark.parametrize("alpha", [None, 3, 1.3])
@pytest.mark.parametrize("init", ["principal", "minor"])
@pytest.mark.parametrize("form", FORMS)
def test_it_computes_what_its_deviation_says(form, init, alpha):
    targets = ALL if form == "delta" else LINEAR
    model = moved(kinds(torch.float64, form=form, init=init, alpha=alpha, target_modules=targets))
    torch.testing.assert_close(model(IDS), plain(model)(IDS), **TOLERANCE)
    for layer in layers(model).values():
        weight = layer._base().oriented(layer.get_delta_weight("default"))
        torch.testing.assert_close(weight, deviation(layer), **TOLERANCE)
        assert torch.linalg.matrix_rank(weight) <= (3 if form == "product" else 6)


def test_delta_and_residual_form_are_the_same_function_and_have_the_same_gradients():
    made = {}
    for form in ("delta", "residual"):
        model = moved(kinds(torch.float64, form=form))
        model(IDS).square().sum().backward()
        made[form] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert made["delta"].keys() == made["residual"].keys()
    for name, gradient in made["delta"].items():
        torch.testing.assert_close(gradient, made["residual"][name], **TOLERANCE)


def test_gradients_are_those_of_the_chain_rule():
    model = moved(kinds(torch.float64, target_modules=["wide"], alpha=5))
    (layer,) = layers(model).values()
    base = plain(model)
    base(IDS).square().sum().backward()
    model(IDS).square().sum().backward()
    s, g = layer.scaling["default"], base.wide.weight.grad
    delta_a, delta_b = layer.largo_A["default"].weight, layer.largo_B["default"].weight
    a, b = layer.largo_A0["default"] + delta_a, layer.largo_B0["default"] + delta_b
    torch.testing.assert_close(delta_b.grad, s * g @ a.T, **TOLERANCE)
    torch.testing.assert_close(delta_a.grad, s * b.T @ g, **TOLERANCE)


def test_the_product_form_measures_its_deviation_by_its_factor():
    model = moved(kinds(torch.float64, form="product", alpha=5))
    for layer in layers(model).values():
        assert not layer.largo_A
        assert not layer.largo_B0
        norm = layer.scaling["default"] * layer.largo_B["default"].weight.norm()
        torch.testing.assert_close(layer.get_delta_weight("default").norm(), norm, **TOLERANCE)


@pytest.mark.parametrize("init", ["principal", "minor"])
@pytest.mark.parametrize("form", ["delta", "residual"])
def test_training_follows_the_factors_themselves(form, init):
    """PiSSA and MiLoRA train ``A`` and ``B``; their differences to the start take the same steps."""
    x, y = torch.randn(30, 10, dtype=torch.float64), torch.randn(30, 16, dtype=torch.float64)
    model = kinds(torch.float64, form=form, init=init, target_modules=["wide"], alpha=6)
    (layer,) = layers(model).values()
    s, weight, bias = 2.0, layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    a, b = (nn.Parameter(start["default"].clone()) for start in (layer.largo_A0, layer.largo_B0))
    residual = weight - s * (b @ a).detach()
    own = [p for p in model.parameters() if p.requires_grad]
    first, second = (torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.0) for ps in (own, [a, b]))
    for _ in range(20):
        first.zero_grad()
        second.zero_grad()
        (layer(x) - y).square().mean().backward()
        (x @ residual.T + s * x @ a.T @ b.T + bias - y).square().mean().backward()
        first.step()
        second.step()
    torch.testing.assert_close(weight + layer.get_delta_weight("default"), residual + s * b @ a, atol=1e-10, rtol=0)
    assert (layer.get_delta_weight("default")).norm() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_hooks_see_what_the_factors_read(form):
    model = moved(kinds(torch.float64, form=form, target_modules=["wide"]))
    (layer,) = layers(model).values()
    seen = {}
    watch = lambda key: lambda module, args: seen.update({key: args[0]})  # noqa: E731
    layer.register_forward_pre_hook(watch("x"))
    layer.largo_B["default"].register_forward_pre_hook(watch("u"))
    if form != "product":
        layer.largo_A["default"].register_forward_pre_hook(watch("A"))
    model(IDS)
    a = layer.largo_A0["default"] + (layer.largo_A["default"].weight if form != "product" else 0)
    torch.testing.assert_close(seen["u"], seen["x"] @ a.T, **TOLERANCE)
    assert form == "product" or torch.equal(seen["A"], seen["x"])
    assert isinstance(layer.largo_B["default"], nn.Linear)
    assert layer.largo_B["default"].weight.shape == (16, 3)


@pytest.mark.parametrize("form", FORMS)
def test_training_changes_the_factors_and_nothing_else(form):
    model = kinds(form=form, modules_to_save=None)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in changed} == ({"largo_A", "largo_B"} if form != "product" else {"largo_B"})
    base = {name: value for name, value in model.state_dict().items() if "base_layer" in name}
    assert base
    assert all(torch.equal(value, before[name]) for name, value in base.items())


def test_a_base_weight_that_trains_gets_its_gradient_in_residual_form():
    model = kinds(torch.float64, form="residual", target_modules=["wide"])
    (layer,) = layers(model).values()
    layer.base_layer.weight.requires_grad_(True)
    moved(model)
    base = copy.deepcopy(model)
    base.base_model.model.wide = base.merge_and_unload().wide
    base.base_model.model.wide.weight.requires_grad_(True)
    model(IDS).square().sum().backward()
    base.base_model.model(IDS).square().sum().backward()
    torch.testing.assert_close(layer.base_layer.weight.grad, base.base_model.model.wide.weight.grad, **TOLERANCE)


def test_random_factors_on_request():
    model = kinds(init_weights=False)
    assert not torch.allclose(model(IDS), Kinds()(IDS))


@pytest.mark.parametrize("make", [vit, gpt2, llama])
def test_it_adapts_models_of_transformers(make):
    base = make()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)} if make is vit else {"input_ids": torch.ones(2, 4).long()}
    before = base(**batch)[0]
    model = get_peft_model(base, LargoConfig(r=2, target_modules="all-linear")).eval()
    assert torch.equal(model(**batch)[0], before)
    assert len(layers(model)) >= 4


def test_the_residual_weight_made_at_inference_serves_training():
    model = moved(kinds(torch.float64, form="residual", modules_to_save=["emb"]))
    with torch.inference_mode():
        expected = model(IDS).clone()
    output = model(IDS)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    assert model.base_model.model.emb.modules_to_save["default"].weight.grad.norm() > 0


@pytest.mark.skipif(peft.__version__ < "0.19", reason="transformers 5 loads no adapter with peft before 0.19")
def test_transformers_takes_it_natively(tmp_path):
    model = llama()
    model.add_adapter(LargoConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False), "mine")
    prompt = torch.randint(5, 50, (2, 6))
    output = model.eval()(input_ids=prompt)[0]
    model.save_pretrained(tmp_path)
    again = llama()
    again.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "largo" not in k})
    assert not torch.allclose(again(input_ids=prompt)[0], output, atol=1e-4)
    again.load_adapter(tmp_path)
    torch.testing.assert_close(again.eval()(input_ids=prompt)[0], output, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_activation_checkpointing_and_compiling_change_nothing(form):
    model = moved(kinds(torch.float64, form=form))
    expected = model(IDS)
    again = torch.utils.checkpoint.checkpoint(model, IDS, use_reentrant=False)
    assert torch.equal(again, expected)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(IDS), expected, **TOLERANCE)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_factors_are_float32_over_half_precision(form):
    model = moved(kinds(torch.bfloat16, form=form))
    assert model(IDS).dtype == torch.bfloat16
    kept = {k: v.dtype for k, v in model.state_dict().items() if "largo" in k}
    assert set(kept.values()) == {torch.float32}
    start = {k: v for k, v in model.state_dict().items() if "largo_A0" in k}
    assert any(not torch.equal(v, v.bfloat16().float()) for v in start.values())  # never rounded on the way


def test_factors_are_as_narrow_as_asked_for():
    model = get_peft_model(Kinds(torch.bfloat16), LargoConfig(r=3, target_modules=ALL), autocast_adapter_dtype=False)
    assert {v.dtype for k, v in model.state_dict().items() if "largo" in k} == {torch.bfloat16}
    assert torch.equal(model(IDS), Kinds(torch.bfloat16)(IDS))


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    model = kinds(form=form)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDS)
        base = Kinds()(IDS)
    torch.testing.assert_close(output, base, atol=0.05, rtol=0.05)
    assert form == "residual" or torch.equal(output, base)


@pytest.mark.parametrize("form", FORMS)
def test_casting_the_whole_model(form):
    model = moved(kinds(form=form))
    expected = model(IDS)
    torch.testing.assert_close(model.double()(IDS).float(), expected, atol=1e-5, rtol=1e-5)


# --- several adapters -----------------------------------------------------------------------------------------------


def two(first="delta", second="product"):
    model = kinds(torch.float64, form=first, init_weights=False)
    model.add_adapter(
        "other", LargoConfig(r=2, form=second, init="minor", target_modules=["wide"], init_weights=False)
    )
    return model.eval()


@pytest.mark.parametrize(("first", "second"), [("delta", "product"), ("residual", "delta"), ("residual", "residual")])
def test_several_active_adapters_add_up(first, second):
    model = two(first, second)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(IDS), plain(model, ["default", "other"])(IDS), **TOLERANCE)
    model.set_adapter("other")
    torch.testing.assert_close(model(IDS), plain(model, ["other"])(IDS), **TOLERANCE)
    with model.disable_adapter():
        assert torch.equal(model(IDS), Kinds(torch.float64)(IDS))


@pytest.mark.parametrize("first", FORMS)
def test_a_batch_may_mix_adapters(first):
    model = two(first)
    names = ["other", "__base__", "default", "other", "default"]
    with torch.inference_mode():
        mixed = model(IDS, adapter_names=names)
    for adapters in (["default"], ["other"], []):
        rows = [row for row, name in enumerate(names) if name == (adapters or ["__base__"])[0]]
        wanted = plain(model, adapters)(IDS) if adapters else Kinds(torch.float64)(IDS)
        torch.testing.assert_close(mixed[rows], wanted[rows], **TOLERANCE)


def test_beam_search_with_mixed_adapters():
    base = llama()
    model = get_peft_model(base, LargoConfig(r=4, init_weights=False), adapter_name="one")
    model.add_adapter("two", LargoConfig(r=4, form="residual", init="minor", init_weights=False))
    moved(model, scale=0.5)
    model.eval()
    prompt = torch.randint(5, 50, (3, 4))
    options = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 4}
    mixed = model.generate(input_ids=prompt, adapter_names=["one", "__base__", "two"], **options)
    model.set_adapter("one")
    assert torch.equal(mixed[0], model.generate(input_ids=prompt, **options)[0])
    model.set_adapter("two")
    assert torch.equal(mixed[2], model.generate(input_ids=prompt, **options)[2])
    with model.disable_adapter():
        assert torch.equal(mixed[1], model.generate(input_ids=prompt, **options)[1])


def test_mixed_batches_refuse_what_they_cannot_do():
    model = two()
    with pytest.raises(ConfigError, match=r"non-existing adapter\(s\): othr; did you mean 'other'"):
        model(IDS, adapter_names=["othr"] * 5)
    with pytest.raises(ConfigError, match="2 adapter_names were given for a batch of 5"):
        model(IDS, adapter_names=["other"] * 2)
    with pytest.raises(ConfigError, match="at inference only"):
        model.train()(IDS, adapter_names=["other"] * 5)
    model.eval().merge_adapter(["default"])
    with pytest.raises(ConfigError, match="unmerge them first"):
        model(IDS, adapter_names=["other"] * 5)


def test_deleting_an_adapter_leaves_nothing_of_it():
    model = two("residual")
    model(IDS)
    model.set_adapter("other")
    model.delete_adapter("default")
    for layer in layers(model).values():
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "default" not in getattr(layer, name)


# --- scaling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_scaling_scales_the_deviation_exactly(form):
    model = moved(kinds(torch.float64, form=form, alpha=5))
    full = model(IDS).detach()
    reference = plain(model, factor=0.3)
    for layer in layers(model).values():
        layer.scale_layer(0.3)
    torch.testing.assert_close(model(IDS), reference(IDS), **TOLERANCE)
    assert not torch.allclose(model(IDS), full)
    for layer in layers(model).values():
        layer.unscale_layer()
    assert torch.equal(model(IDS), full)
    for layer in layers(model).values():
        layer.set_scale("default", 0.0)
        layer.set_scale("absent", 3.0)
    torch.testing.assert_close(model(IDS), Kinds(torch.float64)(IDS), **TOLERANCE)
    for layer in layers(model).values():
        layer.set_scale("default", 2.0)
        layer.unscale_layer(2.0)
        assert layer.scaling["default"] == pytest.approx(5 / 3)


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_it_saves_and_loads(form, dtype, low, tmp_path, monkeypatch):
    model = moved(kinds(dtype, form=form, init="minor", target_modules=ALL if form == "delta" else LINEAR))
    model.save_pretrained(tmp_path)
    if low:  # nothing is decomposed only to be overwritten
        monkeypatch.setattr("growthring.adapters.largo.layer.start_factors", None)
    again = PeftModel.from_pretrained(Kinds(dtype), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(again(IDS), model(IDS))
    again.load_adapter(tmp_path, "second", low_cpu_mem_usage=low)
    again.set_adapter("second")
    assert torch.equal(again(IDS), model(IDS))


def test_loading_other_factors_renews_the_residual_weight(tmp_path):
    model = moved(kinds(torch.float64, form="residual"))
    state = copy.deepcopy(model.state_dict())
    other = kinds(torch.float64, form="residual", init="minor")
    other(IDS)
    other.load_state_dict(state)
    assert torch.equal(other(IDS), model(IDS))


def test_low_memory_without_loading_is_no_silent_start():
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(LargoConfig(r=3, target_modules=LINEAR), Kinds(), low_cpu_mem_usage=True)
    with pytest.raises(ConfigError, match=r"conv: adapter 'default' was made without values \(low_cpu_mem"):
        model(IDS)


def test_only_factors_are_saved():
    from peft import get_peft_model_state_dict

    model = kinds(form="residual", modules_to_save=["emb"])
    model(IDS)
    names = {key.removeprefix("base_model.model.") for key in get_peft_model_state_dict(model)}
    parts = ("largo_A.weight", "largo_B.weight", "largo_A0", "largo_B0")
    assert names == {"emb.weight"} | {f"{layer}.{part}" for layer in LINEAR for part in parts}


def test_all_linear_layers_of_a_second_adapter_are_those_of_the_model():
    model = get_peft_model(llama(), LargoConfig(r=2, target_modules="all-linear"))
    count = len(layers(model))
    model.add_adapter("other", LargoConfig(r=2, form="product", target_modules="all-linear"))
    assert len(layers(model)) == count
    assert all({"default", "other"} == set(layer.largo_B) for layer in layers(model).values())


def test_blocks_may_be_chosen():
    config = LargoConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    model = get_peft_model(llama(), config)
    assert [name.split("layers.")[1] for name in layers(model)] == ["1.self_attn.q_proj"]


def test_progress_shows_after_two_seconds_and_counts_layers(monkeypatch):
    from growthring.adapters.largo import model as module

    seen = []

    class Bar:
        def __init__(self, **options):
            seen.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            seen.append("closed")

        def update(self, count):
            seen.append(count)

    monkeypatch.setattr(module.logging, "tqdm", Bar)
    model = kinds()
    assert seen[0]["delay"] == 2
    assert seen[1:] == [1, 1, 1, "closed"]
    assert "_progress" not in vars(model.base_model)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, r"LargoConfig\(r=0\): give a whole number of at least 1"),
        ({"r": 2.0}, r"LargoConfig\(r=2.0\): give a whole number"),
        ({"r": True}, r"LargoConfig\(r=True\)"),
        ({"alpha": 0}, r"LargoConfig\(alpha=0\): give a finite number above 0"),
        ({"alpha": -1.0}, "above 0"),
        ({"alpha": float("inf")}, "finite"),
        ({"alpha": float("nan")}, "finite"),
        ({"alpha": "8"}, "finite"),
        ({"init": "principle"}, r"LargoConfig\(init='principle'\): did you mean 'principal'"),
        ({"form": "delt"}, "did you mean 'delta'"),
        ({"dropout": 0.1}, r"LargoConfig\(dropout=0.1\): only 0.0 is allowed"),
        ({"svd_iterations": 0}, r"LargoConfig\(svd_iterations=0\)"),
        ({"svd_iterations": 2, "init": "minor"}, "finds the largest singular values only"),
        ({"init": "activation", "form": "residual"}, "nothing to take out of the weight"),
        ({"alpha": 1e-40}, r"scaling alpha / r is 1.25e-41, and single precision needs it between 1e-6 and 1e6"),
        ({"alpha": 1e300}, "between 1e-6 and 1e6; give an alpha near r"),
        ({"init_weights": "gaussian"}, r"LargoConfig\(init_weights='gaussian'\): allowed: True, or False"),
        ({"target_modules": 3}, r"LargoConfig\(target_modules=3\): give a list of names, or a regular expression"),
        ({"target_modules": [1]}, r"LargoConfig\(target_modules=\[1\]\): give a list of names"),
        ({"target_modules": [["wide"]]}, r"LargoConfig\(target_modules=\[\['wide'\]\]\): give a list of names"),
        ({"target_modules": "("}, r"LargoConfig\(target_modules='\('\): this is no regular expression"),
        ({"exclude_modules": "[a"}, "this is no regular expression"),
        ({"modules_to_save": "head"}, r"LargoConfig\(modules_to_save='head'\): give a list of names"),
    ],
)
def test_settings_that_cannot_be(config, message):
    with pytest.raises(ConfigError, match=message):
        LargoConfig(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 7}, r"LargoConfig\(r=7\): out has 6 outputs and 16 inputs, so its rank is at most 6; lower r"),
        ({"form": "residual", "target_modules": ["emb"]}, r"LargoConfig\(form='residual'\): emb is an embedding"),
        ({"form": "product", "target_modules": ["emb"]}, r"LargoConfig\(form='product'\): emb is an embedding"),
        ({"init": "activation", "target_modules": ["emb"]}, r"LargoConfig\(init='activation'\): emb is an embedding"),
    ],
)
def test_layers_that_do_not_fit(config, message):
    with pytest.raises(ConfigError, match=message):
        kinds(**config)


def test_other_modules_are_refused():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 2)
            self.attention = nn.MultiheadAttention(8, 2)
            self.empty = nn.Linear(0, 4)
            self.bytes = nn.Linear(4, 4)
            self.bytes.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
            self.narrow = nn.Linear(4, 4)
            self.narrow.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)

    for target, message in (
        ("conv", r"conv is a Conv2d; LargoConfig can adapt Linear, Conv1D and Embedding layers"),
        ("out_proj", "reads its weight without calling it"),
        ("empty", "empty has 4 outputs and 0 inputs: an empty weight"),
        ("bytes", "bytes is a Linear whose weight is uint8; it seems quantised"),
        ("narrow", "narrow is a Linear whose weight is float8_e4m3fn; it seems quantised"),
    ):
        with pytest.warns(UserWarning, match="zero-element"):
            made = Other()
        with pytest.raises(ConfigError, match=message):
            get_peft_model(made, LargoConfig(r=2, target_modules=[target]))


def test_asking_for_an_adapter_that_is_not_there():
    (layer,) = layers(kinds(target_modules=["wide"])).values()
    with pytest.raises(ConfigError, match=r"wide has no adapter 'absent'; it has \['default'\]"):
        layer.get_delta_weight("absent")


def test_names_that_match_nothing_are_peft_s_to_report():
    with pytest.raises(ValueError, match="Target modules"):
        kinds(target_modules=["absent"])


def test_layers_are_shown_by_name():
    model = kinds()
    assert "largo.LargoLinear(" in repr(model)
    assert all(isinstance(layer, LargoLayer) for layer in layers(model).values())
