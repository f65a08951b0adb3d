"""Radius: how far each layer may move from the pretrained model, with radii that are learned while it trains.

A LARGO-style reading (our derivation; see docs/research/largo.md), from trainable projection radii: TPGM (Tian et al.,
arXiv 2303.10720) and FTP (Tian et al., arXiv 2310.19182). Of a ball with the tensors ``F``, measured from where they
started, a step does

    h      = <g, F> / ||F||                    before the optimizer: dL/dgamma of the radius gamma that made F
    C, n   = what the optimizer made of F, and its norm
    gamma <- clip(gamma - mu * unit * Adam(h), 0, n)
    F     <- C * min(1, gamma / n)

``h`` is exact, needs no graph and no second pass, and is local: no layer asks another one. ``F`` are the deltas
of LARGO-style layers, factor by factor, or the product ``D = s B A`` where the other factor is frozen (product form)
or started with ``B = 0`` (stock LoRA), or what any other weight has moved by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from growthring.errors import ConfigError, GuardError, nearest

from . import shards, storage
from .balls import Balls, Seen
from .base import Certificate, Guard, unwrapped
from .deviation import HEADS, Deviation, anchors_of, find_deviations, inner
from .hyper import HyperAdam, hyper_dtype
from .plan import TensorPlan
from .radius_layout import GRANULARITIES, Layout, certify
from .site import original_name

__all__ = ["Radius"]

UNITS = ("step", "absolute", "anchor")
FLOOR = 1e-3
"""Learned radii end at this share of ``n``: at 0 the direction, and the signal to grow again, would be lost."""


class Radius(Guard):
    """Keeps every layer within a learned distance of the pretrained model.

    Balls are around the pretrained model in the first task, and around where the task began in every later one, so
    that what earlier tasks learned is not shrunk; the distances add up, and certificates say to what. It goes with
    other guards: it only ever scales what the task under way has changed, so it stays in any subspace in which they
    keep a task's change. List it last, so that it measures what they leave. Where another guard goes on with a
    loaded memory, load the Radius that was saved beside it: to a new one all that is learned already is a first task.

    Args:
        mu: How fast radii move, above 0: with ``unit="step"`` the share of the free run's speed at which a ball may
            grow. Smaller stays closer to the pretrained model. Default 1.0; the searches of our
            benchmarks chose between 0.3 and 3.
        kappa: What signals to shrink count for, in [0, 1]; at 0 balls never shrink by themselves. Default 1.
        unit: What ``mu`` is a share of: ``"step"`` (default) the length of the step just taken, so that it follows
            the learning rate; ``"absolute"`` 1; ``"anchor"`` the norm of what the ball is around (``A_0`` or ``B_0``;
            the base weight for products; the pretrained weight otherwise).
        granularity: One radius for each ``"factor"`` (default), one for each ``"layer"`` (both factors; weight and
            bias), or one for each ``"component"`` (rank-one term; of plain weights each row). Products have one
            radius a layer, or one a component.
        first: Share of its first step that a ball is made with, in (0, 1]. Default 0.5.
        betas: Of Adam on the radii. Default (0.9, 0.999).
        fixed: A constant radius for all balls in place of learned ones, at least 0: 0 keeps the pretrained weights
            bit for bit, infinity (or ``"inf"``) lets them go. Default ``None``. The arguments above other than
            ``granularity`` then play no part.
        exclude: Regular expression for names of tensors that no ball holds; default heads. ``None`` leaves out none.

    Raises:
        ConfigError: On values outside the ranges above.

    Example:
        ```python
        guard = gr.Radius(mu=1.0)
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[guard.callback()])
        trainer.train()
        certificate = guard.end_task("birds")
        farthest = max(certificate.deviations, key=lambda layer: layer.frobenius)
        ```
    """

    name = "radius"

    def __init__(
        self,
        mu: float = 1.0,
        *,
        kappa: float = 1.0,
        unit: str = "step",
        granularity: str = "factor",
        first: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.999),
        fixed: float | Literal["inf"] | None = None,
        exclude: str | None = HEADS,
    ) -> None:
        for what, value, allowed in (("unit", unit, UNITS), ("granularity", granularity, GRANULARITIES)):
            if value not in allowed:
                raise ConfigError(f"Radius({what}={value!r}): {nearest(str(value), allowed)}")
        _check("mu", mu, "above 0", lambda x: 0.0 < x < math.inf)
        _check("kappa", kappa, "in [0, 1]", lambda x: 0.0 <= x <= 1.0)
        _check("first", first, "in (0, 1]", lambda x: 0.0 < x <= 1.0)
        fixed = math.inf if fixed == "inf" else fixed
        if fixed is not None:
            _check("fixed", fixed, "at least 0 (or None: learned radii)", lambda x: x >= 0.0)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ConfigError(f"Radius(betas={betas!r}): must be two numbers in [0, 1)")
        for beta in betas:
            _check("betas", beta, "two numbers in [0, 1)", lambda x: 0.0 <= x < 1.0)
        self.mu, self.kappa, self.unit, self.granularity = float(mu), float(kappa), unit, granularity
        self.first, self.betas = float(first), (float(betas[0]), float(betas[1]))
        self.fixed, self.exclude = None if fixed is None else float(fixed), exclude
        self.tasks: list[str] = []
        """Names of the tasks that have ended."""
        self._anchors: dict[str, Tensor | None] = {}  # pretrained values, None for zero
        self._model: nn.Module | None = None
        self._deviations: list[Deviation] = []
        self._task: _Task | None = None  # None while no task is under way

    # --- the contract -------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Find what can deviate, and keep the pretrained values of plain weights when they are seen first.

        A task under way stays under way, also on a model that is wrapped or sharded by now. Another model is another
        beginning: nothing of the one before is kept.

        Raises:
            GuardError: If nothing trainable can deviate, a task under way was about other tensors, or a loaded state
                is about another model.
        """
        if self._model is None:
            self._check_names(model)
        elif inner(model) is not inner(self._model):
            self.tasks, self._anchors, self._task = [], {}, None
        self._deviations = find_deviations(model, self.exclude, self._anchors)
        self._model = model
        self._anchors |= anchors_of(self._deviations)
        if self._task is not None:
            self._task = self._begin(self._task.layout.origins, self._task.state_dict())

    def explain(self, model: nn.Module | None = None) -> tuple[TensorPlan, ...]:
        """What happens to every trainable tensor; before training or at any time.

        Args:
            model: Looked at without being attached; default the attached one.

        Raises:
            GuardError: If there is neither, or the model has nothing that can deviate.
        """
        model = model if model is not None else self._attached()
        if self._task is not None and model is self._model:
            return self._task.layout.plans(model)
        found = find_deviations(model, self.exclude, self._anchors)
        now = {t.name: t.parameter.detach() for d in found for t in d.tensors}
        return Layout(found, self.granularity, now if self.tasks else None).plans(model)

    def begin_task(self, task: str | None = None) -> None:
        """Put a ball around every layer: around the pretrained model, or around where a later task begins.

        A task under way goes on, with its radii.

        Raises:
            GuardError: If the guard is not attached.
        """
        self._attached()
        if self._task is None:
            self._task = self._begin({}, None)

    def bind(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Look at the optimizer's weight decay: towards zero is away from what does not start at zero.

        Raises:
            GuardError: If it decays such a tensor.
        """
        optimizer = unwrapped(optimizer)
        if optimizer is None:
            return
        anchored = {id(t.parameter): t.name for d in self._deviations for t in d.tensors if t.anchor is not None}
        free = {id(t.parameter) for d in self._deviations if d.kind == "lora" and d.b0 is None for t in d.tensors}
        for group in optimizer.param_groups:
            names = [anchored[id(p)] for p in group["params"] if id(p) in anchored and id(p) not in free]
            if names and group.get("weight_decay", 0.0):
                raise GuardError(
                    f"Radius: the optimizer decays {len(names)} tensors towards zero (the first: {names[0]}, "
                    f"weight_decay={group['weight_decay']}), and they started elsewhere: that is away from the "
                    "pretrained model. Set weight_decay=0 for them (their radius holds them), or train a LargoConfig "
                    "adapter, whose deltas may decay"
                )

    def before_step(self) -> None:
        """Take the hyper-gradients of the radii from the gradients."""
        self._under_way("before_step").look()

    def after_step(self) -> None:
        """Move the radii, and bring every ball's tensors back inside.

        A step that moved nothing (skipped by a gradient scaler, say) changes no radius.

        Raises:
            GuardError: If :meth:`before_step` was not called.
        """
        self._under_way("after_step").project()

    def end_task(self, task: str | None, batches: Iterable[Any] = ()) -> Certificate:
        """Measure how far every layer is from the pretrained model.

        Args:
            task: Name of the task; default ``task-<number>``.
            batches: Not read.

        Returns:
            A certificate without sites: ``deviations`` has one entry a layer, ``kept`` says whether all bounds hold.

        Raises:
            GuardError: If the guard is not attached.
        """
        self.begin_task()  # one that did not begin, as a reference that nothing trains on, has moved nothing
        ending, index = self._under_way("end_task"), len(self.tasks)
        task = task or f"task-{index + 1}"
        deviations = certify(ending.layout, ending.radii().tolist(), ending.reach.tolist())
        total = math.sqrt(sum(d.frobenius**2 for d in deviations))
        notes = [f"what trained is {total:.4g} from where it started (Frobenius norm over {len(deviations)} layers)"]
        broken = [d.name for d in deviations if d.kept is False]
        if broken:
            notes.append(f"{len(broken)} layers are outside their bounds (the first: {broken[0]})")
        self.tasks.append(task)
        self._task = None
        return Certificate.without_sites(
            self.name,
            task,
            index,
            kept=None if any(d.kept is None for d in deviations) else not broken,
            notes=notes,
            deviations=deviations,
        )

    def radii(self) -> dict[str, tuple[float, ...]]:
        """The radii of the task under way by ball, one number or one a component.

        Of what has not moved in this task, how far from the ball's centre it is: 0, but for a loaded adapter.

        Raises:
            GuardError: If no task is under way.
        """
        task = self._under_way("radii")
        values = task.radii().tolist()
        return {ball.name: tuple(values[ball.first : ball.first + ball.count]) for ball in task.layout.balls}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write radii and anchors to ``folder`` as safetensors and JSON, each file atomically."""
        return storage.save(Path(folder), self.name, self.settings(), self.state_dict())

    @classmethod
    def load_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> Radius:
        """Read what :meth:`save_pretrained` wrote; nothing in it is executed.

        Args:
            folder: Where it was written.
            model: Attached, if given; needed for a state taken inside a task.

        Raises:
            DataError: If the folder holds no whole memory of this guard, or one of a newer format.
            GuardError: If it belongs to another model, or needs one and none is given.
        """
        return storage.restore(cls, cls.name, Path(folder), model)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, which JSON can hold."""
        names = ("mu", "kappa", "unit", "granularity", "first", "exclude")
        fixed = "inf" if self.fixed == math.inf else self.fixed
        return {name: getattr(self, name) for name in names} | {"betas": list(self.betas), "fixed": fixed}

    def state_dict(self) -> dict[str, Any]:
        """Anchors and, inside a task, radii with their moments: tensors and plain values only.

        Of sharded models whole tensors; call it on all ranks.
        """
        anchors = {n: None if a is None else shards.whole(a).clone() for n, a in self._anchors.items()}
        state: dict[str, Any] = {"tasks": list(self.tasks), "anchors": anchors}
        if self._task is not None:
            origins = {name: shards.whole(value).clone() for name, value in self._task.layout.origins.items()}
            state["under_way"] = self._task.state_dict() | {"origins": origins}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        With the state of a task that was under way, call it after :meth:`attach`: the guard is then inside that task.

        Raises:
            GuardError: If the state needs an attached model and there is none, or is about other tensors.
        """
        if "under_way" in state and self._model is None:
            raise GuardError(
                "this state was taken inside a task: attach(model) first, or give load_pretrained the model"
            )
        self.tasks, self._anchors, self._task = list(state["tasks"]), dict(state["anchors"]), None
        model, self._model = self._model, None
        if model is not None:
            self.attach(model)
            if "under_way" in state:
                self._task = self._begin(state["under_way"]["origins"], state["under_way"])

    # --- inside -------------------------------------------------------------------------------------------------

    def _attached(self) -> nn.Module:
        if self._model is None:
            raise GuardError(
                "Radius is not attached: call guard.attach(model), or pass guard.callback() to the Trainer"
            )
        return self._model

    def _check_names(self, model: nn.Module) -> None:
        """Refuse anchors of weights that a model has not; LoRA's may be gone, merged with their task."""
        names = {original_name(n) for n, _ in model.named_parameters()}
        plain = [n for n, anchor in self._anchors.items() if anchor is not None and ".lora_" not in n]
        if missing := [n for n in plain if n not in names]:
            raise GuardError(
                f"Radius: the state is about {len(self._anchors)} tensors, and {len(missing)} of them are not in this "
                f"model (the first: {missing[0]}). Attach it to the model it was made with"
            )

    def _under_way(self, caller: str) -> _Task:
        if self._task is None:
            raise GuardError(f"Radius.{caller} outside a task: call attach(model) and begin_task() first")
        return self._task

    def _begin(self, known: Mapping[str, Tensor], state: Mapping[str, Any] | None) -> _Task:
        """A task; a later one is around its tensors as they are, or as they are ``known`` to have been."""
        origins = None
        if self.tasks:
            now = {t.name: t.parameter.detach() for d in self._deviations for t in d.tensors}
            origins = {name: shards.like(known.get(name, value), value) for name, value in now.items()}
        task = _Task(self, Layout(self._deviations, self.granularity, origins))
        if state is not None:
            task.load_state_dict(state)
        return task


class _Task:
    """The balls of one task, their radii, and one step after the other."""

    def __init__(self, guard: Radius, layout: Layout) -> None:
        self._guard, self.layout = guard, layout
        self._balls = Balls(layout.parts(), layout.count)
        far = Balls(layout.parts(pretrained=True), layout.count).sizes()  # where this task begins
        self.reach, self._begin = (far, torch.zeros_like(far)) if layout.later else (torch.zeros_like(far), far)
        device = self._balls.device
        self._adam = HyperAdam(layout.count, guard.betas, device)
        fixed = guard.fixed if guard.fixed is not None else 0.0
        self._gamma = torch.full((layout.count,), fixed, dtype=hyper_dtype(device), device=device)
        self._started = torch.zeros(layout.count, dtype=torch.bool, device=device)
        self._unit: Tensor | None = None
        if guard.unit == "anchor" and guard.fixed is None:
            self._unit = layout.anchor_norms().to(self._gamma)
        self._before: Seen | None = None

    @torch.no_grad()
    def look(self) -> None:
        self._before = self._balls.look()

    @torch.no_grad()
    def project(self) -> None:
        if self._before is None:
            raise GuardError("Radius.after_step without before_step: call it when the gradients are ready")
        dots, energy, now, step = self._balls.step(self._before)
        self._before = None
        n, moved = now.clamp_min(0.0).sqrt(), (step > 0) & now.isfinite()
        if self._guard.fixed is None:
            self._learn(dots, energy.clamp_min(0.0).sqrt(), n, step.sqrt(), moved)
        self._started = self._started | moved
        inside = ~moved | (n <= self._gamma)
        self._balls.scale(torch.where(inside, 1.0, self._gamma / n))

    def _learn(self, dots: Tensor, before: Tensor, n: Tensor, step: Tensor, moved: Tensor) -> None:
        """Move the radii of the balls that moved."""
        guard = self._guard
        h = torch.where(before > 0, dots / before, 0.0)
        h = torch.where(h > 0, guard.kappa * h, h)
        old = moved & self._started
        ahead = self._adam.direction(h, old & h.isfinite())
        unit = step if guard.unit == "step" else 1.0 if self._unit is None else self._unit
        radius = torch.minimum(torch.maximum(self._gamma - guard.mu * unit * ahead, FLOOR * n), n)
        begun = torch.where(n > before, torch.lerp(before, n, guard.first), n)
        self._gamma = torch.where(old, radius, torch.where(moved, begun, self._gamma))

    def radii(self) -> Tensor:
        """The radius of every ball; of one that has not moved yet, where it began."""
        return torch.where(self._started, self._gamma, self._begin)

    def state_dict(self) -> dict[str, Any]:
        return {
            "balls": {ball.name: ball.count for ball in self.layout.balls},
            "gamma": self._gamma.clone(),
            "started": self._started.clone(),
            "begin": self._begin.clone(),
            "reach": self.reach.clone(),
            "adam": self._adam.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        ours = {ball.name: ball.count for ball in self.layout.balls}
        if ours != dict(state["balls"]):
            other = ours.items() ^ dict(state["balls"]).items()
            raise GuardError(
                f"Radius: the task under way has other balls than this model: {len(other)} differ (the first: "
                f"{min(name for name, _ in other)}). Set requires_grad and the granularity as they were then"
            )
        for name in ("_gamma", "_started", "_begin", "reach"):
            setattr(self, name, state[name.lstrip("_")].to(getattr(self, name), copy=True))
        self._adam.load_state_dict(state["adam"])


def _check(name: str, value: Any, range_: str, allowed: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
        raise ConfigError(f"Radius({name}={value!r}): must be {range_}")
