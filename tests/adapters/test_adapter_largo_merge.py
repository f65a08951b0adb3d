from __future__ import annotations

import copy

import pytest
import torch
from largo_helpers import ALL, IDS, LINEAR, Kinds, kinds, layers, moved, plain
from peft import get_peft_model
from torch import nn

from growthring.adapters import LargoConfig, start_from_activations
from growthring.adapters.largo import bases
from growthring.errors import ConfigError

FORMS = ["delta", "residual", "product"]
TOLERANCE = {"atol": 1e-12, "rtol": 1e-12}


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_merging_changes_no_output(form, safe):
    model = moved(kinds(torch.float64, form=form, target_modules=ALL if form == "delta" else LINEAR))
    expected = plain(model)(IDS)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    assert type(merged.wide) is nn.Linear
    torch.testing.assert_close(merged(IDS), expected, **TOLERANCE)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(IDS), expected, **TOLERANCE)
    assert not torch.allclose(expected, Kinds(torch.float64)(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_unmerging_restores_the_weights_bitwise(form, dtype):
    model = moved(kinds(dtype, form=form, target_modules=ALL if form == "delta" else LINEAR), scale=3.0)
    model.add_adapter("other", LargoConfig(r=2, init="minor", target_modules=["wide", "out"], init_weights=False))
    before, output = copy.deepcopy(model.state_dict()), model(IDS)
    identities = [id(p) for p in model.parameters()]
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    assert layers(model)["base_model.model.wide"].merged_adapters == ["default", "other"]
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == identities
    assert torch.equal(model(IDS), output)


def test_disabling_a_merged_adapter_unmerges_it():
    model = moved(kinds())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS), Kinds()(IDS))


def test_unloading_gives_the_base_model_back():
    base = Kinds()
    model = moved(get_peft_model(base, LargoConfig(r=3, target_modules=ALL)))
    assert torch.equal(model.unload()(IDS), Kinds()(IDS))


def test_a_broken_adapter_is_not_merged():
    model = moved(kinds())
    layers(model)["base_model.model.wide"].largo_B["default"].weight.data[0, 0] = float("nan")
    before = Kinds().wide.weight
    with pytest.raises(ValueError, match=r"NaNs detected .* The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layers(model)["base_model.model.wide"].base_layer.weight, before)


def test_unmerging_twice_warns():
    model = kinds(target_modules=["wide"])
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_casting_while_merged_and_unmerging():
    model = moved(kinds())
    expected = model(IDS)
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS).float(), expected, atol=1e-5, rtol=1e-5)


def test_a_large_weight_in_half_precision_is_rounded_once():
    model = moved(kinds(torch.bfloat16))
    layer = next(iter(layers(model).values()))
    wanted = (layer.base_layer.weight.float() + layer.get_delta_weight("default")).bfloat16()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, wanted)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.out = nn.Linear(12, 20, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, ids):
        return self.out(self.emb(ids))


@pytest.mark.parametrize(("target", "other"), [("out", "emb"), ("emb", "out")])
def test_tied_weights_are_adapted_but_not_merged(target, other):
    base = Tied()
    before = base(IDS)
    model = get_peft_model(base, LargoConfig(r=3, target_modules=[target]))
    assert torch.equal(model(IDS), before)
    assert not torch.equal(moved(model)(IDS), before)
    for act in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=rf"{target}.weight is tied to {other}.weight: .* change both"):
            act()
    with model.disable_adapter():
        assert torch.equal(model(IDS), before)
    model.base_model.model.get_submodule(target).base_layer.weight = nn.Parameter(base.emb.weight.clone())
    model.merge_adapter()


def test_a_weight_that_is_computed_is_adapted_but_not_merged():
    base = Kinds()
    nn.utils.parametrizations.weight_norm(base.wide)
    before = base(IDS)
    model = get_peft_model(base, LargoConfig(r=3, target_modules=["wide"]))
    assert torch.equal(model(IDS), before)
    assert not torch.equal(moved(model)(IDS), before)
    with pytest.raises(ConfigError, match="wide: its weight is computed from other tensors"):
        model.merge_adapter()


