"""GORP's memory: directions in which the gradients of earlier tasks lay, kept free of later updates.

Wang et al., "GORP: Continual Learning with Gradient Low-Rank Projection", ACL 2025. With orthonormal ``S_in``
``(in, k)`` and ``S_out`` ``(out, k')`` of a weight ``W`` ``(out, in)``, every task keeps

    W = W_0 + (I - S_out S_out^T) (W - W_0) (I - S_in S_in^T),

and after it ``S`` grows by the leading directions of its gradients: the fewest that reach a share of their energy.

What differs from the release: ``S`` lives in the weight's own coordinates (there: in those of a basis that is found
anew every few steps, and of LoRA in the rank of an adapter that is thrown away), it is made of the whole task's
gradients (there: of Adam's first moment at the end, which remembers ten steps), it crosses the task boundary (there it
is read from where nobody wrote it), and the *update* stays outside (there: the gradient, which Adam turns back).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from growthring.errors import ConfigError, GuardError, nearest
from growthring.subspace import Subspace

from . import marks, notes, storage
from .base import Certificate, Guard, unwrapped
from .constraint import Constraint
from .energy import Energy, LinearSchedule, energy_for, parse_energy
from .gradient_sites import KINDS, GradientSurvey, Side
from .gradient_spaces import certificate_of, certify, grow
from .gradient_statistics import GradientStatistics
from .gradient_task import GradientTask
from .gradient_watch import Source
from .memory import EXACT_ABOVE
from .plan import TensorPlan
from .site import original_name

__all__ = ["GradientMemory"]

logger = logging.getLogger(__name__)

DEFAULT = dict.fromkeys(KINDS, 0.95)
"""Energy of the kinds that a mapping leaves out."""


class GradientMemory(Guard):
    """Keeps updates exactly out of the directions in which the gradients of earlier tasks lay.

    Sites are every trained ``nn.Linear``, ``Conv1D`` and convolution weight and the LoRA factors on them. The memory
    belongs to the layer, in its own coordinates, so it holds for every adapter that comes later. With ``side="input"``
    it is about ``A``; a new ``A`` is moved out of the protected directions when its task begins, which changes no
    output while ``B`` is zero, and ``B`` may then move freely. Trainable tensors that are no matrix (biases, norms,
    embeddings) are held at their values from the second task on. :meth:`explain` says what happens to which tensor.

    Any optimizer will do: gradients are projected before its step, and the update after it. One that steps in a
    subspace (:class:`growthring.optim.GORP`) takes the work over once :meth:`bind` has been called, and is watched
    through its coordinates; :meth:`callback` does that in a ``Trainer``.

    Args:
        energy: Share of a task's gradient energy (squared norm) to protect, in (0, 1]: one number, one for each kind
            of site (``{"linear": 0.9, "conv": 0.9, "lora_A": 0.95, "lora_B": 0.95}``, 0.95 where left out), or a
            :class:`LinearSchedule` over tasks in place of any number. Of a later task only what is not protected
            already counts, and of an optimizer that steps in a subspace what that subspace shows (the certificate
            notes how much that is). 1.0 protects every direction above rounding noise. Default 0.95.
        side: ``"input"`` (default): ``dW u = 0``, what protected inputs compute stays. ``"output"``: ``u^T dW = 0``,
            as the release does. ``"both"``.
        source: ``"gradient"`` (default): all gradients of the task. ``"momentum"``: Adam's first moment after every
            step. ``"exp_avg"``: only the last first moment, the published rule.
        project: ``"update"`` (default): exact for any optimizer. ``"gradient"``: one sweep before the optimizer, the
            published rule; Adam then leaks, and certificates show how much. For comparison.
        rows: Rows of the sketch that stands for a whole second moment on sides wider than twice as many that are seen
            through coordinates, and on all wider than 4,096; at least 1. Default 128.
        unprotected: Trainable tensors without a condition: ``"hold"`` them from the second task on (default),
            ``"freeze"`` them from the start, or ``"allow"`` them to move.

    Raises:
        ConfigError: On values outside the ranges above.

    Example:
        ```python
        guard = gr.GradientMemory(energy=0.95)
        for name, rows in tasks.items():
            Trainer(model, args, train_dataset=rows, callbacks=[guard.callback()]).train()
            guard.end_task(name, [])
        guard.save_pretrained("memory/")
        ```
    """

    name = "gradient-memory"

    def __init__(
        self,
        energy: float | LinearSchedule | Mapping[str, Any] = 0.95,
        *,
        side: str = "input",
        source: str = "gradient",
        project: str = "update",
        rows: int = 128,
        unprotected: str = "hold",
    ) -> None:
        parsed = parse_energy(energy, KINDS)
        for one in parsed.values() if isinstance(parsed, Mapping) else [parsed]:
            if not isinstance(one, float | LinearSchedule):
                raise ConfigError(
                    f"GradientMemory(energy={energy!r}): give a number in (0, 1] or a LinearSchedule, or one for each "
                    f"of {', '.join(KINDS)}"
                )
        for what, value, allowed in (
            ("side", side, ("input", "output", "both")),
            ("source", source, ("gradient", "momentum", "exp_avg")),
            ("project", project, ("update", "gradient")),
            ("unprotected", unprotected, ("hold", "allow", "freeze")),
        ):
            if value not in allowed:
                raise ConfigError(f"GradientMemory({what}={value!r}): {nearest(str(value), allowed)}")
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ConfigError(f"GradientMemory(rows={rows!r}): a sketch has a whole number of rows, at least 1")
        self.energy: Energy = parsed
        self.side, self.source, self.project = cast(Side, side), cast(Source, source), project
        self.rows, self.unprotected = rows, unprotected
        self.tasks: list[str] = []
        """Names of the tasks in the memory."""
        self._spaces: dict[str, Subspace] = {}  # by layer and side
        self._marks: dict[str, float] = {}
        self._known: set[str] = set()
        self._frozen: set[str] = set()
        self._survey: GradientSurvey | None = None
        self._task: GradientTask | None = None  # None while no task is under way
        self._optimizer: torch.optim.Optimizer | None = None

    # --- the contract -------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Find the matrices of ``model``. A task under way on the very same parameters stays under way.

        Raises:
            GuardError: If no trainable tensor is a matrix of a layer, weights are not there yet (meta device), or a
                stored memory belongs to another model.
        """
        found = GradientSurvey(model, self.side, self._dims())
        ours = self._survey.parameters if self._survey is not None else {}
        if found.parameters.keys() != ours.keys() or any(p is not ours[n] for n, p in found.parameters.items()):
            self._leave()
        self._survey = found
        if self.unprotected == "freeze":
            loose = found.loose()
            for name in loose:
                found.parameters[name].requires_grad_(False)
            self._frozen.update(loose)

    def explain(self, model: nn.Module | None = None) -> tuple[TensorPlan, ...]:
        """What happens to every trainable tensor, and why; before training or at any time.

        Args:
            model: Looked at without being attached; default the attached one.

        Raises:
            GuardError: If there is neither, or the model has nothing to protect.
        """
        survey = self._attached() if model is None else GradientSurvey(model, self.side, self._dims())
        fresh = {site.name for site, _ in survey.fresh(self._spaces)}
        reading = [s.parameter for s in survey.reading(self._spaces, survey.parameters) if s.name not in fresh]
        return survey.plan(self.unprotected, self._frozen, reading)

    def begin_task(self, task: str | None = None) -> None:
        """Move new LoRA factors out of what is protected, and anchor every matrix where it is.

        A task under way goes on, with its anchors and its statistics.

        Raises:
            GuardError: If the guard is not attached.
        """
        self._enter()

    def bind(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Leave to the optimizer what it can keep outside by itself, and look at its coordinates or first moments.

        Args:
            optimizer: What will step in this task, in accelerate's wrapper or not; called for every task anew.
                :class:`growthring.optim.GORP` takes its matrices over; of another, first moments are read if
                ``source`` asks for them. ``None`` changes nothing.
        """
        optimizer = unwrapped(optimizer)
        if optimizer is None:
            return
        if self._task is not None:
            if optimizer is not self._optimizer:
                self._task.release()
            self._task.bind(optimizer)
        self._optimizer = optimizer

    def before_step(self) -> None:
        """Project the gradients of guarded matrices, and look at them; those of held tensors become zero."""
        self._under_way("before_step").before_step()

    def after_step(self) -> None:
        """Re-project the update since the anchor: exact for any optimizer, decay, momentum or clipping.

        Raises:
            GuardError: If ``source`` asks for first moments that the optimizer does not keep.
        """
        self._under_way("after_step").after_step()

    def end_task(self, task: str | None, batches: Iterable[Any] = ()) -> Certificate:
        """Measure what was kept, then protect the directions of this task's gradients.

        Args:
            task: Name of the task; default ``task-<number>``.
            batches: Not read: everything was seen while the task trained.

        Raises:
            GuardError: If no task is under way.
        """
        ending, attached, index = self._under_way("end_task"), self._attached(), len(self.tasks)
        task = task or f"task-{index + 1}"
        leaks, told = ending.measure()
        if index:
            told += ending.uncovered(self._known, self.unprotected == "allow")
        moments, targets = ending.finish(), attached.targets(self._target)
        reached, short = grow(self._spaces, moments, targets, attached)
        sites = certify(self._spaces, reached, targets, leaks, attached)
        if short:
            told.append(f"{short} sketches of {self.rows} rows lost more energy than the target leaves: raise rows")
        if not moments:
            told.append(f"no matrix had a gradient in {ending.statistics.steps} steps: nothing new is protected")
        if left_out := ending.statistics.left_out:
            told.append(f"{left_out} gradients held NaN or infinity and were left out")
        held = len(ending.constraint.held)
        self._leave()
        self.tasks.append(task)
        self._known = {original_name(n) for n, _ in attached.model.named_parameters()}
        self._marks = marks.take(attached.seen(self._spaces, self._known))
        certificate = certificate_of(self.name, task, index, sites, leaks, held, told)
        if self.exhausted():
            warnings.warn(
                f"GradientMemory: after {task!r} no free direction is left at any of {len(sites)} sites, so nothing "
                "can be learned from now on. Lower the energy, or train more layers",
                stacklevel=2,
            )
        return certificate

    # --- for a plain script -------------------------------------------------------------------------------------

    def consolidate(self, model: nn.Module, batches: Iterable[Any] = (), task: str | None = None) -> Certificate:
        """End a task in a script of one's own: :meth:`end_task`, and a check that ``model`` is the one that trained.

        Raises:
            GuardError: If no task is under way on this model.
        """
        if self._survey is None or self._survey.model is not model:
            self.attach(model)
        return self.end_task(task, batches)

    def exhausted(self) -> bool:
        """True when no site can move: each has a full side."""
        return self._survey is not None and self._survey.full(self._spaces)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the memory to ``folder`` as safetensors and JSON, each file atomically."""
        return storage.save(Path(folder), self.name, self.settings(), self.state_dict())

    @classmethod
    def load_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> GradientMemory:
        """Read a memory written by :meth:`save_pretrained`; nothing in it is executed.

        Args:
            folder: Where it was written.
            model: Attached first, if given; needed for a memory written inside a task.

        Raises:
            DataError: If the folder holds no whole memory of this guard, or one of a newer format.
            GuardError: If the memory belongs to another model, or needs one and none is given.
        """
        return storage.restore(cls, cls.name, Path(folder), model)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {
            "energy": storage.plain(self.energy),
            "side": self.side,
            "source": self.source,
            "project": self.project,
            "rows": self.rows,
            "unprotected": self.unprotected,
        }

    def state_dict(self) -> dict[str, Any]:
        """The memory, and anchors and statistics when called inside a task: tensors and plain values only."""
        state: dict[str, Any] = {
            "tasks": list(self.tasks),
            "spaces": {key: space.state_dict() for key, space in self._spaces.items()},
            "marks": dict(self._marks),
            "known": sorted(self._known),
            "frozen": sorted(self._frozen),
        }
        if self._task is not None:
            state["under_way"] = self._task.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a memory.

        With the state of a task that was under way, call it after :meth:`attach`: the guard is then inside that task,
        with its anchors and statistics. Bind the optimizer again.

        Raises:
            GuardError: If the state needs an attached model and there is none, or belongs to another model.
        """
        if "under_way" in state and self._survey is None:
            raise GuardError(
                "this state was taken inside a task: attach(model) first, or give load_pretrained the model"
            )
        self._leave()
        self.tasks = list(state["tasks"])
        self._spaces = {key: Subspace.from_state_dict(space) for key, space in state["spaces"].items()}
        self._marks = {name: float(mark) for name, mark in state["marks"].items()}
        self._known, self._frozen = set(state["known"]), set(state["frozen"])
        if self._survey is None:
            return
        self.attach(self._survey.model)
        if "under_way" in state:
            remembered, self._marks = self._marks, {}  # its tensors have moved since, and rightly so
            self._enter().load_state_dict(state["under_way"])
            self._marks = remembered

    # --- inside -------------------------------------------------------------------------------------------------

    def _attached(self) -> GradientSurvey:
        if self._survey is None:
            raise GuardError(
                "GradientMemory is not attached: call guard.attach(model), or pass guard.callback() to the Trainer"
            )
        return self._survey

    def _under_way(self, caller: str) -> GradientTask:
        if self._task is None:
            raise GuardError(
                f"GradientMemory.{caller} outside a task: call attach(model) and begin_task() first. It learns from "
                "the gradients of training, so a reference set that is not trained on cannot be protected by it"
            )
        return self._task

    def _dims(self) -> dict[str, int]:
        return {key: space.dim for key, space in self._spaces.items()}

    def _target(self, kind: str) -> float:
        return cast(float, energy_for(self.energy, kind, len(self.tasks), DEFAULT))

    def _enter(self) -> GradientTask:
        """A task is under way: anchor, hold, and stack the bases."""
        attached, before = self._attached(), self._task
        if before is None:
            self._check_unchanged(attached)
            for site, space in attached.fresh(self._spaces):
                part = site.read(attached.parameters).detach()
                for _ in range(2):  # once leaves what the basis lacks of being orthonormal
                    space.reject_(part)
                site.write(attached.parameters, part)
        exact = any(self._target(kind) > EXACT_ABOVE for kind in KINDS)
        statistics = GradientStatistics(attached.key, last=self.source == "exp_avg", rows=self.rows, exact=exact)
        held = [n for n in attached.loose() if n in self._known] if self.unprotected != "allow" else []
        update = self.project == "update"
        if before is not None:
            before.release()
        self._task = GradientTask(attached, self._spaces, held, self.source, statistics, exact=update, before=before)
        self._tell(self._task.constraint)
        if self._optimizer is not None:
            self._task.bind(self._optimizer)
        return self._task

    def _leave(self) -> None:
        """No task is under way any more."""
        if self._task is not None:
            self._task.release()
        self._task = self._optimizer = None

    def _check_unchanged(self, attached: GradientSurvey) -> None:
        moved = marks.changed(attached.seen(self._spaces, self._known), self._marks)
        if moved:
            warnings.warn(
                f"GradientMemory: {len(moved)} protected tensors changed since the last task ended (the first: "
                f"{moved[0]}). What changed them was not guarded; the guarantee starts anew from here",
                stacklevel=4,
            )

    def _tell(self, task: Constraint) -> None:
        if not self.tasks:
            logger.info("GradientMemory: first task, nothing is protected yet")
            return
        notes.warn_narrow("GradientMemory", task, stacklevel=5)
        if self.exhausted():
            warnings.warn(
                "GradientMemory: no free direction is left at any site; this task cannot change them", stacklevel=4
            )
        logger.info("GradientMemory: %d sites guarded, %d tensors held", len(task.guarded), len(task.held))
