from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaModel,
    ViTModel,
)

from growthring.adapters import BottleneckConfig, PrefixTokensConfig, PromptTokensConfig
from growthring.backbones import map_modules
from growthring.recipes import METHODS, parse_config
from growthring.recipes.adapting import make_adapter, make_guards

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 20}


@pytest.fixture(scope="module")
def models(image_world):
    with torch.random.fork_rng():
        return {
            "bert": BertModel(BertConfig(**SIZE)),
            "distilbert": DistilBertModel(
                DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=20)
            ),
            "llama": LlamaModel(LlamaConfig(**SIZE, num_key_value_heads=2)),
            "vit": ViTModel.from_pretrained(str(image_world / "my-vit")),
            "clip": CLIPModel.from_pretrained(str(image_world / "my-clip")),
        }


def made(method, model, **adapter):
    config = parse_config({"method": method, "adapter": adapter or None})
    return make_adapter(METHODS[method], config.adapter, model)


@pytest.mark.parametrize(
    ("name", "prefix", "prompt"),
    [
        ("bert", PrefixTuningConfig, PromptTuningConfig),
        ("llama", PrefixTuningConfig, PromptTuningConfig),
        ("distilbert", PrefixTokensConfig, PromptTuningConfig),  # it takes no keys and values of earlier tokens
        ("vit", PrefixTokensConfig, PromptTokensConfig),
        ("clip", PrefixTokensConfig, PromptTokensConfig),
    ],
)
def test_prefixes_and_prompts_are_pefts_where_the_model_takes_them(models, name, prefix, prompt):
    tower = {"tower": "text"} if name == "clip" else {}
    for method, kind in (("pegp-prefix", prefix), ("sequential-prompt", prompt)):
        adapter = made(method, models[name], tokens=3, **tower)
        assert type(adapter) is kind
        assert 3 in (getattr(adapter, "num_tokens", None), getattr(adapter, "num_virtual_tokens", None))
    if name == "distilbert":
        assert (adapter.token_dim, adapter.num_layers, adapter.num_attention_heads) == (32, 2, 4)


def test_a_role_is_found_from_the_models_structure(models):
    for name in ("bert", "llama", "vit"):
        roles = map_modules(models[name])
        adapter = made("pegp", models[name], target_modules="attention_input", r=4, alpha=4, dropout=0.5)
        assert type(adapter) is LoraConfig
        assert adapter.target_modules == set(roles.linears("attention_input"))
        assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (4, 4, 0.5)
        assert made("pegp", models[name]).target_modules == "all-linear"


def test_a_tower_limits_every_adapter(models):
    vision = made("pegp", models["clip"], tower="image")
    assert vision.target_modules
    assert all(name.startswith("vision_model.") for name in vision.target_modules)
    scales = made("pegp-ia3", models["clip"], tower="text")
    assert all(name.startswith("text_model.") for name in scales.target_modules)
    assert made("pegp-adapter", models["clip"], tower="text").tower == "text"


def test_scales_are_those_of_keys_values_and_the_mlp(models):
    adapter, roles = made("sequential-ia3", models["llama"]), map_modules(models["llama"])
    assert type(adapter) is IA3Config
    assert adapter.feedforward_modules == set(roles.linears("mlp_down"))
    assert adapter.target_modules == {*roles.linears("key"), *roles.linears("value"), *roles.linears("mlp_down")}


def test_settings_of_a_bottleneck_adapter_reach_it(models):
    asked = {"r": 5, "placement": "mlp", "mode": "sequential", "activation": "tanh", "scaling": 0.5, "dropout": 0.25}
    adapter = made("pegp-adapter", models["bert"], **asked)
    assert type(adapter) is BottleneckConfig
    assert {name: getattr(adapter, name) for name in asked} == asked


def test_weights_need_no_adapter(models):
    assert [made(m, models["bert"]) for m in ("gpm", "adam-nscl", "sequential-full")] == ["linear", "linear", "full"]


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        (
            "pegp-prompt",
            {"mode": "paper", "project": "gradient", "kinds": ["prompt_key"], "merge": 0.25, "samples": 7},
        ),
        ("pegp-linear", {"unprotected": "freeze", "probes": 0, "energy": {"linear": {"times": 30.0}}}),
        ("inflora", {"energy": {"start": 0.9, "end": 1.0, "tasks": 4}, "samples": 9}),
        ("o-lora", {"weight": 2.0, "norm": "squared"}),
    ],
)
def test_settings_of_a_guard_reach_it(method, asked):
    config = parse_config({"method": method, "guard": asked})
    (guard,) = make_guards(METHODS[method], config.guard)
    assert {name: guard.settings()[name] for name in asked} == asked
    assert guard.name == METHODS[method].guard
    assert guard.settings().keys() >= config.resolved()["guard"].keys()


def test_a_method_without_a_guard_has_none(tiny_encoder):
    assert make_guards(METHODS["sequential-ia3"], None) == []
    assert made("sequential-full", AutoModel.from_pretrained(str(tiny_encoder))) == "full"
