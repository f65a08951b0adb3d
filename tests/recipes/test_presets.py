"""GORP's choice for each family of models: by role, from the structure."""

from __future__ import annotations

import json

import pytest
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from growthring.backbones import map_modules
from growthring.errors import ConfigError
from growthring.recipes import gorp_preset, parse_config
from growthring.recipes.adapting import make_adapter, make_full_rank
from growthring.recipes.methods import METHODS
from growthring.trainer.full_rank import unfreeze

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {"image_size": 16, "patch_size": 8}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}


def clip():
    text = {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, **SIZE}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config={**SIZE, **IMAGE}, projection_dim=16))


MAKE = {
    "bert": lambda: tf.BertModel(tf.BertConfig(vocab_size=50, **SIZE)),
    "llama": lambda: tf.LlamaModel(tf.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZE)),
    "gemma": lambda: tf.GemmaModel(tf.GemmaConfig(vocab_size=50, num_key_value_heads=2, head_dim=8, **SIZE)),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**SIZE, **IMAGE)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "t5-gated": lambda: tf.T5Model(tf.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "t5-encoder": lambda: tf.T5EncoderModel(tf.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "gpt2": lambda: tf.GPT2Model(tf.GPT2Config(**GPT2)),
    "neox": lambda: tf.GPTNeoXModel(tf.GPTNeoXConfig(vocab_size=50, bos_token_id=0, eos_token_id=0, **SIZE)),
    "clip": clip,
}
# role, ends of the layers with LoRA, ends of those that train whole (any spelling: versions differ)
EXPECTED = {
    "bert": ("mlp_up", {"query", "value"}, {"intermediate.dense"}, 4, 2),
    "llama": ("mlp_gate", {"q_proj", "v_proj"}, {"gate_proj"}, 4, 2),
    "gemma": ("mlp_gate", {"q_proj", "v_proj"}, {"gate_proj"}, 4, 2),
    "vit": ("mlp_up", {"q_proj", "v_proj", "query", "value"}, {"fc1", "intermediate.dense"}, 4, 2),
    "t5": ("cross_query", {"SelfAttention.q", "SelfAttention.v"}, {"EncDecAttention.q", "EncDecAttention.v"}, 8, 4),
    "t5-gated": ("cross_query", {"SelfAttention.q", "SelfAttention.v"}, {"EncDecAttention.q", "EncDecAttention.v"},
                 8, 4),
    "t5-encoder": ("mlp_gate", {"SelfAttention.q", "SelfAttention.v"}, {"wi_0"}, 4, 2),
    "gpt2": ("mlp_up", {"attn.c_attn"}, {"mlp.c_fc"}, 2, 2),
    "neox": ("mlp_up", {"query_key_value"}, {"dense_h_to_4h"}, 2, 2),
    "clip": ("mlp_up", {"q_proj", "v_proj"}, {"fc1"}, 8, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", MAKE)
def test_the_preset_of_each_family(name):
    role, lora, whole, adapted, trained = EXPECTED[name]
    model = MAKE[name]()
    preset = gorp_preset(model)
    assert preset.roles[0] == role
    assert len(preset.roles) == (2 if role == "cross_query" else 1)
    assert (len(preset.lora), len(preset.full_rank)) == (adapted, trained)
    for names, ends in ((preset.lora, lora), (preset.full_rank, whole)):
        assert len(set(names)) == len(names)
        assert all(n.endswith(tuple(f".{end}" for end in ends)) for n in names), names
        assert all(isinstance(model.get_submodule(n), nn.Linear | tf.pytorch_utils.Conv1D) for n in names)
    assert not set(preset.lora) & set(preset.full_rank)
    assert json.loads(json.dumps(preset.to_dict())) == preset.to_dict()


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "t5", "gpt2"])
def test_peft_and_the_trainer_take_it(name):
    model = MAKE[name]()
    preset = gorp_preset(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=list(preset.lora), fan_in_fan_out=name == "gpt2"))
    assert gorp_preset(wrapped.get_base_model()) == preset, "adapters change nothing"
    assert set(unfreeze(wrapped, preset.full_rank)) == set(preset.full_rank)
    adapted = {
        n.split(".lora_A")[0].removeprefix("base_model.model.") for n, _ in wrapped.named_parameters() if "lora_A" in n
    }
    assert adapted == set(preset.lora)


