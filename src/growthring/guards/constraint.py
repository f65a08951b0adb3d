"""What every step of one task must respect: anchors, tensors that are held, and the bases stacked for speed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from growthring.errors import GuardError
from growthring.subspace import Subspace, SubspaceBank, solver_device

from .site import Site

__all__ = ["Constraint", "Leak"]


class Leak(NamedTuple):
    """``||P D||_F / ||D||_F`` of an update ``D``, and the most that storing it in float32 or wider can cause."""

    share: float
    rounding: float


class _Pass:
    """Sites that share no element, with their spaces stacked."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.spaces: list[Subspace] = []
        self.bank = SubspaceBank([], [])

    def touches(self, site: Site) -> bool:
        return any(other.crosses(site) for other in self.sites)

    def stack(self, anchors: Mapping[str, Tensor]) -> None:
        views = [site.read(anchors) for site in self.sites]
        self.bank = SubspaceBank(self.spaces, [(v.shape[0], v.shape[1]) for v in views], device=views[0].device)


class Constraint:
    """``theta = theta_0 + D - (D U) U^T`` at every guarded site, and ``theta = theta_0`` for what is held.

    Two sites may lie on one tensor, along its rows and along its columns (prompts, the two sides of a matrix): their
    projections commute, and are applied one after the other.

    Args:
        parameters: The model's parameters by name.
        guarded: Sites with something to protect.
        spaces: Their protected spaces, one a site.
        held: Names of parameters that keep their values.
        before: The constraint that this one continues; where it has an anchor, that anchor stays.
        exact: Re-project the update after every step; otherwise only gradients are trimmed.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        guarded: Sequence[Site],
        spaces: Sequence[Subspace],
        held: Iterable[str],
        before: Constraint | None = None,
        *,
        exact: bool = True,
    ) -> None:
        self._parameters, self._exact = dict(parameters), exact
        self.guarded, self.spaces = list(guarded), list(spaces)
        old: dict[str, Tensor] = {**before.anchors, **before.held} if before is not None else {}
        tensors = dict.fromkeys(name for site in self.guarded for name in site.tensors)
        self.anchors: dict[str, Tensor] = {n: old[n] if n in old else self._copy(n) for n in tensors}
        self.held: dict[str, Tensor] = {n: old[n] if n in old else self._copy(n) for n in held}
        self._passes: list[_Pass] = []
        self.leave_to(())

    def leave_to(self, others: Collection[str]) -> None:
        """Sweep all guarded sites but those on the named tensors, which somebody else (an optimizer) keeps outside.

        Their anchors stay, and :meth:`leaks` still measures them.
        """
        self._passes = []
        for site, space in zip(self.guarded, self.spaces, strict=True):
            if site.parameter in others:
                continue
            part = next((p for p in self._passes if not p.touches(site)), None)
            if part is None:
                part = _Pass()
                self._passes.append(part)
            part.sites.append(site)
            part.spaces.append(space)
        for part in self._passes:
            part.stack(self.anchors)

    @torch.no_grad()
    def trim(self) -> None:
        """Project the gradients of guarded sites; gradients of held tensors become zero."""
        gradients = {n: self._parameters[n].grad for n in (*self.anchors, *self.held)}
        for name in self.held:
            gradient = gradients[name]
            if gradient is not None:
                gradient.zero_()
        present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        for part in self._passes:
            if all(name in present for site in part.sites for name in site.tensors):
                matrices = [site.read(present) for site in part.sites]
                part.bank.reject_(matrices)
                _write(part.sites, present, matrices)
                continue
            for site, space in zip(part.sites, part.spaces, strict=True):
                if all(name in present for name in site.tensors):
                    matrix = site.read(present)
                    space.reject_(matrix)
                    site.write(present, matrix)

    @torch.no_grad()
    def restore(self) -> None:
        """Re-project the update since the anchor, and put back what is held."""
        for name, anchor in self.held.items():
            self._parameters[name].copy_(anchor)
        if not self._exact:
            return
        for part in self._passes:
            now = [site.read(self._parameters) for site in part.sites]
            part.bank.reject_updates_(now, [site.read(self.anchors) for site in part.sites])
            _write(part.sites, self._parameters, now)

    def leaks(self) -> dict[str, Leak]:
        """What of every guarded site's update so far lies in its protected space, in float64, by site."""
        leaks: dict[str, Leak] = {}
        for site, space in zip(self.guarded, self.spaces, strict=True):  # one at a time: float64 is twice as large
            anchor = site.read({name: _wide(self.anchors[name]) for name in site.tensors})
            delta = site.read({name: _wide(self._parameters[name].detach()) for name in site.tensors}) - anchor
            size = float(delta.norm())
            eps = min(torch.finfo(self._parameters[site.parameter].dtype).eps, torch.finfo(torch.float32).eps)
            leaks[site.name] = Leak(space.share(delta), eps / 2 * float(anchor.norm()) / size if size else 0.0)
        return leaks

    def narrow(self) -> int:
        """Number of guarded sites whose tensor is in half precision."""
        return sum(self._parameters[s.parameter].dtype in (torch.float16, torch.bfloat16) for s in self.guarded)

    def moved(self) -> list[str]:
        """Names of held tensors that are not where they are held."""
        now = {name: self._parameters[name].detach() for name in self.held}
        return [name for name, anchor in self.held.items() if not torch.equal(now[name], anchor.to(now[name].dtype))]

    def state_dict(self) -> dict[str, Any]:
        """Anchors and held values, as tensors."""
        return {
            "anchors": {k: v.clone() for k, v in self.anchors.items()},
            "held": {k: v.clone() for k, v in self.held.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            GuardError: If it is about other tensors than those that train in this model.
        """
        for ours, theirs in ((self.anchors, state["anchors"]), (self.held, state["held"])):
            if other := ours.keys() ^ theirs.keys():
                raise GuardError(
                    f"the state was taken while other tensors were trained: {len(other)} differ (the first: "
                    f"{min(other)}). Set requires_grad as it was then"
                )
            ours.update({name: value.to(ours[name].device, copy=True) for name, value in theirs.items()})

    def _copy(self, name: str) -> Tensor:
        value = self._parameters[name].detach()
        return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _write(sites: Sequence[Site], tensors: Mapping[str, Tensor], matrices: Sequence[Tensor]) -> None:
    for site, matrix in zip(sites, matrices, strict=True):
        site.write(tensors, matrix)


def _wide(tensor: Tensor) -> Tensor:
    """In float64, which MPS lacks."""
    return tensor.to(solver_device(tensor.device)).double()
