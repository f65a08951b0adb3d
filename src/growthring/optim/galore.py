"""GaLore, as published: GORP without a memory, with full SVDs and moments that keep their numbers.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507, ICML 2024. It
takes the steps of ``galore-torch`` 1.0 (``proj_type="std"``), and heals what is broken there: weight decay arrives,
state is tensors only, every shape works.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .gorp import GORP

__all__ = ["GaLore"]


class GaLore(GORP):
    """Adam in the top ``r`` singular directions of the gradient, found by SVD every ``refresh`` steps.

    What differs from :class:`GORP`: full SVD, all matrices refreshed in the same step, moments not rotated, ``eps``
    added to a root without bias correction, decay taken after the step. Each but the last two can be changed.

    Args:
        params: Tensors, ``(name, tensor)`` pairs or parameter groups.
        lr: Learning rate; default 1e-3.
        rank: Dimension of the subspace; default 128.
        refresh: Steps between two SVDs (``update_proj_gap``); default 200.
        scale: Factor on projected updates; default 0.25.
        side: ``"auto"`` (default) is ``proj_type="std"``, ``"two-sided"`` is ``"full"``.
        betas: Decay of the moments; default (0.9, 0.999).
        eps: Default 1e-6.
        weight_decay: Decoupled weight decay; default 0.
        range_finder: ``"full"`` (default); the others of :class:`GORP` span nearly the same at a fraction of its cost.
        **options: Others of :class:`GORP`.

    Raises:
        ConfigError: As :class:`GORP`.
    """

    _published = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = 128,
        refresh: int = 200,
        scale: float = 0.25,
        side: str = "auto",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        range_finder: str = "full",
        rotate: bool = False,
        stagger: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, rank=rank, refresh=refresh, scale=scale, side=side, betas=betas, eps=eps,
            weight_decay=weight_decay, range_finder=range_finder, rotate=rotate, stagger=stagger, **options,
        )  # fmt: skip
