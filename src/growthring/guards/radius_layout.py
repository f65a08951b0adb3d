"""Which balls a model has for :class:`~growthring.Radius`: what lies in which, and what their radii bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growthring.errors import GuardError

from . import shards
from .balls import Along, Part
from .base import DeviationCertificate
from .deviation import Anchored, Deviation
from .plan import HOLE, TensorPlan
from .site import original_name

__all__ = ["GRANULARITIES", "Ball", "Layout", "certify"]

GRANULARITIES = ("factor", "layer", "component")


@dataclass(frozen=True)
class Ball:
    """One ball, or one for each component.

    Attributes:
        name: The tensor's name for a ball of one tensor, else the layer's.
        first: Number of its first radius.
        count: Number of radii.
    """

    name: str
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class _Slot:
    """One tensor in its ball; of a product, the factor that is scaled."""

    deviation: Deviation
    tensor: Anchored
    ball: Ball
    along: Along
    product: bool

    def part(self, origins: Mapping[str, Tensor]) -> Part:
        d, parameter = self.deviation, self.tensor.parameter
        origin = origins.get(self.tensor.name, None if self.product else self.tensor.anchor)
        if not self.product:
            return Part(parameter, self.ball.first, origin, self.along)
        turned = parameter is not d.b
        return Part(parameter, self.ball.first, origin, self.along, d.b if turned else d.a, turned, d.scale)

    def anchor(self) -> Tensor:
        """What the ball is around, in the shape of the parameter; of a product, the base weight."""
        d = self.deviation
        if self.product:
            layer: Any = d.layer
            weight = getattr(layer.get_base_layer(), "weight", None)
            if weight is None:
                raise GuardError(
                    f"Radius(unit='anchor'): the layer under {d.name} has no single weight whose norm could be the "
                    "unit; take unit='step'"
                )
            return shards.whole(weight.detach())
        found: Tensor | None = self.tensor.anchor
        if d.kind == "largo":
            found = d.b0 if self.tensor.parameter is d.b else d.a0
            found = found.mT if found is not None and d.table and found is d.a0 else found
        return torch.zeros_like(shards.whole(self.tensor.parameter.detach())) if found is None else shards.whole(found)


class Layout:
    """The balls of some deviations.

    Args:
        deviations: What can deviate.
        granularity: ``"factor"``, ``"layer"`` or ``"component"``.
        origins: Where a later task begins: its tensors by name; balls are around these. ``None`` in the first task:
            balls are around the pretrained model.
    """

    def __init__(
        self, deviations: Sequence[Deviation], granularity: str, origins: Mapping[str, Tensor] | None = None
    ) -> None:
        self.deviations, self.granularity = list(deviations), granularity
        self.later, self.origins = origins is not None, dict(origins or {})
        self.balls: list[Ball] = []
        self.count = 0
        self._slots: list[_Slot] = []
        for deviation in self.deviations:
            if scaled := self._scaled(deviation):
                self._add_product(deviation, scaled)
            else:
                self._add_factors(deviation)

    def parts(self, *, pretrained: bool = False) -> list[Part]:
        """What lies in the balls, measured from their centres, or from the pretrained model."""
        return [slot.part({} if pretrained else self.origins) for slot in self._slots]

    def slots(self, deviation: Deviation) -> list[_Slot]:
        """The balls' tensors of one deviation."""
        return [slot for slot in self._slots if slot.deviation is deviation]

    def anchor_norms(self) -> Tensor:
        """Norms of what the balls are around, ``(count,)``, float64 on the CPU.

        Raises:
            GuardError: If one of them is zero, or a base weight is quantised.
        """
        found = torch.zeros(self.count, dtype=torch.float64)
        for slot in self._slots:
            value = slot.anchor()
            if not value.is_floating_point():
                raise GuardError(
                    f"Radius(unit='anchor'): the base weight of {slot.deviation.name} is quantised ({value.dtype}), "
                    "so its norm is not there to be read; take unit='step'"
                )
            squares = value.detach().to("cpu", torch.float64).square()
            if slot.along == "all" or slot.product:
                energy = squares.sum()
            else:
                energy = squares.flatten(1).sum(1) if slot.along == "rows" else squares.sum(0)
            found[slot.ball.first : slot.ball.first + slot.ball.count] += energy
        if bool((found == 0).any()):
            names = [b.name for b in self.balls if bool((found[b.first : b.first + b.count] == 0).any())]
            raise GuardError(
                f"Radius(unit='anchor'): {len(names)} balls are around zero (the first: {names[0]}), so their radius "
                "would never move; take unit='step'"
            )
        return found.sqrt()

    def plans(self, model: nn.Module) -> tuple[TensorPlan, ...]:
        """What happens to every trainable tensor of a model."""
        said: dict[str, tuple[str, str, str]] = {}
        where = "from where the task began" if self.later else "from the pretrained model"
        for deviation in self.deviations:
            for slot in self.slots(deviation):
                for tensor in deviation.tensors:
                    scaled = slot.product and tensor is not slot.tensor
                    why = (
                        "its product with the other factor is what is measured; that factor is scaled"
                        if scaled
                        else ""
                    )
                    if slot.product or tensor is slot.tensor:
                        what = "||s dB A||_F" if slot.product else "||d||_F"
                        said[tensor.name] = (deviation.kind, f"{what} {where} is at most gamma", why)
        rows = []
        for raw, p in model.named_parameters():
            name = original_name(raw)
            if not p.requires_grad:
                continue
            if name in said:
                kind, condition, why = said[name]
                rows.append(TensorPlan(name, tuple(p.shape), "protected", (kind,), condition, why, ""))
            else:
                why = "left out by exclude=, as heads are by default"
                rows.append(TensorPlan(name, tuple(p.shape), "free", (), "", why, HOLE))
        return tuple(rows)

    # --- inside -------------------------------------------------------------------------------------------------

    def _scaled(self, d: Deviation) -> Anchored | None:
        """The factor by which a product is scaled; ``None`` where factors have balls of their own."""
        if d.kind == "product":
            return d.tensors[0]
        if d.kind != "lora" or d.b0 is not None:
            return None
        zero = [t for t in d.tensors if t.anchor is None]
        scaled = zero[-1] if zero else d.tensors[-1]
        if self.later and len(d.tensors) == 2 and bool(shards.whole(self.origins[scaled.name]).any()):
            return None  # no multiple of B keeps what earlier tasks left in B A
        if scaled.parameter is not d.b and shards.spread(scaled.parameter):
            raise GuardError(
                f"Radius: {scaled.name} starts at zero and is spread over ranks by the rows that its ball needs "
                "together (PEFT's LoRA of embeddings does so). Leave it out with exclude=, or use LargoConfig"
            )
        return scaled

    def _add_product(self, deviation: Deviation, scaled: Anchored) -> None:
        assert deviation.b is not None
        if self.granularity == "component":
            along: Along = "columns"
            ball = self._ball(deviation.name, deviation.b.shape[1])
        else:
            along, ball = "all", self._ball(deviation.name)
        self._slots.append(_Slot(deviation, scaled, ball, along, True))

    def _add_factors(self, d: Deviation) -> None:
        weight = d.kind == "weight"
        whole = d.name.rpartition(".")[0] if weight else d.name
        joint = None
        for tensor in d.tensors:
            shape = tensor.parameter.shape
            if self.granularity == "component" and not (weight and len(shape) < 2):
                # rank-one terms: rows of A, columns of B; of a plain weight its rows
                along: Along = "rows" if weight or (tensor.parameter is not d.b and not d.table) else "columns"
                count = shape[0] if along == "rows" else shape[1]
                joint = joint or self._ball(d.name, count)
                self._slots.append(_Slot(d, tensor, joint, along, False))
            elif self.granularity == "layer":
                known = [b for b in self.balls if b.name == whole]
                joint = known[0] if known else self._ball(whole)
                self._slots.append(_Slot(d, tensor, joint, "all", False))
            else:
                self._slots.append(_Slot(d, tensor, self._ball(tensor.name), "all", False))

    def _ball(self, name: str, count: int = 1) -> Ball:
        ball = Ball(name, self.count, count)
        self.balls.append(ball)
        self.count += count
        return ball


