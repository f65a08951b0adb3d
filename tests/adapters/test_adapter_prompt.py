"""Prompt tokens against insertion and replacement by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_helpers import attention_by_hand, bert, clip, dinov2, fill, hidden, pixels, tokens, vit, vit_by_hand
from peft import PeftModel, get_peft_model
from transformers import SwinConfig, SwinModel

from growthring.adapters import PromptTokensConfig, PromptTokensLayer
from growthring.errors import ConfigError


def the_layer(model) -> PromptTokensLayer:
    (layer,) = (m for m in model.modules() if isinstance(m, PromptTokensLayer))
    return layer


@pytest.mark.parametrize("start", [1, 0, 5])
def test_vit_equals_insertion_by_hand(start):
    model = vit()
    adapted = fill(get_peft_model(model, PromptTokensConfig(num_tokens=3, start=start)))
    layer = the_layer(adapted)
    assert layer.prompt_tokens["default"].shape == (3, 32)
    assert layer.prompt_start == start
    with torch.no_grad():
        x = layer.base_layer(pixels()["pixel_values"])  # class token and four patches
        x = torch.cat([x[:, :start], layer.prompt_tokens["default"].expand(3, -1, -1), x[:, start:]], dim=1)
        x = vit_by_hand(model, x, lambda layer, q, k, v: attention_by_hand(q, k, v, heads=4))
    out = hidden(adapted, pixels())
    assert out.shape == (3, 8, 32)
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-5)


def test_dinov2_equals_insertion_by_hand():
    model = dinov2()
    adapted = fill(get_peft_model(model, PromptTokensConfig(num_tokens=3)))
    layer = the_layer(adapted)
    with torch.no_grad():
        x = layer.base_layer(pixels()["pixel_values"])
        x = torch.cat([x[:, :1], layer.prompt_tokens["default"].expand(3, -1, -1), x[:, 1:]], dim=1)
        x = model.layernorm(model.encoder(x).last_hidden_state)
    torch.testing.assert_close(hidden(adapted, pixels()), x)


def test_a_text_tower_equals_replacement_by_hand():
    model = clip()
    plain = copy.deepcopy(model.text_model)
    adapted = fill(get_peft_model(model, PromptTokensConfig(num_tokens=2, tower="text")))
    layer = the_layer(adapted)
    assert not layer.inserts
    ids = tokens(padded=False)["input_ids"]
    ids[:, -1] = 59
    embedded = plain.embeddings.token_embedding(ids).detach().clone()
    embedded[:, 1:3] = layer.prompt_tokens["default"].detach()
    table = plain.embeddings.token_embedding
    handle = table.register_forward_hook(lambda module, args, output: embedded)
    with torch.no_grad():
        expected = plain(input_ids=ids).pooler_output
        handle.remove()
        got = adapted.base_model.model.text_model(input_ids=ids).pooler_output
        other = adapted.base_model.model.text_model(input_ids=torch.cat([ids[:, :1], ids[:, 1:3] + 1, ids[:, 3:]], 1))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(other.pooler_output, expected)  # filler words do not matter


@pytest.mark.parametrize(("make", "batch", "rows"), [(vit, pixels, 4), (dinov2, pixels, 4), (bert, tokens, 0)])
def test_only_it_trains_and_it_can_be_turned_off(make, batch, rows):
    model = make()
    base = hidden(model, batch())
    adapted = get_peft_model(model, PromptTokensConfig(num_tokens=4))
    assert [n.rsplit(".", 2)[-2] for n, p in adapted.named_parameters() if p.requires_grad] == ["prompt_tokens"]
    fill(adapted)
    changed = hidden(adapted, batch())
    assert changed.shape[1] == base.shape[1] + rows
    assert not torch.allclose(changed[:, 0], base[:, 0])
    with adapted.disable_adapter():
        assert torch.equal(hidden(adapted, batch()), base)
    assert torch.equal(hidden(adapted.unload(), batch()), base)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # older PEFT looks for the base model
@pytest.mark.parametrize(("make", "batch"), [(vit, pixels), (bert, tokens)])
def test_a_saved_prompt_gives_the_same(tmp_path, make, batch):
    model = make()
    plain = copy.deepcopy(model)
    adapted = fill(get_peft_model(model, PromptTokensConfig(num_tokens=3)))
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(hidden(loaded, batch()), hidden(adapted, batch()))


def test_several_prompts_stand_one_after_another():
    model = vit()
    adapted = get_peft_model(model, PromptTokensConfig(num_tokens=2))
    adapted.add_adapter("more", PromptTokensConfig(num_tokens=3))
    adapted.base_model.set_adapter(["default", "more"])
    layer = the_layer(adapted)
    with torch.no_grad():
        out = layer(pixels()["pixel_values"])
        base = layer.base_layer(pixels()["pixel_values"])
    assert out.shape[1] == base.shape[1] + 5
    torch.testing.assert_close(out[0, 1:3], layer.prompt_tokens["default"].detach())
    torch.testing.assert_close(out[0, 3:6], layer.prompt_tokens["more"].detach())
    adapted.delete_adapter("default")
    assert len(layer.active_prompt) == 3
    with pytest.raises(ConfigError, match="share it"):
        adapted.add_adapter("other", PromptTokensConfig(num_tokens=2, start=2))


def test_gradients_reach_every_token():
    adapted = get_peft_model(vit(), PromptTokensConfig(num_tokens=3))
    adapted(**pixels()).last_hidden_state[:, 0].sum().backward()
    assert (the_layer(adapted).prompt_tokens["default"].grad.abs().amax(-1) > 0).all()


def test_texts_that_are_too_short_are_named():
    adapted = get_peft_model(bert(), PromptTokensConfig(num_tokens=7))
    with pytest.raises(ConfigError, match="at least 8 tokens"):
        hidden(adapted, tokens(length=7))
    assert hidden(adapted, tokens(length=8)).shape[1] == 8


def swin():
    return SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4))


@pytest.mark.parametrize(
    ("make", "config", "says"),
    [
        (clip, {}, r"PromptTokensConfig\(tower=...\)"),
        (bert, {"placement": "insert"}, "PromptTuningConfig"),
        (vit, {"placement": "replace"}, "name it as target_modules"),
        (vit, {"placement": "append"}, "allowed: insert, replace"),
        (vit, {"start": -1}, "counted from 0"),
        (vit, {"num_tokens": True}, "whole number"),
        (vit, {"target_modules": ["embeddings"]}, "say placement"),
        (vit, {"placement": "insert", "target_modules": ["layernorm"]}, "makes no embeddings"),
        (swin, {}, "plain vision transformer"),
    ],
)
def test_wrong_settings_say_what_is_right(make, config, says):
    with pytest.raises(ConfigError, match=says):
        get_peft_model(make(), PromptTokensConfig(**config))


def test_merging_is_refused():
    with pytest.raises(ConfigError, match="cannot be merged"):
        get_peft_model(vit(), PromptTokensConfig()).merge_and_unload()
