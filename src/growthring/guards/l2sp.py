"""L2-SP: a term of the loss that pulls toward the pretrained weights.

Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018,
arXiv 1802.01483. The loss becomes

    task loss + weight * sum over layers || W - W_0 ||_F^2

without the heads. Of LoRA and LARGO-style layers ``W - W_0`` is the product ``D``, measured by ``2 r x 2 r`` Gram
matrices, and not the factors: these could cancel, or be large where the product is small. (The paper's second term,
plain decay of the head, is the optimizer's to give.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .anchored_guard import AnchoredGuard, check_number
from .base import GuardCallback
from .deviation import HEADS
from .penalty import PenaltyCallback, add_gradient
from .plan import HOLE, Treatment

__all__ = ["L2SP"]


class L2SP(AnchoredGuard):
    """Penalises the squared distance of every layer from the pretrained one.

    In a plain ``transformers.Trainer``, whose callbacks cannot add to the loss, ``guard.callback()`` adds the
    penalty's gradient right before the step instead, after clipping.

    Args:
        weight: ``w`` of the term ``w ||W - W_0||^2``, at least 0; published values are 1e-4 to 1. Default 0.01.
        exclude: Names of tensors left out, as a regular expression; default: heads. ``None`` leaves nothing out.

    Raises:
        ConfigError: On a negative weight.

    Example:
        ```python
        Trainer(model, args, train_dataset=rows, callbacks=[gr.L2SP(weight=0.01).callback()]).train()
        ```
    """

    name = "l2-sp"
    treatment: tuple[Treatment, str, str, str] = (
        "free", "", "a loss term pulls the layer toward its start, no condition does", HOLE
    )  # fmt: skip

    def __init__(self, weight: float = 0.01, *, exclude: str | None = HEADS) -> None:
        super().__init__(exclude)
        self.weight = check_number("L2SP", "weight", weight)

    def penalty(self) -> Tensor:
        """``sum ||W - W_0||_F^2`` over the layers, without its weight; differentiable, in float32 or wider."""
        self._attached()
        total = torch.zeros(())
        for deviation in self._deviations:
            with torch.autocast(deviation.tensors[0].parameter.device.type, enabled=False):
                part = deviation.energy()
            total = total.to(part.device) + part
        return total

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor | None:
        """``weight * penalty()``; ``None`` at weight 0. It does not depend on the arguments."""
        return self.weight * self.penalty() if self.weight else None

    def add_gradient(self) -> None:
        """Add the gradient of :meth:`loss` to what a backward pass left: for loops that cannot add to the loss."""
        if (term := self.loss(None, {})) is not None:
            add_gradient(term, [one.parameter for one in self._attached()])

    def callback(self, *, loss_added: bool = False) -> GuardCallback:
        """A ``TrainerCallback``.

        Args:
            loss_added: The Trainer adds :meth:`loss` to its own. Otherwise (default) the callback adds the gradient
                before every step, after clipping.
        """
        return (GuardCallback if loss_added else PenaltyCallback)(self, loss_added=True)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {"weight": self.weight, **super().settings()}
