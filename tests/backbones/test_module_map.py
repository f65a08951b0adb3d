"""The map of real architectures, and of models whose modules have names that nobody could guess."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from growthring.backbones import ROLES, map_modules, map_towers
from growthring.errors import ConfigError

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {"image_size": 16, "patch_size": 8}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def clip():
    text = {"vocab_size": 50, "max_position_embeddings": 16, **SIZE}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config={**SIZE, **IMAGE}, projection_dim=16))


MAKE = {
    "bert": lambda: tf.BertModel(tf.BertConfig(vocab_size=50, **SIZE)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(vocab_size=50, **SIZE)),
    "distilbert": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    ),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**SIZE, **IMAGE)),
    "dinov2": lambda: tf.Dinov2Model(
        tf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, use_swiglu_ffn=True, **IMAGE)
    ),
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=50, num_key_value_heads=2, eos_token_id=None, **SIZE)
    ),
    "qwen3": lambda: tf.Qwen3Model(tf.Qwen3Config(vocab_size=50, num_key_value_heads=2, head_dim=8, **SIZE)),
    "gpt2": lambda: tf.GPT2Model(tf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)),
    "neox": lambda: tf.GPTNeoXModel(tf.GPTNeoXConfig(vocab_size=50, **SIZE)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "t5-encoder": lambda: tf.T5EncoderModel(tf.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "clip": clip,
}
# what the last names of the parts are in transformers; either spelling, as versions differ
EXPECTED = {
    "bert": ({"query"}, {"key"}, {"value"}, {"attention.output.dense"}, {"intermediate.dense"}, {"output.dense"}),
    "roberta": ({"query"}, {"key"}, {"value"}, {"attention.output.dense"}, {"intermediate.dense"}, {"output.dense"}),
    "distilbert": ({"q_lin"}, {"k_lin"}, {"v_lin"}, {"out_lin"}, {"lin1"}, {"lin2"}),
    "vit": (
        {"q_proj", "query"}, {"k_proj", "key"}, {"v_proj", "value"}, {"o_proj", "attention.output.dense"},
        {"fc1", "intermediate.dense"}, {"fc2", "output.dense"},
    ),
    "dinov2": (
        {"q_proj", "query"}, {"k_proj", "key"}, {"v_proj", "value"}, {"o_proj", "attention.output.dense"},
        {"gate_proj", "up_proj", "weights_in"}, {"down_proj", "weights_out"},
    ),
    "llama": ({"q_proj"}, {"k_proj"}, {"v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}),
    "qwen3": ({"q_proj"}, {"k_proj"}, {"v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}),
    "gpt2": ({"c_attn"}, {"c_attn"}, {"c_attn"}, {"attn.c_proj"}, {"c_fc"}, {"mlp.c_proj"}),
    "neox": ({"query_key_value"}, {"query_key_value"}, {"query_key_value"}, {"attention.dense"},
             {"dense_h_to_4h"}, {"dense_4h_to_h"}),
    "t5": ({"q"}, {"k"}, {"v"}, {"o"}, {"wi"}, {"wo"}),
    "t5-encoder": ({"q"}, {"k"}, {"v"}, {"o"}, {"wi_0", "wi_1"}, {"wo"}),
    "clip": ({"q_proj"}, {"k_proj"}, {"v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}),
}  # fmt: skip
ORDER = ("query", "key", "value", "attention_output", "mlp_up", "mlp_down")


@pytest.mark.parametrize("name", MAKE)
def test_roles_of_real_architectures(name):
    model = MAKE[name]()
    found = map_modules(model)
    for role, endings in zip(ORDER, EXPECTED[name], strict=True):
        linears = found.linears(role)
        assert all(linear.endswith(tuple(f".{e}" for e in endings)) for linear in linears), (role, linears)
        assert all(isinstance(model.get_submodule(linear), nn.Linear | tf.pytorch_utils.Conv1D) for linear in linears)
    blocks = 4 if name in ("t5", "clip") else 2
    assert len(found.blocks) == blocks
    attentions = 6 if name == "t5" else blocks
    assert len(found.linears("attention_output")) == attentions
    assert len(found.linears("mlp_down")) == blocks
    assert len(set(found.linears("all"))) == len(found.linears("all"))
    assert all(block.norms for block in found.blocks)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "clip", "vit"])
def test_every_linear_layer_of_a_block_has_a_role(name):
    model = MAKE[name]()
    found = map_modules(model)
    inside = {
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | tf.pytorch_utils.Conv1D) and any(n.startswith(b.name + ".") for b in found.blocks)
    }
    assert set(found.linears("all")) == inside


def test_fused_projections_are_known_as_such():
    attention = map_modules(MAKE["gpt2"]()).blocks[0].attentions[0]
    assert attention.fused
    assert attention.thirds
    assert attention.inputs == (attention.query,)
    interleaved = map_modules(MAKE["neox"]()).blocks[0].attentions[0]
    assert interleaved.fused
    assert not interleaved.thirds  # heads come first there, so no third of the output is the keys
    assert not map_modules(MAKE["bert"]()).blocks[0].attentions[0].fused


def test_an_encoder_decoder_has_two_stacks_and_cross_attention():
    found = map_modules(MAKE["t5"]())
    assert [(s.name, len(s.blocks), s.modality) for s in found.stacks] == [
        ("encoder.block", 2, "text"),
        ("decoder.block", 2, "text"),
    ]
    assert [a.cross for a in found.stacks[1].blocks[0].attentions] == [False, True]
    assert all(s.token_embedding is not None for s in found.stacks)


def test_self_attention_and_cross_attention_are_told_apart():
    found = map_modules(MAKE["t5"]())
    for part in ("query", "value"):
        own, cross = found.linears(f"self_{part}"), found.linears(f"cross_{part}")
        assert set(own) | set(cross) == set(found.linears(part))
        assert len(own) == 4
        assert all(".SelfAttention." in name for name in own)
        assert cross == tuple(f"decoder.block.{i}.layer.1.EncDecAttention.{part[0]}" for i in range(2))
    assert map_modules(MAKE["bert"]()).linears("self_query") == map_modules(MAKE["bert"]()).linears("query")


@pytest.mark.parametrize(
    ("name", "gate"),
    [("llama", "gate_proj"), ("qwen3", "gate_proj"), ("t5-encoder", "wi_0"), ("bert", None), ("gpt2", None)],
)
def test_the_gate_of_an_mlp_is_the_layer_that_is_activated(name, gate):
    found = map_modules(MAKE[name]())
    gates = [mlp.gate for block in found.blocks for mlp in block.mlps]
    assert [one and one.split(".")[-1] for one in gates] == [gate] * 2
    if gate is None:
        with pytest.raises(ConfigError, match="no linear layers of role 'mlp_gate'"):
            found.linears("mlp_gate")
    else:
        assert set(found.linears("mlp_gate")) == set(gates) < set(found.linears("mlp_up"))


@pytest.mark.parametrize("activated", ["first", "second", "neither", "both"])
def test_the_gate_does_not_depend_on_names_or_order(activated):
    class Gated(Gamma):
        def __init__(self):
            super().__init__(False)
            self.key = nn.Linear(16, 40)

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.down, self.value, self.fc2))
            x = x + self.up(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            first, second = self.q_proj(x), self.key(x)
            first = torch.tanh(first) if activated in ("first", "both") else first
            second = torch.tanh(second) if activated in ("second", "both") else second
            return x + self.query(second * first)

    model = Odd()
    model.layers = nn.ModuleList([Gated()])
    (mlp,) = map_modules(model).blocks[0].mlps
    assert mlp.up == ("layers.0.q_proj", "layers.0.key")
    assert mlp.gate == {"first": "layers.0.q_proj", "second": "layers.0.key"}.get(activated)


def test_embeddings():
    bert = map_modules(MAKE["bert"]()).stacks[0]
    assert (bert.embeddings, bert.token_embedding, bert.modality) == (
        "embeddings",
        "embeddings.word_embeddings",
        "text",
    )
    vit = map_modules(MAKE["vit"]()).stacks[0]
    assert (vit.embeddings, vit.token_embedding, vit.modality) == ("embeddings", None, "image")
    roberta = map_modules(MAKE["roberta"]()).stacks[0]
    assert roberta.token_embedding == "roberta.embeddings.word_embeddings"
    llama = map_modules(MAKE["llama"]()).stacks[0]
    assert llama.token_embedding == llama.embeddings == "model.embed_tokens"


def test_layers_that_share_an_input():
    found = map_modules(MAKE["llama"]())
    assert (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
    ) in (found.shared_inputs)
    assert ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj") in found.shared_inputs
    assert len(found.shared_inputs) == 4


def dual():
    return tf.VisionTextDualEncoderModel(vision_model=MAKE["vit"](), text_model=MAKE["bert"]())


@pytest.mark.parametrize("make", [clip, dual])
def test_towers_of_a_dual_encoder(make):
    model = make()
    towers = map_towers(model)
    assert set(towers) == {"text", "image"}
    assert all(n.startswith("vision_model.") for n in towers["image"].linears("all"))
    assert all(n.startswith("text_model.") for n in towers["text"].linears("all"))
    assert len(towers["image"].blocks) == len(towers["text"].blocks) == 2
    assert towers["image"].stacks[0].embeddings == "vision_model.embeddings"
    assert set(map_modules(model).modalities) == {"text", "image"}


def test_one_tower_is_no_dual_encoder():
    with pytest.raises(ConfigError, match="reads text only"):
        map_towers(MAKE["bert"]())
    with pytest.raises(ConfigError, match="no 'image' tower"):
        map_modules(MAKE["bert"]()).tower("image")


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "t5"])
def test_peft_layers_are_seen_as_what_they_wrap(name):
    model = MAKE[name]()
    plain = map_modules(model)
    get_peft_model(model, LoraConfig(target_modules=sorted(plain.linears("all")), r=2, fan_in_fan_out=name == "gpt2"))
    assert map_modules(model) == plain


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_ways_to_compute_attention(implementation):
    model = MAKE["bert"]()
    model.set_attn_implementation(implementation)
    assert len(map_modules(model).linears("query")) == 2


def test_nothing_of_the_model_changes():
    model = MAKE["bert"]().train()
    model.encoder.layer[0].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    map_modules(model)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class Gamma(nn.Module):
    """A block in which the last layer is called ``query`` and the queries come from ``down``."""

    def __init__(self, parallel):
        super().__init__()
        self.parallel = parallel
        self.n1, self.n2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.value, self.down, self.fc2 = (nn.Linear(16, 16) for _ in range(3))  # key, query, value
        self.up = nn.Linear(16, 16)  # attention's output
        self.q_proj, self.query = nn.Linear(16, 40), nn.Linear(40, 16)  # the MLP
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        z = self.n1(x)
        q, k, v = (f(z).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.down, self.value, self.fc2))
        a = self.up(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x if self.parallel else x + a * self.scale
        y = x + self.query(torch.tanh(self.q_proj(z if self.parallel else self.n2(x))))
        return y + a if self.parallel else y


class Odd(nn.Module):
    def __init__(self, parallel=False, depth=3):
        super().__init__()
        self.config = type("Config", (), {"vocab_size": 30})()
        self.table = nn.Embedding(30, 16)
        self.layers = nn.ModuleList([Gamma(parallel) for _ in range(depth)])
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids):
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


@pytest.mark.parametrize("parallel", [False, True])
def test_names_do_not_matter(parallel):
    found = map_modules(Odd(parallel))
    block = found.blocks[2]
    (attention,), (mlp,) = block.attentions, block.mlps
    assert (attention.query, attention.key, attention.value, attention.output) == tuple(
        f"layers.2.{n}" for n in ("down", "value", "fc2", "up")
    )
    assert (mlp.up, mlp.down) == (("layers.2.q_proj",), "layers.2.query")
    assert block.norms == (("layers.2.n1",) if parallel else ("layers.2.n1", "layers.2.n2"))
    assert found.stacks[0].token_embedding == "table"


def test_attention_without_a_residual_is_no_part_of_the_mlp():
    class Plain(Gamma):
        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.down, self.value, self.fc2))
            x = self.up(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return self.query(torch.tanh(self.q_proj(self.n2(x))))

    model = Odd()
    model.layers = nn.ModuleList([Plain(False)])
    block = map_modules(model).blocks[0]
    assert [(mlp.up, mlp.down) for mlp in block.mlps] == [(("layers.0.q_proj",), "layers.0.query")]


def test_one_block_is_enough():
    assert len(map_modules(Odd(depth=1)).blocks) == 1


def test_an_example_of_ones_own():
    model = Odd()
    del model.config
    with pytest.raises(ConfigError, match="example="):
        map_modules(model)
    found = map_modules(model, example={"input_ids": torch.tensor([[3, 1, 2]])})
    assert len(found.blocks) == 3


def test_what_cannot_be_mapped_says_what_was_looked_for_and_found():
    mamba = tf.MambaModel(tf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ConfigError, match=r"looked for repeated layers.*found [68] uses of linear"):
        map_modules(mamba)
    with pytest.raises(ConfigError, match=r"it takes input\. Give an example"):
        map_modules(nn.Sequential(nn.Linear(4, 4)))

    class Broken(Odd):
        def forward(self, input_ids):
            raise RuntimeError("no such luck")

    with pytest.raises(ConfigError, match="no such luck"):
        map_modules(Broken())


def test_attention_that_cannot_be_followed_is_named():
    model = Odd()
    model.layers = nn.ModuleList([nn.Linear(16, 16)])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="map the model under 'sdpa'"):
        map_modules(model)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ConfigError) as caught:
        map_modules(model)
    assert "sdpa" not in str(caught.value)


def test_images_that_are_not_square():
    model = tf.ViTModel(tf.ViTConfig(**SIZE, image_size=(32, 48), patch_size=8))
    assert len(map_modules(model).blocks) == 2


def test_a_model_that_remembers_what_it_saw_still_works():
    """Swin shrinks its windows for good when it is given a small image."""
    model = tf.SwinModel(
        tf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4)
    )
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    before = model.eval()(**pixels).last_hidden_state
    assert len(map_modules(model).linears("query")) == 2
    assert torch.equal(model(**pixels).last_hidden_state, before)


def test_a_query_of_two_layers_is_refused():
    class Split(Gamma):
        def forward(self, x):
            q = self.down(x) + self.up(x)
            k, v = self.value(x), self.fc2(x)
            return F.scaled_dot_product_attention(*(t[:, None] for t in (q, k, v)))[:, 0]

    model = Odd()
    model.layers = nn.ModuleList([Split(False)])
    with pytest.raises(ConfigError, match=r"makes its query out of \['layers.0.down', 'layers.0.up'\]"):
        map_modules(model)


def test_roles():
    found = map_modules(MAKE["llama"]())
    for role in ROLES:
        if not role.startswith("cross_"):
            assert found.linears(role)
    for role in ("cross_query", "cross_value"):
        with pytest.raises(ConfigError, match=f"no linear layers of role '{role}'"):
            found.linears(role)
    assert found.linears("attention_input")[:3] == tuple(found.linears(r)[0] for r in ("query", "key", "value"))
    assert len(found.linears("mlp_up")) == 4
    with pytest.raises(ConfigError, match="did you mean 'query'"):
        found.linears("querry")
    mixtral = tf.MixtralForCausalLM(
        tf.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=2, eos_token_id=None, **SIZE)
    )
    with pytest.raises(ConfigError, match="no linear layers of role 'mlp_down'"):
        map_modules(mixtral).linears("mlp_down")


def test_half_precision_models_are_mapped():
    assert map_modules(MAKE["bert"]().bfloat16()) == map_modules(MAKE["bert"]())
