"""One rank finds the range of a whole matrix for all that share its rows.

The dense range finders need every row. Matrices take turns: of as many as there are ranks, each is gathered by a rank
of its own, all work at once, and each tells the others what it found. So no matrix is decomposed twice, and no rank
holds more than one whole matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from growthring.errors import NumericalError

from ._products import Job

__all__ = ["ranges_by_owners"]


def ranges_by_owners(jobs: Sequence[Job], find: Callable[[Job, Tensor], Tensor]) -> dict[Job, Tensor]:
    """What ``find`` says of whole gradients, on every rank that shares their rows.

    Args:
        jobs: Jobs with a usable gradient, in the same order on every rank; those that are whole here are left out.
        find: Gets a job and its whole gradient ``(rows, columns)``; returns ``(columns, k)``, ``k`` at most its rank.

    Returns:
        For each row-sharded job ``(columns, rank)``; columns beyond ``k`` are zero.

    Raises:
        NumericalError: If an owner failed; on the owner itself, what it failed with.
    """
    by_group: dict[Any, list[Job]] = defaultdict(list)
    for job in jobs:
        if job.shard is not None:
            by_group[job.shard.group].append(job)
    found: dict[Job, Tensor] = {}
    for group, members in by_group.items():
        ranks = dist.get_world_size(group)
        for first in range(0, len(members), ranks):
            found |= _one_each(members[first : first + ranks], group, find)
    return found


def _one_each(jobs: list[Job], group: Any, find: Callable[[Job, Tensor], Tensor]) -> dict[Job, Tensor]:
    """The same for as many jobs as there are ranks, or fewer: number ``i`` is owned by rank ``i``."""
    here = dist.get_rank(group)
    ours = None
    for owner, job in enumerate(jobs):
        whole = _gathered(job, group, owner)
        ours = whole if owner == here else ours
    answers, failed = [_no_answer(j) for j in jobs], None
    if ours is not None:
        try:
            found = find(jobs[here], ours)
            answers[here].zero_()[:, : found.shape[1]] = found
        except Exception as error:  # the others wait: they are told first
            failed = error
    for owner, answer in enumerate(answers):
        dist.broadcast(answer, dist.get_global_rank(group, owner), group=group)
    if failed is not None:
        raise failed
    for owner, (job, answer) in enumerate(zip(jobs, answers, strict=True)):
        if not bool(answer.isfinite().all()):
            raise NumericalError(
                f"rank {dist.get_global_rank(group, owner)} could not find the range of a gradient of shape "
                f"{tuple(job.parameter.shape)}; its own error says why"
            )
    return dict(zip(jobs, answers, strict=True))


def _gathered(job: Job, group: Any, owner: int) -> Tensor | None:
    """The whole gradient on its owner, ``None`` elsewhere."""
    assert job.shard is not None
    assert job.gradient is not None
    counts = job.shard.counts
    padded = torch.nn.functional.pad(job.gradient, (0, 0, 0, counts[0] - job.shard.rows)).contiguous()
    parts = [torch.empty_like(padded) for _ in counts] if dist.get_rank(group) == owner else None
    dist.gather(padded, parts, dist.get_global_rank(group, owner), group=group)
    if parts is None:
        return None
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _no_answer(job: Job) -> Tensor:
    assert job.gradient is not None
    return job.gradient.new_full((job.gradient.shape[1], job.group["rank"]), float("nan"))
