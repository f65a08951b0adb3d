"""What a projected optimizer refuses: parameters, gradients, and what was done to them since they were given."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from growthring.errors import ConfigError

from ._options import check_options, matrix_shape

__all__ = ["check_gradient", "check_group", "check_protected", "check_whole"]


def check_group(group: Mapping[str, Any], who: str) -> bool:
    """Refuse a parameter group that cannot work.

    Returns:
        Whether it has matrices that are to be projected.

    Raises:
        ConfigError: On options out of range, complex or flattened parameters, or a rank above every matrix.
    """
    check_options(group, who)
    complexes = [tuple(p.shape) for p in group["params"] if p.is_complex()]
    if complexes:
        raise ConfigError(
            f"{who}: a parameter of shape {complexes[0]} is complex; real floating parameters are needed. View it "
            "as real (torch.view_as_real) or give it another optimizer"
        )
    for p in group["params"]:
        _refuse_flat(p, who)
    matrices = [matrix_shape(p) for p in group["params"] if p.ndim > 1 and p.requires_grad]
    rank = group["rank"]
    if rank is not None and matrices and rank > max(min(shape) for shape in matrices):
        raise ConfigError(
            f"{who}(rank={rank}): it is above every matrix of its group; the largest shorter side is "
            f"{max(min(shape) for shape in matrices)}. Lower the rank (optimizer.rank in a stream's "
            "file), or give the group rank=None for AdamW"
        )
    return rank is not None and bool(matrices)


def check_gradient(p: Tensor) -> None:
    """Refuse a sparse gradient.

    Raises:
        ConfigError: Saying what to do about it.
    """
    if p.grad is not None and (p.grad.is_sparse or p.grad.layout != torch.strided):
        raise ConfigError(
            f"a parameter of shape {tuple(p.shape)} has a sparse gradient; dense ones are needed. Set "
            "sparse=False in its embedding, or give it torch.optim.SparseAdam"
        )


def check_whole(
    p: Tensor, group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], of_matrices: Collection[int]
) -> None:
    """Refuse what a wrapper has put in the place of matrices since they were given.

    Args:
        p: A parameter of ``group`` that is about to be stepped without projection for the first time.
        group: Its group.
        groups: All groups.
        of_matrices: Numbers of those that had matrices to be projected.

    Raises:
        ConfigError: If it is flat, or nothing but flat parameters is left of a group of matrices.
    """
    _refuse_flat(p, "step")
    number = next(i for i, one in enumerate(groups) if one is group)
    if number in of_matrices and group["rank"] is not None and all(q.ndim < 2 for q in group["params"]):
        raise ConfigError(
            f"step: parameter group {number} had matrices and now has flat parameters only (one of {p.numel()} "
            "numbers), as DeepSpeed ZeRO and FSDP1 make them; a projection needs whole rows. Use DDP or FSDP2 "
            "(fully_shard) instead"
        )


def check_protected(protected: Collection[Tensor], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to step when protected parameters have been replaced: the new ones would not be protected.

    Raises:
        ConfigError: Saying how many, and when to protect.
    """
    ours = {p for group in groups for p in group["params"]}
    lost = [tuple(p.shape) for p in protected if p not in ours]
    if lost:
        raise ConfigError(
            f"protect: {len(lost)} protected parameters (the first of shape {lost[0]}) are no longer in the "
            "parameter groups; accelerate replaces them when it shards a model. Call protect() after prepare()"
        )


def _refuse_flat(parameter: Tensor, who: str) -> None:
    """Refuse parameters that a wrapper has flattened: their rows cannot be told.

    Raises:
        ConfigError: Naming the wrapper and what works in its place.
    """
    if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_shape"):
        wrapper = "partitioned by DeepSpeed ZeRO"
    elif getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
        wrapper = "wrapped by FullyShardedDataParallel (FSDP1)"
    else:
        return
    raise ConfigError(
        f"{who}: a parameter is {wrapper}, which flattens matrices to one dimension; a projection needs whole rows. "
        "Use DDP or FSDP2 (fully_shard) instead"
    )
