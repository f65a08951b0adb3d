"""Directional: how much of a step away from the pretrained model each tensor may take, learned while it trains.

A LARGO-style reading (our derivation; see docs/research/largo.md) of DiGraP, directional gradient projection (Huang et
al., arXiv 2502.15895), whose release is not available. With ``c = theta - theta_0`` and the gradient ``g`` of a
tensor, a step does, before the optimizer,

    if <g, c> < 0 (descending leads further away):   g <- g - omega corr,   corr = <g, c> / ||c||^2 c
    in any case:                                     g <- g + lambda c

and learns ``omega``, in [0, 1], from the next gradient: ``dL/domega = lr <g + lambda c, corr of the step before>``,
which is exact for plain gradient descent. At 0 nothing is taken away (L2-SP), at 1 the whole component outwards. SPD
acts in the other case, ``<g, c> > 0``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from growthring.errors import ConfigError, GuardError

from . import shards
from .anchored_guard import AnchoredGuard, check_number
from .balls import Balls, Part, Seen
from .base import Certificate, unwrapped
from .deviation import HEADS
from .hyper import HyperAdam
from .plan import HOLE, Treatment

__all__ = ["Directional"]


class Directional(AnchoredGuard):
    """Takes a learned share of every gradient's component away from the pretrained model.

    One strength for each tensor: LARGO-style deltas, LoRA's factors (from where they started) and plain weights. It
    changes gradients only and bounds nothing; certificates have what was measured.

    Args:
        mu: Learning rate of the strengths, above 0. Default 1e-2.
        weight: ``lambda``, the weight of the pull back, at least 0. Default 0.
        exclude: Regular expression for names of tensors left alone; default heads. ``None`` leaves out none.

    Raises:
        ConfigError: On values outside the ranges above.

    Example:
        ```python
        guard = gr.Directional(mu=1e-2)
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[guard.callback()])
        trainer.train()
        ```
    """

    name = "directional"
    treatment: tuple[Treatment, str, str, str] = (
        "free", "", "a learned share of its steps outwards is taken away, no condition does", HOLE
    )  # fmt: skip

    def __init__(self, mu: float = 1e-2, *, weight: float = 0.0, exclude: str | None = HEADS) -> None:
        super().__init__(exclude)
        self.mu, self.weight = check_number("Directional", "mu", mu), check_number("Directional", "weight", weight)
        if not self.mu:
            raise ConfigError("Directional(mu=0): strengths begin at 0 and would stay there; must be above 0")
        self._learned: dict[str, dict[str, Any]] = {}  # by name, as it was last put down
        self._names: list[str] = []
        self._omega = torch.zeros(0)
        self._last: tuple[Seen, Tensor, Tensor] | None = None  # the last step's tensors, <g, c> / ||c||^2, rates
        self._optimizer: torch.optim.Optimizer | None = None

    # --- the contract -------------------------------------------------------------------------------------------

    def bind(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Meet the optimizer, whose learning rates scale the hyper-gradients; without it they count as equal."""
        self._optimizer = unwrapped(optimizer) or self._optimizer

    @torch.no_grad()
    def before_step(self) -> None:
        """Move the strengths, then take their share from the gradients."""
        self._attached()
        balls, seen, there = self._balls, self._balls.look(), self._there()
        found = [seen.dots, seen.energy]
        if self._last is not None:
            before = self._last[0]
            found.append(balls.against(before) + self.weight * balls.overlap(seen, before))
        dots, energy, *against = balls.add(torch.stack(found)).unbind()
        if self._last is not None:
            _, share, rates = self._last
            h = rates * share * against[0]
            ahead = self._adam.direction(h, there & (share != 0) & h.isfinite())
            self._omega = (self._omega - self.mu * ahead).clamp(0.0, 1.0)
        share = torch.where((dots < 0) & (energy > 0) & dots.isfinite(), dots / energy, 0.0)
        balls.lean(seen, self.weight - self._omega * share)
        self._last = seen, torch.where(there, share, 0.0), self._rates()

    @torch.no_grad()
    def after_step(self) -> None:
        """See what moved: a step that was skipped says nothing of the strengths."""
        self._attached()
        if self._last is None:
            raise GuardError("Directional.after_step without before_step: call it when the gradients are ready")
        seen, share, rates = self._last
        self._last = seen, torch.where(self._balls.step(seen)[3] > 0, share, 0.0), rates

    def end_task(self, task: str | None, batches: Iterable[Any] = ()) -> Certificate:
        """Measure how far every layer is from the pretrained model.

        Args:
            task: Name of the task; default ``task-<number>``.
            batches: Not read.

        Returns:
            A certificate without a verdict: nothing is bounded. ``deviations`` has one entry a layer.
        """
        self._attached()
        omega, self._last = self._omega, None
        return self._certify(
            task,
            [
                f"Directional bounds nothing: its strengths ended at {float(omega.mean()):.2g} on average, "
                f"{float(omega.max()):.2g} at most"
            ],
        )

    def strengths(self) -> dict[str, float]:
        """``omega`` of every tensor."""
        return {t.name: omega for t, omega in zip(self._attached(), self._omega.tolist(), strict=True)}

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {"mu": self.mu, "weight": self.weight, **super().settings()}

    def state_dict(self) -> dict[str, Any]:
        """Names of the tasks, anchors and strengths with what they are learned from: tensors and plain values only.

        Of sharded models whole tensors; call it on all ranks.
        """
        return super().state_dict() | {"strengths": self._kept()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, before :meth:`attach` or after it. Bind the optimizer again.

        Raises:
            GuardError: If it is about another model.
        """
        super().load_state_dict(state)
        self._learned, self._names = {name: dict(kept) for name, kept in state["strengths"].items()}, []
        if self._model is not None:
            self._arrange()

    # --- inside -------------------------------------------------------------------------------------------------

    def _arrange(self) -> None:
        self._learned |= self._kept()
        tensors = self._attached()
        self._balls = Balls([Part(t.parameter, i, t.anchor) for i, t in enumerate(tensors)], len(tensors))
        self._adam = HyperAdam(len(tensors), device=self._balls.device)
        self._names = [t.name for t in tensors]
        known = [self._learned.get(name, {}) for name in self._names]

        def numbers(key: str) -> Tensor:
            return self._adam.first.new_tensor([kept.get(key, 0.0) for kept in known])

        self._omega = numbers("omega")
        self._adam.load_state_dict({key: numbers(key) for key in ("first", "second", "count")})
        moved = [
            shards.local(shards.like(kept["before"], t.parameter.detach())) if "before" in kept else t.delta()
            for t, kept in zip(tensors, known, strict=True)
        ]
        self._last = (self._balls.join(moved), numbers("share"), numbers("rate"))

    def _renew(self) -> None:
        self._learned, self._names = {}, []

    def _kept(self) -> dict[str, dict[str, Any]]:
        """What was learned of every tensor, and from what it learns next."""
        if not self._names:
            return dict(self._learned)
        numbers = {"omega": self._omega, **self._adam.state_dict()}
        before: list[Tensor] = []
        if self._last is not None:
            seen, numbers["share"], numbers["rate"] = self._last
            both = zip(self._balls.split(seen), self._balls.parts, strict=True)
            before = [shards.joined(f, part.parameter).clone() for f, part in both]
        rows = zip(*(values.tolist() for values in numbers.values()), strict=True)
        found: dict[str, dict[str, Any]] = {
            name: dict(zip(numbers, row, strict=True)) for name, row in zip(self._names, rows, strict=True)
        }
        for name, moved in zip(self._names, before, strict=False):  # there are none between tasks
            found[name]["before"] = moved
        return found

    def _there(self) -> Tensor:
        """Which tensors have a gradient."""
        there = [p.parameter.grad is not None for p in self._balls.parts]
        return torch.tensor(there, device=self._balls.device)

    def _rates(self) -> Tensor:
        """Learning rates of all tensors; 1 without an optimizer."""
        groups = self._optimizer.param_groups if self._optimizer is not None else ()
        rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        return self._adam.first.new_tensor([rates.get(id(p.parameter), 1.0) for p in self._balls.parts])
