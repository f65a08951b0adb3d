"""Layer-wise mode inside a ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from growthring.errors import ConfigError

from .layerwise import LayerWise

__all__ = ["LayerWiseCallback"]


class LayerWiseCallback(TrainerCallback):  # type: ignore[misc]
    """Layer-wise mode from the beginning of training to its end; see :meth:`LayerWise.callback`.

    Attributes:
        layerwise: The mode of the optimizer that trains; ``None`` outside training.
    """

    def __init__(self, max_norm: float | None = None) -> None:
        self.max_norm = max_norm
        self.layerwise: LayerWise | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the optimizer into layer-wise mode."""
        self._end()
        if args.max_grad_norm:
            raise ConfigError(
                f"LayerWise: TrainingArguments(max_grad_norm={args.max_grad_norm}) clips what is left in .grad, by "
                "a norm without the projected matrices. Set max_grad_norm=0 and give LayerWise.callback(max_norm=...)"
            )
        optimizer: Any = kwargs.get("optimizer")
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        self.layerwise = LayerWise(optimizer, max_norm=self.max_norm)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Give the norm of what was stepped, in place of the norm of what is left in ``.grad``."""
        if self.layerwise is not None and self.layerwise.norm is not None and logs and "grad_norm" in logs:
            logs["grad_norm"] = self.layerwise.norm
            if state.log_history and "grad_norm" in state.log_history[-1]:
                state.log_history[-1]["grad_norm"] = self.layerwise.norm

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the mode."""
        self._end()

    def _end(self) -> None:
        if self.layerwise is not None:
            self.layerwise.remove()
        self.layerwise = None
