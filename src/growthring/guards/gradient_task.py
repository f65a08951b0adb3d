"""One task under a gradient memory: its constraint, its view of the gradients, and the optimizer that steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from growthring.subspace import SecondMoment, Subspace

from . import notes
from .base import LEAK_LIMIT
from .constraint import Constraint, Leak
from .gradient_sites import GradientSurvey
from .gradient_statistics import GradientStatistics
from .gradient_watch import GradientWatch, Source

__all__ = ["GradientTask"]

AGAIN = 100
"""Steps between two sweeps of what an optimizer keeps outside: every step rounds, and rounding adds up."""


class GradientTask:
    """What is to be done at every step of one task.

    Args:
        survey: What was found in the model.
        spaces: What is protected, by layer and side.
        held: Names of parameters that keep their values.
        source: What of the gradients is remembered.
        statistics: Takes it.
        exact: Project updates; otherwise only gradients.
        before: The task that this one continues; its anchors and its statistics stay.
    """

    def __init__(
        self,
        survey: GradientSurvey,
        spaces: Mapping[str, Subspace],
        held: Collection[str],
        source: Source,
        statistics: GradientStatistics,
        *,
        exact: bool,
        before: GradientTask | None = None,
    ) -> None:
        guarded = survey.guarded(spaces)
        self._survey, self._spaces, self._exact = survey, spaces, exact
        self.constraint: Constraint = Constraint(
            survey.parameters,
            [site for site, _ in guarded],
            [space for _, space in guarded],
            held,
            before.constraint if before is not None else None,
            exact=exact,
        )
        self.statistics: GradientStatistics = before.statistics if before is not None else statistics
        self._watch = GradientWatch(
            survey.sites, survey.parameters, source, self.statistics, [site.parameter for site, _ in guarded]
        )
        self._protect: Any = None
        self._taken: set[str] = set()  # tensors that the optimizer keeps outside by itself

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the spaces to an optimizer that can use them, and sweep the rest."""
        self._watch.bind(optimizer)
        self._protect = getattr(optimizer, "protect", None)
        if not callable(self._protect):
            return
        parameters = self._survey.parameters
        pairs: dict[nn.Parameter, tuple[Subspace | None, Subspace | None]] = {}
        for site, space in zip(self.constraint.guarded, self.constraint.spaces, strict=True):
            along, across = pairs.get(parameters[site.parameter], (None, None))
            pairs[parameters[site.parameter]] = (along, space) if site.transposed else (space, across)
        taken = self._protect(pairs, exact=self._exact)
        self._taken = {s.parameter for s in self.constraint.guarded if parameters[s.parameter] in taken}
        self.constraint.leave_to(self._taken)

    def release(self) -> None:
        """Let go of the optimizer."""
        self._watch.release()
        if callable(self._protect):
            self._protect({})
        self.constraint.leave_to(())
        self._protect, self._taken = None, set()

    def before_step(self) -> None:
        """Project gradients, and look at them."""
        self._watch.before_step()
        self.constraint.trim()
        self._watch.projected()

    def after_step(self) -> None:
        """Project updates, and look at first moments."""
        self.constraint.restore()
        self._watch.after_step()
        if self._taken and self._exact and self.statistics.steps % AGAIN == 0:
            self._sweep(())
            self.constraint.leave_to(self._taken)

    def finish(self) -> dict[str, SecondMoment]:
        """Second moments of what was seen, by layer and side."""
        return self._watch.finish()

    def measure(self) -> tuple[dict[str, Leak], list[str]]:
        """Leaks by site, and what a reader should know of them.

        What an optimizer kept outside gets a last sweep first. A LoRA factor whose partner is zero by now gets none:
        their product has been merged, as it was, into a weight.
        """
        task, told = self.constraint, []
        leaks = task.leaks()
        if self._taken and self._exact:
            worst = max((leak.share for leak in leaks.values()), default=0.0)
            if worst > LEAK_LIMIT:
                told.append(f"over its last steps the optimizer let through up to {worst:.1e} of an update")
            self._sweep({site.parameter for site, _ in self._survey.fresh(self._spaces)})
            leaks = task.leaks()
        told += notes.of_steps(task, leaks) + self._watch.told()
        if reading := self._survey.reading(self._spaces, task.anchors):
            told.append(
                f"{len(reading)} LoRA factors go on from an earlier task and meet protected directions (the first: "
                f"{reading[0].parameter}): these may change through the other factor, which has no condition. Give "
                "every task a new branch (FreshLoRA)"
            )
        return leaks, told

    def uncovered(self, known: Collection[str], allowed: bool) -> list[str]:
        """Notes on trainable tensors that nothing keeps.

        Args:
            known: Names of tensors that earlier tasks had.
            allowed: Tensors without a condition may move.
        """
        survey = self._survey
        left = [n for n in survey.loose() if n in known] if allowed else []
        covered = {site.parameter for site in self.constraint.guarded} | survey.spared.keys()
        training = [n for n, p in survey.parameters.items() if p.requires_grad and n not in known]
        return notes.of_tensors(left, [n for n in training if n not in covered])

    def _sweep(self, others: Collection[str]) -> None:
        """Take out what rounding of many steps has added up to, all tensors but the named ones."""
        self.constraint.leave_to(others)
        self.constraint.restore()

    def state_dict(self) -> dict[str, Any]:
        """Anchors and statistics: tensors and plain values only."""
        return {"constraint": self.constraint.state_dict(), "statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.constraint.load_state_dict(state["constraint"])
        self.statistics.load_state_dict(state["statistics"])
