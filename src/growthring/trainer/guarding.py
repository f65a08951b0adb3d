"""What a stream asks of its guards: their callbacks, what they say of every tensor, and what they want done."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from growthring.errors import ConfigError
from growthring.guards import FTP, PEGP, FreshLoRA, Guard, GuardCallback, Radius
from growthring.streams import TaskStream

__all__ = ["check_one_pass", "explain", "guard_callbacks", "merge_weight", "prepares", "undecided"]


class GuardCallbacks(TrainerCallback):  # type: ignore[misc]
    """Calls several guards, one after another: of two callbacks of one class the Trainer warns.

    Args:
        callbacks: The callbacks of the guards, in order.
    """

    def __init__(self, callbacks: Sequence[GuardCallback]) -> None:
        self._callbacks = list(callbacks)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the task."""
        for callback in self._callbacks:
            callback.on_train_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trim the gradients."""
        for callback in self._callbacks:
            callback.on_pre_optimizer_step(args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the constraints."""
        for callback in self._callbacks:
            callback.on_optimizer_step(args, state, control, **kwargs)


def guard_callbacks(guards: Sequence[Guard]) -> list[TrainerCallback]:
    """What makes a :class:`StreamTrainer` respect some guards; callbacks of a guard's own class stay as they are."""
    made = [guard.callback(loss_added=True) for guard in guards]
    plain = [callback for callback in made if type(callback) is GuardCallback]
    if len(plain) < 2 or len(plain) < len(made):
        return made
    return [GuardCallbacks(plain)]


def merge_weight(guards: Sequence[Guard]) -> float:
    """The weight of a free training in what a task leaves behind: the ``merge`` of the one guard that has any.

    Raises:
        ConfigError: If several guards ask for one, or one beside guards that bound how far weights move.
    """
    weights = [(guard.name, getattr(guard, "merge", 0.0)) for guard in guards]
    # True and False are no weights: FreshLoRA says by them whether it merges branches
    found = [
        (name, float(w)) for name, w in weights if isinstance(w, int | float) and not isinstance(w, bool) and w > 0
    ]
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise ConfigError(f"the guards {names} all have merge > 0; one of them can merge")
    bounds = [guard.name for guard in guards if isinstance(guard, FTP | Radius)]
    if found and bounds:
        raise ConfigError(
            f"the guard {found[0][0]} has merge > 0, which blends in a training without guards, and {bounds[0]} "
            "bounds how far weights move: the blend would lie outside. Leave merge at 0, or drop the other guard"
        )
    return found[0][1] if found else 0.0


def check_one_pass(stream: TaskStream, guards: Sequence[Guard]) -> None:
    """Refuse guards that would train on rows again where each is seen once.

    Raises:
        ConfigError: If one would.
    """
    if not stream.online:
        return
    once = f"the stream is {stream.scenario}: each training row is seen once"
    if any(undecided(guard) for guard in guards):
        raise ConfigError(
            f"{once}, and energy='auto' trains on the second task once for every candidate. Give a number, or choose "
            "the scenario 'class'"
        )
    if merge_weight(guards):
        raise ConfigError(
            f"{once}, and merge > 0 trains on every task twice. Leave merge at 0, or choose the scenario 'class'"
        )


def prepares(guard: Guard) -> bool:
    """Whether a guard wants to see a task before it trains."""
    return type(guard).prepare is not Guard.prepare


def undecided(guard: Guard) -> bool:
    """Whether a guard chooses its energy at the first boundary."""
    return isinstance(guard, PEGP) and guard.energy == "auto"


def explain(model: nn.Module, guards: Sequence[Guard]) -> list[dict[str, Any]]:
    """What guards do with every trainable tensor, as plain values; guards that do not say are left out.

    Of what :class:`FreshLoRA` begins anew and another guard speaks of, only the other's word counts.
    """
    rows = []
    said = [g.explain(model) if callable(getattr(g, "explain", None)) else () for g in guards]  # type: ignore[attr-defined]
    spoken = {p.name for g, plans in zip(guards, said, strict=True) if not isinstance(g, FreshLoRA) for p in plans}
    for guard, plans in zip(guards, said, strict=True):
        for plan in plans:
            if isinstance(guard, FreshLoRA) and plan.name in spoken:
                continue
            fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(plan).items()}
            rows.append({"guard": guard.name, **fields})
    return rows
