"""Early stopping by the validation rows: the best weights are kept aside, and put back when training ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from growthring.guards import Guard, Radius
from growthring.guards.anchored_guard import AnchoredGuard

__all__ = ["BestWeights"]


class BestWeights(TrainerCallback):  # type: ignore[misc]
    """Looks at the validation score every so many steps, and after the last one.

    Of looks with the same score the earliest counts: it is the nearest to the start.

    Args:
        every: Optimizer steps between two looks.
        score: Gives the validation accuracy of the model as it is; must leave it as it was.
        guards: The guards; radii are kept and put back with the weights that they hold.

    Attributes:
        looks: ``(step, score)`` of every look.
    """

    def __init__(self, every: int, score: Callable[[], float], guards: Sequence[Guard] = ()) -> None:
        self.every, self.looks = every, list[tuple[int, float]]()
        self._score = score
        self._guards = [guard for guard in guards if isinstance(guard, Radius | AnchoredGuard)]
        self._model: nn.Module | None = None
        self._kept: dict[str, Tensor] = {}
        self._radii: list[dict[str, Any]] = []

    def watch(self, model: nn.Module) -> None:
        """The model whose trained weights are kept."""
        self._model = model

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look, if it is time to."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        score = self._score()
        if not self.looks or score > max(one for _, one in self.looks):
            self._kept = {name: p.detach().clone() for name, p in self._trained().items()}
            self._radii = [guard.state_dict() for guard in self._guards]
        self.looks.append((state.global_step, score))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the best weights back."""
        with torch.no_grad():
            for name, parameter in self._trained().items():
                if name in self._kept:
                    parameter.copy_(self._kept[name])
        for guard, state in zip(self._guards, self._radii, strict=True):
            guard.load_state_dict(state)
        self._kept, self._radii = {}, []

    def _trained(self) -> dict[str, nn.Parameter]:
        assert self._model is not None
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}
