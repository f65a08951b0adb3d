"""Training runs by the options of a case: the same in one process and, split over them, in several."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from distributed_helpers import STEPS, Net, loss_of, optimizer_for, protect, state_of, weights
from torch import Tensor, nn

from growthring.optim import LayerWise

Result = dict[str, Any]


def train(
    options: dict[str, Any],
    *,
    wrap: str = "none",
    dtype: torch.dtype = torch.float32,
    steps: int = STEPS,
    memory: str = "none",
    clip: float | None = None,
    scale: float = 1.0,
    broken: int | None = None,
    idle: str | None = None,
    layerwise: bool = False,
) -> Result:
    """Train :class:`Net` on the global batches.

    Args:
        options: Of the optimizer.
        wrap: ``"none"``; ``"ddp"``; ``"local"``: as many processes that do not average gradients; ``"fsdp"``;
            ``"hsdp"``: shards in pairs of ranks, copies over the pairs.
        dtype: Of weights.
        steps: Number of them.
        memory: ``"none"``, ``"exact"`` or ``"published"``.
        clip: Largest norm of gradients.
        scale: Of the loss: of gradients, far from 1 where ranges of floats are tested.
        broken: A step in which the last rank has a NaN in its part of the gradient of ``tall``.
        idle: What the first rank has in place of gradients of ``look`` in two steps of three: ``"zero"`` or
            ``"none"``.
        layerwise: Project gradients during backward.
    """
    model, quiet = wrapped(Net(dtype), wrap)
    if wrap == "local":
        options = options | {"average_over": dist.group.WORLD}
    optimizer = optimizer_for(model, options)
    if memory != "none":
        protect(optimizer, exact=memory == "exact")
    mode = LayerWise(optimizer) if layerwise else nullcontext()
    with warnings.catch_warnings(record=True) as caught, mode:
        warnings.simplefilter("always")
        for step in range(steps):
            optimizer.zero_grad()
            with quiet():
                (loss_of(model, step, dtype) * scale).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if step == broken:
                spoil(model)
            if idle is not None and step % 3 and dist.get_rank() == 0:
                for p in model.module.look.parameters():
                    p.grad = torch.zeros_like(p) if idle == "zero" else None
            optimizer.step()
    return {
        "weights": weights(model),
        "state": state_of(optimizer),
        "said": [str(w.message) for w in caught if "matrices" in str(w.message)],
    }


def wrapped(model: nn.Module, wrap: str) -> tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]:
    """The model in its wrapper, and in what context its backward runs."""
    if wrap == "ddp" or wrap == "local":
        from torch.nn.parallel import DistributedDataParallel

        parallel = DistributedDataParallel(model)
        return parallel, (nullcontext if wrap == "ddp" else parallel.no_sync)
    if wrap in ("fsdp", "hsdp"):
        shard(model, wrap)
    return model, nullcontext


def shard(model: nn.Module, wrap: str = "fsdp", **options: Any) -> None:
    """Shard the model, one of its layers as a unit of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = dist.get_world_size()
    if wrap == "fsdp":
        mesh = init_device_mesh("cpu", (ranks,))
    else:
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("copies", "shards"))
    fully_shard(model.tall, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def spoil(model: nn.Module) -> None:
    """Make one number NaN in the last rank's part of the gradient of ``tall``."""
    gradient = next(p.grad for name, p in model.named_parameters() if name.endswith("tall.weight"))
    part: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
        part[-1, 0] = float("nan")


def train_all(cases: dict[str, dict[str, Any]]) -> dict[str, Result]:
    """Several runs, one after the other; the entries of a case are the arguments of :func:`train`."""
    return {name: train(**case) for name, case in cases.items()}
