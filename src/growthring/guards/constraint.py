"""What every step of one task must respect: anchors, tensors that are held, and the bases stacked for speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from growthring.errors import GuardError
from growthring.subspace import Subspace, SubspaceBank

from .sites import Site

__all__ = ["Constraint", "Leak"]


class Leak(NamedTuple):
    """``||P D||_F / ||D||_F`` of an update ``D``, and the most that storing ``theta_0 + D`` in its dtype can cause."""

    share: float
    rounding: float


class Constraint:
    """``theta = theta_0 + D - (D U) U^T`` at every guarded site, and ``theta = theta_0`` for what is held.

    Args:
        parameters: The model's parameters by name.
        guarded: Sites with something to protect.
        spaces: Their protected spaces, one a site.
        held: Names of parameters that keep their values.
        before: The constraint that this one continues; where it has an anchor, that anchor stays.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        guarded: Sequence[Site],
        spaces: Sequence[Subspace],
        held: Iterable[str],
        before: Constraint | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        self.guarded, self._spaces = list(guarded), list(spaces)
        old: dict[str, Tensor] = {**before.anchors, **before.held} if before is not None else {}
        self.anchors: dict[str, Tensor] = {
            s.name: old[s.name] if s.name in old else self._copy(s.name) for s in self.guarded
        }
        self.held: dict[str, Tensor] = {name: old[name] if name in old else self._copy(name) for name in held}
        self._bank: SubspaceBank | None = None
        if self.guarded:
            views = [s.view(self.anchors[s.name]) for s in self.guarded]
            self._bank = SubspaceBank(spaces, [(v.shape[0], v.shape[1]) for v in views], device=views[0].device)

    @torch.no_grad()
    def trim(self) -> None:
        """Project the gradients of guarded sites; gradients of held tensors become zero."""
        for name in self.held:
            gradient = self._parameters[name].grad
            if gradient is not None:
                gradient.zero_()
        gradients = [self._parameters[s.name].grad for s in self.guarded]
        present = [(s, u, g) for s, u, g in zip(self.guarded, self._spaces, gradients, strict=True) if g is not None]
        if self._bank is not None and len(present) == len(gradients):
            self._bank.reject_([s.view(g) for s, _, g in present])
            return
        for site, space, gradient in present:
            space.reject_(site.view(gradient))

    @torch.no_grad()
    def restore(self) -> None:
        """Re-project the update since the anchor, and put back what is held."""
        for name, anchor in self.held.items():
            self._parameters[name].copy_(anchor)
        if self._bank is None:
            return
        now = [s.view(self._parameters[s.name]) for s in self.guarded]
        self._bank.reject_updates_(now, [s.view(self.anchors[s.name]) for s in self.guarded])

    def leaks(self) -> dict[str, Leak]:
        """What of every guarded site's update so far lies in its protected space, in float64."""
        leaks: dict[str, Leak] = {}
        for site, space in zip(self.guarded, self._spaces, strict=True):
            parameter, anchor = self._parameters[site.name].detach(), self.anchors[site.name].double()
            delta = parameter.double() - anchor
            size = float(delta.norm())
            rounding = torch.finfo(parameter.dtype).eps / 2 * float(anchor.norm()) / size if size else 0.0
            leaks[site.name] = Leak(space.share(site.view(delta)), rounding)
        return leaks

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
