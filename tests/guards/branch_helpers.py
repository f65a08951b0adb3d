"""What the tests of InfLoRA and O-LoRA share."""

from __future__ import annotations

from typing import Any

import torch
from guard_helpers import fit
from torch import Tensor, nn

from growthring.guards import Certificate


def learn(guard: Any, model: nn.Module, name: str, data: Any, **settings: Any) -> Certificate:
    """One task from start to end, in a loop of one's own."""
    guard.attach(model)
    guard.prepare(name, [data])
    guard.begin_task(name)
    fit(model, data, guard, **{"steps": 30, **settings})
    return guard.end_task(name, [data])


def branch(model: nn.Module, name: str, factor: str) -> dict[str, Tensor]:
    """One factor of one adapter at every layer."""
    return {n: p for n, p in model.named_parameters() if n.endswith(f"lora_{factor}.{name}.weight")}


def training(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


def few(count: int, dim: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows in a random subspace of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, rank, generator=generator, dtype=torch.float64)
    return (mixed @ torch.randn(rank, dim, generator=generator, dtype=torch.float64)).to(dtype)
