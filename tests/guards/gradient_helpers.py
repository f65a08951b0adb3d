"""What the tests of GradientMemory share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from guard_helpers import OPTIMIZERS, fit, rows, trainable
from torch import Tensor, nn

from growthring.guards import Certificate, GradientMemory

ALL_OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    **OPTIMIZERS,
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=3e-3, weight_decay=1e-2),
}


def learn(
    guard: GradientMemory, model: nn.Module, batch: Any, name: str | None = None, **settings: Any
) -> Certificate:
    """One task from start to end in a loop of one's own."""
    guard.attach(model)
    guard.begin_task(name)
    if "optimizer" in settings:
        guard.bind(settings["optimizer"])
    fit(model, batch, guard, **{"steps": 25, **settings})
    return guard.end_task(name)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Trainable matrices as they are now."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1}


def basis(guard: GradientMemory, key: str) -> Tensor:
    return guard._spaces[key].basis().double()


def projector(guard: GradientMemory, key: str) -> Tensor:
    return basis(guard, key) @ basis(guard, key).mT


class Projected(torch.optim.Optimizer):
    """A tiny optimizer in a subspace, with the door that guards know: SGD in coordinates, decay, a basis for a while.

    ``side``: the side that has the basis, as GORP names it. Matrices only; others take plain SGD.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.05, rank: int = 4, refresh: int = 3, side: str = "right"
    ) -> None:
        super().__init__(list(params), {"lr": lr})
        self.rank, self.refresh, self.side = rank, refresh, side
        self.spaces: dict[Any, Any] = {}
        self.exact = True
        self.observer: Any = None
        self.shown: list[Tensor] = []

    def protect(self, spaces: Any, *, exact: bool = True) -> set[Any]:
        self.spaces, self.exact = dict(spaces), exact
        return {p for p in spaces if min(p.shape[0], p[0].numel()) >= self.rank}

    def observe(self, observer: Any) -> None:
        self.observer = observer

    def _outside(self, p: Tensor, x: Tensor) -> Tensor:
        s_in, s_out = self.spaces.get(p, (None, None))
        for _ in range(2):
            x = x if s_in is None else s_in.reject(x)
            x = x if s_out is None else s_out.reject(x.mT).mT
        return x

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.ndim < 2 or min(p.shape[0], p[0].numel()) < self.rank:
                    p.add_(p.grad, alpha=-group["lr"])
                    continue
                state, g = self.state[p], self._outside(p, p.grad.reshape(p.shape[0], -1))
                if not bool(g.any()):  # LoRA's A while B is zero: no basis to find
                    continue
                if state.setdefault("step", 0) % self.refresh == 0:
                    u, _, vh = torch.linalg.svd(g, full_matrices=False)
                    state["in"] = None if self.side == "left" else vh[: self.rank].mT.clone()
                    state["out"] = None if self.side == "right" else u[:, : self.rank].clone()
                state["step"] += 1
                low = g if state["in"] is None else g @ state["in"]
                low = low if state["out"] is None else state["out"].mT @ low
                state["first"] = 0.9 * state["first"] + 0.1 * low if "first" in state else 0.1 * low
                if self.observer is not None:
                    self.observer(p, low, state["in"], state["out"], state["first"])
                back = low if state["out"] is None else state["out"] @ low
                back = back if state["in"] is None else back @ state["in"].mT
                self.shown.append(back)
                decay = self._outside(p, p.reshape(p.shape[0], -1)) if self.exact else p.reshape(p.shape[0], -1)
                p.add_((-group["lr"] * (back + 0.1 * decay)).reshape(p.shape))


def few(count: int, dim: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows in a random subspace of the given rank."""
    return rows(count, rank, seed, dtype) @ rows(rank, dim, seed + 100, dtype)


__all__ = ["ALL_OPTIMIZERS", "Projected", "basis", "few", "learn", "matrices", "projector", "trainable"]
