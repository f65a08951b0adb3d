"""Layer-wise mode: a gradient is projected and freed while backward still runs.

A matrix has a full gradient for as long as its hook takes, except in steps in which its basis is due; what is kept
between micro-batches are coordinates, ``r max(m, n)`` floats in place of ``m n``. Projection is linear, so coordinates
add up over micro-batches as gradients do, and one step is taken of the sum.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from growthring.errors import ConfigError
from growthring.subspace import full_precision, widest_dtype

from ._checks import check_gradient
from ._matrix import is_dtensor, local
from ._products import Job, project
from .gorp import GORP

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["LayerWise"]


class LayerWise:
    """Puts an optimizer into layer-wise mode: train as before, with ``backward``, ``step`` and ``zero_grad``.

    After ``backward()`` a projected matrix has no ``.grad``: the optimizer has its coordinates, summed over
    micro-batches, and steps with them. For a step in which its basis is due (the first, then every ``refresh``), and
    after one in which it was skipped, a matrix keeps its whole gradient in ``.grad``. ``stagger`` spreads refreshes,
    so that few are kept at a time; but the first step needs the memory of all gradients.

    ``step()`` uses up what was accumulated, and leaves projected matrices without ``.grad``. To throw it away instead,
    call ``zero_grad()`` of the optimizer; that of the model does not reach coordinates.

    Weights of bf16 or fp16 accumulate in float32 coordinates, where ``.grad`` would round every sum.

    **Clipping.** Functions that read ``.grad`` see only what is left there. ``max_norm`` clips inside ``step()``
    instead, as ``torch.nn.utils.clip_grad_norm_`` would, were the gradients what the rule gets: of a projected matrix
    its coordinates, outside what is protected and, where its basis is due, in the new basis; of any other parameter
    its gradient. Skipped matrices do not count. A norm that is not finite clips nothing.

    **State.** The optimizer's ``state_dict()`` is the same with and without this mode, and loads in either. What is in
    flight between two steps is in :meth:`state_dict` of this object, with the gradients of all other parameters.

    **Guards.** What ``optimizer.protect`` keeps outside stays there: ``GradientMemory`` works as without this mode. A
    guard that projects ``.grad`` before the step, as ``PEGP`` does, finds few there; what it restores after it holds.

    **Several processes.** FSDP2 averages gradients before hooks see them, and works as it is. DDP averages them after
    hooks: it is refused, and the optimizer has to average coordinates itself (``GORP(average_over=...)``). A
    ``torch.amp.GradScaler`` reads and scales ``.grad``, and is refused in ``step()``.

    Hooks go with :meth:`remove`, at the end of a ``with`` block, and with the optimizer. Copies of the model and of
    the optimizer have none.

    Args:
        optimizer: A :class:`GORP` or :class:`GaLore`.
        max_norm: Largest norm of what is stepped; default ``None``: no clipping.

    Attributes:
        max_norm: May be changed between steps.
        norm: The norm in the last step, before clipping; ``None`` before the first.

    Raises:
        ConfigError: If the optimizer is another or in this mode already, ``max_norm`` is not above 0, or several
            processes train plain parameters without ``average_over``.

    Example:
        ```python
        optimizer = gr.GORP(model.named_parameters(), lr=1e-4, rank=8)
        layerwise = gr.optim.LayerWise(optimizer, max_norm=1.0)
        for number, batch in enumerate(batches):
            (model(**batch).loss / 4).backward()  # 4 micro-batches a step
            if number % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
                log(layerwise.norm)
        ```
    """

    def __init__(self, optimizer: GORP, *, max_norm: float | None = None) -> None:
        if not isinstance(optimizer, GORP):
            raise ConfigError(
                f"LayerWise(optimizer={type(optimizer).__name__}(...)): GORP or GaLore is needed, for they can step "
                "with coordinates; give that one, not a wrapper of it"
            )
        if optimizer._before_rule is not None:
            raise ConfigError("LayerWise: this optimizer is in layer-wise mode already; remove() that first")
        if max_norm is not None and (
            isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not max_norm > 0.0
        ):
            raise ConfigError(f"LayerWise(max_norm={max_norm!r}): a number above 0 is needed, or None")
        self.optimizer, self.max_norm = optimizer, max_norm
        self.norm: float | None = None
        self._check_processes()
        self._hooks: dict[Tensor, Any] = {}
        self._whole: set[Tensor] = set()
        self._find_places()
        optimizer._before_rule = self._before_rule
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # so that a scaler shows itself
        self._ends = [
            optimizer.register_step_pre_hook(_weak(self, "_before_step")),
            optimizer.register_step_post_hook(_weak(self, "_after_step")),
            optimizer.register_load_state_dict_post_hook(_weak(self, "_after_load")),
        ]

    @staticmethod
    def callback(max_norm: float | None = None) -> TrainerCallback:
        """For the ``callbacks`` of a ``transformers.Trainer``: layer-wise mode while it trains.

        It wants ``TrainingArguments(max_grad_norm=0)``, for the Trainer would clip what is left in ``.grad``, and puts
        :attr:`norm` into the Trainer's logs as ``grad_norm``.

        Args:
            max_norm: As of :class:`LayerWise`; default ``None``: no clipping.

        Raises:
            ConfigError: When training begins: another optimizer, or ``max_grad_norm`` above 0.
        """
        from ._layerwise_callback import LayerWiseCallback

        return LayerWiseCallback(max_norm)

    # --- backward -----------------------------------------------------------------------------------------------

    def _find_places(self) -> None:
        """Number of the group and ordinal of every projected parameter, and a hook for those that have none."""
        number = {id(group): i for i, group in enumerate(self.optimizer.param_groups)}
        self._places = {p: (number[id(group)], ordinal) for p, group, ordinal in self.optimizer._projected()}
        for p in self._places.keys() - self._hooks.keys():
            self._hooks[p] = p.register_post_accumulate_grad_hook(_weak(self, "_take"))

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        """Project the gradient of one matrix, add it to what there is, and free it; unless it is needed whole."""
        optimizer = self.optimizer
        if p not in self._places:
            return
        if p.grad is None:
            raise ConfigError(
                f"LayerWise: the gradient of a parameter of shape {tuple(p.shape)} was freed by another hook in the "
                "same backward, perhaps by layer-wise mode of an earlier optimizer; remove() that first"
            )
        check_gradient(p)
        if p in self._whole or "basis" not in optimizer.state.get(p, {}):
            return
        number, ordinal = self._places[p]
        so_far = optimizer._given.pop(p, None)
        job = optimizer._job(p, optimizer.param_groups[number], ordinal)
        if optimizer._is_due(job):
            if so_far is not None:
                optimizer._given[p] = so_far
            return
        with full_precision(p.device):
            project([job])
        optimizer._given[p] = job.known if so_far is None else so_far.add_(job.known)
        p.grad = None

    # --- step ---------------------------------------------------------------------------------------------------

    def _check_processes(self) -> None:
        if getattr(self.optimizer, "average_over", None) is not None:
            return
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        plain = [p for p, _, _ in self.optimizer._projected() if not is_dtensor(p)]
        if plain:
            raise ConfigError(
                f"LayerWise: {dist.get_world_size()} processes train {len(plain)} matrices that are no DTensors. DDP "
                "averages gradients after the hooks that project and free them, so each process would step with its "
                "own. Let the optimizer average coordinates (average_over=torch.distributed.group.WORLD, and no DDP "
                "around the model), or shard the model with FSDP2 (fully_shard)"
            )

    def _before_step(self, *_: Any) -> None:
        if hasattr(self.optimizer, "grad_scale"):
            raise ConfigError(
                "LayerWise: a GradScaler unscales what is in .grad, and projected matrices have none there. Train in "
                "bfloat16, which needs no scaler, or without layer-wise mode"
            )
        self._check_processes()

    def _after_step(self, *_: Any) -> None:
        for p in self._places:
            p.grad = None
        self._find_places()

    def _after_load(self, *_: Any) -> None:
        self._whole = set()
        self._find_places()

    def _before_rule(self, live: list[Job], jobs: list[Job]) -> None:
        """Measure and clip what is about to be stepped: the coordinates of ``live``, and gradients beside ``jobs``."""
        self._whole = {j.parameter for j in jobs} - {j.parameter for j in live}
        ours = {j.parameter for j in jobs}
        others = [p.grad for p in self._parameters() if p.grad is not None and p.requires_grad and p not in ours]
        self.norm = _norm(live, others)
        if self.max_norm is None or not math.isfinite(self.norm):
            return
        share = self.max_norm / (self.norm + 1e-6)  # the 1e-6 is torch's
        if share < 1.0:
            torch._foreach_mul_([*(j.known for j in live), *map(local, others)], share)

    def _parameters(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.optimizer.param_groups))

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[int, Tensor]]:
        """Copies of what is accumulated so far; right after ``step()`` and ``zero_grad()`` there is nothing.

        Save it beside the optimizer's ``state_dict()`` if you save between two steps. Every process saves its own.

        Returns:
            ``"coordinates"`` of projected matrices and ``"gradients"`` of other parameters and of matrices that keep
            theirs; by the number that the parameter has in the optimizer's ``state_dict()``.
        """
        coordinates, gradients = {}, {}
        for number, p in enumerate(self._parameters()):
            if p in self.optimizer._given:
                coordinates[number] = self.optimizer._given[p].detach().clone()
            if p.grad is not None:
                gradients[number] = p.grad.detach().clone()
        return {"coordinates": coordinates, "gradients": gradients}

    def load_state_dict(self, state_dict: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Put what was accumulated in place of what is; load the optimizer's state first.

        Args:
            state_dict: From :meth:`state_dict`.

        Raises:
            ConfigError: If it does not fit the parameters or the bases; nothing is loaded then.
        """
        parameters, optimizer = self._parameters(), self.optimizer
        if set(state_dict) != {"coordinates", "gradients"}:
            raise ConfigError(
                f"LayerWise.load_state_dict: it has the keys {sorted(map(str, state_dict))}, 'coordinates' and "
                "'gradients' are needed; the optimizer has a state_dict() of its own"
            )
        given, gradients = {}, {}
        for number, value in state_dict["coordinates"].items():
            p = self._fits(parameters, number)
            first = optimizer.state.get(p, {}).get("exp_avg") if p in self._places else None
            if first is None or local(first).shape != value.shape:
                found = "it has no basis" if first is None else f"its basis has place for {tuple(local(first).shape)}"
                raise ConfigError(
                    f"LayerWise.load_state_dict: coordinates {tuple(value.shape)} are given for parameter {number}, "
                    f"and {found}. Load the optimizer's state_dict() first, the one that was saved beside this one"
                )
            given[p] = value.detach().to(local(first), copy=True)
        for number, value in state_dict["gradients"].items():
            p = self._fits(parameters, number)
            if p.shape != value.shape:
                raise ConfigError(
                    f"LayerWise.load_state_dict: a gradient {tuple(value.shape)} is given for parameter {number}, "
                    f"which is {tuple(p.shape)}"
                )
            gradients[p] = value.detach().to(device=p.device, dtype=p.dtype, copy=True)
        optimizer._given = given
        for p in parameters:
            p.grad = gradients.get(p)

    @staticmethod
    def _fits(parameters: list[Tensor], number: int) -> Tensor:
        if number not in range(len(parameters)):
            raise ConfigError(
                f"LayerWise.load_state_dict: there is an entry for parameter {number!r}, and the optimizer has "
                f"{len(parameters)}"
            )
        return parameters[number]

    # --- end ----------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """End layer-wise mode. Coordinates accumulated so far stay with the optimizer, and the next step uses them."""
        for hook in (*self._hooks.values(), *self._ends):
            hook.remove()
        self._hooks, self._ends, self._places = {}, [], {}
        if self.optimizer._before_rule == self._before_rule:
            self.optimizer._before_rule = None
            del self.optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    def __enter__(self) -> LayerWise:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _weak(one: LayerWise, method: str) -> Any:
    """A method that does not keep its object alive, and does nothing without it: hooks outlive optimizers."""
    reference = weakref.ref(one)

    def call(*args: Any) -> None:
        alive = reference()
        if alive is not None:
            getattr(alive, method)(*args)

    return call


def _norm(jobs: list[Job], gradients: list[Tensor]) -> float:
    """Of coordinates and gradients together, over all ranks, summed in float64 where the device has it."""

    def square(tensor: Tensor) -> Tensor:
        found = torch.linalg.vector_norm(tensor, dtype=widest_dtype(tensor.device)).square()
        return found.full_tensor() if is_dtensor(found) else found

    squares = [square(g) for g in gradients]
    by_ranks = defaultdict(list)
    for job in jobs:
        by_ranks[None if job.shard is None else job.shard.group].append(square(job.known))
    for group, parts in by_ranks.items():
        total = torch.stack(parts).sum()
        if group is not None:
            dist.all_reduce(total, group=group)
        squares.append(total)
    return math.sqrt(math.fsum(map(float, squares)))
