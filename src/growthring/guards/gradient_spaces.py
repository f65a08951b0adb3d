"""What a gradient memory holds: one subspace for each remembered side of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from growthring.subspace import SecondMoment, Subspace

from .base import Certificate, SiteCertificate
from .constraint import Leak
from .gradient_sites import GradientSurvey

__all__ = ["certificate_of", "certify", "grow"]


def grow(
    spaces: dict[str, Subspace],
    moments: Mapping[str, SecondMoment],
    targets: Mapping[str, float],
    survey: GradientSurvey,
) -> tuple[dict[str, float], int]:
    """Protect the directions that a task's gradients need.

    Args:
        spaces: By layer and side; grown in place, made where missing on the device of the parameter, in float64 where
            that is.
        moments: Second moments by layer and side.
        targets: Share of the energy to protect, by layer and side.
        survey: The sites.

    Returns:
        The share that is protected, by layer and side, and the number of sketches that could not hold what was asked.
    """
    reached, short = dict.fromkeys(spaces, 1.0), 0
    like = {survey.key[site.name]: survey.parameters[site.parameter] for site in survey.sites}
    for key, moment in moments.items():
        dtype = torch.float64 if like[key].dtype == torch.float64 else torch.float32
        space = spaces.setdefault(key, Subspace(moment.dim, dtype=dtype, device=like[key].device))
        reached[key] = space.grow(moment, energy=targets[key]).energy
        short += moment.form == "sketch" and reached[key] < targets[key] - 1e-6
    return reached, short


def certify(
    spaces: Mapping[str, Subspace],
    reached: Mapping[str, float],
    targets: Mapping[str, float],
    leaks: Mapping[str, Leak],
    survey: GradientSurvey,
) -> list[SiteCertificate]:
    """One entry for each site whose layer is remembered."""
    found = []
    for site in survey.sites:
        key = survey.key[site.name]
        if key in spaces:
            space, (leak, rounding) = spaces[key], leaks.get(site.name, (None, None))
            sizes = (space.dim, space.rank, space.free)
            found.append(SiteCertificate(site.name, site.kind, *sizes, targets[key], reached[key], leak, rounding))
    return found


def certificate_of(
    guard: str,
    task: str,
    index: int,
    sites: Sequence[SiteCertificate],
    leaks: Mapping[str, Leak],
    held: int,
    notes: Sequence[str],
) -> Certificate:
    """The certificate of a task; without a verdict while nothing was protected."""
    measured = bool(index and leaks)
    return Certificate(
        guard=guard,
        task=task,
        task_index=index,
        protected_tasks=index,
        leak=max(leak.share for leak in leaks.values()) if measured else None,
        kept=all(s.kept for s in sites) if measured else None,
        energy=min((s.energy for s in sites), default=0.0),
        free=sum(s.free for s in sites),
        dims=sum(s.dim for s in sites),
        output_change=None,
        probes=0,
        held=held,
        sites=tuple(sites),
        notes=tuple(notes),
    )
