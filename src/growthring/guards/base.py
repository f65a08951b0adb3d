"""The contract of a guard, its certificate, and the door into ``transformers.Trainer``."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import TrainerCallback

from growthring.errors import GuardError

__all__ = ["LEAK_LIMIT", "Certificate", "DeviationCertificate", "Guard", "GuardCallback", "SiteCertificate"]

LEAK_LIMIT = 1e-5
"""A strict guard lets no more than this share of a float32 update into what it protects."""


@dataclass(frozen=True)
class SiteCertificate:
    """What one trainable tensor kept, measured.

    Attributes:
        name: Qualified name of the parameter.
        kind: Kind of site, as ``energy`` of :class:`~growthring.PEGP` names it.
        dim: Dimension of its feature space.
        rank: Directions protected from now on.
        free: Directions left to learn in, ``dim - rank``.
        energy_target: Share of this task's feature energy asked to be protected.
        energy: Share that is protected, never below the target except where rounding noise begins.
        leak: ``||P D||_F / ||D||_F`` of this task's update ``D`` on the space that was protected while it trained;
            ``None`` when nothing was protected yet.
        rounding: The most of ``leak`` that storing the tensor in float32 (or wider, if it is) can cause by itself,
            ``eps / 2 * ||theta_0||_F / ||D||_F``: a tensor that hardly moves has a leak that is all rounding. Half
            precision causes more, and has no excuse.
    """

    name: str
    kind: str
    dim: int
    rank: int
    free: int
    energy_target: float
    energy: float
    leak: float | None
    rounding: float | None

    @property
    def kept(self) -> bool:
        """No leak beyond 1e-5, or none beyond what rounding to float32 explains."""
        return self.leak is None or self.leak <= max(LEAK_LIMIT, self.rounding or 0.0)


@dataclass(frozen=True)
class DeviationCertificate:
    """How far one layer is from the pretrained model, measured, and the bound that held it.

    Attributes:
        name: Qualified name of the layer with its adapter, or of a plain weight.
        kind: ``"largo"``, ``"product"``, ``"lora"`` or ``"weight"``.
        frobenius: ``||W - W_0||_F``.
        spectral: ``||W - W_0||_2``.
        bound: What both are at most, by the radii: of a product, or a plain weight, its radius; of LARGO's factors
            ``s (||B_0||_2 gamma_A + ||A_0||_2 gamma_B + gamma_A gamma_B)``. ``None`` where nothing bounds them.
        radii: The radii; what earlier tasks moved is not in them, but in the bound.
        kept: ``frobenius`` is at most ``bound``, up to rounding; ``None`` without a bound.
    """

    name: str
    kind: str
    frobenius: float
    spectral: float
    bound: float | None
    radii: tuple[float, ...]
    kept: bool | None


@dataclass(frozen=True)
class Certificate:
    """What a guard can vouch for after a task. Every figure is measured, none is assumed.

    Attributes:
        guard: Name of the guard.
        task: Name of the task that just ended.
        task_index: Its position in the stream, from 0.
        protected_tasks: Tasks whose knowledge was protected while this one trained.
        leak: Worst leak over the sites; ``None`` for the first task.
        kept: The guarantee held: at every site the leak is at most 1e-5, or at most what rounding the tensor to
            float32 causes; ``None`` for the first task.
        energy: Least captured share of this task's feature energy over the sites.
        free: Free dimensions summed over the sites.
        dims: Dimensions summed over the sites.
        output_change: ``max |new - old| / max |old|`` of the model's outputs on the probes kept from earlier tasks,
            against what the model said when their task ended; ``None`` without probes.
        probes: Number of old inputs behind ``output_change``.
        held: Trainable tensors that no site protects and that were therefore held at their old values.
        sites: One entry per protected tensor.
        notes: Sentences a reader should see.
        deviations: How far what trained is from the pretrained model, layer by layer, of guards that bound or learn
            from it; ``kept`` is then about these bounds, from the first task on, and ``None`` without any.
    """

    guard: str
    task: str
    task_index: int
    protected_tasks: int
    leak: float | None
    kept: bool | None
    energy: float
    free: int
    dims: int
    output_change: float | None
    probes: int
    held: int
    sites: tuple[SiteCertificate, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    deviations: tuple[DeviationCertificate, ...] = field(default=(), repr=False)

    @classmethod
    def without_sites(
        cls,
        guard: str,
        task: str,
        task_index: int,
        *,
        kept: bool | None = None,
        notes: Iterable[str] = (),
        deviations: tuple[DeviationCertificate, ...] = (),
    ) -> Certificate:
        """What a guard says that protects no features: nothing leaks, and no dimension is counted."""
        return cls(
            guard=guard,
            task=task,
            task_index=task_index,
            protected_tasks=0,
            leak=None,
            kept=kept,
            energy=0.0,
            free=0,
            dims=0,
            output_change=None,
            probes=0,
            held=0,
            sites=(),
            notes=tuple(notes),
            deviations=deviations,
        )

    def to_dict(self) -> dict[str, Any]:
        """The certificate as plain values for JSON."""
        return {
            **dataclasses.asdict(self),
            "sites": [dataclasses.asdict(s) for s in self.sites],
            "notes": list(self.notes),
            "deviations": [dataclasses.asdict(d) | {"radii": list(d.radii)} for d in self.deviations],
        }


class Guard(ABC):
    """What a step must not change, and what is remembered between tasks.

    The order of calls: :meth:`attach` once; for every task :meth:`begin_task` and :meth:`bind`, then for every step
    :meth:`before_step` (gradients are ready, clipped and unscaled), the optimizer's step, :meth:`after_step`; then
    :meth:`end_task`.
    """

    name: str = "guard"

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Find the sites in ``model``; raise :class:`~growthring.errors.GuardError` if there are none."""

    @abstractmethod
    def begin_task(self, task: str | None = None) -> None:
        """Anchor the parameters; the guarantee is about the difference from here on."""

    def prepare(self, task: str | None, batches: Iterable[Any]) -> None:  # noqa: B027
        """Look at a task's training inputs before it trains, and before :meth:`begin_task`.

        Called by :class:`~growthring.ContinualTrainer` after :meth:`attach`. It may change which parameters train.

        Args:
            task: Name of the task.
            batches: As :meth:`end_task` gets them: a sample of the training rows.
        """

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor | None:
        """A term to add to the loss, or ``None``."""
        return None

    def bind(self, optimizer: torch.optim.Optimizer | None) -> None:  # noqa: B027
        """Meet the optimizer that will step: one that can, keeps protected directions free by itself.

        Called after :meth:`begin_task` by :class:`GuardCallback`; call it yourself in a loop of your own. A guard need
        not use it, and does its work under any optimizer without it.

        Args:
            optimizer: The optimizer, in accelerate's wrapper or not; ``None`` changes nothing.
        """

    def before_step(self) -> None:  # noqa: B027
        """Trim the gradients, so that optimizer statistics stay clean."""

    def after_step(self) -> None:  # noqa: B027
        """Restore the constraint exactly, whatever the optimizer did."""

    @abstractmethod
    def end_task(self, task: str | None, batches: Iterable[Any]) -> Certificate:
        """Learn what must be kept of this task, and certify what was kept of the earlier ones."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors, plain scalars, strings and containers of them only."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""

    def callback(self, *, loss_added: bool = False) -> GuardCallback:
        """A ``TrainerCallback`` that makes a plain ``transformers.Trainer`` respect this guard.

        Args:
            loss_added: The Trainer adds :meth:`loss` to its own; a plain one does not, and a guard that needs it is
                then refused when training begins.
        """
        return GuardCallback(self, loss_added=loss_added)


class GuardCallback(TrainerCallback):  # type: ignore[misc]
    """Calls a guard at the right moments of a ``transformers.Trainer`` run.

    ``on_pre_optimizer_step`` comes after clipping and unscaling, ``on_optimizer_step`` right after the step.
    """

    def __init__(self, guard: Guard, *, loss_added: bool = False) -> None:
        self.guard, self._loss_added = guard, loss_added

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the model that trains, anchor it, and bind to the optimizer."""
        if type(self.guard).loss is not Guard.loss and not self._loss_added:
            raise GuardError(
                f"the guard {self.guard.name!r} adds a term to the loss, and callbacks of a plain Trainer cannot: "
                "train with gr.ContinualTrainer, or add guard.loss(outputs, batch) in your compute_loss and pass "
                "guard.callback(loss_added=True)"
            )
        model = kwargs.get("model")
        if model is None:
            raise GuardError("the Trainer gave its callbacks no model; growthring needs transformers 5.8 or newer")
        self.guard.attach(model)
        self.guard.begin_task()
        self.guard.bind(unwrapped(kwargs.get("optimizer")))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trim the gradients."""
        self.guard.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the constraint."""
        self.guard.after_step()


def unwrapped(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer inside accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return cast("torch.optim.Optimizer | None", optimizer)
