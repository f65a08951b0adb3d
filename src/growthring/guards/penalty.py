"""Guards that add a term to the loss, in a Trainer whose loss does not hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .base import GuardCallback

__all__ = ["Penalty", "PenaltyCallback", "add_gradient"]


class Penalty(Protocol):
    """A guard that can add its term's gradient to what a backward pass left."""

    def add_gradient(self) -> None:
        """Add it."""


class PenaltyCallback(GuardCallback):
    """Adds the term's gradient right before the step, after clipping, and then does what any guard's callback does."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient, then trim."""
        guard: Any = self.guard
        penalty: Penalty = guard
        penalty.add_gradient()
        super().on_pre_optimizer_step(args, state, control, **kwargs)


def add_gradient(term: Tensor, parameters: Sequence[Tensor]) -> None:
    """Add the gradient of ``term`` to the gradients of ``parameters``, all of which it depends on."""
    for parameter, gradient in zip(parameters, torch.autograd.grad(term, parameters), strict=True):
        if parameter.grad is None:
            parameter.grad = gradient.to(parameter.dtype)
        else:
            parameter.grad.add_(gradient)
