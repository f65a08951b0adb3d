"""Small nets whose layers can deviate in every way, data for them, and a bare training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from growthring.adapters import LargoConfig

STEPS = 12
TARGETS = ["0", "2", "4"]
KINDS: dict[str, Any] = {
    "delta": lambda r: LargoConfig(r=r, alpha=2.0 * r, target_modules=TARGETS),
    "minor": lambda r: LargoConfig(r=r, init="minor", target_modules=TARGETS),
    "residual": lambda r: LargoConfig(r=r, form="residual", target_modules=TARGETS),
    "product": lambda r: LargoConfig(r=r, alpha=2.0 * r, form="product", target_modules=TARGETS),
    "lora": lambda r: LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS),
    "pissa": lambda r: LoraConfig(r=r, lora_alpha=r, init_lora_weights="pissa", target_modules=TARGETS),
    "weight": None,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
}


def net(kind: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, r: int = 3) -> nn.Module:
    """12 -> 10 -> 10 -> 4 with tanh: two layers have one shape of factors each; ``kind`` says what trains."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 4))
    config = KINDS[kind]
    model = base if config is None else get_peft_model(base, config(r))
    return model.to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64, size: int = 24) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, with noise enough that gradients do not always agree."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 12, generator=generator, dtype=torch.float64)
    y = torch.sin(2.0 * x[:, :4]) + 0.5 * torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, step: int, scale: float = 1.0) -> Tensor:
    x, y = batch(step, next(model.parameters()).dtype)
    return scale * (model(x) - y).square().mean()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def farthest(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[n].double() - two[n].double()).abs().max()) for n in one)


def train(
    model: nn.Module,
    guards: Any = (),
    optimizer: torch.optim.Optimizer | str = "adamw",
    *,
    steps: range | int = STEPS,
    scale: float = 1.0,
    watch: Callable[[int], None] | None = None,
) -> torch.optim.Optimizer:
    """Steps with some guards (attached here; a task under way goes on), in their order; ``watch`` after each step."""
    guards = guards if isinstance(guards, list | tuple) else [guards]
    if isinstance(optimizer, str):
        optimizer = OPTIMIZERS[optimizer](list(trainable(model).values()))
    for guard in guards:
        guard.attach(model)
        guard.begin_task()
        guard.bind(optimizer)
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        loss_of(model, step, scale).backward()
        for guard in guards:
            guard.before_step()
        optimizer.step()
        for guard in guards:
            guard.after_step()
        if watch is not None:
            watch(step)
    return optimizer
