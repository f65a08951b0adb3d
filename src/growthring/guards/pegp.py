"""PEGP: parameter-efficient gradient projection, made exact.

Qiao et al., "Gradient Projection For Continual Parameter-Efficient Tuning", arXiv 2405.13383, TPAMI 2025. An old input
``x`` keeps its output when the change ``D`` of every adapted matrix satisfies ``D x = 0`` (equations 13-14). With ``U``
an orthonormal basis of the old features, a step does

    g <- g - (g U) U^T                      before the optimizer: its statistics stay clean
    theta <- theta_0 + D - (D U) U^T        after it, with D = theta - theta_0: exact for any optimizer

The second line is what the published code lacks: Adam's element-wise scaling, weight decay and old momentum all rotate a
projected gradient back into the protected space (a third of the update's norm, measured).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growthring.errors import ConfigError, GuardError
from growthring.subspace import SecondMoment, Subspace, SubspaceBank

from . import storage
from .base import Certificate, Guard, SiteCertificate
from .batches import evaluating, head_of, mask_for, output_of, relative_change, run_model, size_of
from .energy import CANDIDATES, Energy, energy_for, parse_energy
from .sites import Site, capture, find_sites, group_by_input, original_name, unprotected

__all__ = ["PEGP"]

logger = logging.getLogger(__name__)


class PEGP(Guard):
    """Keeps trained matrices exactly out of the feature space of earlier tasks.

    Sites are the two factors of every trainable LoRA layer and every other trainable ``nn.Linear`` or ``Conv1D``
    weight. Trainable tensors that no condition protects (biases, norms, embeddings) are held at their values from the
    second task on, since a guarantee with a hole is none.

    Args:
        energy: Share of the old features' energy (sigma squared, not centred) to protect, in (0, 1]: one number, one
            for each kind of site (``{"lora_A": 0.95, "lora_B": 0.9, "linear": 0.8}``), a :class:`LinearSchedule` over
            tasks in place of any number, or ``"auto"``: chosen on validation data at the first task boundary, by
            :class:`~growthring.ContinualTrainer` or :meth:`tune`. 1.0 protects every direction above rounding noise.
            Default 0.95.
        samples: Examples whose features are collected at the end of a task; default 512.
        probes: Inputs of each task kept, on the CPU, to *measure* how far outputs drift; never trained on. Default 8;
            0 keeps no input at all.
        max_probe_tasks: Tasks whose probes are kept; the oldest stay. Default 32.
        unprotected: ``"hold"`` (default) or ``"allow"`` trainable tensors without a condition to move.
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
        samples: int = 512,
        probes: int = 8,
        max_probe_tasks: int = 32,
        unprotected: str = "hold",
        candidates: Sequence[Mapping[str, Any]] = CANDIDATES,
    ) -> None:
        self.energy: Energy = parse_energy(energy)
        if samples < 1 or probes < 0 or max_probe_tasks < 0:
            raise ConfigError(
                f"PEGP(samples={samples}, probes={probes}, max_probe_tasks={max_probe_tasks}): too small"
            )
        if unprotected not in ("hold", "allow"):
            raise ConfigError(f"PEGP(unprotected={unprotected!r}): allowed are 'hold' and 'allow'")
        self.samples, self.probes, self.max_probe_tasks = samples, probes, max_probe_tasks
        self.unprotected = unprotected
        self.candidates = tuple(parse_energy(c) for c in candidates)
        self.tasks: list[str] = []
        """Names of the tasks in the memory."""
        self._spaces: dict[str, Subspace] = {}
        self._site_space: dict[str, str] = {}
        self._marks: dict[str, float] = {}
        self._known: set[str] = set()
        self._probes: list[tuple[Any, Tensor]] = []
        self._pending: tuple[dict[str, Subspace], dict[str, SecondMoment], list[list[Site]]] | None = None
        self._model: nn.Module | None = None
        self._sites: list[Site] = []
        self._begun = False
        self._anchors: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}
        self._guarded: list[Site] = []
        self._parameters: dict[str, nn.Parameter] = {}
        self._bank: SubspaceBank | None = None

    # --- the contract -------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Find the sites of ``model``.

        Raises:
            GuardError: If nothing trainable can be protected, or a stored memory belongs to another model.
        """
        sites = find_sites(model, self._site_space)
        names = {original_name(n): p for n, p in model.named_parameters()}
        trainable = [n for n, p in names.items() if p.requires_grad]
        if not trainable:
            raise GuardError(
                "PEGP: no parameter of the model is trainable. Add an adapter (peft.get_peft_model) or set "
                "requires_grad on the weights that should learn; a PEFT model loaded for inference needs is_trainable=True"
            )
        if not any(names[s.name].requires_grad for s in sites):
            raise GuardError(
                f"PEGP found no LoRA factor and no linear weight among the {len(trainable)} trainable tensors "
                f"(the first: {', '.join(trainable[:3])}). It protects LoRA on linear layers and plain linear weights"
            )
        missing = [n for n in self._site_space if n not in names]
        if missing:
            raise GuardError(
                f"the memory protects {len(self._site_space)} tensors, and {len(missing)} of them are not in this model "
                f"(the first: {missing[0]}). Attach it to the model it was made with, wrapped in the same way"
            )
        for site in sites:
            space = self._space(site)
            if space is not None and space.dim != site.dim:
                raise GuardError(
                    f"{site.name} sees {site.dim} features; the memory holds a basis of R^{space.dim} for it"
                )
        self._model, self._sites, self._parameters, self._begun = model, sites, names, False

    def begin_task(self, task: str | None = None) -> None:
        """Anchor every protected tensor where it is now.

        Raises:
            GuardError: If the guard is not attached, or ``energy="auto"`` still has to be chosen.
        """
        model = self._attached()
        if self._pending is not None and self.energy == "auto":
            raise GuardError(
                "energy='auto' has to be chosen before the second task: let gr.ContinualTrainer do it, call "
                "guard.tune(trial) with a function that trains and scores one candidate, or give a number"
            )
        self._check_marks()
        self._guarded = [s for s in self._sites if self._parameters[s.name].requires_grad and self._protects(s)]
        self._anchors = {s.name: self._copy(s.name) for s in self._guarded}
        guarded = {s.name for s in self._guarded}
        bare = [s.name for s in self._sites if self._parameters[s.name].requires_grad and s.name not in guarded]
        loose = [n for n in (*unprotected(model, self._sites), *bare) if n in self._known]
        self._held = {n: self._copy(n) for n in loose} if self.unprotected == "hold" else {}
        self._bank = None
        if self._guarded:
            first = self._parameters[self._guarded[0].name]
            shapes = [tuple(s.view(self._parameters[s.name]).shape) for s in self._guarded]
            self._bank = SubspaceBank(
                [self._spaces[self._site_space[s.name]] for s in self._guarded], shapes, device=first.device
            )  # type: ignore[arg-type]
        self._begun = True
        self._tell(loose)

    @torch.no_grad()
    def before_step(self) -> None:
        """Project the gradients of protected tensors; gradients of held ones become zero."""
        self._ready("before_step")
        for name in self._held:
            gradient = self._parameters[name].grad
            if gradient is not None:
                gradient.zero_()
        if self._bank is None:
            return
        gradients = [(s, self._parameters[s.name].grad) for s in self._guarded]
        if all(g is not None for _, g in gradients):
            self._bank.reject_([s.view(g) for s, g in gradients if g is not None])
            return
        for site, gradient in gradients:
            if gradient is not None:
                self._spaces[self._site_space[site.name]].reject_(site.view(gradient))

    @torch.no_grad()
    def after_step(self) -> None:
        """Re-project the update since the anchor: exact for any optimizer, decay, momentum or clipping."""
        self._ready("after_step")
        for name, anchor in self._held.items():
            self._parameters[name].copy_(anchor)
        if self._bank is None:
            return
        parameters = [self._parameters[s.name] for s in self._guarded]
        anchors = [self._anchors[s.name] for s in self._guarded]
        deltas = [p.to(a.dtype) - a if p.dtype != a.dtype else p - a for p, a in zip(parameters, anchors, strict=True)]
        self._bank.reject_([s.view(d) for s, d in zip(self._guarded, deltas, strict=True)])
        torch._foreach_add_(deltas, anchors)
        torch._foreach_copy_(parameters, deltas)

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
        model = self._attached()
        index = len(self.tasks)
        task = task or f"task-{index + 1}"
        leaks = self._leaks()
        notes = list(self._notes())
        with evaluating(model):
            change = self._output_change(model)
            kept, groups, moments = self._collect(model, batches)
        before = {name: space.clone() for name, space in self._spaces.items()}
        target: Energy = self.candidates[0] if self.energy == "auto" else self.energy
        sites = self._grow(groups, moments, target, index, leaks)
        if self.energy == "auto" and index == 0:
            self._pending = (before, moments, groups)
            notes.append("energy='auto' is not chosen yet: these ranks are those of the most protective candidate")
        held = len(self._held)
        protected = index
        if len(self._probes) < self.max_probe_tasks and self.probes:
            self._probes.extend(kept)
        self.tasks.append(task)
        self._known = {original_name(n) for n, _ in model.named_parameters()}
        self._marks = {s.name: self._mark(s.name) for s in self._sites}
        self._begun, self._anchors, self._held, self._bank, self._guarded = False, {}, {}, None, []
        certificate = Certificate(
            guard=self.name, task=task, task_index=index, protected_tasks=protected,
            leak=max((v for v in leaks.values()), default=None) if protected else None,
            energy=min(s.energy for s in sites), free=sum(s.free for s in sites), dims=sum(s.dim for s in sites),
            output_change=change, probes=sum(size_of(b) for b, _ in self._probes) if change is not None else 0,
            held=held, sites=tuple(sites), notes=tuple(notes),
        )  # fmt: skip
        if certificate.free == 0:
            warnings.warn(
                f"PEGP: after {task!r} no free direction is left at any of {len(sites)} sites, so nothing can be learned "
                "from now on. Lower the energy, widen the adapter (a larger rank), or adapt more layers",
                stacklevel=2,
            )
        return certificate

    # --- for a plain script -------------------------------------------------------------------------------------

    def consolidate(self, model: nn.Module, batches: Iterable[Any], task: str | None = None) -> Certificate:
        """End a task in a script of one's own: attach if needed, then :meth:`end_task`.

        Calling it on a reference set before any training protects the pretrained model's behaviour there.
        """
        if self._model is not model:
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
            GuardError: If there is nothing to choose (not ``"auto"``, or not exactly one task consolidated).
        """
        if self._pending is None:
            raise GuardError("PEGP.tune: only for energy='auto', after the first task and before the second")
        before, moments, groups = self._pending
        best: tuple[float, Energy] | None = None
        for candidate in self.candidates:
            self._regrow(before, moments, groups, candidate)
            score = trial(candidate)
            logger.info("PEGP energy %s scores %.4f on validation data", candidate, score)
            if best is None or score > best[0]:
                best = (score, candidate)
        if best is None:
            raise ConfigError("PEGP.tune: candidates is empty")
        self._regrow(before, moments, groups, best[1])
        self.energy, self._pending = best[1], None
        return self.energy

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the memory to ``folder`` as safetensors and JSON, each file atomically."""
        return storage.save(Path(folder), self.settings(), self.state_dict())

    @classmethod
    def load_pretrained(cls, folder: str | Path) -> PEGP:
        """Read a memory written by :meth:`save_pretrained`; nothing in it is executed."""
        settings, state = storage.load(Path(folder), "pegp")
        guard = cls(**settings)
        guard.load_state_dict(state)
        return guard

    def exhausted(self) -> bool:
        """True when every site is protected and no free direction is left at any of them."""
        return bool(self._site_space) and all(space.free == 0 for space in self._spaces.values())

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {
            "energy": storage.plain(self.energy), "samples": self.samples, "probes": self.probes,
            "max_probe_tasks": self.max_probe_tasks, "unprotected": self.unprotected,
            "candidates": [storage.plain(c) for c in self.candidates],
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The memory, and the anchors when called inside a task: tensors and plain values only."""
        state: dict[str, Any] = {
            "tasks": list(self.tasks), "site_space": dict(self._site_space), "marks": dict(self._marks),
            "known": sorted(self._known), "energy": storage.plain(self.energy),
            "spaces": {k: v.state_dict() for k, v in self._spaces.items()},
            "probes": [{"inputs": b if isinstance(b, dict) else {"": b}, "outputs": o} for b, o in self._probes],
            "anchors": {k: v.clone() for k, v in self._anchors.items()},
            "held": {k: v.clone() for k, v in self._held.items()},
        }  # fmt: skip
        if self._pending is not None:
            before, moments, groups = self._pending
            state["pending"] = {
                "spaces": {k: v.state_dict() for k, v in before.items()},
                "moments": {k: v.state_dict() for k, v in moments.items()},
                "groups": [[s.name for s in group] for group in groups],
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a memory. Inside a task, call after :meth:`begin_task` to go on from the stored anchors."""
        self.tasks = list(state["tasks"])
        self._site_space, self._marks = dict(state["site_space"]), {k: float(v) for k, v in state["marks"].items()}
        self._known, self.energy = set(state["known"]), parse_energy(state["energy"])
        self._spaces = {k: Subspace.from_state_dict(v) for k, v in state["spaces"].items()}
        self._probes = [
            (p["inputs"][""] if set(p["inputs"]) == {""} else dict(p["inputs"]), p["outputs"])
            for p in state.get("probes", [])
        ]
        self._anchors = {
            k: v.to(self._anchors[k]) if k in self._anchors else v for k, v in state.get("anchors", {}).items()
        }
        self._held = {k: v.to(self._held[k]) if k in self._held else v for k, v in state.get("held", {}).items()}
        self._pending = None
        pending = state.get("pending")
        if pending:
            by_name = {s.name: s for s in self._sites}
            self._pending = (
                {k: Subspace.from_state_dict(v) for k, v in pending["spaces"].items()},
                {k: SecondMoment.from_state_dict(v) for k, v in pending["moments"].items()},
                [[by_name[n] for n in names if n in by_name] for names in pending["groups"]],
            )

    # --- inside -------------------------------------------------------------------------------------------------

    def _attached(self) -> nn.Module:
        if self._model is None:
            raise GuardError("PEGP is not attached: call guard.attach(model), or pass guard.callback() to the Trainer")
        return self._model

    def _ready(self, caller: str) -> None:
        if not self._begun:
            raise GuardError(f"PEGP.{caller} outside a task: call attach(model) and begin_task() first")

    def _space(self, site: Site) -> Subspace | None:
        return self._spaces.get(self._site_space.get(site.name, ""))

    def _protects(self, site: Site) -> bool:
        space = self._space(site)
        return space is not None and space.rank > 0

    def _copy(self, name: str) -> Tensor:
        value = self._parameters[name].detach()
        return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)

    def _mark(self, name: str) -> float:
        return float(self._parameters[name].detach().double().norm())

    def _check_marks(self) -> None:
        moved = [
            n
            for n, mark in self._marks.items()
            if n in self._parameters and abs(self._mark(n) - mark) > 1e-4 * max(mark, 1e-6)
        ]
        if moved:
            warnings.warn(
                f"PEGP: {len(moved)} protected tensors changed between consolidation and this task (the first: {moved[0]}). "
                "What changed them was not guarded; the guarantee starts anew from here",
                stacklevel=3,
            )

    def _tell(self, loose: list[str]) -> None:
        if not self.tasks:
            logger.info("PEGP: first task, nothing is protected yet; %d sites will be", len(self._sites))
            return
        narrow = [s.name for s in self._guarded if self._parameters[s.name].dtype in (torch.float16, torch.bfloat16)]
        if narrow:
            warnings.warn(
                f"PEGP: {len(narrow)} protected tensors are {self._parameters[narrow[0]].dtype}; rounding them leaks more than "
                "1e-5. Keep trainable tensors in float32 (autocast may still compute in half precision)",
                stacklevel=3,
            )
        free = sum(self._spaces[self._site_space[s.name]].free for s in self._guarded)
        if self._guarded and free == 0 and not any(not self._protects(s) for s in self._sites):
            warnings.warn(
                "PEGP: no free direction is left at any site; this task cannot change the model", stacklevel=3
            )
        logger.info(
            "PEGP: %d sites protected, %d free directions, %d tensors held", len(self._guarded), free, len(self._held)
        )
        if loose:
            what = (
                "held at their values"
                if self.unprotected == "hold"
                else "free to move, which the guarantee does not cover"
            )
            logger.info(
                "PEGP: %d trainable tensors have no condition and are %s: %s", len(loose), what, ", ".join(loose[:5])
            )

    def _notes(self) -> Iterable[str]:
        if self.tasks and self.unprotected == "allow":
            loose = [n for n in unprotected(self._attached(), self._sites) if n in self._known]
            if loose:
                yield f"{len(loose)} trainable tensors were left free: the guarantee does not cover them"
        narrow = [s for s in self._guarded if self._parameters[s.name].dtype in (torch.float16, torch.bfloat16)]
        if narrow:
            yield f"{len(narrow)} tensors are kept in half precision: their leak is that of rounding"

    def _leaks(self) -> dict[str, float]:
        leaks: dict[str, float] = {}
        for site in self._guarded:
            delta = self._parameters[site.name].detach().double() - self._anchors[site.name].double()
            leaks[site.name] = self._spaces[self._site_space[site.name]].share(site.view(delta))
        return leaks

    def _output_change(self, model: nn.Module) -> float | None:
        changes = []
        for batch, old in self._probes:
            new = output_of(run_model(model, batch))
            if new is not None:
                changes.append(relative_change(new, old, mask_for(old, batch)))
        return max(changes) if changes else None

    def _collect(
        self, model: nn.Module, batches: Iterable[Any]
    ) -> tuple[list[tuple[Any, Tensor]], list[list[Site]], dict[str, SecondMoment]]:
        groups: list[list[Site]] = []
        moments: dict[str, SecondMoment] = {}
        kept: list[tuple[Any, Tensor]] = []
        seen, want = 0, self.probes
        current: list[Any] = [None]
        listen: dict[str, list[str]] = {}

        def sink(module: str, features: Tensor) -> None:
            mask = mask_for(features, current[0])
            for leader in listen[module]:
                moments[leader].update(features, mask)

        for batch in batches:
            if seen == 0:
                groups = group_by_input(model, self._sites, lambda batch=batch: run_model(model, batch))  # type: ignore[misc]
                for group in groups:
                    moments[group[0].name] = self._moment(group)
                    listen.setdefault(group[0].module, []).append(group[0].name)
            take = min(size_of(batch), self.samples - seen)
            part = batch if take == size_of(batch) else head_of(batch, take)
            current[0] = part
            with capture(model, set(listen), sink):
                outputs = output_of(run_model(model, part))
            if want and outputs is not None:
                probe = head_of(part, want)
                answer = output_of(run_model(model, probe))
                if answer is not None:
                    kept.append((probe, answer.detach().cpu().clone()))
                want -= size_of(probe)
            seen += take
            if seen >= self.samples:
                break
        if seen == 0:
            raise GuardError("PEGP: end_task got no batch; pass the task's training inputs, as the model takes them")
        return kept, groups, moments

    def _moment(self, group: list[Site]) -> SecondMoment:
        """The cheapest form that can resolve what the energy asks for."""
        dim = group[0].dim
        exact = self.energy != "auto" and any(energy_for(self.energy, s.kind, len(self.tasks)) > 0.999 for s in group)
        if dim > 4096:
            return SecondMoment(dim, form="sketch")
        return SecondMoment(dim, form="root") if exact else SecondMoment(dim, products=torch.float32)

    def _grow(
        self,
        groups: list[list[Site]],
        moments: Mapping[str, SecondMoment],
        energy: Energy,
        index: int,
        leaks: Mapping[str, float],
    ) -> list[SiteCertificate]:
        sites = []
        for group in groups:
            moment = moments[group[0].name]
            held = next((self._site_space[s.name] for s in group if s.name in self._site_space), group[0].name)
            target = max(energy_for(energy, s.kind, index) for s in group)
            if moment.count == 0 or moment.trace == 0.0:
                known = self._spaces.get(held)
                logger.info("PEGP: %s saw no features in this task", group[0].name)
                if known is None:
                    continue
                captured = 1.0
            else:
                first = self._parameters[group[0].name]
                dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
                space = self._spaces.setdefault(held, Subspace(moment.dim, dtype=dtype, device=first.device))
                captured = space.grow(moment, energy=target).energy
            for site in group:
                self._site_space[site.name] = held
                space = self._spaces[held]
                leak = leaks.get(site.name)
                sites.append(
                    SiteCertificate(site.name, site.kind, space.dim, space.rank, space.free, target, captured, leak)
                )
        if not sites:
            raise GuardError("PEGP: no protected module was called while the model ran; check what the batches feed")
        return sites

    def _regrow(
        self,
        before: Mapping[str, Subspace],
        moments: Mapping[str, SecondMoment],
        groups: list[list[Site]],
        energy: Energy,
    ) -> None:
        self._spaces = {name: space.clone() for name, space in before.items()}
        self._grow(groups, moments, energy, 0, {})
