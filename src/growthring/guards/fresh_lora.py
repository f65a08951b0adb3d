"""A new LoRA branch for every task, merged into the weights when it ends or kept beside them.

What GORP (Wang et al., ACL 2025) and incremental LoRA do: every task trains a pair ``A``, ``B`` of its own from
``B = 0``. It keeps nothing by itself. With a :class:`~growthring.guards.GradientMemory` beside it the new ``A`` reads
nothing that earlier tasks need, and so neither does ``B A``, whatever ``B`` becomes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from growthring.errors import ConfigError, GuardError

from . import marks
from .base import Certificate
from .branch_guard import BranchGuard
from .branches import Branches
from .plan import TensorPlan, Treatment

__all__ = ["FreshLoRA"]

_COST = "it keeps nothing by itself: put a GradientMemory beside it"


class FreshLoRA(BranchGuard):
    """Gives every task a LoRA branch that starts anew, and merges it into the base weights or keeps it, frozen.

    The model must be a ``PeftModel`` with plain LoRA on linear layers; base weights may train beside it. For every
    task call :meth:`prepare` before the optimizer is made; :class:`~growthring.ContinualTrainer` does. Beside a
    :class:`~growthring.guards.GradientMemory` it may stand first or last in the list of guards.

    Args:
        merge: ``True`` (default): at the end of a task the base weights take up ``s B A``, so that the model stays as
            small as it was; save the whole model then, as an adapter alone no longer holds what was learned.
            ``False``: branches stay in the model, frozen and active, and one adapter of all of them fits the untouched
            base (:func:`merge_branches`).
        seed: Of the first weights of ``A`` (Kaiming uniform, as PEFT's), at least 0. Default 0.

    Raises:
        ConfigError: If ``merge`` is no boolean or ``seed`` is no whole number of at least 0.

    Example:
        ```python
        guards = [gr.FreshLoRA(), gr.GradientMemory(energy=0.95)]
        for guard in guards:
            guard.attach(model)
        for name, loader in tasks.items():
            guards[0].prepare(name, loader)
            Trainer(model, args, train_dataset=loader.dataset, callbacks=[g.callback() for g in guards]).train()
            for guard in guards:
                guard.end_task(name, loader)
        model.merge_and_unload().save_pretrained("model/")
        ```
    """

    name = "fresh-lora"

    def __init__(self, merge: bool = True, *, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(merge, bool):
            raise ConfigError(f"FreshLoRA(merge={merge!r}): must be True or False")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"FreshLoRA(seed={seed!r}): must be a whole number, at least 0")
        self.merge, self.seed = merge, seed
        why = f"a new one for every task, {'merged into the weight' if merge else 'frozen'} when the task has ended"
        factor: tuple[Treatment, str, str, str] = ("free", "", why, _COST)
        self.plans = {"A": factor, "B": factor}

    # --- the contract -------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Find the LoRA layers of ``model``. A task under way on the very same model stays under way.

        Raises:
            GuardError: If the model has no LoRA on linear layers, the memory belongs to another model, or a branch
                cannot be merged (quantised, tied or computed weights).
        """
        if self.merge:
            self._check_mergeable(model)
        super().attach(model)

    def explain(self, model: nn.Module | None = None) -> tuple[TensorPlan, ...]:
        """What happens to the factors of a branch; it says nothing of other tensors."""
        return tuple(row for row in super().explain(model) if row.kinds)

    def end_task(self, task: str | None, batches: Iterable[Any] = ()) -> Certificate:
        """Close the branch of the task: merge it, or leave it as it is.

        Args:
            task: Name of the task; default ``task-<number>``.
            batches: Not read.

        Returns:
            A certificate without a verdict: nothing is protected (``leak`` and ``kept`` are ``None``).
        """
        branches, index, branch = self._attached(), len(self.tasks), self.current
        task = task or f"task-{index + 1}"
        notes: list[str] = []
        self._finish(task, notes)
        if self.merge and branch:
            narrow = self._fold(branches, branch)
            if narrow:
                notes.append(f"{narrow} weights in half precision took up their branch; small changes round away")
            self._kept.remove(branch)
            self._marks = self._computed(branches)
        return Certificate.without_sites(
            self.name,
            task,
            index,
            notes=notes,
        )

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {"merge": self.merge, "seed": self.seed}

    # --- inside -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _design(self, branches: Branches, batches: Iterable[Any]) -> None:
        """``A`` uniform in ``+-1 / sqrt(in)``, seeded by the task alone; ``B`` zero."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {len(self.tasks)}".encode()))
        for _, f in branches.factors(self.current):
            bound = f.a.shape[1] ** -0.5
            f.a.copy_(torch.empty(f.a.shape).uniform_(-bound, bound, generator=generator))
            f.b.zero_()

    @torch.no_grad()
    def _fold(self, branches: Branches, branch: str) -> int:
        """Add ``s B A`` to the base weights and zero ``B``; returns how many of them are in half precision.

        ``A`` stays: guards that are asked later measure what became of it.
        """
        narrow = 0
        for name, f in branches.factors(branch):
            layer = branches.layers[name]
            weight, update = layer.get_base_layer().weight, f.update()
            wide = weight.to(update.device).double()
            weight.copy_(wide + (update.mT if layer.fan_in_fan_out else update))
            f.b.zero_()
            narrow += weight.dtype in (torch.float16, torch.bfloat16)
        return narrow

    def _computed(self, branches: Branches) -> dict[str, float]:
        found = super()._computed(branches)
        if self.merge:
            base = {name: (layer.get_base_layer().weight, None) for name, layer in branches.layers.items()}
            return {name: found[name] + mark for name, mark in marks.take(base).items()}
        return found

    def _rounding(self, branches: Branches) -> dict[str, float]:
        found = super()._rounding(branches)
        if self.merge:
            for name, layer in branches.layers.items():
                found[name] += 1e-4 * float(layer.get_base_layer().weight.detach().norm())
        return found

    def _check_mergeable(self, model: nn.Module) -> None:
        holders: dict[int, int] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
        for name, layer in Branches(model, self.name).layers.items():
            base = layer.get_base_layer()
            weight: Any = base._parameters.get("weight")
            if not isinstance(base, nn.Linear | Conv1D) or weight is None or not weight.is_floating_point():
                why = f"is a {type(base).__name__}, whose weight is quantised or computed"
            elif holders[id(weight)] > 1:
                why = "shares its weight with another layer, which would change too"
            else:
                continue
            raise GuardError(f"{self.name}: {name} {why}: no branch can be merged into it. Use merge=False")