def certify(layout: Layout, radii: Sequence[float], reach: Sequence[float]) -> tuple[DeviationCertificate, ...]:
    """Measure every deviation, and say what its radii bound it by.

    Args:
        layout: The balls.
        radii: Their radii.
        reach: How far from the pretrained model each ball's centre is.
    """
    found = []
    for d in layout.deviations:
        slots = layout.slots(d)
        frobenius, spectral = d.frobenius(), d.spectral()
        bound: float | None = _bound(d, slots, radii, reach, layout.origins)
        own = dict.fromkeys(slot.ball for slot in slots)
        numbers = tuple(radii[i] for b in own for i in range(b.first, b.first + b.count))
        if not math.isfinite(bound or 0.0):
            bound = None
        kept = None if bound is None else frobenius <= bound * (1 + _precision(d)) + _rounding(d)
        finite = tuple(n for n in numbers if math.isfinite(n))
        found.append(DeviationCertificate(d.name, d.kind, frobenius, spectral, bound, finite, kept))
    return tuple(found)


@torch.no_grad()
def _bound(
    d: Deviation, slots: list[_Slot], radii: Sequence[float], reach: Sequence[float], origins: Mapping[str, Tensor]
) -> float:
    """A bound of ``||D||_F``, which bounds ``||D||_2`` too."""

    def radius(slot: _Slot, around: bool = True) -> float:
        ball = range(slot.ball.first, slot.ball.first + slot.ball.count)
        return math.sqrt(sum((radii[i] + (reach[i] if around else 0.0)) ** 2 for i in ball))

    first = slots[0]
    if d.kind == "weight":
        return radius(first)
    if first.product:
        if first.along == "all":
            return radius(first)
        rows = first.part({}).other().double()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        # |sum_i n_i u_i a_i| <= sqrt(largest eigenvalue of the a_i's Gram) |n|: 1 where A has orthogonal rows
        return radius(first) * math.sqrt(max(0.0, float(torch.linalg.matrix_norm(rows, 2)) ** 2))
    pair = {("b" if slot.tensor.parameter is d.b else "a"): slot for slot in slots}
    centres: dict[str, Tensor | None] = {"a": d.a0, "b": d.b0}
    start, around = 0.0, d.kind == "largo"
    if d.kind == "lora":  # around where the task began, wherever that is
        for key, slot in pair.items():
            centres[key] = origins.get(slot.tensor.name, slot.tensor.anchor)
        centres = {k: (getattr(d, k) if k not in pair else c) for k, c in centres.items()}
        start = _start_norm(d, centres)
    alpha, beta = (_spectral(centres[key]) for key in ("a", "b"))
    if len(pair) == 2 and pair["a"].ball == pair["b"].ball:  # a^2 + b^2 <= R^2
        both = radius(pair["a"], around)
        return start + d.scale * (math.hypot(alpha, beta) * both + both**2 / 2)
    resting = {k: 0.0 if d.kind == "lora" else _norm(getattr(d, k)) for k in ("a", "b")}
    a, b = (radius(pair[k], around) if k in pair else resting[k] for k in ("a", "b"))
    return start + d.scale * (beta * a + alpha * b + a * b)


