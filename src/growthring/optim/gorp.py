"""GORP: Adam, or another rule, inside a low-rank subspace of the gradient; with what earlier tasks need left out.

Wang et al., "Continual Gradient Low-Rank Projection Fine-Tuning for LLMs" (GORP), ACL 2025, on Zhao et al., "GaLore",
arXiv 2403.03507, ICML 2024. For a weight ``W`` ``(m, n)`` with gradient ``G`` and a basis ``P`` ``(n, r)``::

    every `refresh` steps:  P <- canonical basis of the dominant right space of G outside what is protected
                            moments <- the same moments in the new basis
    every step:             L = G P                          (m, r): all that the rule and its state see
                            L <- L - S_out S_out^T L         protected outputs, before the rule
                            N = rule(L)                      Adam: m / (sqrt(v) + eps), bias corrected
                            N <- N - S_out S_out^T N         and after it: Adam turned it back
                            W <- W - lr wd W' - lr scale N P^T

Protected inputs cost nothing more: ``P`` is orthogonal to them, so every update is. ``W'`` is ``W`` outside what is
protected. A step reads ``G`` once and writes ``W`` once; AdamW reads and writes three more tensors of that size.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from growthring.errors import ConfigError, nearest
from growthring.subspace import Subspace, full_precision

from . import _state
from ._averaging import agree_on_gradients, average, check_process_group
from ._checks import check_gradient, check_group, check_protected, check_whole
from ._matrix import as_matrix, local, local_gradient, row_shard, write_back
from ._options import ParameterPlan, check_options, matrix_shape, plan_of
from ._owner import ranges_by_owners
from ._products import (
    Job,
    apply,
    by_elements,
    by_options,
    by_step,
    decay,
    energies,
    is_usable,
    kept_outside,
    project,
    sweep,
)
from ._ranges import Spaces, dense_range
from ._refresh import refresh
from ._rules import adam, adamw_step

__all__ = ["GORP", "Observer"]

Observer = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None", Tensor], None]
"""``observer(parameter, coordinates, basis_in, basis_out, exp_avg)``: see :meth:`GORP.observe`."""


class GORP(torch.optim.Optimizer):
    """Steps matrices inside a rank-``r`` subspace of their gradients, and everything else as AdamW.

    Every option but ``average_over`` may stand in a parameter group; ``rank=None`` there makes the group plain AdamW.
    :meth:`explain` says how each parameter is treated and why. Parameters of more than two dimensions are taken as
    matrices ``(shape[0], rest)``. State is kept in float32 (float64 for float64 weights), as tensors only.

    A matrix whose gradient is zero, NaN or infinite is skipped: weights, moments, basis and step count stay; it is
    counted in its state and warned of once (not where it was zero from the start).

    Args:
        params: Tensors, ``(name, tensor)`` pairs or parameter groups.
        lr: Learning rate; default 1e-3. A projected matrix moves by ``lr * scale``.
        rank: Dimension ``r`` of the subspace, default 8; ``None`` projects nothing.
        refresh: Steps between two searches for the subspace, ``T``; default 10.
        scale: Factor on projected updates, ``alpha``; default 1.
        side: Where the basis lies: ``"right"`` ``(n, r)``, ``"left"`` ``(m, r)``, ``"two-sided"`` both, with ``r x r``
            moments; ``"auto"`` (default): the shorter axis, or the right where rows are spread over ranks.
        betas: Decay of the moments; default (0.9, 0.999).
        eps: Added to the root of the second moment; default 1e-8.
        weight_decay: Decoupled weight decay, taken before the step as AdamW does; default 0.
        rule: ``"adam"`` (default), ``"momentum"`` (SGD's; the first of ``betas``), ``"adafactor"`` (factored second
            moment) or ``"shared"`` (one second moment for all rows: protected outputs stay exact without a second
            projection).
        range_finder: ``"warm"`` (default: one subspace iteration from the last basis; starts randomised, and again
            where it holds less than half the energy that it held before), ``"randomized"``, ``"gram"``, ``"full"``.
        rotate: Carry the moments over into a new basis; default True. False keeps their numbers, as GaLore does.
        stagger: Spread refreshes over the steps between two of them; default True.
        seed: Of randomised starts; default 0.
        compile: Run the rule through ``torch.compile``; default False.
        average_over: Processes that each have a gradient of their own; default ``None``: gradients arrive averaged.
            With a process group the optimizer averages coordinates in place of gradients, ``m r`` numbers in place of
            ``m n``; whole gradients only of matrices whose basis is due and of those that are not projected. Weights
            have to start equal. Not for DDP outside ``no_sync()``, which averages by itself, nor for FSDP2.

    Raises:
        ConfigError: On values outside these ranges, an unknown option, complex parameters, or a group in which the
            rank is above every matrix.

    Example:
        ```python
        optimizer = gr.GORP(model.named_parameters(), lr=1e-4, rank=8, weight_decay=0.01)
        why = {plan.name: (plan.treatment, plan.why) for plan in optimizer.explain()}
        ```
    """

    _published = False
    """As galore-torch: eps beside a root without bias correction, decay after the step, signs as SVD gives them."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = 8,
        refresh: int = 10,
        scale: float = 1.0,
        side: str = "auto",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rule: str = "adam",
        range_finder: str = "warm",
        rotate: bool = True,
        stagger: bool = True,
        seed: int = 0,
        compile: bool = False,
        average_over: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "rank": rank, "refresh": refresh, "scale": scale, "side": side, "betas": betas, "eps": eps,
            "weight_decay": weight_decay, "rule": rule, "range_finder": range_finder, "rotate": rotate,
            "stagger": stagger, "seed": seed, "compile": compile,
        }  # fmt: skip
        check_options(defaults, type(self).__name__)
        if average_over is not None:
            check_process_group(average_over, type(self).__name__)
        self.average_over = average_over
        self._warned = False
        self._reset()
        super().__init__(params, defaults)

    def _reset(self) -> None:
        """What belongs to a run and not to the state."""
        self._spaces: dict[Tensor, Spaces] = {}
        self._observer: Observer | None = None
        self._given: dict[Tensor, Tensor] = {}
        self._of_matrices: set[int] = set()
        self._before_rule: Callable[[list[Job], list[Job]], None] | None = None

    # --- groups -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options override the optimizer's.

        Raises:
            ConfigError: On an unknown option or value, complex parameters, or a rank above every matrix of the group.
        """
        who = type(self).__name__
        unknown = set(param_group) - set(self.defaults) - {"params", "param_names", "initial_lr", "max_lr", "min_lr"}
        for name in sorted(unknown):
            if any(name in group for group in self.param_groups):
                continue  # a scheduler's own entry
            raise ConfigError(f"{who}: a parameter group has the option {name!r}; {nearest(name, self.defaults)}")
        super().add_param_group(param_group)
        try:
            has_matrices = check_group(self.param_groups[-1], who)
        except ConfigError:
            self.param_groups.pop()
            raise
        if has_matrices:
            self._of_matrices.add(len(self.param_groups) - 1)

    def explain(self) -> tuple[ParameterPlan, ...]:
        """How each parameter is treated, and why."""
        plans = []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(group["params"]))]
            plans += [plan_of(p, group, name) for p, name in zip(group["params"], names, strict=True)]
        return tuple(plans)

    # --- the door for guards ------------------------------------------------------------------------------------

    def protect(
        self, spaces: Mapping[Tensor, tuple[Subspace | None, Subspace | None]], *, exact: bool = True
    ) -> set[Tensor]:
        """Keep updates out of subspaces, in place of what was protected before.

        It belongs to the run, not to the state: who gave it gives it again after a resume.

        Args:
            spaces: For a parameter ``(m, n)`` the protected subspaces of R^n and of R^m; ``{}`` lifts all.
            exact: The update stays outside, whatever rule and decay do (default). False sweeps coordinates once,
                before the rule, as the published code does; what Adam turns back is then left in.

        Returns:
            Those of the parameters that are projected, which alone are kept outside.

        Raises:
            ConfigError: If a subspace does not fit its parameter.
        """
        ours = {p for p, group, _ in self._projected()}
        taken = {p: pair for p, pair in spaces.items() if p in ours}
        for p, pair in taken.items():
            for space, size, what in zip(pair, reversed(matrix_shape(p)), ("inputs", "outputs"), strict=True):
                if space is not None and space.dim != size:
                    raise ConfigError(
                        f"protect: a parameter of shape {tuple(p.shape)} has {size} {what}, the subspace given for "
                        f"them lies in R^{space.dim}"
                    )
        self._spaces = {p: Spaces.of(p, pair, exact) for p, pair in taken.items()}
        for p, spaces_of in self._spaces.items():
            state = self.state.get(p, {})
            if "basis" in state and not spaces_of.hold_off(state):
                state["refreshes"].zero_()  # to be found again, outside
        return set(taken)

    def observe(self, observer: Observer | None) -> None:
        """Have a function called for every projected matrix in every step, once its moments are updated.

        Args:
            observer: Gets the parameter, the coordinates of its gradient, the bases of its input side ``(n, r)`` and
                output side ``(m, r)`` (``None`` where there is none), so that the gradient is about ``basis_out @
                coordinates @ basis_in^T``, and the first moment in the same coordinates. They are the optimizer's own:
                to be read, not kept. ``None`` ends it.
        """
        self._observer = observer

    # --- stepping -----------------------------------------------------------------------------------------------

    def _projected(self) -> Iterator[tuple[Tensor, dict[str, Any], int]]:
        """Projected parameters, their groups, and their ordinals."""
        ordinal = 0
        for group in self.param_groups:
            rank = group["rank"]
            if rank is None:
                continue
            for p in group["params"]:
                if p.ndim > 1 and p.requires_grad and min(matrix_shape(p)) >= rank:
                    yield p, group, ordinal
                    ordinal += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and what :class:`LayerWise` has accumulated."""
        self._given.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            ConfigError: On a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        devices = {p.device for group in self.param_groups for p in group["params"]}
        with contextlib.ExitStack() as stack:  # whatever is set around a step, its products are exact
            for device in devices:
                stack.enter_context(full_precision(device))
            self._step()
        return loss

    def _step(self) -> None:
        if self.average_over is not None:
            trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
            agree_on_gradients(trained, self.state, self._given, self.average_over)
        projected = set()
        jobs = []
        for p, group, ordinal in self._projected():
            projected.add(p)
            if p.grad is not None or p in self._given:
                check_gradient(p)
                jobs.append(self._job(p, group, ordinal))
        if not self._spaces.keys() <= projected:
            check_protected(self._spaces, self.param_groups)
        others = [
            [p for p in group["params"] if p.requires_grad and p.grad is not None and p not in projected]
            for group in self.param_groups
        ]
        for p in chain.from_iterable(others):
            check_gradient(p)
        self._step_projected(jobs, [p.grad for p in chain.from_iterable(others) if p.grad is not None])
        for group, members in zip(self.param_groups, others, strict=True):
            if members:
                self._step_adamw(members, group)

    def _step_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                check_whole(p, group, self.param_groups, self._of_matrices)
            _state.start_adamw(self.state[p], p)
        lost, betas = group["weight_decay"], group["betas"]
        for members in by_step(parameters, self.state) if self._published else [parameters]:
            states, weights = [self.state[p] for p in members], [local(p) for p in members]
            adamw_step(
                weights,
                [local_gradient(p) for p in members],
                [local(s["exp_avg"]) for s in states],
                [local(s["exp_avg_sq"]) for s in states],
                [s["step"] for s in states],
                betas=betas,
                lr=group["lr"],
                eps=self._eps(group, states[0]),
                weight_decay=0.0 if self._published else lost,
            )
            if self._published and lost:
                torch._foreach_mul_(weights, 1.0 - float(group["lr"]) * lost)

    def _eps(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        """What torch's kernel has to be given as eps, for the step to come."""
        eps: float = group["eps"]
        if self._published:
            eps /= (1.0 - group["betas"][1] ** (float(state["step"]) + 1.0)) ** 0.5
        return eps

    def _job(self, p: Tensor, group: dict[str, Any], ordinal: int) -> Job:
        state = self.state[p]
        side = _state.start_projected(state, p, group)
        weight, gradient = as_matrix(p), None
        spaces = self._spaces.get(p, Spaces())
        if p.grad is not None:
            gradient = local_gradient(p).flatten(1).to(state["exp_avg"].dtype)
        if side == "left":
            weight, gradient, spaces = weight.mT, None if gradient is None else gradient.mT, spaces.mT
        job = Job(p, group, state, ordinal, side, weight, gradient, spaces, row_shard(p), self._given.pop(p, None))
        if job.coordinates is not None and (gradient is not None or self._is_due(job)):
            lifted, job.coordinates = job.lifted(job.coordinates), None  # they cannot be stepped with as they are
            job.gradient = lifted if job.gradient is None else job.gradient + lifted
        return job

    def _step_projected(self, jobs: list[Job], others: list[Tensor]) -> None:
        wanted = [j for j in jobs if self._is_due(j)]
        due = set(wanted)
        skipped = due - self._search(wanted)
        rest = [j for j in jobs if j not in skipped]
        project(j for j in rest if j.coordinates is None)
        if self.average_over is not None:
            average([j.known for j in rest if j not in due] + others, self.average_over)
        held = dict(zip(rest, energies([j.known for j in rest], rest), strict=True))
        # a gradient wholly beside its basis would wait for a refresh that never comes: no step, no count
        found = self._search([j for j in rest if held[j] == 0.0 and j not in due])
        beside = [j for j in rest if j in found]
        held |= dict(zip(beside, energies([j.known for j in beside], beside), strict=True))
        live = [j for j in rest if is_usable(held[j])]
        if len(live) < len(jobs):
            stepping = set(live)
            self._skip([j for j in jobs if j not in stepping])
        sweep(live)
        if self._before_rule is not None:
            self._before_rule(live, jobs)
        for members in by_options(live, by_step=self._published):
            self._take(members)

    def _search(self, jobs: list[Job]) -> set[Job]:
        """Find bases; returns the jobs whose gradient allows it."""
        known = [j for j in jobs if j.gradient is not None]
        gradients = [j.gradient for j in known if j.gradient is not None]
        if self.average_over is not None:
            average(gradients, self.average_over)
        found = energies(gradients, known)
        usable = {j: energy for j, energy in zip(known, found, strict=True) if is_usable(energy)}
        dense = [j for j in usable if j.shard is not None and j.group["range_finder"] in ("full", "gram")]
        wholes = ranges_by_owners(dense, self._dense_range)
        for job, energy in usable.items():
            refresh(job, energy, wholes.get(job), raw=self._published)
        return set(usable)

    def _dense_range(self, job: Job, gradient: Tensor) -> Tensor:
        """What the dense range finders say of a whole gradient whose rows are spread, on its owner."""
        rank, method = job.group["rank"], job.group["range_finder"]
        return dense_range(gradient, rank, method, spaces=job.spaces, raw=self._published)

    def _is_due(self, job: Job) -> bool:
        if not int(job.state["refreshes"]):
            return True
        offset = job.ordinal if job.group["stagger"] else 0
        return bool((int(job.state["step"]) + offset) % job.group["refresh"] == 0)

    def _skip(self, jobs: list[Job]) -> None:
        for job in jobs:  # torch.distributed.checkpoint takes a first step at learning rate 0, to have a state
            job.state["skipped"].add_(1 if float(job.group["lr"]) or float(job.state["step"]) else 0)
        # zero from the start is no fault: the first gradient of a LoRA factor A is, and that of what a guard holds
        begun = [j for j in jobs if int(j.state["refreshes"]) or j.gradient is None or bool(j.gradient.any())]
        loud = [j for j in begun if float(j.group["lr"]) and j.spaces.inputs is None and j.spaces.outputs is None]
        if loud and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: {len(loud)} matrices (the first of shape {tuple(loud[0].parameter.shape)}) "
                "have a gradient that is zero, NaN or infinite; they are skipped, and their basis and moments stay. "
                "Said once; state['skipped'] counts on. Look at the loss, or lower the learning rate, if it goes on",
                stacklevel=4,
            )

    def _take(self, jobs: list[Job]) -> None:
        """Rule, protection and update of matrices of one group."""
        group = jobs[0].group
        rate, betas, eps = float(group["lr"]) * group["scale"], group["betas"], self._eps(group, jobs[0].state)
        if group["rule"] == "adam" and not group["compile"]:
            second = [local(j.state["exp_avg_sq"]) for j in jobs]
            first, steps = [j.first for j in jobs], [j.state["step"] for j in jobs]
            updates = adam([j.known for j in jobs], first, second, steps, rate=rate, betas=betas, eps=eps)
        else:
            updates = by_elements(jobs, rate, betas, eps)
        if self._observer is not None:
            for job in jobs:
                self._show(job, self._observer)
        lost = float(group["lr"]) * group["weight_decay"]
        if lost and not self._published:
            decay(jobs, lost)
        apply(jobs, kept_outside(jobs, updates))
        if lost and self._published:
            decay(jobs, lost)
        for job in jobs:
            write_back(job.parameter, job.weight.mT if job.side == "left" else job.weight)

    @staticmethod
    def _show(job: Job, observer: Observer) -> None:
        if job.side == "left":
            observer(job.parameter, job.known.mT, None, job.basis, job.first.mT)
        else:
            observer(job.parameter, job.known, job.basis, job.out, job.first)

    # --- state --------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; unlike torch's own, bases and moments keep their dtype over bf16 and fp16 weights."""
        self._given.clear()  # they belong to the bases of before
        super().load_state_dict(state_dict)
        _state.restore_dtypes(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._warned = False
        self.__dict__.setdefault("average_over", None)
        if "_spaces" not in self.__dict__:
            self._reset()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for entry in self.state.values():
            _state.migrate(entry)
