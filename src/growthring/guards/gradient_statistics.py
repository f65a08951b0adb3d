"""What a task's gradients were, summed up while it trains: a second moment for each side of each matrix.

The rows of a gradient ``G`` ``(out, in)`` are vectors of the input side, its columns of the output side. An optimizer
that steps in a subspace sees ``G ~ L P^T`` with a basis ``P`` ``(in, r)`` that it keeps for a while; over that while

    sum_t G_t^T G_t  =  P (sum_t L_t^T L_t) P^T,

so it is enough to add up ``r x r`` matrices, and to hand on the ``r`` rows of ``(sum L^T L)^(1/2) P^T`` when ``P``
changes: ``out * r^2`` multiply-adds a step, and nothing of the size of ``G``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from growthring.errors import NumericalError
from growthring.subspace import SecondMoment, solver_device, widest_dtype

from .memory import SKETCH_ABOVE
from .site import Site

__all__ = ["GradientStatistics"]


@dataclass
class _Window:
    """``sum L^T L`` while one basis ``P`` is in use."""

    key: str
    basis: Tensor  # a copy: the optimizer's own may be written over
    gram: Tensor
    source: Tensor | None  # the optimizer's own, to see that it is still in use; None after loading

    def uses(self, basis: Tensor) -> bool:
        """Whether ``basis`` is what this window was opened with."""
        if self.source is basis:
            return True
        same = self.basis.shape == basis.shape and bool((self.basis == basis).all())
        self.source = basis if same else None
        return same

    def rows(self) -> Tensor:
        """``(sum L^T L)^(1/2) P^T``, ``(r, dim)`` float64."""
        values, vectors = torch.linalg.eigh(self.gram.to(solver_device(self.gram.device)))
        root = values.clamp_min(0).sqrt().unsqueeze(1) * vectors.mT
        return root @ self.basis.to(root).mT


class GradientStatistics:
    """Second moments of one task's gradients, by layer and side.

    Args:
        keys: Layer and side of every site, by its name.
        last: Keep what came last instead of the sum.
        rows: Rows of a sketch, for sides wider than twice as much of which only coordinates are seen, and for all
            wider than 4,096.
        exact: Directions down to rounding noise are asked for.
    """

    def __init__(self, keys: Mapping[str, str], *, last: bool, rows: int, exact: bool) -> None:
        self._keys, self._last, self._rows, self._exact = dict(keys), last, rows, exact
        self._moments: dict[str, SecondMoment] = {}
        self._windows: dict[str, _Window] = {}
        self._latest: dict[str, Tensor] = {}
        self._left_out: Tensor | int = 0
        self.steps = 0
        """Optimizer steps that were watched."""

    @property
    def left_out(self) -> int:
        """Matrices left out because they held NaN or infinity."""
        return int(self._left_out)

    def __contains__(self, site: str) -> bool:
        """Whether coordinates, or a last matrix, of the named site are held."""
        return site in self._windows or site in self._latest

    @torch.no_grad()
    def add(self, site: Site, matrix: Tensor, floor: Tensor | float = 0.0) -> None:
        """Add a whole gradient or first moment ``(rows, dim)`` of a site, unless its norm is at most ``floor``."""
        self._take(site, matrix.detach(), floor, whole=True)

    @torch.no_grad()
    def add_coordinates(
        self, site: Site, coordinates: Tensor, basis: Tensor | None, floor: Tensor | float = 0.0
    ) -> None:
        """Add ``G ~ coordinates @ basis^T`` of a site.

        Args:
            site: The site.
            coordinates: ``(rows, r)``, or ``(r, dim)`` without a basis on this side; left as they are.
            basis: Orthonormal columns ``(dim, r)``, or ``None``.
            floor: Norm of ``G`` up to which it counts as nothing.
        """
        if basis is None:
            self._take(site, coordinates.detach(), floor, whole=False)
            return
        window = self._windows.get(site.name)
        if window is None or not window.uses(basis):
            if window is not None and not self._last:
                self._flush(window)
            gram = torch.zeros(basis.shape[1], basis.shape[1], dtype=widest_dtype(basis.device), device=basis.device)
            window = _Window(self._keys[site.name], basis.detach().clone(), gram, basis)
            self._windows[site.name] = window
        part = coordinates.detach()
        part = part.to(window.gram.dtype if self._exact else torch.promote_types(part.dtype, torch.float32))
        product = (part.mT @ part).to(window.gram.dtype)
        whole = product.isfinite().all()  # NaN never enters, and nothing waits for the device
        self._left_out = self._left_out + (~whole).long()
        counts = whole & (product.trace() > floor**2)
        if self._last:
            window.gram.copy_(torch.where(counts, product, window.gram))
        else:
            window.gram.add_(product.masked_fill_(~counts, 0.0))

    def finish(self) -> dict[str, SecondMoment]:
        """Everything that was added, by layer and side."""
        for window in self._windows.values():
            self._flush(window)
        for name, matrix in self._latest.items():
            self._update(self._keys[name], matrix, whole=True)
        self._windows.clear()
        self._latest.clear()
        return self._moments

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "moments": {key: moment.state_dict() for key, moment in self._moments.items()},
            "windows": {
                name: {"key": w.key, "basis": w.basis.clone(), "gram": w.gram.clone()}
                for name, w in self._windows.items()
            },
            "latest": {name: matrix.clone() for name, matrix in self._latest.items()},
            "left_out": self.left_out,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._moments = {key: SecondMoment.from_state_dict(moment) for key, moment in state["moments"].items()}
        self._windows = {
            name: _Window(w["key"], w["basis"].clone(), w["gram"].clone(), None)
            for name, w in state["windows"].items()
        }
        self._latest = {name: matrix.clone() for name, matrix in state["latest"].items()}
        self._left_out, self.steps = int(state["left_out"]), int(state["steps"])

    def _take(self, site: Site, rows: Tensor, floor: Tensor | float, *, whole: bool) -> None:
        if float(floor) and float(rows.norm()) <= float(floor):
            return
        if self._last:
            self._latest[site.name] = rows.clone()
        else:
            self._update(self._keys[site.name], rows, whole=whole)

    def _flush(self, window: _Window) -> None:
        if bool(window.gram.any()):
            self._update(window.key, window.rows(), whole=False)

    def _update(self, key: str, rows: Tensor, *, whole: bool) -> None:
        """Add rows, unless they are zero or hold NaN or infinity."""
        moment = self._moments.get(key) or self._moment(rows, whole)
        if whole and moment.form == "sketch" and rows.shape[0] > self._rows:
            rows = _mixed(rows, self._rows, moment.count)
        try:
            moment.update(rows)
        except NumericalError:
            self._left_out = self._left_out + 1
            return
        if moment.trace > 0.0:
            self._moments[key] = moment

    def _moment(self, rows: Tensor, whole: bool) -> SecondMoment:
        """The cheapest form that resolves what is asked for."""
        dim = rows.shape[1]
        if dim > SKETCH_ABOVE or (dim > 2 * self._rows and not whole and not self._exact):
            return SecondMoment(dim, form="sketch", rows=self._rows)
        wide = self._exact or not whole or rows.dtype == torch.float64
        return SecondMoment(dim, form="gram", products=torch.float64 if wide else torch.float32)


def _mixed(rows: Tensor, count: int, seed: int) -> Tensor:
    """``count`` seeded random mixtures of the rows, whose second moment has that of the rows as its mean."""
    generator = torch.Generator().manual_seed(seed)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    weights = torch.randn(count, rows.shape[0], generator=generator) / count**0.5
    return weights.to(wide) @ wide