def _start_norm(d: Deviation, centres: Mapping[str, Tensor | None]) -> float:
    """How far a LoRA pair's ``D`` is from the pretrained model where its balls are centred."""
    a, b = (None if c is None else shards.whole(c).detach().double() for c in (centres["a"], centres["b"]))
    product = 0.0 if a is None or b is None else b.flatten(1) @ a.flatten(1)
    if d.a0 is not None and d.b0 is not None:
        product = product - shards.whole(d.b0).double() @ shards.whole(d.a0).double()
    return d.scale * (float(product.norm()) if isinstance(product, Tensor) else 0.0)


def _precision(d: Deviation) -> float:
    """Share of a bound that norms and scaling in the tensors' dtype may be off by."""
    return max(1e-5, 8 * max(torch.finfo(t.parameter.dtype).eps for t in d.tensors))


def _rounding(d: Deviation) -> float:
    """How far storing what does not start at zero can move ``D`` by itself."""
    eps = max(torch.finfo(t.parameter.dtype).eps for t in d.tensors) / 2
    if d.kind == "weight":
        return eps * _norm(d.tensors[0].parameter)
    return eps * d.scale * _norm(d.a) * _norm(d.b) if d.kind == "lora" else 0.0


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(shards.whole(tensor.detach()).double().norm())


def _spectral(tensor: Tensor | None) -> float:
    return (
        0.0
        if tensor is None
        else float(torch.linalg.matrix_norm(shards.whole(tensor.detach()).double().flatten(1), 2))
    )
