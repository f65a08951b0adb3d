"""Prefix tokens against attention written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_helpers import bert, checkpointing, clip, dinov2, fill, hidden, llama, pixels, tokens, vit
from peft import PeftModel, get_peft_model
from transformers import T5Config, T5EncoderModel

from growthring.adapters import PrefixTokensConfig, PrefixTokensLayer
from growthring.errors import ConfigError


def by_hand(x, linears, keys, values, heads, bias=None):
    """``softmax(Q [P_k; K]^T / sqrt(d_h)) [P_v; V]`` per head, heads concatenated."""
    q, k, v = (linear(x) for linear in linears)
    b, n, d = q.shape
    k = torch.cat([keys.expand(b, -1, -1), k], dim=1)
    v = torch.cat([values.expand(b, -1, -1), v], dim=1)
    q, k, v = (t.view(b, -1, heads, d // heads).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / (d // heads) ** 0.5
    if bias is not None:  # of the real keys; the prefix is always seen
        scores[..., keys.shape[0] :] += bias
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_vit_equals_attention_written_by_hand(implementation):
    model = vit(attn_implementation=implementation)
    if not hasattr(model, "layers"):
        pytest.skip("the twin is written for the module names of newer transformers")
    adapted = fill(get_peft_model(model, PrefixTokensConfig(num_tokens=3)))
    with torch.no_grad():
        x = model.embeddings(pixels()["pixel_values"])
        for block in model.layers:
            layer = block.attention
            linears = (layer.q_proj, layer.k_proj, layer.v_proj)
            keys, values = layer.prefix_keys["default"], layer.prefix_values["default"]
            assert keys.shape == values.shape == (3, 32)
            x = x + layer.o_proj(by_hand(block.layernorm_before(x), linears, keys, values, heads=4))
            x = x + block.mlp(block.layernorm_after(x))
        x = model.layernorm(x)
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
            heads = by_hand(
                x, (layer.query, layer.key, layer.value), layer.prefix_keys["default"], layer.prefix_values["default"],
                heads=4, bias=bias,
            )  # fmt: skip
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


def test_a_saved_prefix_gives_the_same(tmp_path):
    model = vit()
    plain = copy.deepcopy(model)
    adapted = fill(get_peft_model(model, PrefixTokensConfig(num_tokens=3)))
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(hidden(loaded, pixels()), hidden(adapted, pixels()))


def test_several_prefixes_stand_one_after_another():
    model = vit()
    adapted = get_peft_model(model, PrefixTokensConfig(num_tokens=2))
    adapted.add_adapter("more", PrefixTokensConfig(num_tokens=3))
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    adapted.base_model.set_adapter(["default", "more"])
    fill(adapted)
    both = hidden(adapted, pixels())
    layers = [m for m in adapted.modules() if isinstance(m, PrefixTokensLayer)]
    assert all(len(layer.active_prefix[0]) == 5 for layer in layers)
    single = get_peft_model(adapted.unload(), PrefixTokensConfig(num_tokens=5))
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
