"""SPD: selective projection decay, a pull toward the pretrained weights only where the gradient already leads back.

Tian, Huang and Kira, "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", NeurIPS 2024, arXiv
2411.01713. Per tensor, with ``d`` its deviation before the optimizer's step, ``d'`` after it, and ``g`` its gradient:

    if <g, d> > 0:    r = clamp((||d'|| - ||d||) / ||d'||, 0, 1),    d' <- (1 - min(weight r, 1)) d'

At weight 1 the tensor is then exactly as far from its start as before. (DiGraP is the mirror image: it acts where
``<g, d> < 0``, that is where the step leads further out.) Above weight 1 the published rule can step past the start to
its other side; here it stops there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from growthring.errors import GuardError

from .anchored_guard import AnchoredGuard, check_number, dots_of, lengths_of, scale_rows
from .deviation import HEADS, Anchored
from .plan import HOLE, Treatment

__all__ = ["SPD"]


class SPD(AnchoredGuard):
    """Undoes the step away from the pretrained weights in tensors whose gradient leads back.

    It scales the whole deviation, that of earlier tasks too. LoRA's factors are measured from their start, where the
    published code takes zero for both and so erases the random ``A``. Use no weight decay beside it: this is one.

    Args:
        weight: Strength, at least 0: 0 does nothing, 1 (default) returns to the previous distance, more pulls further
            in.
        exclude: Names of tensors left out, as a regular expression; default: heads. ``None`` leaves nothing out.

    Raises:
        ConfigError: On a negative weight.

    Example:
        ```python
        Trainer(model, args, train_dataset=rows, callbacks=[gr.SPD().callback()]).train()
        ```
    """

    name = "spd"
    treatment: tuple[Treatment, str, str, str] = (
        "free", "", "it is pulled toward its start where its gradient leads there, no condition does", HOLE
    )  # fmt: skip

    def __init__(self, weight: float = 1.0, *, exclude: str | None = HEADS) -> None:
        super().__init__(exclude)
        self.weight = check_number("SPD", "weight", weight)
        self._before: tuple[list[Anchored], Tensor, Tensor] | None = None  # tensors, whether to pull, distances

    @torch.no_grad()
    def before_step(self) -> None:
        """Look where gradients lead, and how far the tensors are."""
        tensors = [one for one in self._attached() if one.parameter.grad is not None] if self.weight else []
        deltas = [one.delta() for one in tensors]
        self._before = tensors, dots_of(tensors, deltas) > 0, lengths_of(tensors, deltas)

    @torch.no_grad()
    def after_step(self) -> None:
        """Pull back in.

        Raises:
            GuardError: If :meth:`before_step` was not called.
        """
        self._attached()
        if self._before is None:
            raise GuardError("SPD.after_step without before_step: call it when the gradients are ready")
        (tensors, back, old), self._before = self._before, None
        deltas = [one.delta() for one in tensors]
        new = lengths_of(tensors, deltas)
        ratio = ((new - old) / new).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0)
        factors = 1.0 - (self.weight * ratio).clamp(max=1.0) * back
        for one, delta, factor in zip(tensors, deltas, factors.tolist(), strict=True):
            if factor < 1.0:
                scale_rows(one, delta, delta.new_tensor([factor]))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {"weight": self.weight, **super().settings()}

    def _arrange(self) -> None:
        self._before = None
