"""Where gradients are seen while a task trains: in the optimizer's coordinates, or on the parameters themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from growthring.errors import GuardError
from growthring.subspace import SecondMoment

from .gradient_statistics import GradientStatistics
from .site import Site

__all__ = ["GradientWatch", "Source"]

Source = Literal["gradient", "momentum", "exp_avg"]

SEEN = 0.95
"""Below this share of whole gradients a certificate says how much of them an optimizer has shown."""
AGAIN = 10
"""After so many steps the sizes of unprojected gradients are measured again: they are but a scale."""


class GradientWatch:
    """Feeds one task's gradients, or first moments, to its statistics.

    Args:
        sites: Sites to watch.
        parameters: The model's parameters by name.
        source: What is summed up, as :class:`GradientMemory` has it.
        statistics: Takes it.
        guarded: Names of parameters whose gradients are projected. What rounding leaves of a gradient that lay in
            protected directions altogether is no gradient, and is not remembered.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        parameters: Mapping[str, nn.Parameter],
        source: Source,
        statistics: GradientStatistics,
        guarded: Collection[str],
    ) -> None:
        self._parameters, self._source, self.statistics = dict(parameters), source, statistics
        self._sites: dict[nn.Parameter, list[Site]] = defaultdict(list)
        for site in sites:
            self._sites[self._parameters[site.parameter]].append(site)
        self._optimizer: Any = None
        self._shows = False  # the optimizer shows its coordinates
        self._shown: set[nn.Parameter] = set()  # what it has shown since the last step
        self._guarded = {self._parameters[name] for name in guarded}
        self._floors: dict[nn.Parameter, Tensor] = {}  # norms of gradients up to which they are rounding
        self._asked, self._missed = 0, 0  # gradients looked for on parameters, and those that were not there

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Watch this optimizer from now on."""
        if optimizer is not self._optimizer:
            self.release()
        self._optimizer = optimizer
        observe = getattr(optimizer, "observe", None)
        self._shows = callable(observe)
        if callable(observe):
            observe(self._observe)

    def release(self) -> None:
        """Let go of the optimizer."""
        if self._shows:
            self._optimizer.observe(None)
        self._optimizer, self._shows = None, False

    def before_step(self) -> None:
        """Gradients are ready, and not projected yet."""
        self._shown.clear()
        if self.statistics.steps % AGAIN == 0 or not self._floors:
            found = {p: p.grad.detach() for p in self._guarded if p.grad is not None}
            norms = torch._foreach_norm(list(found.values())) if found else ()
            self._floors = {p: norm.float() * _noise(p) for p, norm in zip(found, norms, strict=True)}

    def projected(self) -> None:
        """Gradients are projected."""
        if self._source == "gradient" and not self._shows:
            self._add_gradients()

    def after_step(self) -> None:
        """The optimizer has stepped.

        Raises:
            GuardError: If first moments are asked for, and the optimizer keeps none or is not known.
        """
        self.statistics.steps += 1
        if self._source == "gradient":
            if self._shows:  # what it treats as plain AdamW does
                self._add_gradients()
            return
        for parameter, sites in self._sites.items():
            if parameter not in self._shown:
                moment = self._first_moment(parameter, sites)
                if moment is not None and self._source == "momentum":
                    self._add(parameter, moment)

    def told(self) -> list[str]:
        """What a reader should know of how much was seen."""
        found = []
        if 2 * self._missed > self._asked:
            found.append(
                f"{self._missed} of {self._asked} gradients that were looked for were not there. In layer-wise mode "
                "they are freed in backward: call guard.bind(optimizer), so that the optimizer shows its coordinates"
            )
        states = [self._optimizer.state.get(p, {}) for p in self._sites] if self._shows else []
        shares = [float(s["share"]) for s in states if "share" in s and int(s["refreshes"])]
        if shares and (mean := sum(shares) / len(shares)) < SEEN:
            found.append(
                f"the optimizer's subspaces held {100 * mean:.0f} % of the gradients' energy when last found (mean of "
                f"{len(shares)} matrices): energy is a share of what they showed, not of whole gradients"
            )
        return found

    def finish(self) -> dict[str, SecondMoment]:
        """The task has ended: its second moments, by layer and side.

        Raises:
            GuardError: If the last first moment is asked for, and the optimizer is not known any more.
        """
        if self._source == "exp_avg" and self.statistics.steps:
            for parameter, sites in self._sites.items():
                if not any(site.name in self.statistics for site in sites):
                    moment = self._first_moment(parameter, sites)
                    if moment is not None:
                        self._add(parameter, moment)
        return self.statistics.finish()

    def _observe(
        self,
        parameter: nn.Parameter,
        coordinates: Tensor,
        basis_in: Tensor | None,
        basis_out: Tensor | None,
        exp_avg: Tensor | None,
    ) -> None:
        """What an optimizer shows of a matrix: ``G ~ basis_out @ coordinates @ basis_in^T``, where it has a basis."""
        if parameter not in self._sites:
            return
        shown = coordinates if self._source == "gradient" else exp_avg
        if shown is None:
            raise GuardError(self._lacks(self._sites[parameter]))
        self._shown.add(parameter)
        for site in self._sites[parameter]:
            if site.transposed:
                self.statistics.add_coordinates(site, shown.mT, basis_out, self._floors.get(parameter, 0.0))
            else:
                self.statistics.add_coordinates(site, shown, basis_in, self._floors.get(parameter, 0.0))

    def _add_gradients(self) -> None:
        for parameter in self._sites:
            if parameter in self._shown:
                continue
            self._asked += 1
            if parameter.grad is not None:
                self._add(parameter, parameter.grad)
            else:
                self._missed += 1

    def _add(self, parameter: nn.Parameter, value: Tensor) -> None:
        for site in self._sites[parameter]:
            self.statistics.add(site, site.read({site.parameter: value}), self._floors.get(parameter, 0.0))

    def _first_moment(self, parameter: nn.Parameter, sites: Sequence[Site]) -> Tensor | None:
        """The optimizer's first moment of a whole parameter; ``None`` where it has not stepped, or has shown it."""
        if self._optimizer is None:
            raise GuardError(
                f"GradientMemory(source={self._source!r}) reads the optimizer's first moments, and knows no "
                "optimizer: call guard.bind(optimizer) after guard.begin_task() (guard.callback() does), or use "
                "source='gradient'"
            )
        state: Mapping[str, Any] = self._optimizer.state.get(parameter, {})
        if "basis" in state:
            return None  # of a subspace, and shown in every step that was taken
        moment: Tensor | None = state.get("exp_avg")
        if moment is None and isinstance(self._optimizer, torch.optim.SGD):
            moment = state.get("momentum_buffer")
        if moment is None and _stepped(parameter.grad):
            raise GuardError(self._lacks(sites))
        return moment if moment is not None and moment.shape == parameter.shape else None

    def _lacks(self, sites: Collection[Site]) -> str:
        who, what = type(self._optimizer).__name__, next(iter(sites)).parameter
        return (
            f"GradientMemory(source={self._source!r}) reads first moments, and {who} keeps none of {what}. Use Adam, "
            "AdamW, NAdam, SGD with momentum or growthring.optim.GORP, or source='gradient'"
        )


def _noise(parameter: nn.Parameter) -> float:
    """What a projection leaves of a vector in the protected space, as a share of it, at most."""
    return 32 * torch.finfo(torch.promote_types(parameter.dtype, torch.float32)).eps


def _stepped(gradient: Tensor | None) -> bool:
    """Whether an optimizer has surely stepped with this gradient; with NaN, infinity or zeros it may have skipped."""
    if gradient is None:
        return False
    peak = gradient.detach().abs().amax()
    return bool(peak.isfinite() & (peak > 0))
