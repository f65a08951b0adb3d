"""Bottleneck adapters against a plain twin written from the equations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adapter_helpers import (
    attention_by_hand,
    bert,
    checkpointing,
    clip,
    fill,
    gpt2,
    hidden,
    llama,
    pixels,
    tokens,
    vit,
    vit_by_hand,
)
from peft import PeftModel, get_peft_model
from torch import nn

from growthring.adapters import BottleneckConfig, BottleneckLayer
from growthring.adapters.bottleneck.activations import ACTIVATIONS, activation
from growthring.backbones import map_modules
from growthring.errors import ConfigError


def bottleneck(layer, z, act=F.relu, s=1.0, name="default"):
    down, up = layer.adapter_down[name], layer.adapter_up[name]
    return s * (act(z @ down.weight.T + down.bias) @ up.weight.T + up.bias)


class Twin(nn.Module):
    """A linear layer and, by hand, what an adapter around it computes."""

    def __init__(self, layer, mode, act, s):
        super().__init__()
        self.layer, self.mode, self.act, self.s = layer, mode, act, s

    def forward(self, x):
        h = x @ self.layer.base_layer.weight.T + self.layer.base_layer.bias
        return h + bottleneck(self.layer, x if self.mode == "parallel" else h, self.act, self.s)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize(
    ("name", "act"), [("relu", F.relu), ("gelu", F.gelu), ("identity", lambda x: x), ("tanh", torch.tanh)]
)
def test_one_layer_equals_its_twin(mode, name, act):
    base = nn.Sequential(nn.Linear(12, 20))
    config = BottleneckConfig(r=5, mode=mode, activation=name, scaling=0.7, target_modules=["0"], init_weights=False)
    model = fill(get_peft_model(base, config)).double()
    layer = model.base_model.model[0]
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), Twin(layer, mode, act, 0.7)(x), rtol=1e-12, atol=1e-12)
    assert layer.adapter_down["default"].in_features == (12 if mode == "parallel" else 20)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_vision_transformer_equals_its_twin(mode):
    model = vit()
    config = BottleneckConfig(r=4, mode=mode, activation="gelu", scaling=0.5, init_weights=False)
    adapted = fill(get_peft_model(model, config))

    def after(layer, x, h):
        return h + bottleneck(layer, x if mode == "parallel" else h, F.gelu, 0.5)

    with torch.no_grad():
        x = model.embeddings(pixels()["pixel_values"])
        expected = vit_by_hand(model, x, lambda layer, q, k, v: attention_by_hand(q, k, v, heads=4), after)
    torch.testing.assert_close(hidden(adapted, pixels()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_post_norm_encoder_equals_its_twin(mode):
    """BERT has no module around its MLP: the parallel adapter reads what the first linear layer reads."""
    model = bert()
    adapted = fill(get_peft_model(model, BottleneckConfig(r=4, mode=mode, init_weights=False)))
    batch = tokens(padded=False)
    with torch.no_grad():
        x = model.embeddings(batch["input_ids"])
        for block in model.encoder.layer:
            heads = block.attention.self(x)[0]
            output = block.attention.output
            out = output.dense.base_layer(heads)
            out = out + bottleneck(output.dense, x if mode == "parallel" else out)
            x = output.LayerNorm(x + out)
            out = block.output.dense.base_layer(block.intermediate(x))
            out = out + bottleneck(block.output.dense, x if mode == "parallel" else out)
            x = block.output.LayerNorm(x + out)
    torch.testing.assert_close(hidden(adapted, batch), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize(("make", "batch"), [(vit, pixels), (bert, tokens), (gpt2, tokens)])
def test_it_starts_as_the_identity_and_only_it_trains(make, batch, mode):
    model = make()
    before = hidden(model, batch())
    adapted = get_peft_model(model, BottleneckConfig(r=4, mode=mode))
    assert torch.equal(hidden(adapted, batch()), before)
    trains = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trains
    assert all(".adapter_down." in n or ".adapter_up." in n for n in trains)
    assert len(trains) == 2 * 2 * 2 * 2  # two blocks, two places, two layers, weight and bias
    fill(adapted)
    assert not torch.allclose(hidden(adapted, batch()), before)  # or the identity would hold whatever is learned


def test_random_init_is_not_the_identity():
    model = vit()
    before = hidden(model, pixels())
    assert not torch.allclose(hidden(get_peft_model(model, BottleneckConfig(init_weights=False)), pixels()), before)


@pytest.mark.parametrize("placement", ["attention", "mlp", "both"])
def test_placement_follows_the_roles(placement):
    model = bert()
    found = map_modules(model)
    expected = set()
    if placement in ("attention", "both"):
        expected |= set(found.linears("attention_output"))
    if placement in ("mlp", "both"):
        expected |= set(found.linears("mlp_down"))
    config = BottleneckConfig(r=4, placement=placement)
    adapted = get_peft_model(model, config)
    layers = {n for n, m in adapted.base_model.model.named_modules() if isinstance(m, BottleneckLayer)}
    assert layers == expected
    assert config.target_modules == expected  # kept in the config, so that loading needs no map


def test_chosen_blocks_and_one_tower():
    adapted = get_peft_model(bert(), BottleneckConfig(r=4, layers_to_transform=[1]))
    assert all(".layer.1." in n for n, m in adapted.named_modules() if isinstance(m, BottleneckLayer))
    adapted = get_peft_model(clip(), BottleneckConfig(r=4, tower="image"))
    layers = [n for n, m in adapted.named_modules() if isinstance(m, BottleneckLayer)]
    assert len(layers) == 4
    assert all("vision_model" in n for n in layers)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # older PEFT looks for the base model
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_saved_adapter_gives_the_same(tmp_path, mode):
    model = bert()
    plain = copy.deepcopy(model)
    adapted = fill(get_peft_model(model, BottleneckConfig(r=4, mode=mode, activation="silu", scaling=2.0)))
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert torch.equal(hidden(loaded, tokens()), hidden(adapted, tokens()))
    assert not any(p.requires_grad for p in loaded.parameters())
    config = loaded.peft_config["default"]
    assert (config.r, config.mode, config.activation, config.scaling, config.placement) == (
        4,
        mode,
        "silu",
        2.0,
        "both",
    )
    lazy = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(hidden(lazy, tokens()), hidden(adapted, tokens()))
    trained = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in trained.parameters())


def test_several_adapters_add_up_and_can_be_turned_off():
    model = bert()
    base = hidden(model, tokens())
    adapted = get_peft_model(model, BottleneckConfig(r=4, init_weights=False))
    first = hidden(adapted, tokens())
    adapted.add_adapter("second", BottleneckConfig(r=3, mode="sequential", init_weights=False, placement="mlp"))
    assert torch.equal(hidden(adapted, tokens()), first)  # added, not active
    adapted.set_adapter("second")
    second = hidden(adapted, tokens())
    assert not torch.allclose(first, second)
    adapted.base_model.set_adapter(["default", "second"])
    both = hidden(adapted, tokens())
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    with adapted.disable_adapter():
        assert torch.equal(hidden(adapted, tokens()), base)
    adapted.delete_adapter("second")
    adapted.set_adapter("default")
    assert torch.equal(hidden(adapted, tokens()), first)
    restored = adapted.unload()
    assert torch.equal(hidden(restored, tokens()), base)
    assert not any(m._forward_pre_hooks for m in restored.modules())  # nothing of it stays behind


def test_parallel_adapters_of_one_layer_read_the_same_input():
    base = nn.Sequential(nn.Linear(6, 6))
    model = get_peft_model(base, BottleneckConfig(r=2, target_modules=["0"], init_weights=False))
    model.add_adapter("more", BottleneckConfig(r=3, mode="sequential", target_modules=["0"], init_weights=False))
    model.base_model.set_adapter(["default", "more"])
    layer, x = model.base_model.model[0], torch.randn(5, 6)
    h = layer.base_layer(x)
    expected = h + bottleneck(layer, x) + bottleneck(layer, h, name="more")
    torch.testing.assert_close(model(x), expected)


def test_a_copy_stands_on_its_own():
    """The copy's parallel adapters must read the copy's inputs, not those of the original."""
    adapted = fill(get_peft_model(bert(), BottleneckConfig(r=4)))
    twin = copy.deepcopy(adapted)
    expected = hidden(adapted, tokens())
    fill(adapted, scale=1.0)
    assert torch.equal(hidden(twin, tokens()), expected)
    assert not torch.equal(hidden(adapted, tokens()), expected)


def test_an_input_that_never_came_is_an_error():
    """A copied block would read nothing, and falling back to another input would be silently wrong."""
    adapted = get_peft_model(bert(), BottleneckConfig(r=4))
    block = adapted.base_model.model.encoder.layer[0]
    block.intermediate = copy.deepcopy(block.intermediate)
    with pytest.raises(ConfigError, match=r"reads the input of encoder.layer.0.intermediate.dense, which did not run"):
        hidden(adapted, tokens())


def test_gradients_survive_checkpointing():
    grads = []
    for saved in (True, False):
        torch.manual_seed(0)
        model = bert()
        adapted = fill(get_peft_model(model, BottleneckConfig(r=4)))
        if not saved:
            checkpointing(model)
        adapted.train()
        for module in adapted.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        adapted(**tokens()).last_hidden_state.square().sum().backward()
        grads.append([p.grad for p in adapted.parameters() if p.requires_grad])
        assert model.encoder.layer[0].output.dense._inputs == {}
    for a, b in zip(*grads, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


def test_wrapped_modules_may_return_tuples():
    model = vit()
    name = map_modules(model).blocks[0].attentions[0].module
    before = hidden(model, pixels())
    adapted = get_peft_model(model, BottleneckConfig(r=4, target_modules=[name], init_weights=False))
    layer = adapted.base_model.model.get_submodule(name)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], layer.base_layer(x)[0] + bottleneck(layer, x))
        torch.testing.assert_close(layer(hidden_states=x)[0], layer(x)[0])  # by name, as some models call it
    assert not torch.allclose(hidden(adapted, pixels()), before)


def test_a_language_model_generates():
    adapted = fill(get_peft_model(llama(), BottleneckConfig(r=4)))
    batch = tokens(count=1, length=4, padded=False)
    cached = adapted.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    plain = adapted.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert cached.shape == (1, 8)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = bert().to(dtype)
    adapted = fill(get_peft_model(model, BottleneckConfig(r=4)))
    out = hidden(adapted, tokens())
    assert out.dtype == dtype
    weights = [p.dtype for n, p in adapted.named_parameters() if "adapter_" in n]
    assert set(weights) == {
        torch.float32 if dtype == torch.bfloat16 else dtype
    }  # PEFT keeps half-precision ones in full


def test_dropout_acts_in_training_only():
    adapted = fill(
        get_peft_model(nn.Sequential(nn.Linear(8, 8)), BottleneckConfig(r=4, dropout=0.5, target_modules=["0"]))
    )
    x = torch.randn(3, 8)
    adapted.train()
    assert not torch.equal(adapted(x), adapted(x))
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x))


def test_merging_is_refused():
    adapted = get_peft_model(bert(), BottleneckConfig(r=4))
    with pytest.raises(ConfigError, match="cannot be merged"):
        adapted.merge_and_unload()
    with pytest.raises(ConfigError, match="cannot be merged"):
        adapted.merge_adapter()
    assert torch.isfinite(hidden(adapted, tokens())).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_element_wise(name):
    x = torch.linspace(-3, 3, 12).view(3, 4)
    y = activation(name)(x)
    for i in range(3):
        for j in range(4):
            torch.testing.assert_close(activation(name)(x[i : i + 1, j : j + 1])[0, 0], y[i, j], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 0}, "at least 1"),
        ({"r": 2.5}, "whole number"),
        ({"mode": "paralel"}, "did you mean 'parallel'"),
        ({"placement": "mpl"}, "did you mean 'mlp'"),
        ({"activation": "softmax"}, "mixes coordinates"),
        ({"activation": "glu"}, "mixes coordinates"),
        ({"activation": "rellu"}, "did you mean 'relu'"),
        ({"dropout": 1.0}, "share"),
        ({"placement": "mlp", "target_modules": ["dense"]}, "give one"),
        ({"tower": "audio"}, "'text', 'image'"),
        ({"tower": "text", "target_modules": ["dense"]}, "tower goes with placement"),
        ({"layers_to_transform": [5]}, "has 2 blocks"),
        ({"tower": "image"}, "no 'image' tower"),
        ({"target_modules": ["word_embeddings"]}, "without a linear layer"),
    ],
)
def test_wrong_settings_say_what_is_right(changes, says):
    with pytest.raises(ConfigError, match=says):
        get_peft_model(bert(), BottleneckConfig(**changes))


def test_a_wrong_width_is_named_when_it_shows():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), BottleneckConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    with pytest.raises(ConfigError, match=r"width 6 was given float32 of shape \(2, 5\)"):
        layer._increment("default", torch.zeros(2, 5))
