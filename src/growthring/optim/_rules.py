"""Inner rules: from coordinates of a gradient to the step that is taken in them.

Rows of the coordinates lie on the first axis, directions of the basis on the last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["adam", "adamw_step", "compiled", "elementwise", "second_moment_shape"]


def second_moment_shape(rule: str, rows: int, columns: int) -> tuple[int, int] | None:
    """Shape of what a rule keeps beside the first moment; of ``"adafactor"`` the row means (the column means follow).

    Args:
        rule: The rule.
        rows: Rows of the coordinates.
        columns: Their directions.
    """
    return {"adam": (rows, columns), "shared": (1, columns), "adafactor": (rows, 1), "momentum": None}[rule]


def adamw_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    *,
    betas: Sequence[float],
    lr: float | Tensor,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of ``torch.optim.AdamW`` on lists: its fused kernel on the CPU, its default elsewhere.

    That kernel walks through memory whatever the strides, so it is given contiguous tensors only.
    """
    every = (*parameters, *gradients, *first, *second)
    fused = all(t.device.type == "cpu" and t.is_contiguous() for t in every) or None
    adamw(
        parameters,
        gradients,
        first,
        second,
        [],
        steps,
        fused=fused,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def adam(
    coordinates: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    *,
    rate: float,
    betas: Sequence[float],
    eps: float,
) -> list[Tensor]:
    """Adam's step in every matrix's coordinates, by torch's own kernel on updates that start at zero."""
    updates = [torch.zeros_like(c) for c in coordinates]
    adamw_step(updates, coordinates, first, second, steps, betas=betas, lr=rate, eps=eps, weight_decay=0.0)
    return updates


def elementwise(
    rule: str,
    coordinates: Tensor,
    first: Tensor,
    second: Tensor | None,
    columns: Tensor | None,
    over_rows: Tensor | None,
    correction: Tensor,
    rate: Tensor,
    betas: Sequence[Tensor],
    eps: Tensor,
) -> Tensor:
    """One matrix's step by any rule, in plain operations that ``torch.compile`` can fuse.

    * ``"adam"``: as ``torch.optim.Adam``.
    * ``"momentum"``: ``m <- b1 m + L``, ``N = m`` (torch's SGD without dampening).
    * ``"shared"``: as Adam, with the mean of ``L^2`` over the rows as the second moment of all of them. ``N`` is then
      the first moment with scaled columns: what its columns are orthogonal to, they stay orthogonal to.
    * ``"adafactor"``: as Adam, with the outer product of row and column means over their mean (Shazeer and Stern 2018,
      arXiv 1804.04235, algorithm 4) as the second moment.

    Args:
        rule: Name of the rule.
        coordinates: ``L``, ``(rows, r)``.
        first: First moment, changed in place.
        second: Second moment of :func:`second_moment_shape`, changed in place; ``None`` for ``"momentum"``.
        columns: Column means ``(1, r)`` of ``"adafactor"``, changed in place; else ``None``.
        over_rows: ``(1, r)`` mean of ``L^2`` over the rows of all ranks, for the last two rules; else ``None``.
        correction: ``1 - b2^t``, a scalar.
        rate: Learning rate times scale, over ``1 - b1^t`` where there is a second moment; a scalar.
        betas: Decay of first and second moment, scalars.
        eps: Added to the root of the second moment, a scalar.

    Numbers come as tensors, so that a schedule that moves them compiles nothing anew.

    Returns:
        ``-lr scale N``, ``(rows, r)``.
    """
    beta1, beta2 = betas
    if second is None:
        return first.mul_(beta1).add_(coordinates) * -rate
    first.lerp_(coordinates, 1.0 - beta1)
    if rule == "adam":
        moment = second.lerp_(coordinates.square(), 1.0 - beta2)
    elif rule == "shared":
        assert over_rows is not None
        moment = second.lerp_(over_rows, 1.0 - beta2)
    else:
        assert over_rows is not None
        assert columns is not None
        row = second.lerp_(coordinates.square().mean(1, keepdim=True), 1.0 - beta2)
        column = columns.lerp_(over_rows, 1.0 - beta2)
        moment = row * (column / column.mean().clamp_min(torch.finfo(column.dtype).tiny))
    scale = (moment / correction).sqrt().add(eps)
    return first / scale * -rate


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """:func:`elementwise` through ``torch.compile``, whole and for any shape."""
    return torch.compile(elementwise, fullgraph=True, dynamic=True)
