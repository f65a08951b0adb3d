"""The way from the start of a training to its end (WiSE-FT), for plain weights and for adapters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from growthring.errors import ConfigError, GuardError
from growthring.guards.deviation import Deviation, find_deviations

from .steps import blend

__all__ = ["Interpolation"]


class Interpolation:
    """Remembers where a model starts, and moves it between there and where it is.

    Adapters whose layers add a matrix ``D`` to a weight (LoRA and its kin) are scaled through their ``scale_layer``:
    ``W0 + alpha D``, exactly. Every other trained tensor, the head's included, is interpolated by itself.

    Args:
        model: The classifier (``encoder`` and ``head``), before training.

    Attributes:
        start: Start values of the tensors that are interpolated by themselves, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: list[Any] = [
            m
            for m in model.modules()
            if isinstance(m, BaseTunerLayer) and hasattr(m, "scale_layer") and hasattr(m, "get_delta_weight")
        ]
        factors = {id(p) for layer in self._layers for p in _adapter_parameters(layer) if p.requires_grad}
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors}
        self.start = {name: p.detach().clone() for name, p in trained.items()}
        self._refused = self._why_not()
        self._deviations = self._find() if self._is_matrices() else None

    @contextlib.contextmanager
    def __call__(self, alpha: float) -> Iterator[None]:
        """Inside, the model is at ``alpha`` of the way; afterwards bitwise where it was.

        Raises:
            ConfigError: ``alpha`` is not between 0 and 1, or the adapter did not start at the pretrained weights.
        """
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise ConfigError(f"alpha={alpha!r}: it must be between 0 (the start) and 1 (the trained model)")
        if alpha == 1:
            yield
            return
        if self._refused:
            raise ConfigError(self._refused)
        plain = {n: p for n, p in self._model.named_parameters() if n in self.start}
        end = {n: p.detach().clone() for n, p in plain.items()}
        scalings = [dict(layer.scaling) for layer in self._layers]
        try:
            for layer in self._layers:
                layer.scale_layer(float(alpha))
            blend(plain, self.start, float(alpha))
            yield
        finally:
            blend(plain, end, 0.0)
            for layer, scaling in zip(self._layers, scalings, strict=True):
                layer.scaling.update(scaling)

    def deviation(self) -> float | None:
        """``||W - W0||_F`` over all weights of the encoder; ``None`` where adapters add no matrix to a weight."""
        if self._deviations is None:
            return None
        return math.sqrt(math.fsum(one.frobenius() ** 2 for one in self._deviations))

    def _is_matrices(self) -> bool:
        """Whether all that trains in the encoder is weights, or matrices that are added to them."""
        others: list[nn.Parameter] = []
        for module in self._model.modules():
            if isinstance(module, BaseTunerLayer) and module not in self._layers:
                others += _adapter_parameters(module)
            prompts = getattr(module, "prompt_encoder", None) if isinstance(module, PeftModel) else None
            others += prompts.parameters() if isinstance(prompts, nn.Module) else []
        trained = {id(p) for p in self._model.parameters() if p.requires_grad}
        return not any(id(p) in trained for p in others)

    def _find(self) -> list[Deviation] | None:
        if not any(p.requires_grad for n, p in self._model.named_parameters() if not n.startswith("head.")):
            return []
        try:
            return find_deviations(self._model, exclude=r"^head\.", anchors=self.start)
        except GuardError:  # a variant of LoRA of which no difference of weights is known
            return None

    def _why_not(self) -> str:
        """Why the way from start to end cannot be gone; empty if it can."""
        for layer in self._layers:
            if any(getattr(layer, "use_dora", {}).values()):
                return (
                    "DoRA rescales whole weights: there is no matrix that could be added in part. Interpolate a LoRA "
                    "without use_dora"
                )
            if any(bool((delta != 0).any()) for delta in _deltas(layer)):
                return (
                    "the adapter adds something to the pretrained weights from the start (an initialisation from "
                    "singular vectors that takes it out of the base weights, random factors, or an adapter trained "
                    "before), so scaling it does not lead back to them. Start from zero: LoraConfig with its default "
                    "init_lora_weights, or LargoConfig"
                )
        return ""


def _adapter_parameters(layer: Any) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for name in layer.adapter_layer_names:
        part = getattr(layer, name, None)
        if isinstance(part, nn.Module):
            found += part.parameters()
    return found


@torch.no_grad()
def _deltas(layer: Any) -> list[Tensor]:
    """What each active adapter of a layer adds to its weight."""
    keys = {key for name in layer.adapter_layer_names for key in getattr(layer, name, None) or ()}
    return [layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in keys]
