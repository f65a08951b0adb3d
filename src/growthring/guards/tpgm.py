"""TPGM: when a task has been trained, every weight is projected; the radii are trained on validation data.

Tian, Dai, Ma, He, Liu and Kira, "Trainable Projected Gradient Method for Robust Fine-tuning", CVPR 2023, arXiv
2303.10720, in the form that its CLIP experiments have: once, after training. Per tensor, with one radius ``gamma``,
the trained ``d = theta - theta_0`` and the norms ``n_i`` of its rows:

    theta(gamma) = theta_0 + d min(1, gamma / n)
    gamma <- clip(gamma - mu Adam(dL/dgamma), 0, max n),    gamma_1 = min n / 2

for ``iterations`` validation batches, with the model in evaluation mode. ``dL/dgamma`` is the sum over rows with
``gamma <= n_i`` of ``<dL/dtheta_i, d_i> / n_i``: one ordinary backward pass, no copy of the model. Rows that have not
moved do not count for the first radius, and a tensor that the validation loss does not depend on stays as it was
trained. (In the form of its DomainNet experiments one such iteration follows every training step; FTP is what became
of it.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growthring.errors import ConfigError, DataError, GuardError, NumericalError, nearest

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
from .batches import evaluating, run_model
from .deviation import HEADS, Anchored
from .hyper import HyperAdam
from .plan import HOLE, Treatment

__all__ = ["TPGM"]


class TPGM(AnchoredGuard):
    """Pulls every weight back toward the pretrained one when a task ends, as far as validation data ask for it.

    Training itself is not touched. :meth:`end_task` needs validation batches with labels, such that the model returns
    a loss; :class:`~growthring.ContinualTrainer` gives them. Accuracy on the same rows is then no fair estimate any
    more, neither for stopping nor for choosing settings. It scales the whole deviation, that of earlier tasks too.

    Args:
        iterations: Validation batches that the radii are trained on, at least 1; batches are gone through again where
            there are fewer. Default 200.
        mu: Learning rate of the radii, above 0; a length, in the norm that ``norm`` names. Default 0.01.
        norm: ``"rows"`` (default): every row by its sum of absolute values. ``"tensor"``: all of it by its Frobenius
            norm. A tensor with one axis is one row.
        samples: Validation rows that :class:`~growthring.ContinualTrainer` gives it, at least 1. Default 256.
        exclude: Names of tensors left out, as a regular expression; default: heads. ``None`` leaves nothing out.

    Raises:
        ConfigError: On a number out of range or another norm.

    Example:
        ```python
        guard = gr.TPGM()
        guard.attach(model)
        Trainer(model, args, train_dataset=rows).train()
        guard.end_task("reviews", validation_loader)
        ```
    """

    name = "tpgm"
    split = "validation"
    """Which rows of a task :meth:`end_task` gets."""
    treatment: tuple[Treatment, str, str, str] = (
        "free", "", "it trains freely, and is projected toward its start when the task ends", HOLE
    )  # fmt: skip

    def __init__(
        self,
        iterations: int = 200,
        *,
        mu: float = 1e-2,
        norm: str = "rows",
        samples: int = 256,
        exclude: str | None = HEADS,
    ) -> None:
        super().__init__(exclude)
        for name, value in (("iterations", iterations), ("samples", samples)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"TPGM({name}={value!r}): must be a whole number, at least 1")
        self.mu = check_number("TPGM", "mu", mu)
        if not self.mu:
            raise ConfigError(f"TPGM(mu={mu!r}): must be above 0, else the radii stay where they begin")
        if norm not in NORMS:
            raise ConfigError(f"TPGM(norm={norm!r}): {nearest(str(norm), NORMS)}")
        self.iterations, self.norm, self.samples = iterations, norm, samples
        self.radii: dict[str, float] = {}
        """The radius of every tensor that had moved in the last task, by name."""

    def end_task(self, task: str | None, batches: Iterable[Any] = ()) -> Certificate:
        """Train the radii, and project.

        Args:
            task: Name of the task; default ``task-<number>``.
            batches: Validation batches with labels, as the model takes them; of several processes all have the same
                ones, unless the model is wrapped (DDP, FSDP2). Not read if nothing has moved.

        Raises:
            DataError: If there is no batch.
            GuardError: If the guard is not attached, or the model returns no loss for a batch.
            NumericalError: If the loss or its gradient is not finite.
        """
        tensors = self._attached()
        with torch.no_grad():
            far = norms_of(tensors, [one.delta() for one in tensors], self.norm)
            largest = shards.most([one.parameter for one in tensors], gathered(_largest(n) for n in far))
        moved = [one for one, most in zip(tensors, largest.tolist(), strict=True) if most > 0]
        self.radii = {}
        if not moved:
            return self._certify(task, ["nothing had moved, so nothing was projected"])
        batches = list(batches)
        if not batches:
            raise DataError(
                f"{self.name}: no validation batch: the radii are trained on held-out rows. Pass some to end_task"
            )
        assert self._model is not None
        deltas = [one.delta().clone() for one in moved]
        kept = [shards.local(one.parameter.detach()).clone() for one in moved]
        done = False
        try:
            radii = self._train(self._model, moved, deltas, kept, batches)
            done = True
        finally:
            if not done:
                _put_back(moved, kept)
        self.radii = {one.name: radius for one, radius in zip(moved, radii, strict=True)}
        told = f"radii trained in {self.iterations} steps on {len(batches)} validation batches"
        return self._certify(task, [told], self.radii)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        own = {"iterations": self.iterations, "mu": self.mu, "norm": self.norm, "samples": self.samples}
        return {**own, **super().settings()}

    # --- inside -------------------------------------------------------------------------------------------------

    def _train(
        self,
        model: nn.Module,
        moved: Sequence[Anchored],
        deltas: Sequence[Tensor],
        kept: Sequence[Tensor],
        batches: Sequence[Any],
    ) -> list[float]:
        """Train the radii of ``moved``; leaves the projected weights behind, and no gradient."""
        parameters = [one.parameter for one in moved]
        with torch.no_grad():
            norms = norms_of(moved, deltas, self.norm)
            largest = shards.most(parameters, gathered(_largest(n) for n in norms))
            least = -shards.most(parameters, -gathered(_least(n) for n in norms))
            adam = HyperAdam(len(moved), device=largest.device)
            largest, gamma = largest.to(adam.count), least.to(adam.count) / 2
            ways = []
        gradients = [(p, p.grad) for p in model.parameters()]
        try:
            with evaluating(model):
                for _, batch in zip(range(self.iterations), itertools.cycle(batches), strict=False):
                    self._project(moved, deltas, kept, norms, gamma)
                    model.zero_grad(set_to_none=True)
                    with torch.enable_grad():
                        self._loss(model, batch).backward()
                    ways = [_way(d, n, g) for d, n, g in zip(deltas, norms, gamma, strict=True)]
                    gamma = self._step(adam, gamma, largest, moved, ways)
                gamma = torch.where(adam.second > 0, gamma, largest)  # the loss does not ask for anything else
                self._project(moved, deltas, kept, norms, gamma)
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
        return [float(radius) for radius in gamma]

    def _step(
        self, adam: HyperAdam, gamma: Tensor, largest: Tensor, moved: Sequence[Anchored], ways: Sequence[Tensor]
    ) -> Tensor:
        """The radii after one step of Adam."""
        used = [i for i, one in enumerate(moved) if one.parameter.grad is not None]
        h = torch.zeros_like(gamma)
        if used:
            h[used] = dots_of([moved[i] for i in used], [ways[i] for i in used]).to(h)
        if not bool(torch.isfinite(h).all()):
            raise NumericalError(
                f"{self.name}: the gradient of the validation loss is not finite, so no radius can be trained. Train "
                "with a smaller learning rate, or evaluate in float32"
            )
        return (gamma - self.mu * adam.direction(h)).clamp(min=0.0).minimum(largest)

    @torch.no_grad()
    def _project(
        self,
        moved: Sequence[Anchored],
        deltas: Sequence[Tensor],
        kept: Sequence[Tensor],
        norms: Sequence[Tensor],
        gamma: Tensor,
    ) -> None:
        """Write ``theta(gamma)``; rows that no radius reaches have their trained value, bit for bit."""
        _put_back(moved, kept)
        for one, delta, norm, radius in zip(moved, deltas, norms, gamma, strict=True):
            limit = radius.to(norm)
            scale_rows(one, delta, torch.where(norm > limit, limit / norm, torch.ones_like(norm)))

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = run_model(model, batch)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            raise GuardError(
                f"{self.name}: {type(model).__name__} returned no loss for a validation batch, and the radii are "
                "trained on it: batches must hold labels, and the model must return a mapping with loss, as those of "
                "transformers do"
            )
        if not bool(torch.isfinite(loss.detach())):
            raise NumericalError(f"{self.name}: the loss of a validation batch is {float(loss.detach())}")
        return loss


def _way(delta: Tensor, norm: Tensor, radius: Tensor) -> Tensor:
    """``dtheta / dgamma``: ``d_i / n_i`` of rows outside the ball or on it, else 0."""
    ways = torch.where((norm >= radius.to(norm)) & (norm > 0), norm.reciprocal(), torch.zeros_like(norm))
    return (rows_of(delta) * ways[:, None]).reshape(delta.shape)


def _largest(norm: Tensor) -> Tensor:
    return norm.max() if norm.numel() else norm.sum()


def _least(norm: Tensor) -> Tensor:
    """The smallest norm of a row that has moved; infinite if this rank has none."""
    return torch.where(norm > 0, norm, torch.inf).min() if norm.numel() else norm.new_full((), torch.inf)


@torch.no_grad()
def _put_back(moved: Sequence[Anchored], kept: Sequence[Tensor]) -> None:
    for one, value in zip(moved, kept, strict=True):
        shards.local(one.parameter.detach()).copy_(value)