# --- quantised layers, by a backend of our own ----------------------------------------------------------------------


class Int8Linear(nn.Module):
    """What a quantiser makes of a linear layer: no weight that could train."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.weight * self.scale).T


class Backend:
    backend_name = "int8"
    supports_merge = True

    def get_base_weight(self, layer):
        return layer.weight * layer.scale

    def set_base_weight(self, peft_layer, weight):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        made, layer = Int8Linear(linear), peft_layer.get_base_layer()
        layer.weight, layer.scale = made.weight, made.scale

    def maybe_clone_base_result(self, x):
        return x.clone()


@pytest.fixture
def quantised(monkeypatch):
    resolve = lambda layer, **kwargs: Backend() if isinstance(layer, Int8Linear) else None  # noqa: E731
    monkeypatch.setattr(bases, "resolve_quantization_backend", resolve)
    monkeypatch.setattr(bases, "get_quantization_kwargs", lambda model: {})
    return nn.Sequential(Int8Linear(nn.Linear(12, 10)), nn.Tanh(), nn.Linear(10, 4))


@pytest.mark.parametrize("form", ["delta", "product"])
def test_quantised_layers(quantised, form):
    x = torch.randn(5, 12)
    before, weight = quantised(x), quantised[0].weight.clone()
    model = get_peft_model(quantised, LargoConfig(r=3, form=form, target_modules=["0"]))
    assert torch.equal(model(x), before)
    output = moved(model, scale=0.5)(x)
    assert not torch.equal(output, before)
    model.merge_adapter()
    torch.testing.assert_close(model(x), output, atol=0.05, rtol=0.05)
    assert not torch.equal(model(x), output)  # requantised
    model.unmerge_adapter()
    assert torch.equal(model(x), output)
    assert torch.equal(quantised[0].get_base_layer().weight, weight)


def test_quantised_layers_have_no_residual_form(quantised):
    with pytest.raises(ConfigError, match=r"LargoConfig\(form='residual'\): 0 is quantised \(int8\)"):
        get_peft_model(quantised, LargoConfig(r=3, form="residual", target_modules=["0"]))


def test_without_a_backend_quantised_layers_are_refused(quantised, monkeypatch):
    monkeypatch.setattr(bases, "resolve_quantization_backend", None)
    with pytest.raises(ConfigError, match=r"0 is a Int8Linear"):
        get_peft_model(quantised, LargoConfig(r=3, target_modules=["0"]))


def test_a_backend_that_cannot_dequantise_says_so(quantised, monkeypatch):
    def refuse(self, layer):
        raise TypeError("Dequantization is not supported for gptq layers.")

    monkeypatch.setattr(Backend, "get_base_weight", refuse)
    with pytest.raises(ConfigError, match=r"0: Dequantization is not supported .*\. A start from the weight"):
        get_peft_model(quantised, LargoConfig(r=3, target_modules=["0"]))
    x = torch.randn(9, 12)
    expected = quantised(x)
    model = get_peft_model(quantised, LargoConfig(r=3, init="activation", form="product", target_modules=["0"]))
    start_from_activations(model, [x])
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["delta", "product"])
def test_bitsandbytes(form, bits):
    bnb = pytest.importorskip("bitsandbytes")
    if bases.resolve_quantization_backend is None:
        pytest.skip("this version of peft has no quantisation backends")
    linear = bnb.nn.Linear4bit(64, 128, quant_type="nf4") if bits == 4 else bnb.nn.Linear8bitLt(64, 128)
    base = nn.Sequential(linear).to("cpu")
    x = torch.randn(5, 64)
    before = base(x)
    model = get_peft_model(base, LargoConfig(r=3, form=form, target_modules=["0"]))
    assert torch.equal(model(x), before)
    output = moved(model)(x)
    assert not torch.equal(output, before)
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    assert torch.equal(model(x), output)
