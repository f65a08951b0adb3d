"""Sentences about a task that a reader of its certificate should see."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from .base import LEAK_LIMIT
from .constraint import Constraint, Leak

__all__ = ["of_steps", "of_tensors", "warn_narrow"]


def of_steps(task: Constraint | None, leaks: Mapping[str, Leak]) -> list[str]:
    """What was measured of the task's steps."""
    notes = []
    if task and (moved := task.moved()):
        notes.append(f"{len(moved)} held tensors have moved since the last step (the first: {moved[0]})")
    if task and (narrow := task.narrow()):
        notes.append(f"{narrow} tensors are kept in half precision: their leak is that of rounding")
    elif rounded := [name for name, leak in leaks.items() if leak.rounding > LEAK_LIMIT]:
        notes.append(
            f"{len(rounded)} tensors moved by so little that rounding them to their dtype may leak more than 1e-5 "
            f"of it (the first: {rounded[0]}); outputs change by rounding only"
        )
    return notes


def of_tensors(left: Sequence[str], fresh: Sequence[str]) -> list[str]:
    """What no condition covers.

    Args:
        left: Tensors of earlier tasks that were left free.
        fresh: Tensors that train for the first time.
    """
    notes = []
    if left:
        notes.append(f"{len(left)} trainable tensors were left free: the guarantee does not cover them")
    if fresh:
        notes.append(
            f"{len(fresh)} trainable tensors are new in this task: old inputs are covered if they do not use them"
        )
    return notes


def warn_narrow(who: str, task: Constraint, stacklevel: int) -> None:
    """Warn of protected tensors in half precision."""
    if narrow := task.narrow():
        warnings.warn(
            f"{who}: {narrow} protected tensors are in half precision; rounding them leaks more than 1e-5. Keep "
            "trainable tensors in float32 (autocast may still compute in half precision)",
            stacklevel=stacklevel,
        )
