"""What InfLoRA, O-LoRA and FreshLoRA share: a branch for every task, made before it trains, closed after it."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from growthring.errors import ConfigError, DataError, GuardError

from . import storage
from .base import Certificate, Guard
from .branches import Branches
from .plan import HOLE, TensorPlan, Treatment

__all__ = ["BranchGuard"]

_NARROW = (torch.float16, torch.bfloat16)
_Self = TypeVar("_Self", bound="BranchGuard")


class BranchGuard(Guard):
    """What every guard does that gives each task a branch: the tasks, the adapters, and their state."""

    trains = "AB"
    """Factors of the current branch that train."""
    plans: Mapping[str, tuple[Treatment, str, str, str]] = {}
    """Treatment, condition, why and cost of the factors ``"A"`` and ``"B"`` of a new branch."""

    def __init__(self) -> None:
        self.tasks: list[str] = []
        """Names of the tasks that have ended."""
        self.current = ""
        """Adapter of the task under way; empty between tasks."""
        self._kept: list[str] = []  # branches that the model must have active
        self._marks: dict[str, float] = {}
        self._sums: list[float] = []
        self._stored: dict[str, Any] = {}
        self._model: nn.Module | None = None
        self._branches: Branches | None = None

    # --- the contract -------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Find the LoRA layers of ``model``. A task under way on the very same model stays under way.

        Branches that a loaded memory holds and the model lacks are put into it.

        Raises:
            GuardError: If the model has no LoRA on linear layers, one whose branches do not add up, or the memory
                belongs to another model.
        """
        branches = Branches(model, self.name)
        missing = [name for name in self._marks if name not in branches.layers]
        if missing:
            raise GuardError(
                f"{self.name}: the memory is about {len(self._marks)} LoRA layers, and {len(missing)} of them are not "
                f"in this model (the first: {missing[0]}). Attach it to the model it was made with"
            )
        before = self._branches.models if self._branches is not None else None
        absent = {name: weights for name, weights in self._stored.items() if not branches.has(name)}
        for name, weights in absent.items():
            branches.add(name, weights)
        self._stored = {}
        if before is None or [id(m) for m in before] != [id(m) for m in branches.models]:
            self.current = self.current if branches.has(self.current) else ""
            self._sums = []
        self._model, self._branches = model, branches
        if any(branches.has(name) and name not in branches.names() for name in self._kept):
            idle = self._idle()
            self._activate()
            for name in idle:
                branches.remove(name)

    def prepare(self, task: str | None, batches: Iterable[Any]) -> None:
        """Give the task a branch of its own, before its optimizer is made.

        Earlier branches stay active and are frozen; an adapter that does nothing yet (as ``get_peft_model`` makes it)
        gives way to the first branch. Called again before the task has ended, it starts the branch anew.

        Args:
            task: Name of the task.
            batches: Batches of its training inputs, as the model takes them.

        Raises:
            GuardError: If the guard is not attached.
        """
        branches = self._attached()
        if not self.current:
            self._look()
            self._open(branches)
        else:
            branches.restart(self.current)
            self._activate()
        self._design(branches, batches)
        self._sums = branches.sums(self._frozen())

    def begin_task(self, task: str | None = None) -> None:
        """See to it that all branches are active and the current one alone trains.

        Raises:
            GuardError: If :meth:`prepare` was not called for this task.
        """
        branches = self._attached()
        if not self.current:
            raise GuardError(
                f"{self.name}: this task has no branch yet. Call guard.attach(model) and guard.prepare(task, batches) "
                "before the optimizer is made (with transformers.Trainer: before trainer.train())"
            )
        self._activate()
        self._sums = self._sums or branches.sums(self._frozen())

    def explain(self, model: nn.Module | None = None) -> tuple[TensorPlan, ...]:
        """What happens to every trainable tensor, and why; before training or at any time.

        Before the first task the adapter that the model has stands for the branch of every task.

        Args:
            model: Looked at without being attached; default the attached one.

        Raises:
            GuardError: If there is neither, or the model has no LoRA whose branches add up.
        """
        if model is None:
            self._attached()
        looked_at = model if model is not None else self._model
        assert looked_at is not None
        branches = Branches(looked_at, self.name)
        newest = branches.names()[-1:]
        factors = {id(t): side for n in newest for _, f in branches.factors(n) for t, side in ((f.a, "A"), (f.b, "B"))}
        rows = []
        for name, tensor in looked_at.named_parameters():
            side, shape = factors.get(id(tensor)), tuple(tensor.shape)
            if side is not None:
                treatment, condition, why, cost = self.plans[side]
                rows.append(TensorPlan(name, shape, treatment, (f"lora_{side}",), condition, why, cost))
            elif tensor.requires_grad:
                rows.append(TensorPlan(name, shape, "free", (), "", "it belongs to no branch", HOLE))
        return tuple(rows)

    @abstractmethod
    def _design(self, branches: Branches, batches: Iterable[Any]) -> None:
        """Give the current branch its first weights."""

    # --- for a plain script -------------------------------------------------------------------------------------

    def consolidate(self, model: nn.Module, batches: Iterable[Any], task: str | None = None) -> Certificate:
        """End a task in a script of one's own: attach if needed, then :meth:`end_task`."""
        if self._model is not model:
            self.attach(model)
        return self.end_task(task, batches)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write memory and branches to ``folder`` as safetensors and JSON, each file atomically."""
        return storage.save(Path(folder), self.name, self.settings(), self.state_dict())

    @classmethod
    def load_pretrained(cls: type[_Self], folder: str | Path, model: nn.Module | None = None) -> _Self:
        """Read a memory written by :meth:`save_pretrained`; nothing in it is executed.

        Args:
            folder: Where it was written.
            model: Attached, if given; branches that it lacks are put into it.

        Raises:
            DataError: If the folder holds no whole memory of this guard, or one of a newer format.
            GuardError: If the memory belongs to another model.
        """
        settings, state = storage.load(Path(folder), cls.name)
        try:
            guard = cls(**settings)
            guard.load_state_dict(state)
        except (ConfigError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"the memory in {folder} is not whole: {type(error).__name__}: {error}") from error
        if model is not None:
            guard.attach(model)
        return guard

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""

    def state_dict(self) -> dict[str, Any]:
        """The tasks and the branches' weights: tensors and plain values only."""
        stored = dict(self._stored)
        if self._branches is not None:
            for name in self._branches.names():
                if name in self._kept or not self._branches.idle(name):
                    stored[name] = {
                        layer: {"A": f.a.detach().clone(), "B": f.b.detach().clone()}
                        for layer, f in self._branches.factors(name)
                    }
        return {
            "tasks": list(self.tasks),
            "current": self.current,
            "branches": stored,
            "marks": dict(self._marks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; an attached model gets the branches that it lacks.

        Raises:
            GuardError: If the state belongs to another model.
        """
        self.tasks, self.current = list(state["tasks"]), str(state["current"])
        self._stored = {name: dict(weights) for name, weights in state["branches"].items()}
        self._kept = list(self._stored)
        self._marks = {name: float(mark) for name, mark in state["marks"].items()}
        self._sums = []
        if self._model is not None:
            self.attach(self._model)

    # --- inside -------------------------------------------------------------------------------------------------

    def _attached(self) -> Branches:
        if self._branches is None:
            raise GuardError(f"{self.name} is not attached: call guard.attach(model) first")
        return self._branches

    def _open(self, branches: Branches) -> None:
        """Add the branch of a new task and make it the one that trains."""
        name = f"task-{len(self.tasks):03d}"  # PEFT 0.18 mixes adapters up of which one's name is part of the other's
        while any(name in other or other in name for peft in branches.models for other in peft.peft_config):
            name = f"new-{name}"
        old, idle = self._active(), self._idle()
        branches.add(name)
        for place, first in [pair for n in idle[:1] for pair in branches.factors(n)]:
            with torch.no_grad():  # a first task is then the plain LoRA, bit for bit
                branches.layers[place].lora_A[name].weight.copy_(first.a)
        self.current = name
        self._kept = [*(n for n in old if n not in idle), name]
        self._activate()
        for n in idle:
            branches.remove(n)

    def _active(self) -> list[str]:
        """Branches that belong to the model's answer, whether PEFT has all of them switched on just now or not.

        Oldest first; a task under way has the last.
        """
        branches = self._attached()
        kept = [name for name in self._kept if branches.has(name)]
        return [*(n for n in branches.names() if n not in kept and not (kept and branches.idle(n))), *kept]

    def _activate(self) -> None:
        """All of them active, newest first: a new one then changes no answer by a bit, and resuming restores it."""
        self._attached().activate(self._active()[::-1], self.trains if self.current else "")

    def _idle(self) -> list[str]:
        """Active adapters that do nothing and are nobody's branch, as ``get_peft_model`` makes them."""
        branches = self._attached()
        return [name for name in branches.names() if name not in self._kept and branches.idle(name)]

    def _frozen(self) -> list[str]:
        return [name for name in self._active() if name != self.current]

    def _look(self) -> None:
        """Warn when what the branches compute has changed since the last task ended."""
        branches = self._attached()
        if not self._marks:
            return
        now, size = self._computed(branches), self._rounding(branches)
        moved = [layer for layer, mark in self._marks.items() if abs(now[layer] - mark) > size[layer]]
        if moved:
            warnings.warn(
                f"{self.name}: at {len(moved)} layers the branches compute something else than when the last task "
                f"ended (the first: {moved[0]}). Load them again, or go on: what changed them was not guarded",
                stacklevel=3,
            )

    def _computed(self, branches: Branches) -> dict[str, float]:
        """One number a layer for what must not change between two tasks."""
        return branches.marks()

    def _rounding(self, branches: Branches) -> dict[str, float]:
        """By how much rounding may change each of them."""
        size: dict[str, float] = dict.fromkeys(branches.layers, 1e-6)
        for name in branches.names():
            for layer, f in branches.factors(name):
                rounding = 1e-2 if f.a.dtype in _NARROW else 1e-4
                size[layer] += rounding * abs(f.scale) * float(f.a.detach().norm()) * float(f.b.detach().norm())
        return size

    def _finish(self, task: str, notes: list[str]) -> bool:
        """Close the branch under way; returns whether earlier branches are what they were."""
        branches = self._attached()
        intact = not self._sums or branches.sums(self._frozen()) == self._sums
        if not intact:
            notes.append("factors of earlier branches, which are frozen, have changed while this task trained")
        if self.current and branches.idle(self.current):
            notes.append("the branch of this task is still zero: nothing was learned")
            warnings.warn(
                f"{self.name}: the branch of {task!r} is still zero, so nothing was learned. Make the optimizer after "
                "guard.prepare(); with no free direction left, lower the energy or use a wider adapter",
                stacklevel=3,
            )
        self.tasks.append(task)
        self.current, self._sums = "", []
        self._marks = self._computed(branches)
        return intact

    def _outside(self) -> list[str]:
        """Names of trainable tensors that belong to no branch."""
        assert self._model is not None
        branches = self._attached()
        inside = {id(t) for name in branches.names() for _, f in branches.factors(name) for t in (f.a, f.b)}
        return [name for name, p in self._model.named_parameters() if p.requires_grad and id(p) not in inside]
