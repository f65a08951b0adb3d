"""What PEGP remembers: one basis for every group of sites that sees the same features, and a few probes."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from growthring.errors import GuardError
from growthring.subspace import SecondMoment, Subspace

from .base import SiteCertificate
from .batches import answer_of, head_of, mask_for, masks_apply, relative_change, rows_in_front, run_model, size_of
from .constraint import Leak
from .energy import Energy, NullRatio, energy_for
from .features import Key, capture, group_by_input, jacobians
from .site import Site

__all__ = ["Collected", "FeatureMemory", "Probes", "collect", "needs_everything"]

logger = logging.getLogger(__name__)

EXACT_ABOVE = 0.999
"""Energies above this are collected by QR; Gram matrices of float32 products stop at 1e-7 of the top energy."""
ROUNDING = 1e-10
"""Share of energy that float32 may leave of what was projected out."""
SKETCH_ABOVE = 4096
"""Features wider than this are sketched: a full moment would take more than 134 MB."""
ROWS, ROWS_PER_DIM = 8192, 4
"""Feature rows used of a site, the larger of the two, where rounding noise is not asked for: more change little."""


@dataclass
class Collected:
    """Features of one task: sites grouped by their input, one moment for each group (under its first site's name)."""

    groups: list[list[Site]] = field(default_factory=list)
    moments: dict[str, SecondMoment] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and strings only."""
        return {
            "moments": {name: moment.state_dict() for name, moment in self.moments.items()},
            "groups": [[site.name for site in group] for group in self.groups],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], sites: Iterable[Site]) -> Collected:
        """Rebuild from :meth:`state_dict`, with the sites of the attached model."""
        by_name = {site.name: site for site in sites}
        return cls(
            [[by_name[name] for name in names] for names in state["groups"]],
            {name: SecondMoment.from_state_dict(moment) for name, moment in state["moments"].items()},
        )


class FeatureMemory:
    """Bases of protected features, shared by sites that see the same input.

    Per group at most ``d * d / 2`` numbers are kept, however many tasks have been learned.
    """

    def __init__(self) -> None:
        self.spaces: dict[str, Subspace] = {}
        self.site_space: dict[str, str] = {}

    def space(self, site: str) -> Subspace | None:
        """The protected space of a site, or ``None`` while it has none."""
        return self.spaces.get(self.site_space.get(site, ""))

    @property
    def dims(self) -> dict[str, int]:
        """Feature dimension of every site, by name."""
        return {site: self.spaces[space].dim for site, space in self.site_space.items()}

    def protects(self, site: str) -> bool:
        """True when at least one direction of the site's features is protected."""
        space = self.space(site)
        return space is not None and space.rank > 0

    def copy(self) -> FeatureMemory:
        """An independent copy."""
        twin = FeatureMemory()
        twin.spaces = {name: space.clone() for name, space in self.spaces.items()}
        twin.site_space = dict(self.site_space)
        return twin

    def grow(
        self,
        collected: Collected,
        energy: Energy,
        index: int,
        like: Mapping[str, Tensor],
        leaks: Mapping[str, Leak],
        resting: Mapping[str, Site] = MappingProxyType({}),
    ) -> list[SiteCertificate]:
        """Protect what the collected features need; a group takes the highest threshold among its sites.

        Args:
            collected: Features of the task.
            energy: Thresholds.
            index: Index of the task, for schedules.
            like: The model's parameters by name: a basis lives on its parameter's device, in float64 where that is.
            leaks: Measured leak by site, for the certificates.
            resting: Factors ``A`` by the name of the factor ``B`` behind them, where ``B`` is still zero; see
                :meth:`_settle`.

        Raises:
            GuardError: If no site saw any feature.
        """
        if not any(moment.trace > 0.0 for moment in collected.moments.values()):
            raise GuardError(
                "PEGP: no protected module saw any feature while the model ran; check what the batches feed"
            )
        grown: list[tuple[Site, float | NullRatio, float]] = []
        for group in collected.groups:
            lead, moment = group[0], collected.moments[group[0].name]
            target = _strictest(energy_for(energy, s.kind, index) for s in group)
            for name, members in self._by_space(group).items():
                captured = 1.0
                if lead.name in resting and isinstance(target, float) and moment.trace > 0.0:
                    captured = self._settle(lead, resting[lead.name], collected, target, like)
                elif moment.trace > 0.0:
                    parameter = like[lead.parameter]
                    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
                    space = self.spaces.setdefault(name, Subspace(moment.dim, dtype=dtype, device=parameter.device))
                    captured = _grow(space, moment, target)
                    if lead.kind == "prompt_key" and bool(parameter.any()):
                        # strict: the norms' scale; paper: the P of [X; P]. See prompts.py
                        space.grow(parameter.detach().to(dtype), energy=1.0)
                elif name not in self.spaces:
                    logger.info("PEGP: %s saw no features, so it is not protected yet", name)
                    continue
                self.site_space.update({site.name: name for site in members})
                grown += [(site, target, captured) for site in members]
        certificates = []
        for site, target, captured in grown:
            space = self.spaces[self.site_space[site.name]]
            leak, rounding = leaks.get(site.name, (None, None))
            certificates.append(
                SiteCertificate(
                    site.name, site.kind, space.dim, space.rank, space.free, _share(target), captured, leak, rounding
                )
            )
        return certificates

    def _settle(
        self, outer: Site, inner: Site, collected: Collected, target: float, like: Mapping[str, Tensor]
    ) -> float:
        """Move ``A`` out of what is protected of its inputs while ``B = 0``: no output changes, and ``B`` stays free.

        Else ``A x`` would fill all of ``R^r`` at once, and ``B`` could never learn. With ``A (I - U U^T)`` in its
        place, ``A x`` is what ``A`` makes of the unprotected share of ``x``; ``B`` needs protection only as far as
        that is more than ``1 - target`` of the energy that ``A x`` had.

        Returns:
            The share of that energy that is gone or protected.
        """
        matrix = inner.view(like[inner.parameter].detach())
        group = next(group for group in collected.groups if any(s.name == inner.name for s in group))
        rows = collected.moments[group[0].name].factor().to(matrix.device)
        before = float((rows @ matrix.double().mT).square().sum())
        space = self.space(inner.name)
        if space is not None:
            space.reject_(matrix)
        left = SecondMoment(outer.dim, form="root").update(rows @ matrix.double().mT)
        dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        mine = self.spaces.setdefault(outer.name, Subspace(outer.dim, dtype=dtype, device=matrix.device))
        if left.trace <= max(1.0 - target, ROUNDING) * before:
            return 1.0 - left.trace / before if before else 1.0
        share = mine.grow(left, energy=1.0 - (1.0 - target) * before / left.trace).energy
        return 1.0 - (1.0 - share) * left.trace / before

    def _by_space(self, group: list[Site]) -> dict[str, list[Site]]:
        """The group's sites by the space that each has; new ones join the first, and what was apart stays apart."""
        default = next((self.site_space[s.name] for s in group if s.name in self.site_space), group[0].name)
        parts: dict[str, list[Site]] = {}
        for site in group:
            parts.setdefault(self.site_space.get(site.name, default), []).append(site)
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Tensors and strings only."""
        return {
            "spaces": {name: space.state_dict() for name, space in self.spaces.items()},
            "site_space": dict(self.site_space),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> FeatureMemory:
        """Rebuild from :meth:`state_dict`."""
        memory = cls()
        memory.spaces = {name: Subspace.from_state_dict(space) for name, space in state["spaces"].items()}
        memory.site_space = dict(state["site_space"])
        return memory


class Probes:
    """A few inputs of every task with what the model answered when the task ended: they measure drift, nothing else.

    Args:
        each: Inputs kept of each task.
        tasks: Tasks whose inputs are kept; the first ones stay.
    """

    def __init__(self, each: int, tasks: int) -> None:
        self.each, self.tasks = each, tasks
        self.kept: list[tuple[Any, Tensor]] = []

    @property
    def inputs(self) -> int:
        """Number of inputs kept."""
        return sum(size_of(batch) for batch, _ in self.kept)

    def take(self, model: nn.Module, batch: Any) -> None:
        """Keep the first inputs of ``batch`` with the model's answers, unless there are enough."""
        if self.each == 0 or len(self.kept) >= self.tasks:
            return
        probe = head_of(batch, self.each)
        if isinstance(probe, Mapping):
            probe = {key: value for key, value in probe.items() if _storable(value)}
        answer = answer_of(model, probe)
        if answer is not None:
            self.kept.append((probe, answer.detach().cpu().clone()))

    def change(self, model: nn.Module) -> float | None:
        """Worst ``max |new - old| / max |old|`` over the tasks; ``None`` without probes."""
        changes = []
        for batch, old in self.kept:
            new = answer_of(model, batch)
            if new is not None:
                changes.append(relative_change(new, old, mask_for(old, batch) if masks_apply(model) else None))
        return max(changes, default=None)

    def state_dict(self) -> list[dict[str, Any]]:
        """Tensors and plain values only."""
        return [{"inputs": b if isinstance(b, Mapping) else {"": b}, "outputs": o} for b, o in self.kept]

    def load_state_dict(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.kept = [(p["inputs"][""] if set(p["inputs"]) == {""} else dict(p["inputs"]), p["outputs"]) for p in state]


def collect(
    model: nn.Module, sites: list[Site], batches: Iterable[Any], samples: int, exact: set[str], probes: Probes
) -> Collected:
    """Run batches through the model and gather the second moment of every group's features.

    Args:
        model: In evaluation mode, without gradients.
        sites: Sites to listen to. Those that share their input in the first batch share one moment, of everything
            that any of them sees.
        batches: Batches as the model takes them.
        samples: Examples read at most. Of their feature rows a seeded random part is used where there are many.
        exact: Names of sites whose features are needed down to rounding noise.
        probes: Takes its inputs from the first batch, once all of them went well.

    Raises:
        GuardError: If there is no batch.
    """
    collected = Collected()
    lead: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    first: Any = None
    current: Any = None
    keys: dict[str, Tensor] = {}
    fed: dict[tuple[str, Key], Tensor] = {}  # what this batch gave already; kept alive, so that keys stay true
    seen, expected, masked, front = 0, samples, masks_apply(model), rows_in_front(model)

    def sink(site: Site, features: Tensor, key: Key) -> None:
        if (lead[site.name], key) in fed:
            return
        fed[lead[site.name], key] = features
        mask = mask_for(features, current, front) if masked and site.slots is None else None
        rows = features.reshape(-1, features.shape[-1])
        if mask is not None:
            rows = rows[mask.reshape(-1).to(rows.device).bool()]
        moment = collected.moments[lead[site.name]]
        if site.bias:
            rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
        keep = math.ceil(max(ROWS, ROWS_PER_DIM * moment.dim) * size_of(current) / expected)
        if moment.form not in ("root", "diagonal") and keep < rows.shape[0]:
            rows = rows[torch.randperm(rows.shape[0], generator=generator)[:keep].to(rows.device)]
        moment.update(rows)

    for batch in batches:
        take = min(size_of(batch), samples - seen)
        current = batch if take == size_of(batch) else head_of(batch, take)
        if first is None:
            first = current
            expected = min(samples, max(1, operator.length_hint(batches)) * take) if take < samples else take
            collected.groups = group_by_input(model, sites, current)
            for group in collected.groups:
                collected.moments[group[0].name] = _moment(group[0], any(s.name in exact for s in group))
                lead.update({site.name: group[0].name for site in group})
            keys = jacobians(model, sites, current)
        with capture(model, sites, current, sink, keys):
            run_model(model, current)
        fed.clear()
        seen += take
        if seen >= samples:
            break
    if seen == 0:
        raise GuardError("PEGP: end_task got no batch; pass the task's training inputs, as the model takes them")
    probes.take(model, first)
    return collected


def _storable(value: Any) -> bool:
    """True for tensors, plain values and lists of them."""
    if isinstance(value, list | tuple):
        return all(_storable(v) for v in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _moment(site: Site, exact: bool) -> SecondMoment:
    """The cheapest form that resolves what is asked for."""
    if site.scales:
        return SecondMoment(site.dim, form="diagonal")
    if site.dim > SKETCH_ABOVE:
        return SecondMoment(site.dim, form="sketch")
    return SecondMoment(site.dim, form="root") if exact else SecondMoment(site.dim, products=torch.float32)


def _strictest(targets: Iterable[float | NullRatio]) -> float | NullRatio:
    """The target that protects most of those that share a basis."""
    return max(targets, key=lambda t: (isinstance(t, NullRatio), -t.times if isinstance(t, NullRatio) else t))


def _grow(space: Subspace, moment: SecondMoment, target: float | NullRatio) -> float:
    """Grow a space to its target; returns the captured share of the energy."""
    if isinstance(target, NullRatio):
        values, _ = moment.residual_spectrum(space)
        return space.grow(moment, rank=target.protected(values)).energy
    return space.grow(moment, energy=target).energy


def needs_everything(target: float | NullRatio) -> bool:
    """True for targets that ask for directions far below the largest."""
    return isinstance(target, NullRatio) or target > EXACT_ABOVE


def _share(target: float | NullRatio) -> float:
    return 0.0 if isinstance(target, NullRatio) else target
