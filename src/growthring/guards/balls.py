"""Balls around a start, one radius each, and the tensors that must stay in them: norms, dots and scaling, batched.

A *part* is one tensor ``F`` of a ball, measured from an origin; a ball holds one part or several, and its size is
``n^2 = sum ||F - origin||_F^2``. Of a pair ``D = s F N`` whose other factor is ``N``, a part has the size of ``D``:
``||D||_F^2 = s^2 <F N N^T, F>``, and of its i-th rank-one term ``s^2 ||F[:, i]||^2 ||N[i]||^2``.

Tensors of one shape are stacked, so that a model takes a few kernels for each shape; what ranks hold in shards is
summed in one all-reduce for all balls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import shards
from .hyper import hyper_dtype

__all__ = ["Along", "Balls", "Part"]

Along = Literal["all", "rows", "columns"]

STACKED = 1 << 22
"""Elements that one stack holds at most, so that copies of large weights do not pile up."""


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor of a ball, or of one ball for each of its rows or columns.

    Attributes:
        parameter: The tensor ``F``.
        first: Number of its (first) ball.
        origin: What it is measured from, in any dtype; ``None`` for zero.
        along: ``"all"``: it is in one ball. ``"rows"``, ``"columns"``: each row (column) is in a ball of its own.
        partner: ``N`` of a pair, ``(r, n)``; ``None`` if it is measured by itself.
        transposed: The parameter is ``F^T``, ``(r, m)``, and ``partner`` is the other factor's transpose; pairs only.
        scale: ``s`` of a pair.
    """

    parameter: nn.Parameter
    first: int
    origin: Tensor | None = None
    along: Along = "all"
    partner: Tensor | None = None
    transposed: bool = False
    scale: float = 1.0

    def read(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor shaped as the parameter, factors with ``r`` last."""
        if tensor.is_sparse:
            tensor = tensor.to_dense()
        tensor = shards.local(tensor.detach())
        if self.partner is not None and tensor.ndim > 2:
            tensor = tensor.flatten(1)
        return tensor.mT if self.transposed else tensor

    def placed(self, value: Tensor) -> Tensor:
        """What :meth:`read` gives, shaped as this rank's part of the parameter."""
        return (value.mT if self.transposed else value).reshape(shards.local(self.parameter).shape)

    def other(self) -> Tensor:
        """All of ``N``, ``(r, n)``."""
        assert self.partner is not None
        full = shards.whole(self.partner.detach())
        full = full.flatten(1) if full.ndim > 2 else full
        return full.mT if self.transposed else full


class Seen(NamedTuple):
    """Parts as they were before a step, stack by stack."""

    moved: list[Tensor]  # F - origin
    others: list[Tensor | None]  # N
    dots: Tensor  # <g, F - origin> of every ball, of this rank
    energy: Tensor  # n^2 of every ball, of this rank


class Balls:
    """``count`` balls and their parts.

    Args:
        parts: Their parts; all of them are spread over ranks alike.
        count: Number of balls.
    """

    def __init__(self, parts: Sequence[Part], count: int) -> None:
        self.count = count
        self.parts = list(parts)
        self.device = shards.local(self.parts[0].parameter).device if self.parts else torch.device("cpu")
        alike: dict[object, list[Part]] = defaultdict(list)
        for part in self.parts:
            p, n = part.parameter, part.partner
            pair = None if n is None else (n.shape, n.requires_grad, part.transposed)
            shape, device = part.read(p).shape, shards.local(p).device
            alike[shape, p.dtype, device, part.along, part.origin is None, pair].append(part)
        self._stacks: list[_Stack] = []
        for group in alike.values():
            most = max(1, STACKED // max(1, group[0].parameter.numel()))
            self._stacks += [_Stack(group[i : i + most]) for i in range(0, len(group), most)]
        self._table = self._gather_table()

    def look(self) -> Seen:
        """Where parts are, and ``<g, F - origin>`` of their gradients, before a step."""
        moved, others, dots, sizes = [], [], [], []
        for stack in self._stacks:
            f, n = stack.read()
            moved.append(f)
            others.append(n)
            dots.append(stack.each(stack.gradients() * f))
            sizes.append(stack.energies(f, n))
        return Seen(moved, others, self._by_ball(dots), self._by_ball(sizes))

    def step(self, before: Seen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a step did, over all ranks.

        Args:
            before: :meth:`look` before it.

        Returns:
            Of every ball ``<g, F>``, ``n^2`` before, ``n^2`` now and the squared length of the step, ``(count,)``.
        """
        now, lengths = [], []
        for stack, f0, n0 in zip(self._stacks, before.moved, before.others, strict=True):
            f, n = stack.read()
            now.append(stack.energies(f, n))
            lengths.append(stack.step_energies(f, n, f0, n0))
        found = torch.stack([before.dots, before.energy, self._by_ball(now), self._by_ball(lengths)])
        dots, old, new, length = self.add(found).unbind()
        return dots, old, new, length

    def against(self, before: Seen) -> Tensor:
        """``<g, F>`` of every ball with the gradients of now and the ``F - origin`` of ``before``, of this rank."""
        dots = [s.each(s.gradients() * f) for s, f in zip(self._stacks, before.moved, strict=True)]
        return self._by_ball(dots)

    def overlap(self, one: Seen, two: Seen) -> Tensor:
        """``<F_1, F_2>`` of every ball, of this rank."""
        both = zip(self._stacks, one.moved, two.moved, strict=True)
        return self._by_ball([s.each(f * g) for s, f, g in both])

    def add(self, found: Tensor) -> Tensor:
        """Sum over ranks what this rank found of every ball, ``(..., count)``."""
        return shards.add([p.parameter for p in self.parts[:1]], found)

    def split(self, seen: Seen) -> list[Tensor]:
        """``F - origin`` of every part, in order; this rank's part of each."""
        found = {
            id(p): f for s, fs in zip(self._stacks, seen.moved, strict=True) for p, f in zip(s.parts, fs, strict=True)
        }
        return [found[id(part)] for part in self.parts]

    def join(self, moved: Sequence[Tensor]) -> Seen:
        """What :meth:`split` took apart, without dots and energies."""
        found = {id(part): f for part, f in zip(self.parts, moved, strict=True)}
        empty = torch.zeros(self.count, dtype=hyper_dtype(self.device), device=self.device)
        stacks = [torch.stack([found[id(p)] for p in s.parts]) for s in self._stacks]
        return Seen(stacks, [None] * len(stacks), empty, empty)

    def lean(self, seen: Seen, by: Tensor) -> None:
        """``g <- g + by (F - origin)`` in every gradient that is there, of tensors that lie in one ball each.

        A sparse gradient becomes a dense one: what is added is not sparse.
        """
        for stack, f in zip(self._stacks, seen.moved, strict=True):
            stack.lean(f, by)

    def sizes(self) -> Tensor:
        """``n`` of every ball now, over all ranks, ``(count,)``."""
        found = self._by_ball([stack.energies(*stack.read()) for stack in self._stacks])
        return self.add(found).clamp_min(0.0).sqrt()

    def scale(self, ratio: Tensor) -> None:
        """``F <- origin + ratio (F - origin)``; a ratio of 1 leaves ``F`` as it is, bit for bit."""
        for stack in self._stacks:
            stack.scale(ratio)

    def _by_ball(self, found: list[Tensor]) -> Tensor:
        """Sum what parts have, ball by ball, in a fixed order."""
        dtype = hyper_dtype(self.device)
        pieces = [piece.flatten().to(self.device, dtype) for piece in found]
        flat = torch.cat([*pieces, torch.zeros(1, dtype=dtype, device=self.device)])
        return flat[self._table].sum(1)

    def _gather_table(self) -> Tensor:
        """``(count, k)``: where in the row of all parts' numbers those of a ball stand; the last place is a zero."""
        ball = torch.cat([torch.zeros(0, dtype=torch.long), *(stack.index.flatten().cpu() for stack in self._stacks)])
        order = ball.argsort(stable=True)
        sizes = torch.bincount(ball, minlength=self.count)
        begins = sizes.cumsum(0) - sizes
        table = torch.full((self.count, int(sizes.max()) if self.count else 0), ball.numel())
        table[ball[order], torch.arange(ball.numel()) - begins[ball[order]]] = order
        return table.to(self.device)


class _Stack:
    """Parts of one shape."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        first = parts[0]
        self.along, local = first.along, first.read(first.parameter)
        self._dtype = torch.promote_types(local.dtype, torch.float32)
        self._pair = first.partner is not None
        self._still = first.partner is not None and not first.partner.requires_grad
        starts = torch.tensor([p.first for p in parts])
        if self.along == "all":
            self.index = starts
        else:
            axis = 0 if self.along == "rows" else -1
            if axis == 0:  # parts of one size may begin at different rows of their tensors
                starts += torch.tensor([shards.offset(p.parameter) for p in parts])
            self.index = starts.unsqueeze(1) + torch.arange(local.shape[axis])
        self.index = self.index.to(local.device)
        self._scale = torch.tensor([p.scale**2 for p in parts], dtype=self._dtype, device=local.device)
        self._origin: Tensor | None = None
        if first.origin is not None:
            self._origin = torch.stack([p.read(p.origin) for p in parts if p.origin is not None]).to(self._dtype)
        self._gram: Tensor | None = None
        if self._still:
            self._gram = _gram(self._others())

    def read(self) -> tuple[Tensor, Tensor | None]:
        """``F - origin`` of all parts, and ``N`` of pairs in which it trains."""
        f = torch.stack([p.read(p.parameter) for p in self.parts]).to(self._dtype)
        if self._origin is not None:
            f = f - self._origin
        return f, self._others() if self._pair and not self._still else None

    def gradients(self) -> Tensor:
        """Gradients, zero where there are none."""
        found = [
            torch.zeros_like(p.read(p.parameter)) if p.parameter.grad is None else p.read(p.parameter.grad)
            for p in self.parts
        ]
        return torch.stack(found).to(self._dtype)

    def lean(self, f: Tensor, by: Tensor) -> None:
        """See :meth:`Balls.lean`."""
        for part in self.parts:
            if part.parameter.grad is not None and part.parameter.grad.is_sparse:
                part.parameter.grad = part.parameter.grad.to_dense()
        factors = by.to(self.index.device)[self.index].to(self._dtype)
        moves = (f * factors.view(-1, *[1] * (f.ndim - 1))).unbind()
        both = zip((p.parameter.grad for p in self.parts), self.parts, moves, strict=True)
        found = [(part.read(gradient), move) for gradient, part, move in both if gradient is not None]
        if found:
            torch._foreach_add_([g for g, _ in found], [m.to(g.dtype) for g, m in found])

    def each(self, products: Tensor) -> Tensor:
        """Sum products of elements, as the parts lie in balls."""
        if self.along == "rows":
            return products.flatten(2).sum(2)
        if self.along == "columns":
            return products.sum(1)
        return products.flatten(1).sum(1) if products.ndim > 1 else products  # single numbers have no axis

    def energies(self, f: Tensor, n: Tensor | None) -> Tensor:
        """``n^2`` of every part."""
        return self._measure(f, f, self._gram if n is None else _gram(n))

    def step_energies(self, f: Tensor, n: Tensor | None, f0: Tensor, n0: Tensor | None) -> Tensor:
        """Squared length of what ``F``, or ``F N``, has moved by: ``F N - F_0 N_0 = (F - F_0) N + F_0 (N - N_0)``."""
        step = f - f0
        if n is None or n0 is None:
            return self._measure(step, step, self._gram)
        turn = n - n0
        cross = self._measure(step, f0, n @ turn.mT)
        return (self._measure(step, step, _gram(n)) + 2 * cross + self._measure(f0, f0, _gram(turn))).clamp_min(0.0)

    def scale(self, ratio: Tensor) -> None:
        """See :meth:`Balls.scale`."""
        by = ratio.to(self.index.device)[self.index].to(self._dtype)
        places = [shards.local(p.parameter.detach()) for p in self.parts]
        f = torch.stack([p.read(p.parameter) for p in self.parts]).to(self._dtype)
        shape = [len(self.parts)] + [1] * (f.ndim - 1)
        if self.along != "all":
            shape[1 if self.along == "rows" else -1] = by.shape[1]
        by = by.view(shape)
        new = f * by if self._origin is None else torch.lerp(self._origin, f, by.expand_as(f))
        new = torch.where(by < 1.0, new, f)  # NaN of a broken step stays what it is
        new = new.to(places[0].dtype)
        torch._foreach_copy_(places, [part.placed(value) for part, value in zip(self.parts, new, strict=True)])

    def _others(self) -> Tensor:
        return torch.stack([p.other() for p in self.parts]).to(self._dtype)

    def _measure(self, one: Tensor, two: Tensor, gram: Tensor | None) -> Tensor:
        """``<one G, two>``, scaled; the rank-one terms have the diagonal of ``G`` only."""
        if gram is None:
            return self.each(one * two)
        if self.along == "columns":
            terms = (one * two).sum(1) * gram.diagonal(dim1=-2, dim2=-1)
            return terms * self._scale.unsqueeze(1)
        return self.each((one @ gram) * two) * self._scale


def _gram(n: Tensor) -> Tensor:
    return n @ n.mT
