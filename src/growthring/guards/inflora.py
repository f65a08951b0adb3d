"""InfLoRA: the new branch reads only what earlier tasks do not use.

Liang and Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR 2024, arXiv 2404.00228.
Before task ``t`` trains, its inputs ``H_t`` ``(n, d)`` at every adapted layer are collected, and with ``P`` the
projector on the input space of earlier tasks

    A_t = (top r right singular vectors of H_t (I - P))^T / sqrt(3),    frozen;    B_t = 0, trained.

The rows of ``A_t`` lie outside the old space, so ``B_t A_t x = 0`` for every ``x`` in it, whatever ``B_t`` becomes:
exact under any optimizer, with nothing to do at a step. After the task, ``P`` grows by what its inputs need (DualGPM:
the smaller of the space and its complement is what is stored).

The released code takes singular values of ``H^T H`` and squares them again, so that its threshold acts on sigma to the
fourth, and it designs ``A`` from ``(I - P) H^T H``; here energy is sigma squared and ``A`` is the paper's.
"""

from __future__ import annotations

import contextlib
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from growthring.errors import ConfigError, GuardError
from growthring.subspace import SecondMoment, Subspace

from . import storage
from .base import Certificate, SiteCertificate
from .batches import evaluating, head_of, mask_for, masks_apply, run_model, size_of
from .branch_guard import BranchGuard
from .branches import Branches
from .energy import LinearSchedule, parse_energy
from .memory import EXACT_ABOVE, ROWS, ROWS_PER_DIM, SKETCH_ABOVE
from .plan import Treatment

__all__ = ["InfLoRA"]

ITERATE_ABOVE, OVERSAMPLE, ITERATIONS = 1024, 8, 8
"""Inputs wider than this: the few leading directions are iterated for, in place of a whole eigendecomposition."""