def test_a_tower_of_a_dual_encoder():
    model = MAKE["clip"]()
    image = gorp_preset(model, tower="image")
    assert all(name.startswith("vision_model.") for name in (*image.lora, *image.full_rank))
    assert (len(image.lora), len(image.full_rank)) == (4, 2)
    with pytest.raises(ConfigError, match="no 'image' tower"):
        gorp_preset(MAKE["bert"](), tower="image")


def test_towers_of_two_families_choose_by_themselves():
    gated = tf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, use_swiglu_ffn=True, **IMAGE)
    model = tf.VisionTextDualEncoderModel(vision_model=tf.Dinov2Model(gated), text_model=MAKE["bert"]())
    if map_modules(model).tower("image").blocks[0].mlps[0].gate is None:
        pytest.skip("this version of transformers fuses the gate of DINOv2 with the layer beside it")
    preset = gorp_preset(model)
    assert set(preset.roles) == {"mlp_up", "mlp_gate"}
    assert gorp_preset(model, tower="image").roles == ("mlp_gate",)
    assert len(preset.full_rank) == 4


def test_what_has_no_mlp_of_linear_layers_says_so():
    mixtral = tf.MixtralModel(
        tf.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=2, eos_token_id=None, **SIZE)
    )
    with pytest.raises(
        ConfigError, match=r"MixtralModel has no cross-attention and no MLP of linear layers. Name the"
    ):
        gorp_preset(mixtral)
    with pytest.raises(ConfigError, match="cannot be mapped"):
        gorp_preset(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------ from a configuration


def chosen(model, **adapter):
    config = parse_config({"method": "gorp", "adapter": adapter or None})
    method = METHODS["gorp"]
    return make_adapter(method, config.adapter, model), make_full_rank(method, config.adapter, model)


def test_the_configuration_takes_the_preset_or_anything_else():
    model = MAKE["bert"]()
    preset = gorp_preset(model)
    adapter, whole = chosen(model)
    assert (adapter.target_modules, whole) == (set(preset.lora), list(preset.full_rank))
    adapter, whole = chosen(model, target_modules="key", full_rank="query", r=3, alpha=6)
    assert {n.split(".")[-1] for n in adapter.target_modules} == {"key"}
    assert (adapter.r, adapter.lora_alpha, whole) == (3, 6, "query")
    assert chosen(model, full_rank=["query"])[1] == ["query"]
    assert chosen(model, full_rank="all-linear")[1] == "all-linear"
    assert chosen(model, target_modules=["encoder.layer.0.intermediate.dense"])[1] == [preset.full_rank[1]]
    assert make_full_rank(METHODS["pegp"], parse_config({"method": "pegp"}).adapter, model) is None
    assert make_full_rank(METHODS["gorp-full"], None, model) is None


def test_a_tower_limits_weights_too():
    model = MAKE["clip"]()
    for whole in ("preset", "mlp_up", "all-linear"):
        adapter, names = chosen(model, tower="text", full_rank=whole)
        assert names
        assert all(n.startswith("text_model.") for n in (*names, *adapter.target_modules))
        assert not set(names) & adapter.target_modules


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"target_modules": "all-linear"}, "adapter.full_rank: preset: LoRA adapts every one of these layers"),
        ({"target_modules": "mlp"}, "adapter.full_rank: preset: LoRA adapts every one of these layers"),
        ({"full_rank": ["qeury"]}, "adapter.full_rank: the model has no linear layer 'qeury'; did you mean 'query'"),
    ],
)
def test_what_cannot_train_whole_is_refused(adapter, said):
    with pytest.raises(ConfigError, match=said):
        chosen(MAKE["bert"](), **adapter)
