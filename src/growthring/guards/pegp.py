"""PEGP: parameter-efficient gradient projection, made exact.

Qiao et al., "Gradient Projection For Continual Parameter-Efficient Tuning", arXiv 2405.13383, TPAMI 2025. An old
input ``x`` keeps its output when the change ``D`` of every adapted matrix satisfies ``D x = 0`` (equations 13-14).
With ``U`` an orthonormal basis of the old features, a step does

    g <- g - (g U) U^T                      before the optimizer: its statistics stay clean
    theta <- theta_0 + D - (D U) U^T        after it, with D = theta - theta_0: exact for any optimizer

The second line is what the published code lacks: Adam's element-wise scaling, weight decay and old momentum all rotate
a projected gradient back into the protected space. What ``x`` is for prefixes and prompts stands in :mod:`.prompts`.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from growthring.errors import ConfigError, GuardError, nearest

from . import marks, notes, storage
from .base import Certificate, Guard, GuardCallback
from .batches import evaluating
from .constraint import Constraint, Leak
from .energy import CANDIDATES, KINDS, Energy, energy_for, parse_energy
from .memory import Collected, FeatureMemory, Probes, collect, needs_everything
from .plan import TensorPlan, plan
from .site import Mode, original_name
from .sites import find_sites
from .survey import Survey

__all__ = ["PEGP"]

logger = logging.getLogger(__name__)


class PEGP(Guard):
    """Keeps trained matrices exactly out of the feature space of earlier tasks.

    Sites are the two factors of every trainable LoRA layer, both matrices of a bottleneck adapter with their biases,
    PEFT's prefixes, prompts and IA3 scales, prefixes and prompts of vision models, and every other trainable
    ``nn.Linear`` or ``Conv1D`` weight. Trainable tensors that no condition protects (biases, norms, embeddings) are
    held at their values from the second task on, since a guarantee with a hole is none. :meth:`explain` says before
    training what happens to which tensor.

    Args:
        energy: Share of the old features' energy (sigma squared, not centred) to protect, in (0, 1]: one number, one
            for each kind of site (``{"lora_A": 0.95, "lora_B": 0.9, "linear": 0.8}``), a :class:`LinearSchedule` over
            tasks or a :class:`NullRatio` in place of any number, or ``"auto"``: chosen on validation data at the first
            task boundary, by :class:`~growthring.ContinualTrainer` or :meth:`tune`. 1.0 protects every direction above
            rounding noise. Default 0.95.
        mode: ``"strict"`` (default): conditions that keep what old inputs compute. ``"paper"``: those of the paper's
            equations, which for prefixes and prompts do not; for comparison.
        project: ``"update"`` (default): exact for any optimizer. ``"gradient"``: only gradients are projected, as
            published code does; Adam and weight decay then leak, and certificates show how much. For comparison.
        kinds: Kinds of sites to protect; default all. The others train freely.
        merge: Weight of a freely trained copy that :class:`~growthring.ContinualTrainer` mixes in after every guarded
            task, in [0, 1); default 0. The paper's journal version takes 0.5. What it lets through is in the leak.
        samples: Examples whose features are collected at the end of a task; default 256.
        probes: Inputs of each task kept, on the CPU, to *measure* how far outputs drift; never trained on. Default 8;
            0 keeps no input at all.
        max_probe_tasks: Tasks whose probes are kept; the oldest stay. Default 32.
        unprotected: Trainable tensors without a condition: ``"hold"`` them from the second task on (default),
            ``"freeze"`` them from the start, or ``"allow"`` them to move.
        candidates: What ``"auto"`` tries, most protective first.

    Raises:
        ConfigError: On values outside the ranges above.

    Example:
        ```python
        guard = gr.PEGP(energy=0.95)
        trainer = Trainer(model, args, train_dataset=first, callbacks=[guard.callback()])
        trainer.train()
        guard.consolidate(model, trainer.get_train_dataloader())
        guard.save_pretrained("memory/")
        ```
    """

    name = "pegp"

    def __init__(
        self,
        energy: Energy | float | Mapping[str, Any] | str = 0.95,
        *,
        mode: str = "strict",
        project: str = "update",
        kinds: Sequence[str] | None = None,
        merge: float = 0.0,
        samples: int = 256,
        probes: int = 8,
        max_probe_tasks: int = 32,
        unprotected: str = "hold",
        candidates: Sequence[Mapping[str, Any]] = CANDIDATES,
    ) -> None:
        self.energy: Energy = parse_energy(energy)
        if samples < 1 or probes < 0 or max_probe_tasks < 0:
            raise ConfigError(
                f"PEGP(samples={samples}, probes={probes}, max_probe_tasks={max_probe_tasks}): samples must be at "
                "least 1, the others at least 0"
            )
        for what, value, allowed in (
            ("mode", mode, ("strict", "paper")),
            ("project", project, ("update", "gradient")),
            ("unprotected", unprotected, ("hold", "allow", "freeze")),
            *(("kinds", kind, KINDS) for kind in ([kinds] if isinstance(kinds, str) else kinds or ())),
        ):
            if value not in allowed:
                raise ConfigError(f"PEGP({what}={value!r}): {nearest(str(value), allowed)}")
        if isinstance(merge, bool) or not isinstance(merge, int | float) or not 0.0 <= merge < 1.0:
            raise ConfigError(f"PEGP(merge={merge!r}): the weight of the free copy must be in [0, 1)")
        if isinstance(kinds, str) or (kinds is not None and not kinds):
            raise ConfigError(f"PEGP(kinds={kinds!r}): give a list with at least one of {', '.join(KINDS)}")
        self.mode = cast(Mode, mode)
        self.project, self.merge = project, float(merge)
        self.kinds = tuple(kinds) if kinds is not None else None
        self.candidates = tuple(parse_energy(c) for c in candidates)
        if not self.candidates or any(c == "auto" for c in self.candidates):
            raise ConfigError(f"PEGP(candidates={candidates!r}): give at least one energy to try, none of them 'auto'")
        self.samples = samples
        self.unprotected = unprotected
        self.tasks: list[str] = []
        """Names of the tasks in the memory."""
        self._memory = FeatureMemory()
        self._probes = Probes(probes, max_probe_tasks)
        self._pending: tuple[FeatureMemory, Collected] | None = None
        self._marks: dict[str, float] = {}
        self._known: set[str] = set()
        self._frozen: set[str] = set()
        self._survey: Survey | None = None
        self._task: Constraint | None = None  # None while no task is under way

    # --- the contract -------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Find the sites of ``model``. A task under way on the very same parameters stays under way.

        Raises:
            GuardError: If nothing trainable can be protected, the weights are not there yet (meta device), or a
                stored memory belongs to another model.
        """
        found = Survey(model, self._memory, self.mode, self.kinds)
        ours = self._survey.parameters if self._survey is not None else {}
        if found.parameters.keys() != ours.keys() or any(p is not ours[n] for n, p in found.parameters.items()):
            self._task = None
        self._survey = found
        if self.unprotected == "freeze":
            self._frozen.update(found.freeze())

    def explain(self, model: nn.Module | None = None) -> tuple[TensorPlan, ...]:
        """What happens to every trainable tensor, and why; before training or at any time.

        Args:
            model: Looked at without being attached; default the attached one.

        Raises:
            GuardError: If there is neither, or the model has tuners that no condition protects.
        """
        model = model if model is not None else self._attached().model
        policy = cast(Literal["hold", "allow", "freeze"], self.unprotected)
        names = {original_name(n): p for n, p in model.named_parameters()}
        sites = find_sites(model, self._memory.dims, self.mode)
        ours = self._survey is not None and self._survey.model is model
        unseen = self._attached().guarded(self._memory, self._known)[1] if ours else ()
        return plan(names, sites, self.kinds, self.mode, policy, self._frozen, unseen)

    def begin_task(self, task: str | None = None) -> None:
        """Anchor every protected tensor where it is now, or where it was if this task is under way already.

        Raises:
            GuardError: If the guard is not attached, or ``energy="auto"`` still has to be chosen.
        """
        self._attached()
        if self._pending is not None and self.energy == "auto":
            raise GuardError(
                "energy='auto' has to be chosen before the second task: let gr.ContinualTrainer do it, call "
                "guard.tune(trial) with a function that trains and scores one candidate, or give a number"
            )
        self._enter()

    def before_step(self) -> None:
        """Project the gradients of protected tensors; gradients of held ones become zero."""
        self._under_way("before_step").trim()

    def after_step(self) -> None:
        """Re-project the update since the anchor: exact for any optimizer, decay, momentum or clipping."""
        self._under_way("after_step").restore()

    def end_task(self, task: str | None, batches: Iterable[Any]) -> Certificate:
        """Measure what was kept, then protect what this task uses.

        Args:
            task: Name of the task; default ``task-<number>``.
            batches: Batches of the task's *training* inputs, as the model takes them; at most ``samples`` examples
                are read.

        Returns:
            The certificate.

        Raises:
            GuardError: If ``batches`` gives nothing.
        """
        attached = self._attached()
        model, index = attached.model, len(self.tasks)
        task = task or f"task-{index + 1}"
        leaks = self._task.leaks() if self._task else {}
        held = len(self._task.held) if self._task else 0
        told = self._notes(leaks)
        if self._task is None and self._changed():
            told.append("this task was trained without the guard: nothing was protected meanwhile")
        with evaluating(model):
            change, compared = self._probes.change(model), self._probes.inputs
            collected = collect(model, attached.sites, batches, self.samples, self._exact_sites(index), self._probes)
            before = self._memory.copy() if self.energy == "auto" else None
            energy: Energy = self.candidates[0] if self.energy == "auto" else self.energy
            resting = attached.resting(self._memory) if before is None else {}
            sites = self._memory.grow(collected, energy, index, attached.parameters, leaks, resting)
        if resting:
            told.append(f"{len(resting)} factors B are zero still: their A was moved to read nothing protected")
        if before is not None:
            self._pending = (before, collected)
            told.append("energy='auto' is not chosen yet: these ranks are those of the most protective candidate")
        self.tasks.append(task)
        self._known = {original_name(n) for n, _ in model.named_parameters()}
        self._mark()
        self._task = None
        certificate = Certificate(
            guard=self.name,
            task=task,
            task_index=index,
            protected_tasks=index,
            leak=max((leak.share for leak in leaks.values()), default=None) if index else None,
            kept=all(s.kept for s in sites) if index else None,
            energy=min(s.energy for s in sites),
            free=sum(s.free for s in sites),
            dims=sum(s.dim for s in sites),
            output_change=change,
            probes=compared,
            held=held,
            sites=tuple(sites),
            notes=tuple(told),
        )
        if self.exhausted():
            warnings.warn(
                f"PEGP: after {task!r} no free direction is left at any of {len(sites)} sites, so nothing can be "
                "learned from now on. Lower the energy, widen the adapter (rank, tokens), or adapt more layers",
                stacklevel=2,
            )
        return certificate

    # --- for a plain script -------------------------------------------------------------------------------------

    def consolidate(self, model: nn.Module, batches: Iterable[Any], task: str | None = None) -> Certificate:
        """End a task in a script of one's own: attach if needed, then :meth:`end_task`.

        Calling it on a reference set before any training protects the pretrained model's behaviour there.
        """
        if self._survey is None or self._survey.model is not model:
            self.attach(model)
        return self.end_task(task, batches)

    def tune(self, trial: Callable[[Energy], float]) -> Energy:
        """Choose the energy at the first task boundary.

        Args:
            trial: Called once for each candidate with the memory already grown to it; trains the second task from
                the same start, returns a score on *validation* data (higher is better), and puts the model back.

        Returns:
            The chosen energy: the most protective of the best. The memory is grown to it.

        Raises:
            GuardError: If there is nothing to choose (not ``"auto"``, or not right after the first task).
        """
        if self._pending is None:
            raise GuardError("PEGP.tune: only for energy='auto', after the first task and before the second")
        before, collected = self._pending
        scores: list[float] = []
        try:
            for candidate in self.candidates:
                self._take(before, collected, candidate)
                score = float(trial(candidate))
                scores.append(-math.inf if math.isnan(score) else score)
                logger.info("PEGP: energy %s scores %.4f on validation data", candidate, score)
        except BaseException:
            self._take(before, collected, self.candidates[0])
            self.energy = "auto"
            raise
        self._take(before, collected, self.candidates[scores.index(max(scores))])
        self._pending = None
        return self.energy

    def callback(self, *, loss_added: bool = False) -> GuardCallback:
        """As every guard's; refused for a plain Trainer with ``merge`` above 0, as it trains no second copy."""
        if self.merge and not loss_added:
            raise GuardError(
                f"PEGP(merge={self.merge}) trains every task twice: use gr.ContinualTrainer, not a plain Trainer"
            )
        return super().callback(loss_added=loss_added)

    def exhausted(self) -> bool:
        """True when nothing protected can move: each site, or one across it on the same tensor, is full."""
        return self._survey is not None and self._survey.full(self._memory)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the memory to ``folder`` as safetensors and JSON, each file atomically."""
        return storage.save(Path(folder), self.name, self.settings(), self.state_dict())

    @classmethod
    def load_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> PEGP:
        """Read a memory written by :meth:`save_pretrained`; nothing in it is executed.

        Args:
            folder: Where it was written.
            model: Attached first, if given. Needed for a memory written inside a task, or before ``energy="auto"``
                was chosen.

        Raises:
            DataError: If the folder holds no whole memory of this guard, or one of a newer format.
            GuardError: If the memory belongs to another model, or needs one and none is given.
        """
        return storage.restore(cls, cls.name, Path(folder), model)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {
            "energy": storage.plain(self.energy),
            "samples": self.samples,
            "probes": self._probes.each,
            "max_probe_tasks": self._probes.tasks,
            "unprotected": self.unprotected,
            "mode": self.mode,
            "project": self.project,
            "kinds": list(self.kinds) if self.kinds is not None else None,
            "merge": self.merge,
            "candidates": [storage.plain(c) for c in self.candidates],
        }

    def state_dict(self) -> dict[str, Any]:
        """The memory, and the anchors when called inside a task: tensors and plain values only."""
        state: dict[str, Any] = {
            "tasks": list(self.tasks),
            "energy": storage.plain(self.energy),
            "memory": self._memory.state_dict(),
            "marks": dict(self._marks),
            "known": sorted(self._known),
            "frozen": sorted(self._frozen),
            "probes": self._probes.state_dict(),
        }
        if self._task is not None:
            state["under_way"] = self._task.state_dict()
        if self._pending is not None:
            before, collected = self._pending
            state["pending"] = {"memory": before.state_dict(), "collected": collected.state_dict()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a memory.

        With the state of a task that was under way, call it after :meth:`attach`: the guard is then inside that task,
        with its anchors. A memory with ``energy="auto"`` still to be chosen needs the model attached as well.

        Raises:
            GuardError: If the state needs an attached model and there is none.
        """
        if ("under_way" in state or "pending" in state) and self._survey is None:
            raise GuardError(
                "this state was taken inside a task (or before energy='auto' was chosen): attach(model) first, or "
                "give load_pretrained the model"
            )
        self.tasks, self.energy = list(state["tasks"]), parse_energy(state["energy"])
        self._memory = FeatureMemory.from_state_dict(state["memory"])
        self._marks, self._known = {k: float(v) for k, v in state["marks"].items()}, set(state["known"])
        self._frozen = set(state.get("frozen", ()))
        self._probes.load_state_dict(state["probes"])
        self._pending = None
        if "pending" in state:
            pending = state["pending"]
            self._pending = (
                FeatureMemory.from_state_dict(pending["memory"]),
                Collected.from_state_dict(pending["collected"], self._attached().sites),
            )
        self._task = None
        if self._survey is not None:
            self.attach(self._survey.model)
            if "under_way" in state:
                remembered, self._marks = self._marks, {}  # its tensors have moved since, and rightly so
                self._enter().load_state_dict(state["under_way"])
                self._marks = remembered

    # --- inside -------------------------------------------------------------------------------------------------

    def _attached(self) -> Survey:
        if self._survey is None:
            raise GuardError("PEGP is not attached: call guard.attach(model), or pass guard.callback() to the Trainer")
        return self._survey

    def _under_way(self, caller: str) -> Constraint:
        if self._task is None:
            raise GuardError(f"PEGP.{caller} outside a task: call attach(model) and begin_task() first")
        return self._task

    def _enter(self) -> Constraint:
        """A task is under way: anchor, hold, and stack the bases."""
        attached = self._attached()
        if self._task is None:
            self._changed()
        guarded, loose = attached.guarded(self._memory, self._known)
        held = loose if self.unprotected != "allow" else []
        spaces = [space for _, space in guarded]
        exact = self.project == "update"
        self._task = Constraint(attached.parameters, [s for s, _ in guarded], spaces, held, self._task, exact=exact)
        self._tell(self._task, loose)
        return self._task

    def _take(self, before: FeatureMemory, collected: Collected, energy: Energy) -> None:
        """Grow the memory of the first task anew, with another energy."""
        self.energy, self._memory = energy, before.copy()
        self._memory.grow(collected, energy, 0, self._attached().parameters, {})
        self._mark()

    def _exact_sites(self, index: int) -> set[str]:
        asked = self.candidates if self.energy == "auto" else (self.energy,)
        sites = self._attached().sites
        return {s.name for s in sites for e in asked if needs_everything(energy_for(e, s.kind, index))}

    def _mark(self) -> None:
        self._marks = marks.take(self._attached().seen(self._memory, self._known))

    def _changed(self) -> bool:
        """Warn when what old inputs see has changed since the last consolidation, outside a task."""
        moved = marks.changed(self._attached().seen(self._memory, self._known), self._marks)
        if moved:
            warnings.warn(
                f"PEGP: {len(moved)} protected tensors changed between consolidation and this task (the first: "
                f"{moved[0]}). What changed them was not guarded; the guarantee starts anew from here",
                stacklevel=4,
            )
        return bool(moved)

    def _tell(self, task: Constraint, loose: list[str]) -> None:
        if not self.tasks:
            logger.info("PEGP: first task, nothing is protected yet; %d sites will be", len(self._attached().sites))
            return
        notes.warn_narrow("PEGP", task, stacklevel=5)
        if self.exhausted():
            warnings.warn("PEGP: no free direction is left at any site; this task cannot change them", stacklevel=4)
        logger.info("PEGP: %d sites guarded, %d tensors held", len(task.guarded), len(task.held))
        if loose:
            what = "held" if self.unprotected != "allow" else "left free, which the guarantee does not cover"
            logger.info("PEGP: %d trainable tensors have no condition and are %s", len(loose), what)

    def _notes(self, leaks: Mapping[str, Leak]) -> list[str]:
        found = notes.of_steps(self._task, leaks)
        if self.tasks:
            attached = self._attached()
            loose = attached.loose() if self.unprotected == "allow" else ()
            fresh = [n for n, p in attached.parameters.items() if p.requires_grad and n not in self._known]
            found += notes.of_tensors([n for n in loose if n in self._known], fresh)
        return found
