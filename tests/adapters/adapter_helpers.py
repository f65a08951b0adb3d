"""Tiny models and inputs that the tests of adapters share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from growthring.backbones import map_modules

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {"image_size": 16, "patch_size": 8}
RANGE = {"initializer_range": 0.3}  # large weights: a small mistake shows


def vit(**changes):
    return ViTModel(ViTConfig(**{**SIZE, **IMAGE, **RANGE, **changes})).eval()


def dinov2():
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IMAGE, **RANGE)
    return Dinov2Model(config).eval()


def bert():
    return BertModel(BertConfig(vocab_size=60, max_position_embeddings=32, **SIZE, **RANGE)).eval()


def gpt2():
    return GPT2Model(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, eos_token_id=None, **SIZE)).eval()


def clip():
    text = {"vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 59, **SIZE}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**SIZE, **IMAGE}, projection_dim=16)).eval()


def pixels(count=3):
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def tokens(count=3, length=7, padded=True):
    made = torch.Generator().manual_seed(2)
    batch = {"input_ids": torch.randint(5, 50, (count, length), generator=made)}
    if padded:
        mask = torch.ones(count, length, dtype=torch.long)
        mask[0, -2:] = 0
        batch["attention_mask"] = mask
    return batch


def hidden(model, batch):
    with torch.no_grad():
        return model(**batch).last_hidden_state


def fill(model, scale=0.3):
    """Random values for everything that trains, zero-initialised weights too."""
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=made).to(parameter))
    return model


def checkpointing(model):
    """Turn activation checkpointing on; newer transformers have another name for it."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})


def vit_by_hand(model, x, attend, after=lambda linear, x, h: h):
    """The blocks of a ViT from their parts.

    ``attend(block, x, q, k, v)`` is attention without its last projection; ``after(linear, x, h)`` may change what the
    last linear layer of attention or MLP gives for that part's input ``x``.
    """
    for block in map_modules(model).blocks:
        (attention,), (mlp,), norms = block.attentions, block.mlps, block.norms
        part = model.get_submodule
        normed = part(norms[0])(x)
        q, k, v = (part(name)(normed) for name in attention.inputs)
        output = part(attention.output)
        h = getattr(output, "base_layer", output)(attend(part(attention.module), q, k, v))
        x = x + after(output, normed, h)
        normed = part(norms[1])(x)
        output = part(mlp.down)
        h = getattr(output, "base_layer", output)(F.gelu(part(mlp.up[0])(normed)))
        x = x + after(output, normed, h)
    return model.layernorm(x)


def attention_by_hand(q, k, v, heads, bias=None):
    """``softmax(Q K^T / sqrt(d_h) + bias) V`` per head, heads concatenated."""
    b, n, d = q.shape
    q, k, v = (t.view(b, -1, heads, d // heads).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / (d // heads) ** 0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d)
