"""State of one parameter: what there is, how it starts, how it is loaded. Tensors only; shapes follow from options."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from growthring.errors import ConfigError

from ._matrix import like_rows, local, row_shard
from ._options import SIDE_CODES, matrix_shape, side_of
from ._rules import second_moment_shape

__all__ = ["SCALARS", "migrate", "restore_dtypes", "start_adamw", "start_projected"]

SCALARS = {"step": torch.float32, "refreshes": torch.int64, "skipped": torch.int64, "share": torch.float32}
"""Scalars on the CPU: steps taken, bases found, steps left out, and the share of its gradient's energy that the basis
held when it was found."""


def start_adamw(state: dict[str, Any], p: Tensor) -> None:
    """What ``torch.optim.AdamW`` keeps.

    Raises:
        ConfigError: If the parameter was projected before, or the state is that of another shape.
    """
    if "basis" in state:
        raise ConfigError(
            f"a parameter of shape {tuple(p.shape)} was projected so far and its group now has rank=None: its moments "
            "are those of a subspace. Clear optimizer.state[parameter], or put the rank back"
        )
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    elif state["exp_avg"].shape != p.shape:  # torch's fused kernel would write beyond it
        raise _another_shape(p)


def start_projected(state: dict[str, Any], p: Tensor, group: Mapping[str, Any]) -> str:
    """Give a projected parameter its state, if it has none yet.

    Its shapes follow from the parameter and the options alone, and the basis starts as the first coordinate axes: so
    a fresh optimizer that has taken one step with zero gradients can be loaded into.

    Returns:
        The side of its basis: what the state says, else what the options do.

    Raises:
        ConfigError: If the state was made with options that give it another shape.
    """
    if "basis" in state:
        return _check(state, p, group)
    rank, (m, n) = group["rank"], matrix_shape(p)
    side = side_of(p, group["side"])
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    device = local(p).device
    rows, axis = {"right": (m, n), "left": (n, m), "two-sided": (rank, n)}[side]
    sharded = row_shard(p) is not None

    def zeros(shape: tuple[int, int], *, by_rows: bool) -> Tensor:
        if sharded and by_rows:
            return like_rows(p, shape[1], dtype)
        return torch.zeros(shape, dtype=dtype, device=device)

    for name, kind in SCALARS.items():
        state[name] = torch.zeros((), dtype=kind)
    state["side"] = torch.tensor(SIDE_CODES.index(side))
    state["basis"] = torch.eye(axis, rank, dtype=dtype, device=device)
    if side == "two-sided":
        state["basis_out"] = torch.eye(m, rank, dtype=dtype, device=device)
    state["exp_avg"] = zeros((rows, rank), by_rows=True)
    shape = second_moment_shape(group["rule"], rows, rank)
    if shape is not None:
        state["exp_avg_sq"] = zeros(shape, by_rows=group["rule"] != "shared")
    if group["rule"] == "adafactor":
        state["exp_avg_sq_columns"] = zeros((1, rank), by_rows=False)
    return side


def _check(state: Mapping[str, Any], p: Tensor, group: Mapping[str, Any]) -> str:
    side, rank, rule = SIDE_CODES[int(state["side"])], state["basis"].shape[1], group["rule"]
    wanted = second_moment_shape(rule, state["exp_avg"].shape[0], group["rank"])
    held = state.get("exp_avg_sq")
    if side != "right" and row_shard(p) is not None:
        raise ConfigError(
            f"the state of a parameter of shape {tuple(p.shape)} has its basis on the side {side!r}, and the rows of "
            "the parameter are spread over ranks now, which needs side='right'. Train with side='right' from the start"
        )
    m, n = matrix_shape(p)
    far = state["basis_out" if side == "two-sided" else "exp_avg"]
    if (state["basis"].shape[0], far.shape[0]) != ((m, n) if side == "left" else (n, m)):
        raise _another_shape(p)
    for option, given, fits in (
        ("rank", group["rank"], group["rank"] == rank),
        ("side", group["side"], group["side"] in ("auto", side)),
        ("rule", rule, wanted == (None if held is None else tuple(held.shape))),
    ):
        if not fits:
            raise ConfigError(
                f"{option}={given!r}: the state of a parameter of shape {tuple(p.shape)} was made with another one "
                f"(rank {rank}, side {side!r}). Put it back, or clear optimizer.state[parameter] to start afresh"
            )
    return side


def _another_shape(p: Tensor) -> ConfigError:
    return ConfigError(
        f"the state of a parameter of shape {tuple(p.shape)} belongs to one of another shape: was it loaded from "
        "another model? Load the right one, or clear optimizer.state[parameter] to start afresh"
    )


def restore_dtypes(optimizer: torch.optim.Optimizer, given: Mapping[str, Any]) -> None:
    """Undo what ``torch.optim.Optimizer.load_state_dict`` does to projected state: the cast to the weight's dtype."""
    saved = chain.from_iterable(group["params"] for group in given["param_groups"])
    ours = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for key, p in zip(saved, ours, strict=True):
        entry = given["state"].get(key)
        if not entry or "basis" not in entry:
            continue
        for name, value in entry.items():
            if isinstance(value, Tensor):
                device = torch.device("cpu") if value.ndim == 0 else local(p).device
                optimizer.state[p][name] = value.detach().to(device, copy=True)
        migrate(optimizer.state[p])


def migrate(entry: dict[str, Any]) -> None:
    """Fill in what a state of an earlier version lacks."""
    if "basis" in entry:
        for name, kind in SCALARS.items():
            if not isinstance(entry.get(name), Tensor):
                entry[name] = torch.tensor(entry.get(name, 1 if name == "refreshes" else 0), dtype=kind)
