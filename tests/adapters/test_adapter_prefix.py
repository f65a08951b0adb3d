"""Prefix tokens against attention written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_helpers import (
    attention_by_hand,
    bert,
    checkpointing,
    clip,
    dinov2,
    fill,
    hidden,
    llama,
    pixels,
    tokens,
    vit,
    vit_by_hand,
)
from peft import PeftModel, get_peft_model
from transformers import T5Config, T5EncoderModel

from growthring.adapters import PrefixTokensConfig, PrefixTokensLayer
from growthring.errors import ConfigError


def by_hand(layer, q, k, v, bias=None):
    """``softmax(Q [P_k; K]^T / sqrt(d_h)) [P_v; V]`` per head."""
    keys, values = (t["default"].expand(len(q), -1, -1) for t in (layer.prefix_keys, layer.prefix_values))
    if bias is not None:  # of the real keys; the prefix is always seen
        bias = torch.cat([torch.zeros(*bias.shape[:-1], keys.shape[1]), bias], dim=-1)
    return attention_by_hand(q, torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1), heads=4, bias=bias)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_vit_equals_attention_written_by_hand(implementation):
    model = vit(attn_implementation=implementation)
    adapted = fill(get_peft_model(model, PrefixTokensConfig(num_tokens=3)))
    layers = [m for m in adapted.modules() if isinstance(m, PrefixTokensLayer)]
    assert all(
        layer.prefix_keys["default"].shape == layer.prefix_values["default"].shape == (3, 32) for layer in layers
    )
    with torch.no_grad():
        x = vit_by_hand(model, model.embeddings(pixels()["pixel_values"]), by_hand)
    torch.testing.assert_close(hidden(adapted, pixels()), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert_with_padding_equals_attention_written_by_hand(implementation):
    model = bert()
    model.set_attn_implementation(implementation)
    adapted = fill(get_peft_model(model, PrefixTokensConfig(num_tokens=3)))
    batch = tokens()
    bias = torch.zeros(3, 1, 1, 7).masked_fill(batch["attention_mask"][:, None, None] == 0, float("-inf"))
    with torch.no_grad():
        x = model.embeddings(batch["input_ids"])
        for block in model.encoder.layer:
            layer = block.attention.self
            heads = by_hand(layer, layer.query(x), layer.key(x), layer.value(x), bias)
            x = block.attention.output(heads, x)
            x = block.output(block.intermediate(x), x)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(hidden(adapted, batch)[seen], x[seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_causal_text_tower_keeps_its_order(implementation):
    """Every token sees the whole prefix and no later token."""
    model = clip()
    model.set_attn_implementation(implementation)
    adapted = fill(get_peft_model(model, PrefixTokensConfig(num_tokens=3, tower="text")))
    text = adapted.base_model.model.text_model
    ids = tokens(padded=False)["input_ids"]
    changed = ids.clone()
    changed[:, 4:] += 1
    with torch.no_grad():
        a, b = (text(input_ids=i).last_hidden_state for i in (ids, changed))
        before = a.clone()
        layer = text.encoder.layers[0].self_attn
        layer.prefix_values["default"][2] += 1.0
        after = text(input_ids=ids).last_hidden_state
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])
    assert ((after - before).abs().amax(-1) > 1e-4).all()  # the first token too


@pytest.mark.parametrize(("make", "batch"), [(vit, pixels), (dinov2, pixels), (bert, tokens)])
def test_only_it_trains_and_it_can_be_turned_off(make, batch):
    model = make()
    base = hidden(model, batch())
    adapted = get_peft_model(model, PrefixTokensConfig(num_tokens=4))
    trains = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trains) == 4
    assert all(".prefix_keys." in n or ".prefix_values." in n for n in trains)
    fill(adapted)
    changed = hidden(adapted, batch())
    assert changed.shape == base.shape
    assert not torch.allclose(changed, base)
    with adapted.disable_adapter():
        assert torch.equal(hidden(adapted, batch()), base)
    assert torch.equal(hidden(adapted.unload(), batch()), base)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # older PEFT looks for the base model
def test_a_saved_prefix_gives_the_same(tmp_path):
    model = vit()
    plain = copy.deepcopy(model)
    adapted = fill(get_peft_model(model, PrefixTokensConfig(num_tokens=3)))
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(hidden(loaded, pixels()), hidden(adapted, pixels()))


def test_several_prefixes_stand_one_after_another():
    model = vit()
    plain = copy.deepcopy(model)
    adapted = get_peft_model(model, PrefixTokensConfig(num_tokens=2))
    adapted.add_adapter("more", PrefixTokensConfig(num_tokens=3))
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    adapted.base_model.set_adapter(["default", "more"])
    fill(adapted)
    both = hidden(adapted, pixels())
    layers = [m for m in adapted.modules() if isinstance(m, PrefixTokensLayer)]
    assert all(len(layer.active_prefix[0]) == 5 for layer in layers)
    single = get_peft_model(plain, PrefixTokensConfig(num_tokens=5))
    new = [m for m in single.modules() if isinstance(m, PrefixTokensLayer)]
    with torch.no_grad():
        for old, layer in zip(layers, new, strict=True):
            layer.prefix_keys["default"].copy_(old.active_prefix[0])
            layer.prefix_values["default"].copy_(old.active_prefix[1])
    torch.testing.assert_close(hidden(single, pixels()), both)


def test_gradients_reach_every_row_under_checkpointing():
    model = vit()
    adapted = fill(get_peft_model(model, PrefixTokensConfig(num_tokens=3)))
    checkpointing(model)
    adapted.train()
    adapted(**pixels()).last_hidden_state.square().sum().backward()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad.abs().amax(-1) > 0).all(), name


def test_attention_weights_have_no_padded_queries():
    model = vit(attn_implementation="eager")
    adapted = get_peft_model(model, PrefixTokensConfig(num_tokens=3))
    layer = next(m for m in adapted.modules() if isinstance(m, PrefixTokensLayer))
    with torch.no_grad():
        out = layer(torch.randn(2, 5, 32))
    assert out[0].shape == (2, 5, 32)
    assert out[1].shape == (2, 4, 5, 8)
    torch.testing.assert_close(out[1].sum(-1), torch.ones(2, 4, 5))


def test_half_precision():
    model = vit().bfloat16()
    adapted = get_peft_model(model, PrefixTokensConfig(num_tokens=3))
    out = hidden(adapted, {"pixel_values": pixels()["pixel_values"].bfloat16()})
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


def t5():
    return T5EncoderModel(T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))


@pytest.mark.parametrize(
    ("make", "config", "says"),
    [
        (clip, {}, r"PrefixTokensConfig\(tower=...\)"),
        (vit, {"tower": "text"}, "no 'text' tower"),
        (vit, {"num_tokens": 0}, "at least 1"),
        (vit, {"init_std": -1.0}, "at least 0"),
        (vit, {"target_modules": ["attention"]}, "need projections"),
        (t5, {}, "relative_attention_bias"),
    ],
)
def test_wrong_settings_say_what_is_right(make, config, says):
    with pytest.raises(ConfigError, match=says):
        get_peft_model(make(), PrefixTokensConfig(**config))


def test_rotary_positions_are_refused():
    adapted = get_peft_model(llama(), PrefixTokensConfig(num_tokens=3))
    with pytest.raises(ConfigError, match="PrefixTuningConfig"):
        adapted(**tokens(), use_cache=False)


def test_merging_is_refused():
    with pytest.raises(ConfigError, match="cannot be merged"):
        get_peft_model(vit(), PrefixTokensConfig()).merge_and_unload()
