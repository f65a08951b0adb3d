"""The products of a step: into the subspace, out of it, and what keeps an update outside what is protected.

A large matrix is read once and written once, by two thin products. Small ones of one shape are stacked, for there a
call costs more than its work.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from growthring.subspace import widest_dtype

from ._matrix import Shard, local
from ._ranges import Spaces, times
from ._rules import compiled, elementwise

__all__ = [
    "Job",
    "apply",
    "by_elements",
    "by_options",
    "decay",
    "energies",
    "is_usable",
    "kept_outside",
    "project",
    "sweep",
    "totals",
]

SMALL = 1 << 15
"""Matrices of fewer elements share batched products."""


@dataclass(eq=False)
class Job:
    """One matrix in one step, turned so that its basis lies on the right: ``(rows, columns)``.

    Attributes:
        parameter: The parameter.
        group: Its options.
        state: Its state.
        ordinal: Its number among the projected ones.
        side: Where its basis lies before the turn.
        weight: The local matrix, turned; a view of the parameter where its layout lets it.
        gradient: The same of its gradient; ``None`` where only coordinates are given.
        spaces: What its update must stay out of, turned.
        shard: How its rows are spread over ranks.
        coordinates: Of the gradient in the basis; ``None`` until they are made.
    """

    parameter: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    ordinal: int
    side: str
    weight: Tensor
    gradient: Tensor | None
    spaces: Spaces
    shard: Shard | None
    coordinates: Tensor | None = None

    @property
    def basis(self) -> Tensor:
        """``(columns, r)``."""
        return local(self.state["basis"])

    @property
    def out(self) -> Tensor | None:
        """``(rows, r)``, of two-sided jobs."""
        return self.state.get("basis_out")

    @property
    def first(self) -> Tensor:
        """First moment."""
        return local(self.state["exp_avg"])

    @property
    def known(self) -> Tensor:
        """The coordinates."""
        assert self.coordinates is not None
        return self.coordinates

    def lifted(self, coordinates: Tensor) -> Tensor:
        """Back to ``(rows, columns)``."""
        return (coordinates if self.out is None else self.out @ coordinates) @ self.basis.mT


def energies(tensors: Sequence[Tensor], jobs: Sequence[Job]) -> list[float]:
    """``||tensor||_F^2`` of each, over all ranks that share its rows; 0 or not finite where it cannot be used.

    One reading of each tensor. What leaves the range of float32 when squared is looked at again by its largest entry,
    and a finite non-zero tensor then answers the square of that, in float64.
    """
    if not jobs:
        return []
    values: list[float] = torch.stack(totals([_square(t).to(torch.float32) for t in tensors], jobs)).tolist()
    again = [i for i, value in enumerate(values) if not 0.0 < value < math.inf]  # the same ones on every rank
    if again:
        peaks = totals([_peak(tensors[i]) for i in again], [jobs[i] for i in again], largest=True)
        for i, peak in zip(again, peaks, strict=True):
            values[i] = float(peak * peak)
    return values


def totals(tensors: Sequence[Tensor], jobs: Sequence[Job], *, largest: bool = False) -> list[Tensor]:
    """Each tensor's sum, or largest entries, over the ranks that share the rows of its job; one message for all."""
    found = list(tensors)
    if all(job.shard is None for job in jobs):
        return found
    together: dict[Any, list[int]] = defaultdict(list)
    for i, job in enumerate(jobs):
        if job.shard is not None:
            together[job.shard.group, found[i].dtype, found[i].device].append(i)
    for (group, *_), where in together.items():
        flat = torch.cat([found[i].reshape(-1) for i in where])
        dist.all_reduce(flat, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
        for i, part in zip(where, flat.split([found[i].numel() for i in where]), strict=True):
            found[i] = part.view(found[i].shape)
    return found


def is_usable(energy: float) -> bool:
    """Finite and not zero."""
    return 0.0 < energy < math.inf


def _square(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        tensor = tensor.mT if tensor.mT.is_contiguous() else tensor.contiguous()
    flat = tensor.view(-1)
    return torch.dot(flat, flat)


def _peak(tensor: Tensor) -> Tensor:
    """The largest magnitude in float64; infinite for NaN, which the maximum over ranks may drop."""
    peak = tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())
    return peak.to(widest_dtype(peak.device)).nan_to_num(nan=math.inf, posinf=math.inf)


def project(jobs: Iterable[Job]) -> None:
    """Give every job the coordinates of its gradient."""
    for members in _alike(jobs):
        gradients = [j.gradient for j in members if j.gradient is not None]
        if len(members) == 1:
            coordinates = [times(gradients[0], members[0].basis)]
        else:
            coordinates = list(torch.bmm(torch.stack(gradients), torch.stack([j.basis for j in members])).unbind())
        for job, found in zip(members, coordinates, strict=True):
            job.coordinates = found if job.out is None else job.out.mT @ found


def apply(jobs: Iterable[Job], updates: Sequence[Tensor]) -> None:
    """Lift every update ``(rows, r)`` and add it to its weight."""
    by_job = dict(zip(jobs, updates, strict=True))
    for members in _alike(by_job):
        lifted = [u if j.out is None else j.out @ u for j, u in ((j, by_job[j]) for j in members)]
        if len(members) > 1:
            whole = torch.bmm(torch.stack(lifted), torch.stack([j.basis for j in members]).mT)
            torch._foreach_add_(
                [j.weight for j in members], [w.to(j.weight.dtype) for w, j in zip(whole, members, strict=True)]
            )
            continue
        job, update = members[0], lifted[0]
        if job.weight.dtype == update.dtype:
            job.weight.addmm_(update, job.basis.mT)
        else:  # a bf16 or fp16 weight: the sum is formed in float32 and rounded once
            job.weight.copy_(torch.addmm(job.weight.to(update.dtype), update, job.basis.mT))


def _alike(jobs: Iterable[Job]) -> list[list[Job]]:
    """Small matrices of one shape together, all others alone."""
    groups: dict[Any, list[Job]] = defaultdict(list)
    for job in jobs:
        w = job.weight
        key = (w.shape, w.dtype, w.device, job.basis.shape) if 0 < w.numel() < SMALL else job.ordinal
        groups[key].append(job)
    return list(groups.values())


def by_options(jobs: Iterable[Job], *, by_step: bool) -> list[list[Job]]:
    """Jobs that one call of a rule can take: of one group, and of one step count where that is asked for."""
    groups: dict[Any, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[id(job.group), float(job.state["step"]) if by_step else 0.0, job.first.device].append(job)
    return list(groups.values())


def by_step(parameters: Iterable[Tensor], states: Mapping[Tensor, Mapping[str, Any]]) -> list[list[Tensor]]:
    """Parameters of one step count together."""
    groups: dict[float, list[Tensor]] = defaultdict(list)
    for p in parameters:
        groups[float(states[p]["step"])].append(p)
    return list(groups.values())


def by_elements(jobs: Sequence[Job], rate: float, betas: Sequence[float], eps: float) -> list[Tensor]:
    """Steps of a rule that torch has no kernel for, or of any rule through ``torch.compile``."""
    means: list[Tensor | None] = [None] * len(jobs)
    if jobs[0].group["rule"] in ("shared", "adafactor"):
        sums = totals([j.known.square().sum(0, keepdim=True) for j in jobs], jobs)
        means = [
            s / (j.known.shape[0] if j.shard is None else sum(j.shard.counts)) for j, s in zip(jobs, sums, strict=True)
        ]
    return [_by_elements(job, mean, rate, betas, eps) for job, mean in zip(jobs, means, strict=True)]


def _by_elements(job: Job, over_rows: Tensor | None, rate: float, betas: Sequence[float], eps: float) -> Tensor:
    state = job.state
    state["step"].add_(1)
    second, count = state.get("exp_avg_sq"), float(state["step"])
    if second is not None:
        rate /= 1.0 - betas[0] ** count
    function = compiled() if job.group["compile"] else elementwise
    known = job.known
    beta1, beta2, correction, size, small = known.new_tensor([*betas, 1.0 - betas[1] ** count, rate, eps]).unbind()
    return function(
        job.group["rule"], known, job.first, None if second is None else local(second),
        state.get("exp_avg_sq_columns"), over_rows, correction, size, (beta1, beta2), small,
    )  # fmt: skip


def sweep(jobs: Sequence[Job]) -> None:
    """Take out of the coordinates of gradients what is protected, before the rule sees them."""
    plain = [j for j in jobs if j.out is None and j.spaces.outputs is not None]
    for job, coordinates in zip(plain, _outside_outputs(plain, [j.known for j in plain]), strict=True):
        job.coordinates = coordinates
    for job in jobs:
        spaces = job.spaces
        if spaces.exact:
            continue
        if job.out is not None and spaces.outputs is not None:
            job.coordinates = job.out.mT @ spaces.reject_outputs(job.out @ job.known)
        if spaces.inputs is not None:
            job.coordinates = job.known @ (job.basis.mT @ spaces.reject_inputs(job.basis))


def kept_outside(jobs: Sequence[Job], updates: Sequence[Tensor]) -> list[Tensor]:
    """Updates with their rows outside the protected outputs, after the rule; bases see to the rest."""
    kept = dict(zip(jobs, updates, strict=True))
    exact = [j for j in jobs if j.spaces.exact and j.out is None and j.spaces.outputs is not None]
    kept |= zip(exact, _outside_outputs(exact, [kept[j] for j in exact]), strict=True)
    return list(kept.values())


def _outside_outputs(jobs: Sequence[Job], columns: Sequence[Tensor]) -> list[Tensor]:
    """Columns outside the protected outputs of their jobs; one message between ranks for all."""
    inner = totals([j.spaces.inner_outputs(c, j.shard) for j, c in zip(jobs, columns, strict=True)], jobs)
    return [j.spaces.without_outputs(c, i, j.shard) for j, c, i in zip(jobs, columns, inner, strict=True)]


def decay(jobs: Iterable[Job], rate: float) -> None:
    """Weight decay, outside what is protected where that is exact."""
    free = [j.weight for j in jobs if not _is_exact(j)]
    if free:
        torch._foreach_mul_(free, 1.0 - rate)
    for job in jobs:
        if _is_exact(job):
            wide = job.weight.to(job.basis.dtype)
            job.weight.sub_((rate * job.spaces.reject(wide, job.shard)).to(job.weight.dtype))


def _is_exact(job: Job) -> bool:
    return job.spaces.exact and (job.spaces.inputs is not None or job.spaces.outputs is not None)
