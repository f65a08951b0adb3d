"""What the guards of the robust family share: what can leave the pretrained model, from where, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from growthring.errors import ConfigError, GuardError

from . import shards, storage
from .base import Certificate, DeviationCertificate, Guard
from .deviation import HEADS, Anchored, Deviation, find_deviations, inner
from .hyper import hyper_dtype
from .plan import HOLE, TensorPlan, Treatment
from .site import original_name

__all__ = [
    "NORMS",
    "AnchoredGuard",
    "check_number",
    "dots_of",
    "gathered",
    "lengths_of",
    "norms_of",
    "rows_of",
    "scale_rows",
]

_Self = TypeVar("_Self", bound="AnchoredGuard")

NORMS = ("rows", "tensor")
"""Of every row the sum of absolute values, or of the whole tensor the Frobenius norm."""


class AnchoredGuard(Guard):
    """Every trainable tensor but the heads', with the value that it had when it was first seen: its anchor.

    Anchors stay over the tasks of a stream: they are the pretrained model (of adapters, the start, at which the model
    is the pretrained one; zero for LARGO-style deltas). A model that was not seen before is anchored anew.

    Args:
        exclude: Names of tensors left out, as a regular expression.
    """

    norm = "tensor"
    """In which norm radii are; see :data:`NORMS`."""
    treatment: tuple[Treatment, str, str, str] = ("free", "", "", HOLE)
    """What becomes of every tensor: treatment, condition, why and cost."""

    def __init__(self, exclude: str | None = HEADS) -> None:
        self.exclude = exclude
        self.tasks: list[str] = []
        """Names of the tasks that have ended."""
        self._model: nn.Module | None = None
        self._deviations: list[Deviation] = []
        self._starts: dict[str, Tensor] = {}  # by name; not those that are zero whatever happens
        self._trainable: set[tuple[Any, ...]] = set()  # which parameters trained, and where, when last looked at

    # --- the contract -------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Find what trains, and keep the anchors of what was not seen before.

        Raises:
            ConfigError: If ``exclude`` is no regular expression.
            GuardError: If nothing but what is excluded trains, or a loaded state is about another model.
        """
        if self._model is not None and inner(self._model) is not inner(model):
            self._starts = {}
            self._renew()
        names = {original_name(n) for n, _ in model.named_parameters()}
        if missing := [name for name in self._starts if name not in names]:
            raise GuardError(
                f"{self.name}: the state is about {len(self._starts)} tensors, and {len(missing)} of them are not in "
                f"this model (the first: {missing[0]}). Attach it to the model it was made with"
            )
        trainable = {(id(p), p.device, p.dtype) for p in model.parameters() if p.requires_grad}
        if self._model is model and trainable == self._trainable:
            return
        self._deviations = find_deviations(model, self.exclude, self._starts)
        self._model, self._trainable = model, trainable
        for deviation in self._deviations:
            if deviation.kind in ("lora", "weight"):
                for one in deviation.tensors:
                    zero = one.anchor is None and one.name not in self._starts
                    self._starts[one.name] = torch.zeros_like(one.parameter.detach()) if zero else _start(one)
        self._arrange()

    def begin_task(self, task: str | None = None) -> None:
        """Nothing is anchored anew: the distance is that from the pretrained model.

        Raises:
            GuardError: If the guard is not attached.
        """
        self._attached()

    def end_task(self, task: str | None, batches: Iterable[Any] = ()) -> Certificate:
        """Measure how far the model is from the pretrained one.

        Args:
            task: Name of the task; default ``task-<number>``.
            batches: Not read.
        """
        return self._certify(task)

    def explain(self, model: nn.Module | None = None) -> tuple[TensorPlan, ...]:
        """What happens to every trainable tensor, and why; before training or at any time.

        Args:
            model: Looked at without being attached; default the attached one.

        Raises:
            GuardError: If there is neither, or nothing but what is excluded trains.
        """
        looked_at = model if model is not None else self._model
        if looked_at is None:
            self._attached()
        assert looked_at is not None
        attached = looked_at is self._model
        found = self._deviations if attached else find_deviations(looked_at, self.exclude, self._starts)
        kinds = {one.name: deviation.kind for deviation in found for one in deviation.tensors}
        rows = []
        for raw, parameter in looked_at.named_parameters():
            name = original_name(raw)
            if not parameter.requires_grad:
                continue
            treatment, condition, why, cost = self.treatment
            if name not in kinds:
                treatment, condition, why, cost = "free", "", "left out by exclude=, as heads are by default", HOLE
            of = (kinds[name],) if name in kinds else ()
            rows.append(TensorPlan(name, tuple(parameter.shape), treatment, of, condition, why, cost))
        return tuple(rows)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write anchors, and what was learned, to ``folder`` as safetensors and JSON, each file atomically."""
        return storage.save(Path(folder), self.name, self.settings(), self.state_dict())

    @classmethod
    def load_pretrained(cls: type[_Self], folder: str | Path, model: nn.Module | None = None) -> _Self:
        """Read what :meth:`save_pretrained` wrote; nothing in it is executed.

        Args:
            folder: Where it was written.
            model: Attached, if given.

        Raises:
            DataError: If the folder holds no whole memory of this guard, or one of a newer format.
            GuardError: If it belongs to another model.
        """
        return storage.restore(cls, cls.name, Path(folder), model)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {"exclude": self.exclude}

    def state_dict(self) -> dict[str, Any]:
        """Names of the tasks and the anchors: tensors and plain values only. Of sharded tensors the whole."""
        return {
            "tasks": list(self.tasks),
            "anchors": {name: shards.whole(value).clone() for name, value in self._starts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, before :meth:`attach` or after it.

        Raises:
            GuardError: If it is about another model.
        """
        self.tasks, self._starts = list(state["tasks"]), dict(state["anchors"])
        self._renew()
        if self._model is not None:
            self._trainable = set()
            self.attach(self._model)

    # --- for the guards -----------------------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Another set of tensors trains from now on."""

    def _renew(self) -> None:
        """Forget what was learned of a model."""

    def _attached(self) -> list[Anchored]:
        """Every tensor that can deviate."""
        if self._model is None:
            raise GuardError(
                f"{self.name} is not attached: call guard.attach(model), or pass guard.callback() to the Trainer"
            )
        return [one for deviation in self._deviations for one in deviation.tensors]

    def _certify(
        self, task: str | None, notes: Iterable[str] = (), radii: Mapping[str, float] | None = None
    ) -> Certificate:
        """Close a task; ``radii`` are those of tensors that must be inside, in the norm that ``self.norm`` names."""
        self._attached()
        deviations = tuple(self._measure(one, radii or {}) for one in self._deviations)
        total = math.sqrt(sum(one.frobenius**2 for one in deviations))
        broken = [one.name for one in deviations if one.kept is False]
        notes = [
            f"what trained is {total:.4g} from where it started (Frobenius norm over {len(deviations)} layers)",
            *notes,
        ]
        if broken:
            notes.append(
                f"{len(broken)} layers are outside their radii (the first: {broken[0]}): something moved them after "
                "the last projection"
            )
        index = len(self.tasks)
        task = task or f"task-{index + 1}"
        self.tasks.append(task)
        return Certificate.without_sites(
            self.name,
            task,
            index,
            kept=not broken if any(one.kept is not None for one in deviations) else None,
            notes=notes,
            deviations=deviations,
        )

    @torch.no_grad()
    def _measure(self, deviation: Deviation, radii: Mapping[str, float]) -> DeviationCertificate:
        """How far a layer is, and the bound by its radius: of a plain weight, ``gamma``, or ``gamma sqrt(rows)``."""
        frobenius, own = deviation.frobenius(), tuple(radii[t.name] for t in deviation.tensors if t.name in radii)
        bound, kept = None, None
        if deviation.kind == "weight" and own:
            (only,) = deviation.tensors
            shape = only.parameter.shape
            rows = shape[0] if len(shape) > 1 and self.norm == "rows" else 1
            bound, kept = own[0] * math.sqrt(rows), self._inside(only, own[0])
        return DeviationCertificate(deviation.name, deviation.kind, frobenius, deviation.spectral(), bound, own, kept)

    def _inside(self, one: Anchored, radius: float) -> bool:
        """Whether every row, or the whole tensor, is within its radius, up to the rounding of its dtype."""
        now = shards.whole(one.parameter.detach())
        now, eps = now.to(hyper_dtype(now.device)), torch.finfo(now.dtype).eps
        delta = now if one.anchor is None else now - shards.whole(one.anchor).to(now)
        far, size = (
            rows_of(t).abs().sum(1) if self.norm == "rows" else torch.linalg.vector_norm(t) for t in (delta, now)
        )
        return bool((far <= radius * (1 + 64 * eps) + eps * size).all())


