"""Tiny models and a plain reference that the tests of LARGO-style adapters share."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from growthring.adapters import LargoConfig


class Kinds(nn.Module):
    """An embedding, a Conv1D and two linear layers, of which one has no bias."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.emb = nn.Embedding(20, 12)
            self.conv = Conv1D(10, 12)
            nn.init.normal_(self.conv.weight, std=0.3)
            nn.init.normal_(self.conv.bias)
            self.wide = nn.Linear(10, 16)
            self.out = nn.Linear(16, 6, bias=False)
        self.to(dtype)

    def forward(self, ids):
        return self.out(torch.tanh(self.wide(torch.tanh(self.conv(self.emb(ids))))))


LINEAR = ["conv", "wide", "out"]
ALL = ["emb", *LINEAR]
IDS = torch.randint(0, 20, (5, 4), generator=torch.Generator().manual_seed(1))


def kinds(dtype=torch.float32, **config):
    """The model with an adapter of rank 3 on its linear layers, or on those named."""
    return get_peft_model(Kinds(dtype), LargoConfig(**{"r": 3, "target_modules": LINEAR, **config}))


def moved(model, scale=0.2, seed=3):
    """The model with random values in its trained factors."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=made, dtype=torch.float64))
    return model


def layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "largo_A0")}


def deviation(layer, adapter="default"):
    """``s (B0 dA + dB A0 + dB dA)`` from its definition, ``(m, n)``."""
    zero = torch.zeros(layer.out_features, layer.r[adapter])
    start_a = layer.largo_A0[adapter]
    start_b = layer.largo_B0[adapter] if adapter in layer.largo_B0 else zero.to(start_a)
    if adapter in layer.largo_A:
        delta_a = layer.largo_A[adapter].weight
    elif adapter in layer.largo_embedding_A:
        delta_a = layer.largo_embedding_A[adapter].weight.T
    else:
        delta_a = torch.zeros_like(start_a)
    delta_b = layer.largo_B[adapter].weight
    return layer.scaling[adapter] * (start_b @ delta_a + delta_b @ start_a + delta_b @ delta_a)


def plain(model, adapters=("default",), factor=1.0):
    """The base model with ``W0 + factor * D`` for weights: what the adapted model must compute."""
    base = Kinds(next(model.parameters()).dtype)
    for name, layer in layers(model).items():
        target = base.get_submodule(name.removeprefix("base_model.model."))
        change = sum(deviation(layer, adapter) for adapter in adapters if adapter in layer.largo_B)
        if isinstance(change, int):
            continue  # this layer has none of them
        change = change.T if isinstance(target, Conv1D | nn.Embedding) else change
        target.weight.data = (target.weight + factor * change).to(target.weight.dtype)
    return base
