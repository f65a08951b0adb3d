"""FTP: every weight is projected after each step, and the radii are trained by the next batch's gradient.

Tian, Liu, Smith and Kira, "Fast Trainable Projection for Robust Fine-Tuning", NeurIPS 2023, arXiv 2310.19182. Per
tensor, with one radius ``gamma``, ``C = theta - theta_0`` after the optimizer's step, and ``n_i`` the norms of rows:

    h      = sum over i with gamma <= n_i of <g_i, C_i> / n_i         with C, n and gamma of the last step
    gamma <- clip(gamma - mu Adam(kappa h if h > 0 else h), 0, max n)
    theta  = theta_0 + C min(1, gamma / n)

``h`` is the derivative of the batch's loss with respect to ``gamma``. Differences from the published code: rows inside
their ball do not depend on ``gamma`` and are left out of ``h``; Adam's bias correction counts from its first moment,
and its ``eps`` is 1e-30, so that small losses do not silence the radii; the lower end is 0 and not 1e-8; the state is
kept by tensor name, is in :meth:`FTP.state_dict`, and outlives the optimizer, so that a later task goes on from the
radii of the earlier ones. LoRA's factors are measured from their start, where that code takes zero for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from growthring.errors import ConfigError, GuardError, nearest

from . import shards
from .anchored_guard import (
    NORMS,
    AnchoredGuard,
    check_number,
    dots_of,
    gathered,
    norms_of,
    rows_of,
    scale_rows,
)
from .base import Certificate
from .deviation import HEADS, Anchored
from .hyper import HyperAdam
from .plan import Treatment

__all__ = ["FTP"]

FIRST = 1e-8
"""The first radius: the first step only shows where the weights would go."""


class FTP(AnchoredGuard):
    """Keeps every weight in a ball around the pretrained one; one radius a tensor, trained along with the weights.

    It scales the whole deviation, that of earlier tasks too. It keeps the anchors and the directions of the last step:
    two copies of what trains.

    Args:
        mu: Learning rate of the radii, above 0. Default 0.01; it is a length, in the norm that ``norm`` names: with
            rows of a handful of entries (LoRA's ``B``) the default hardly binds.
        kappa: How much of the wish to shrink counts, in [0, 1]. Default 1; at 0 radii only grow, or follow the step.
        norm: ``"rows"`` (default): every row by its sum of absolute values. ``"tensor"``: all of it by its Frobenius
            norm. A tensor with one axis is one row.
        exclude: Names of tensors left out, as a regular expression; default: heads. ``None`` leaves nothing out.

    Raises:
        ConfigError: On a number out of range or another norm.

    Example:
        ```python
        Trainer(model, args, train_dataset=rows, callbacks=[gr.FTP().callback()]).train()
        ```
    """

    name = "ftp"

    def __init__(
        self, mu: float = 1e-2, *, kappa: float = 1.0, norm: str = "rows", exclude: str | None = HEADS
    ) -> None:
        super().__init__(exclude)
        self.mu = check_number("FTP", "mu", mu)
        if not self.mu:
            raise ConfigError(f"FTP(mu={mu!r}): must be above 0, else the radii stay where they begin")
        self.kappa = check_number("FTP", "kappa", kappa, most=1.0)
        if norm not in NORMS:
            raise ConfigError(f"FTP(norm={norm!r}): {nearest(str(norm), NORMS)}")
        self.norm = norm
        what = "each row has a norm of" if norm == "rows" else "it has a norm of"
        treatment: Treatment = "protected"
        self.treatment = (treatment, f"less its start {what} gamma at most", "gamma is trained along", "")
        self._names: list[str] = []
        self._radii = torch.zeros(0, dtype=torch.float64)  # NaN of what has not moved yet
        self._adam = HyperAdam(0)
        self._directions: dict[str, Tensor] = {}  # C / n where the projection was active, else 0; of this rank
        self._h: tuple[Tensor, Tensor, Tensor] | None = None  # gradients of the radii, known of which, who steps

    # --- the contract -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self) -> None:
        """Take the radii's gradients."""
        tensors = self._attached()
        self._h = None
        h = torch.zeros_like(self._radii)
        stepping, known = (torch.zeros_like(h, dtype=torch.bool) for _ in range(2))
        moving = [i for i, one in enumerate(tensors) if one.parameter.grad is not None]
        places = [i for i in moving if tensors[i].name in self._directions]
        stepping[moving] = True
        if places:
            ways = [self._directions[tensors[i].name] for i in places]
            h[places] = dots_of([tensors[i] for i in places], ways).to(h)
            known[places] = True
        self._h = h, known, stepping

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the radii, and project. A gradient that is not finite means a step that was skipped: nothing happens.

        Raises:
            GuardError: If :meth:`before_step` was not called.
        """
        tensors = self._attached()
        if self._h is None:
            raise GuardError("FTP.after_step without before_step: call it when the gradients are ready")
        (h, known, stepping), self._h = self._h, None
        if not bool(torch.isfinite(h).all()):
            return
        places = stepping.nonzero().flatten().tolist()
        if not places:
            return
        chosen = [tensors[i] for i in places]
        deltas = [one.delta() for one in chosen]
        norms = norms_of(chosen, deltas, self.norm)
        farthest = torch.zeros_like(self._radii)
        largest = gathered(norm.max() if norm.numel() else norm.sum() for norm in norms)
        farthest[places] = shards.most([one.parameter for one in chosen], largest).to(farthest)
        begun = ~self._radii.isnan()
        gamma = self._radii - self.mu * self._adam.direction(torch.where(h > 0, self.kappa * h, h), known & begun)
        gamma = torch.where(begun, gamma, FIRST).clamp(min=0.0).minimum(farthest)
        begins = stepping & (begun | (farthest > 0))  # what has not moved yet, as LoRA's A behind B = 0, waits
        self._radii = torch.where(begins, gamma, self._radii)
        for place, one, delta, norm in zip(places, chosen, deltas, norms, strict=True):
            radius = self._radii[place].to(norm)
            factors = torch.where(norm > radius, radius / norm, torch.ones_like(norm))  # of NaN: 1
            ways = torch.where((norm >= radius) & (norm > 0), norm.reciprocal(), torch.zeros_like(norm))
            self._directions[one.name] = (rows_of(delta) * ways[:, None]).reshape(delta.shape)
            scale_rows(one, delta, factors)

    def end_task(self, task: str | None, batches: Iterable[Any] = ()) -> Certificate:
        """Measure how far the model is from the pretrained one, and whether every weight is inside.

        Args:
            task: Name of the task; default ``task-<number>``.
            batches: Not read.
        """
        return self._certify(task, radii=self.radii)

    @property
    def radii(self) -> dict[str, float]:
        """The radius of every tensor that has moved, by name."""
        pairs = zip(self._names, self._radii.tolist(), strict=True)
        return {name: radius for name, radius in pairs if radius == radius}

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {"mu": self.mu, "kappa": self.kappa, "norm": self.norm, **super().settings()}

    def state_dict(self) -> dict[str, Any]:
        """Anchors, radii, their moments and the directions of the last step: tensors and plain values only."""
        like = {one.name: one for one in self._attached()} if self._model is not None else {}
        return {
            **super().state_dict(),
            "names": list(self._names),
            "radii": self._radii.clone(),
            "moments": self._adam.state_dict(),
            "directions": {
                name: (shards.joined(way, like[name].parameter) if name in like else way).clone()
                for name, way in self._directions.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, before :meth:`attach` or after it."""
        super().load_state_dict({"tasks": state["tasks"], "anchors": state["anchors"]})
        self._names, self._radii = list(state["names"]), state["radii"].clone()
        self._adam = HyperAdam(len(self._names))
        self._adam.load_state_dict(state["moments"])
        self._directions = dict(state["directions"])
        if self._model is not None:
            self._arrange()

    # --- inside -------------------------------------------------------------------------------------------------

    def _renew(self) -> None:
        self._names, self._radii, self._adam = [], torch.zeros(0, dtype=torch.float64), HyperAdam(0)
        self._directions, self._h = {}, None

    def _arrange(self) -> None:
        """Order the state as the tensors are ordered now; what was learned of a tensor that rests is kept."""
        tensors = {one.name: one for one in self._attached()}
        old = {name: place for place, name in enumerate(self._names)}
        names = [*tensors, *(name for name in self._names if name not in tensors)]
        device = next(iter(tensors.values())).parameter.device
        adam, before = HyperAdam(len(names), device=device), self._adam
        radii = torch.full_like(adam.count, float("nan"))
        for place, name in enumerate(names):
            if name in old:
                radii[place] = self._radii[old[name]].to(radii)
                for part in ("first", "second", "count"):
                    getattr(adam, part)[place] = getattr(before, part)[old[name]].to(radii)
        self._names, self._radii, self._adam, self._h = names, radii, adam, None
        for name, way in self._directions.items():
            if name in tensors:
                self._directions[name] = _part(way, tensors[name])


def _part(way: Tensor, one: Anchored) -> Tensor:
    """This rank's part of a direction."""
    place = shards.local(one.parameter.detach())
    return way.to(place.device) if way.shape == place.shape else shards.local(shards.like(way, one.parameter.detach()))