def check_number(who: str, name: str, value: Any, *, least: float = 0.0, most: float = float("inf")) -> float:
    """``value`` as a number.

    Raises:
        ConfigError: If it is none, or not between ``least`` and ``most`` (finite).
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most or value == float("inf"):
        bounds = f"at least {least:g}" if most == float("inf") else f"between {least:g} and {most:g}"
        raise ConfigError(f"{who}({name}={value!r}): must be a number, {bounds}")
    return float(value)


def gathered(numbers: Iterable[Tensor]) -> Tensor:
    """Numbers, one a tensor, as one vector on the device of the first."""
    found = list(numbers)
    return torch.stack([n.to(found[0].device) for n in found]) if found else torch.zeros(0)


def lengths_of(tensors: Sequence[Anchored], deltas: Iterable[Tensor]) -> Tensor:
    """Frobenius norms over all ranks, ``(tensors,)``, in float64 where the device has it."""
    parts = gathered(torch.linalg.vector_norm(delta) for delta in deltas)
    return shards.add([one.parameter for one in tensors], parts.to(hyper_dtype(parts.device)).square()).sqrt()


def dots_of(tensors: Sequence[Anchored], others: Iterable[Tensor]) -> Tensor:
    """``<g, other>`` of the gradients over all ranks, ``(tensors,)``, in float64 where the device has it."""
    parts = []
    for one, other in zip(tensors, others, strict=True):
        assert one.parameter.grad is not None
        gradient = one.parameter.grad.to_dense() if one.parameter.grad.is_sparse else one.parameter.grad
        gradient = shards.local(gradient).to(other.dtype)
        parts.append(torch.dot(gradient.reshape(-1), other.reshape(-1)))
    found = gathered(parts)
    return shards.add([one.parameter for one in tensors], found.to(hyper_dtype(found.device)))


def rows_of(delta: Tensor) -> Tensor:
    """A tensor as a matrix ``(rows, others)``; one with a single axis, or none, is one row."""
    return delta.flatten(1) if delta.ndim > 1 else delta.reshape(1, -1)


def scale_rows(one: Anchored, delta: Tensor, factors: Tensor) -> None:
    """Write ``anchor + factor * delta`` where the factor of a row is below 1; other rows stay bit for bit.

    Args:
        one: The tensor, changed in place.
        delta: Its :meth:`~growthring.guards.deviation.Anchored.delta`.
        factors: One for each row of :func:`rows_of`, or one for all, ``(rows,)`` or ``(1,)``; at least 0.
    """
    place = shards.local(one.parameter.detach())
    factors = factors.to(delta).reshape(-1, *[1] * max(delta.ndim - 1, 0)) if delta.ndim else factors.to(delta)[0]
    moved = factors * delta
    if one.anchor is not None:
        moved = moved + shards.local(one.anchor).to(moved)
    place.copy_(torch.where(factors < 1, moved.to(place.dtype), place))


def norms_of(tensors: Sequence[Anchored], deltas: Sequence[Tensor], norm: str) -> list[Tensor]:
    """Of every delta the sums of absolute values of its rows ``(rows,)``, or its Frobenius norm ``(1,)``.

    Rows are those of this rank; a sum that spans ranks (a Frobenius norm, a tensor with one axis) is over all of them.
    """
    if norm == "tensor":
        whole = lengths_of(tensors, deltas)
        return [n.reshape(1).to(d) for n, d in zip(whole, deltas, strict=True)]
    found = [rows_of(d).abs().sum(1) for d in deltas]
    flat = [i for i, d in enumerate(deltas) if d.ndim < 2]
    if flat and shards.spread(tensors[0].parameter):
        sums = shards.add([tensors[i].parameter for i in flat], gathered(found[i].squeeze(0) for i in flat))
        for i, value in zip(flat, sums, strict=True):
            found[i] = value.reshape(1)
    return found


def _start(one: Anchored) -> Tensor:
    assert one.anchor is not None
    return one.anchor
