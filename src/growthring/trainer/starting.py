"""Adapters that have to see data before they can be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from growthring.adapters import start_from_activations

__all__ = ["start_adapters"]


def start_adapters(model: nn.Module, batches: Callable[[], Iterable[Any]]) -> None:
    """Start LARGO-style adapters with ``init="activation"`` that have not been started or loaded yet.

    Args:
        model: The model.
        batches: Makes batches of training inputs; called once for each such adapter.
    """
    waiting = {
        adapter
        for module in model.modules()
        for adapter, what in getattr(module, "largo_waits", {}).items()
        if what and module.largo_init[adapter] == "activation"  # type: ignore[index]
    }
    for adapter in sorted(waiting):
        start_from_activations(model, batches(), adapter_name=adapter)
