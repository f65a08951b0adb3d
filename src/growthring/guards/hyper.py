"""Adam on a vector of hyper-parameters: radii, strengths. They have no graph; their gradients are computed by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["HyperAdam", "hyper_dtype"]

TINY = 1e-30
"""In place of Adam's ``eps``: hyper-gradients may be 1e-8 and smaller, and 1e-8 would silence them."""


def hyper_dtype(device: torch.device) -> torch.dtype:
    """float64, so that squares of tiny hyper-gradients do not vanish; float32 on devices that lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


class HyperAdam:
    """Directions of Adam (Kingma and Ba 2015) for ``size`` numbers that are learned independently.

    Every entry has a counter of its own, so that one that rests (no gradient, a skipped step) does not change.
    ``eps`` is 1e-30: a direction does not depend on the scale of the loss.

    Args:
        size: Number of entries, at least 0.
        betas: Decay of the first and the second moment, each in [0, 1).
        device: Where the state lives; default the CPU.

    Attributes:
        first: First moments ``(size,)``.
        second: Second moments ``(size,)``.
        count: Gradients seen by each entry ``(size,)``.
    """

    def __init__(
        self, size: int, betas: tuple[float, float] = (0.9, 0.999), device: torch.device | str = "cpu"
    ) -> None:
        self.betas = betas
        zeros = torch.zeros(size, dtype=hyper_dtype(torch.device(device)), device=device)
        self.first, self.second, self.count = zeros, zeros.clone(), zeros.clone()

    def direction(self, gradient: Tensor, where: Tensor | None = None) -> Tensor:
        """Take in one gradient and return the direction of *ascent*; step against it.

        Args:
            gradient: ``(size,)``.
            where: Entries that take part ``(size,)``, boolean; default all. The others keep their state bit for bit,
                whatever their gradient (NaN too), and get direction 0.

        Returns:
            ``m / (1 - beta_1^k) / (sqrt(v / (1 - beta_2^k)) + 1e-30)``, ``(size,)``.
        """
        b1, b2 = self.betas
        gradient = gradient.to(self.first)
        if where is None:
            where = torch.ones_like(gradient, dtype=torch.bool)
        gradient = torch.where(where, gradient, 0.0)
        self.count = torch.where(where, self.count + 1, self.count)
        self.first = torch.where(where, b1 * self.first + (1 - b1) * gradient, self.first)
        self.second = torch.where(where, b2 * self.second + (1 - b2) * gradient * gradient, self.second)
        k = self.count.clamp_min(1)
        ahead = (self.first / (1 - b1**k)) / ((self.second / (1 - b2**k)).sqrt() + TINY)
        return torch.where(where, ahead, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and counters."""
        return {"first": self.first.clone(), "second": self.second.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for name in ("first", "second", "count"):
            setattr(self, name, state[name].to(self.first, copy=True))
