"""LARGO-style adapters on linear layers and on embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .bases import embed_scale
from .factors import FactorA
from .layer import LargoLayer

__all__ = ["LargoEmbedding", "LargoLinear"]


class LargoLinear(LargoLayer):
    """A ``Linear`` (or quantised one) or ``Conv1D`` with LARGO-style factors beside it."""

    def _make_a(self, r: int, like: dict[str, Any]) -> nn.Module:
        return FactorA(self.in_features, r, bias=False, **like)

    def _inner(self, adapter: str, x: Tensor, both: bool) -> tuple[Tensor | None, Tensor]:
        start_a: Tensor = self.largo_A0[adapter]
        x = self._cast_input_dtype(x, start_a.dtype)
        if adapter not in self.largo_A:
            return None, F.linear(x, start_a)
        factor_a: Any = self.largo_A[adapter]
        inner: Tensor = factor_a(x, start_a, both)
        return (inner, inner[..., self.r[adapter] :]) if both else (None, inner)

    def _as_residual(self, adapter: str) -> bool:
        core, weight = self._core, self._core.weight
        if weight.requires_grad:  # it would get no gradient, and changes
            self.largo_residual.clear()
        return (
            self.largo_form[adapter] == "residual"
            and self.scaling[adapter] == self.largo_unit[adapter]  # W0 - s B0 A0 was made for this s
            and not weight.requires_grad
            and self.base_layer is core  # another tuner's layer adds its part when it is called
            and not (core._forward_hooks or core._forward_pre_hooks)  # nor would they be called
            and type(core).forward in (nn.Linear.forward, Conv1D.forward)  # nor what a subclass does
        )

    def _residual_forward(self, adapter: str, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # which cannot ask for it
            self._renew_residual()
        if adapter not in self.largo_residual:
            self._make_residual(adapter)
        base: Any = self._core
        residual = self.largo_residual[adapter]
        autocast = torch.is_autocast_enabled(x.device.type)  # then the output is as narrow as the base layer's
        dtype = None if autocast else x.dtype
        x = self._cast_input_dtype(x, residual.dtype)
        output = F.linear(x, residual, None if base.bias is None else base.bias.to(residual.dtype))
        _, u = self._inner(adapter, x, both=False)
        factor_b: Any = self.largo_B[adapter]
        return (output + factor_b(u, self.scaling[adapter], self.largo_B0[adapter])).to(dtype or output.dtype)

    def _renew_residual(self) -> None:
        """Forget what was made of ``W0`` if it was written to since."""
        weight = self._core.weight
        version = None if weight.is_inference() else weight._version
        if version != self._residual_of:
            self.largo_residual.clear()
            self._residual_of = version

    def _make_residual(self, adapter: str) -> None:
        with torch.inference_mode(False), torch.no_grad():
            start_a, start_b, _, _ = self.factors(adapter)
            part = self.largo_unit[adapter] * (start_b @ start_a)  # type: ignore[operator]
            self.largo_residual[adapter] = (self._base().weight() - part).to(start_a.dtype)


class LargoEmbedding(LargoLayer):
    """An ``Embedding`` with LARGO-style factors beside it."""

    def _make_a(self, r: int, like: dict[str, Any]) -> nn.Module:
        base: Any = self._core
        return nn.Embedding(self.in_features, r, padding_idx=base.padding_idx, **like)

    def _inner(self, adapter: str, x: Tensor, both: bool) -> tuple[Tensor | None, Tensor]:
        moved: Tensor = self.largo_embedding_A[adapter](x)
        u = F.embedding(x, self.largo_A0[adapter].T) + moved
        return torch.cat((moved, u), dim=-1), u

    def _increment(self, adapter: str, x: Tensor) -> Tensor:
        increment = super()._increment(adapter, x)
        scale = embed_scale(self)
        return increment if scale is None else increment * scale.to(increment.dtype)