class InfLoRA(BranchGuard):
    """Gives every task a LoRA branch whose ``A`` cannot see the inputs of earlier tasks; only its ``B`` trains.

    The model must be a ``PeftModel`` with plain LoRA on linear layers, any of them. For every task call
    :meth:`prepare` before the optimizer is made; :class:`~growthring.ContinualTrainer` does.

    Args:
        energy: Share of the old inputs' energy (sigma squared, not centred) to keep clear of, in (0, 1], or a
            :class:`LinearSchedule` over tasks; the paper goes from 0.95 or 0.98 to 1.0. Default 0.95.
        samples: Examples whose inputs are collected, before and after a task; default 256.

    Raises:
        ConfigError: On values outside the ranges above.

    Example:
        ```python
        guard = gr.InfLoRA(energy=gr.LinearSchedule(0.95, 1.0, tasks=10))
        guard.attach(model)
        for name, loader in tasks.items():
            guard.prepare(name, loader)
            Trainer(model, args, train_dataset=loader.dataset, callbacks=[guard.callback()]).train()
            guard.end_task(name, loader)
        gr.merge_branches(model)
        model.save_pretrained("adapter/")
        ```
    """

    name = "inflora"
    trains = "B"
    plans: Mapping[str, tuple[Treatment, str, str, str]] = {
        "A": (
            "frozen",
            "A x = 0 for the old inputs x of the layer",
            "made from the inputs of each task before it trains",
            "the branch sees only what old inputs leave free",
        ),
        "B": ("protected", "B (A x) = 0 for old inputs x, whatever B becomes, since A x = 0", "", ""),
    }

    def __init__(self, energy: float | LinearSchedule | Mapping[str, Any] = 0.95, *, samples: int = 256) -> None:
        super().__init__()
        parsed = parse_energy(energy)
        if not isinstance(parsed, float | LinearSchedule):
            raise ConfigError(f"InfLoRA(energy={energy!r}): give one number in (0, 1], or a LinearSchedule")
        if samples < 1:
            raise ConfigError(f"InfLoRA(samples={samples}): must be at least 1")
        self.energy, self.samples = parsed, samples
        self._spaces: dict[str, Subspace] = {}
        self._groups: dict[str, str] = {}  # layer -> the first layer that sees the same input

    # --- the contract -------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Find the LoRA layers; raise :class:`~growthring.errors.GuardError` if the memory is about others."""
        super().attach(model)
        layers = self._attached().layers
        for name, space in self._spaces.items():
            if name in layers and layers[name].in_features != space.dim:
                raise GuardError(
                    f"{name} sees {layers[name].in_features} features, but the memory holds a basis of R^{space.dim}"
                )

    def end_task(self, task: str | None, batches: Iterable[Any]) -> Certificate:
        """Measure what was kept, then keep clear of this task's inputs too.

        Args:
            task: Name of the task; default ``task-<number>``. Without a branch under way (a reference set before any
                training) only the memory grows.
            batches: Batches of the task's *training* inputs, as the model takes them; at most ``samples`` examples
                are read.

        Raises:
            GuardError: If ``batches`` gives nothing, or no adapted layer saw any input.
        """
        branches = self._attached()
        index = len(self.tasks)
        notes: list[str] = []
        task = task or f"task-{index + 1}"
        target = self.energy.at(index) if isinstance(self.energy, LinearSchedule) else self.energy
        leaks = self._leaks(branches)
        moments = self._moments(batches, target > EXACT_ABOVE)
        reached = self._grow(branches, moments, target)
        if index and (outside := self._outside()):
            notes.append(
                f"{len(outside)} tensors outside the branches trained too (the first: {outside[0]}): the guarantee "
                "does not cover them"
            )
        branch = self.current
        intact = self._finish(task, notes)
        sites = []
        for layer in branches.layers:
            if (lead := self._groups.get(layer)) not in reached:
                continue
            space, (leak, rounding) = self._spaces[lead], leaks.get(layer, (None, None))
            name = f"{layer}.lora_A.{branch}.weight" if branch else layer
            sites.append(
                SiteCertificate(
                    name, "lora_A", space.dim, space.rank, space.free, target, reached[lead], leak, rounding
                )
            )
        measured = bool(leaks) and index > 0
        certificate = Certificate(
            guard=self.name,
            task=task,
            task_index=index,
            protected_tasks=index,
            leak=max(leak for leak, _ in leaks.values()) if measured else None,
            kept=(intact and all(s.kept for s in sites)) if measured else None,
            energy=min(s.energy for s in sites),
            free=sum(s.free for s in sites),
            dims=sum(s.dim for s in sites),
            output_change=None,
            probes=0,
            held=0,
            sites=tuple(sites),
            notes=tuple(notes),
        )
        if certificate.free == 0:
            warnings.warn(
                f"InfLoRA: after {task!r} no free direction is left at any of {len(sites)} layers, so nothing can be "
                "learned from now on. Lower the energy, or adapt more layers",
                stacklevel=2,
            )
        return certificate

    def exhausted(self) -> bool:
        """True when no direction of any layer's input is free."""
        return bool(self._spaces) and all(space.free == 0 for space in self._spaces.values())

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {"energy": storage.plain(self.energy), "samples": self.samples}

    def state_dict(self) -> dict[str, Any]:
        """The input spaces, the tasks and the branches' weights: tensors and plain values only."""
        spaces = {name: space.state_dict() for name, space in self._spaces.items()}
        return {**super().state_dict(), "spaces": spaces, "groups": dict(self._groups)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; an attached model gets the branches that it lacks."""
        self._spaces = {name: Subspace.from_state_dict(space) for name, space in state["spaces"].items()}
        self._groups = dict(state["groups"])
        super().load_state_dict(state)

    # --- inside -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _design(self, branches: Branches, batches: Iterable[Any]) -> None:
        moments = self._moments(batches, exact=False)
        for lead, moment in moments.items():
            mine = [f.a for layer, f in branches.factors(self.current) if self._groups[layer] == lead]
            widest = max((a.shape[0] for a in mine), default=0)
            rows = directions(moment, self._spaces.get(lead), widest) / math.sqrt(3.0)
            for a in mine:
                count = min(a.shape[0], rows.shape[0])
                a.zero_()[:count].copy_(rows[:count])
        if not any(bool(f.a.any()) for _, f in branches.factors(self.current)):
            warnings.warn(
                "InfLoRA: the inputs of this task lie inside the space of earlier tasks at every layer, so its branch "
                "cannot learn. Lower the energy",
                stacklevel=3,
            )

    def _grow(self, branches: Branches, moments: Mapping[str, SecondMoment], target: float) -> dict[str, float]:
        """Take in what the inputs need; returns the captured energy by group."""
        reached = {}
        for lead, moment in moments.items():
            if moment.trace > 0.0:
                weight = next(iter(branches.layers[lead].lora_A.values())).weight
                dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
                space = self._spaces.setdefault(lead, Subspace(moment.dim, dtype=dtype, device=weight.device))
                reached[lead] = space.grow(moment, energy=target).energy
        if not reached:
            raise GuardError(
                "InfLoRA: no adapted layer saw any input while the model ran; check what the batches feed"
            )
        return reached

    def _leaks(self, branches: Branches) -> dict[str, tuple[float, float]]:
        """Share of ``B A`` inside the protected space, and the most of it that storing ``A`` can cause, by layer."""
        leaks = {}
        for layer, f in branches.factors(self.current) if self.current else ():
            space = self._spaces.get(self._groups.get(layer, ""))
            if space is not None:
                update = f.update()
                size = float(update.norm())
                bound = abs(f.scale) * float(f.b.detach().double().norm()) * float(f.a.detach().double().norm())
                rounding = (
                    min(torch.finfo(f.a.dtype).eps, torch.finfo(torch.float32).eps) / 2 * bound / size if size else 0.0
                )
                leaks[layer] = (space.share(update), rounding)
        return leaks

    def _moments(self, batches: Iterable[Any], exact: bool) -> dict[str, SecondMoment]:
        assert self._model is not None
        with evaluating(self._model):
            return input_moments(
                self._model, self._attached().layers, self._groups, batches, self.samples, exact=exact
            )


def directions(moment: SecondMoment, space: Subspace | None, count: int) -> Tensor:
    """Unit rows ``(<= count, d)``, float64: the inputs' principal directions outside ``space``, strongest first.

    Directions whose energy is rounding noise are left out.
    """
    if moment.trace == 0.0:
        return torch.zeros(0, moment.dim, dtype=torch.float64)
    if moment.form == "gram" and moment.dim > ITERATE_ABOVE:
        values, vectors = _leading(moment.matrix(), space, count)
    else:
        values, vectors = moment.residual_spectrum(space)
        values, vectors = values[:count], vectors[:, :count]
    noise = 4 * torch.finfo(moment.products).eps if moment.form == "gram" else 0.0
    rows = vectors[:, values > max(noise, 1e-12) * moment.trace].mT
    if space is not None and space.rank:
        for _ in range(2):  # once leaves what the basis lacks of being orthonormal
            rows = space.reject(rows.to(space.device)).to(rows.device)
        rows = rows / rows.norm(dim=1, keepdim=True)
    return rows


def _leading(matrix: Tensor, space: Subspace | None, count: int) -> tuple[Tensor, Tensor]:
    """The leading part of ``matrix``'s spectrum outside ``space``, by subspace iteration."""

    def outside(rows: Tensor) -> Tensor:
        return rows if space is None else space.reject(rows.to(space.device)).to(rows.device)

    generator = torch.Generator().manual_seed(0)
    dim = matrix.shape[0]
    rows = torch.randn(min(count + OVERSAMPLE, dim), dim, generator=generator, dtype=torch.float64).to(matrix.device)
    for _ in range(ITERATIONS):
        rows = torch.linalg.qr(outside(outside(rows) @ matrix).mT)[0].mT
    rows = outside(rows)
    values, turned = torch.linalg.eigh(rows @ matrix @ rows.mT)
    return values.flip(0)[:count], (turned.flip(1)[:, :count].mT @ rows).mT


def input_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    groups: dict[str, str],
    batches: Iterable[Any],
    samples: int,
    *,
    exact: bool,
) -> dict[str, SecondMoment]:
    """Second moments of what layers see, one for all layers with the same input (query, key and value, say).

    Args:
        model: In evaluation mode, without gradients.
        layers: Modules by name; the first argument of their forward is the input.
        groups: For every layer the first one that sees the same input; filled at the first call, kept from then on.
        batches: Batches as the model takes them.
        samples: Examples read at most. Of their rows a seeded random part is used where there are many.
        exact: Directions down to rounding noise are asked for.

    Raises:
        GuardError: If there is no batch.
    """
    moments: dict[str, SecondMoment] = {}
    generator = torch.Generator().manual_seed(0)
    alive: dict[
        tuple[Any, ...], tuple[str, Tensor]
    ] = {}  # this batch's inputs, held so that their addresses stay true
    given: set[tuple[Any, ...]] = set()
    seen, expected, masked = 0, samples, masks_apply(model)
    current: Any = None

    def hook(name: str) -> Callable[..., None]:
        def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor):
                return
            version = 0 if x.is_inference() else x._version
            key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, version)
            lead = groups.setdefault(name, alive[key][0] if key in alive else name)
            alive.setdefault(key, (lead, x))
            if (lead, key) in given:
                return
            given.add((lead, key))
            rows = x.detach().reshape(-1, x.shape[-1])
            mask = mask_for(x, current) if masked else None
            if mask is not None:
                rows = rows[mask.reshape(-1).to(rows.device).bool()]
            if lead not in moments:
                moments[lead] = _moment(rows, exact)
            keep = math.ceil(max(ROWS, ROWS_PER_DIM * rows.shape[1]) * size_of(current) / expected)
            if moments[lead].form != "root" and keep < rows.shape[0]:
                rows = rows[torch.randperm(rows.shape[0], generator=generator)[:keep].to(rows.device)]
            moments[lead].update(rows)

        return listen

    with contextlib.ExitStack() as stack:
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled graph calls no later hook
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        for batch in batches:
            take = min(size_of(batch), samples - seen)
            current = batch if take == size_of(batch) else head_of(batch, take)
            if seen == 0:
                expected = min(samples, max(1, operator.length_hint(batches)) * take) if take < samples else take
            run_model(model, current)
            alive.clear()
            given.clear()
            seen += take
            if seen >= samples:
                break
    if seen == 0:
        raise GuardError("InfLoRA got no batch; pass the task's training inputs, as the model takes them")
    return moments


def _moment(rows: Tensor, exact: bool) -> SecondMoment:
    """The cheapest form that resolves what is asked for."""
    if rows.shape[1] > SKETCH_ABOVE:
        return SecondMoment(rows.shape[1], form="sketch")
    if exact:
        return SecondMoment(rows.shape[1], form="root")
    return SecondMoment(rows.shape[1], products=torch.float64 if rows.dtype == torch.float64 else torch.float32)
