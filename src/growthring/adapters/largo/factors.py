"""The trained factors as linear layers: guards and PEFT find them by their weights, and hooks see their inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FactorA", "FactorB"]


class FactorA(nn.Linear):
    """``dA`` as a linear layer on ``x``."""

    def forward(self, x: Tensor, anchor: Tensor, both: bool) -> Tensor:  # type: ignore[override]
        """``(A0 + dA) x``; with ``both``, ``dA x`` and ``(A0 + dA) x`` side by side, from one reading of ``x``."""
        moved = anchor + self.weight
        return F.linear(x, torch.cat((self.weight, moved)) if both else moved)


class FactorB(nn.Linear):
    """``dB`` as a linear layer on ``u = (A0 + dA) x``."""

    def forward(
        self, u: Tensor, scale: float = 1.0, anchor: Tensor | None = None, both: Tensor | None = None
    ) -> Tensor:
        """``s dB u``; with ``anchor`` ``s (B0 + dB) u``; with ``both = (z, u)`` ``s (B0 z + dB u)`` in one product."""
        weight = self.weight
        if both is not None and anchor is not None:
            u, weight = both, torch.cat((anchor, weight), dim=1)
        elif anchor is not None:
            weight = anchor + weight
        return F.linear(u, weight if scale == 1.0 else scale * weight)
