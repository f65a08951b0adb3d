"""A refresh: a new basis, the moments in it, and the coordinates of this step's gradient."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from ._matrix import local
from ._products import Job, energies
from ._ranges import Spaces, find_basis, rotate_moments, without_noise

__all__ = ["refresh"]


def refresh(job: Job, energy: float, whole: Tensor | None, *, raw: bool) -> None:
    """Find the basis of a matrix again, and carry its moments over; leaves the new coordinates in ``job``.

    Args:
        job: The matrix.
        energy: ``||gradient||_F^2`` over all ranks.
        whole: What an owner found of a matrix whose rows are spread; else ``None``.
        raw: As ``galore_torch`` does it: what the SVD gives, signs and all.
    """
    assert job.gradient is not None
    state, group, gradient = job.state, job.group, job.gradient
    seen, rank, method = int(state["refreshes"]), group["rank"], group["range_finder"]
    before, previous = job.basis, job.basis if seen else None
    seed = hash((group["seed"], job.ordinal, seen)) % (1 << 62)
    find = {"spaces": job.spaces, "seed": seed, "shard": job.shard, "norm": energy**0.5, "raw": raw}
    basis, coordinates = find_basis(
        gradient, rank, method, previous=previous, found=whole, turned=job.side == "left", **find
    )
    share = energies([coordinates], [job])[0] / energy
    if method == "warm" and previous is not None and share < 0.5 * float(state["share"]):
        other, others = find_basis(gradient, rank, "randomized", previous=None, **find)
        held = energies([others], [job])[0] / energy
        if held > share:
            basis, coordinates, share = other, others, held
    state["share"].fill_(share)
    state["basis"] = basis
    rotates = bool(state["step"]) and group["rotate"]
    second = state.get("exp_avg_sq")
    if rotates:
        columns = state.get("exp_avg_sq_columns", second)
        rotate_moments(job.first, None if columns is None else local(columns), (before.mT @ basis).to(job.first))
    if job.out is not None:
        if raw:
            out = normalize(coordinates, dim=0)
            coordinates = out.mT @ coordinates
        else:
            outside = Spaces(job.spaces.outputs, None, job.spaces.exact)
            out, found = find_basis(coordinates.mT, rank, "full", **find | {"spaces": outside, "previous": None})
            coordinates = without_noise(found.mT.contiguous(), sum(job.parameter.shape))
        if rotates:
            rotate_moments(job.first.mT, None if second is None else second.mT, job.out.mT @ out)
        state["basis_out"] = out
    job.coordinates = coordinates
    state["refreshes"].add_(1)
