"""Small models, optimizers and a bare training loop with every hook a guard meets in practice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2Model

from growthring.guards import PEGP

OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0, bias: bool = True) -> nn.Sequential:
    """20 -> 24 -> 16 -> 3: odd and even sizes, a bias on every layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 24, bias=bias), nn.GELU(), nn.Linear(24, 16, bias=bias), nn.Tanh(), nn.Linear(16, 3, bias=bias)
    ).to(dtype)


def lora_mlp(dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> nn.Module:
    """The same with stock PEFT LoRA on the three layers."""
    base = mlp(torch.float32, seed)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["0", "2", "4"], **config}
    return get_peft_model(base, LoraConfig(**settings)).to(dtype)


def bert_config(**changes: Any) -> BertConfig:
    settings = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "num_labels": 3,
        **changes,
    }
    return BertConfig(**settings)


def bert(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    return BertModel(bert_config(), add_pooling_layer=False)


def lora_bert(seed: int = 0, model: nn.Module | None = None, **config: Any) -> nn.Module:
    torch.manual_seed(seed)
    settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", **config}
    return get_peft_model(model or bert(seed), LoraConfig(**settings))


def classifier(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(bert_config(**changes))


def gpt2(seed: int = 0) -> GPT2Model:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    return GPT2Model(config)


def tokens(count: int, length: int, seed: int, *, padded: int = 0) -> dict[str, Tensor]:
    """A batch of token ids; the last ``padded`` positions of every second row are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[::2, length - padded :] = 0
        ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def rows(count: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def answer(model: nn.Module, batch: Any) -> Tensor:
    """The model's evaluated output, and the training flag as before."""
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    model.train(training)
    if isinstance(out, Tensor):
        return out.clone()
    return (out["logits"] if "logits" in out else out["last_hidden_state"]).clone()


def change(new: Tensor, old: Tensor) -> float:
    """``max |new - old| / max |old|``."""
    return float((new - old).abs().max() / old.abs().max())


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """A target that no old output meets: pull the (mean) output to a fixed pattern."""
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    if not isinstance(out, Tensor):
        out = out["logits"] if "logits" in out else out["last_hidden_state"]
    flat = out.reshape(-1, out.shape[-1])
    goal = torch.linspace(-1.0, 1.0, flat.shape[-1], dtype=flat.dtype) * torch.linspace(
        0.5, 1.5, flat.shape[0], dtype=flat.dtype
    ).unsqueeze(1)
    return (flat - goal).square().mean()


def fit(
    model: nn.Module,
    batch: Any,
    guard: PEGP | None = None,
    *,
    make: Callable[[Iterable[Any]], torch.optim.Optimizer] = OPTIMIZERS["adamw"],
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 200,
    clip: float | None = None,
    accumulate: int = 1,
    warmup: int = 0,
    autocast: torch.dtype | None = None,
    project_gradient: bool = True,
    project_update: bool = True,
    loss_of: Callable[[nn.Module, Any], Tensor] = default_loss,
) -> list[float]:
    """Train, calling the guard where a Trainer would; returns the losses."""
    optimizer = optimizer or make(trainable(model))
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(accumulate):
            context = torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()
            with context:
                loss = loss_of(model, batch) / accumulate
            loss.backward()
            total += float(loss.detach())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
        if guard is not None and project_gradient:
            guard.before_step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / warmup) if warmup else rate
        optimizer.step()
        if guard is not None and project_update:
            guard.after_step()
        losses.append(total)
    return losses


def protected(model: nn.Module, old: Any, energy: Any = 1.0, **settings: Any) -> PEGP:
    """A guard that has consolidated ``old`` and is inside the next task."""
    guard = PEGP(energy, **settings)
    guard.consolidate(model, [old], "old")
    guard.begin_task("new")
    return guard
