"""Streaming second moments of features: ``C = sum_n x_n x_n^T``, never centred, bounded in memory.

Four forms hold the same quantity, or the part of it that counts:

* ``"gram"``: the ``d x d`` matrix itself, accumulated in float64. The default up to ``limit``.
* ``"root"``: a triangular factor ``F`` with ``C = F^T F``, updated by QR. It never squares the condition number, so
  directions down to ``1e-15`` of the largest are seen; used where *every* old direction must be protected.
* ``"sketch"``: Frequent Directions (Liberty 2013, "Simple and Deterministic Matrix Sketching", KDD; Ghashami et al.
  2016, SIAM J. Comput.): ``F`` with a fixed number of rows ``l`` and ``0 <= C - F^T F <= shrinkage * I``, where
  ``shrinkage <= ||X||_F^2 / l``. Memory at most ``3 l d`` however wide the features are.
* ``"diagonal"``: the ``d`` sums of squares alone, for weights that scale features one by one; its directions are axes.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from growthring.errors import ConfigError, DataError, NumericalError

from ._precision import full_precision, solver_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .basis import Subspace

__all__ = ["SecondMoment"]

Form = Literal["gram", "root", "sketch", "diagonal"]
_FORMS: tuple[Form, ...] = ("gram", "root", "sketch", "diagonal")


def _same_order(mask: Sequence[int], leading: Sequence[int]) -> bool:
    """True when one shape is the other with neighbouring dimensions merged: ``(T, B)`` is not ``(B, T)``."""
    first, second = (set(accumulate(shape, mul)) - {1} for shape in (mask, leading))
    return first <= second or second <= first


class SecondMoment:
    """Streaming ``X^T X`` of feature rows, in bounded memory.

    Args:
        dim: Feature dimension ``d``.
        form: ``"gram"``, ``"root"``, ``"sketch"`` or ``"diagonal"`` (see the module); default ``"gram"`` when
            ``dim <= limit``, else
            ``"sketch"``.
        limit: Largest ``d`` kept as a full matrix by default (``4096`` is 134 MB in float64).
        rows: Rows ``l`` of the sketch; default ``512``. Only for ``form="sketch"``.
        products: Dtype in which one batch's products are formed: ``torch.float64`` (default) or ``torch.float32``,
            about twice as fast, but of ``"gram"`` it resolves directions (singular values) only down to
            ``sqrt(1.2e-7 d)`` of the largest instead of ``sqrt(2.2e-16 d)``. Sums over batches are float64 either way;
            the other forms always compute in float64.

    Raises:
        ConfigError: On an unknown form, a non-positive size, or another dtype.
    """

    def __init__(
        self,
        dim: int,
        *,
        form: Form | None = None,
        limit: int = 4096,
        rows: int = 512,
        products: torch.dtype = torch.float64,
    ) -> None:
        if dim < 1 or rows < 1:
            raise ConfigError(f"SecondMoment(dim={dim}, rows={rows}): both must be at least 1")
        if form is not None and form not in _FORMS:
            raise ConfigError(f"SecondMoment(form={form!r}): allowed are {', '.join(map(repr, _FORMS))}")
        if products not in (torch.float32, torch.float64):
            raise ConfigError(f"SecondMoment(products={products}): allowed are torch.float32 and torch.float64")
        self.dim = dim
        self.form: Form = form or ("gram" if dim <= limit else "sketch")
        self.sketch_rows = min(rows, dim)
        self.products = products
        self.count = 0
        """Feature rows seen (masked rows not counted)."""
        self.trace = 0.0
        """Total energy ``sum_n ||x_n||^2``, exact in every form."""
        self.shrinkage = 0.0
        """Upper bound of the spectral norm of what a sketch lost; 0 in the other forms."""
        self._matrix: Tensor | None = None
        self._rows: list[Tensor] = []

    # --- collecting ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, features: Tensor, mask: Tensor | None = None) -> SecondMoment:
        """Add rows.

        Args:
            features: ``(..., d)``, any number of leading dimensions, any floating dtype.
            mask: Optional, shape of the leading dimensions, or the same rows flattened further or less far; rows
                where it is 0 or False (padding) are left out.

        Returns:
            Itself.

        Raises:
            DataError: If the last dimension is not ``d``, or the mask does not fit or is an additive one.
            NumericalError: If a kept row holds NaN or infinity; nothing is added then.
        """
        if features.ndim == 0 or features.shape[-1] != self.dim:
            raise DataError(f"SecondMoment of dimension {self.dim} got features of shape {tuple(features.shape)}")
        flat = features.detach().reshape(-1, self.dim)
        if mask is not None:
            if mask.numel() != flat.shape[0] or not _same_order(mask.shape, features.shape[:-1]):
                raise DataError(
                    f"mask of shape {tuple(mask.shape)} does not fit features of shape {tuple(features.shape)}: "
                    f"it must have one element for each of the {flat.shape[0]} rows, in the same order of dimensions"
                )
            if bool((mask < 0).any()):
                raise DataError(
                    "the mask has negative values, like the additive masks inside attention; pass 1 or True where a "
                    "row counts and 0 or False where it is padding"
                )
            flat = flat[mask.reshape(-1).to(device=flat.device, dtype=torch.bool)]
        if flat.shape[0] == 0:
            return self
        wide = flat.to(solver_device(flat.device)).to(self.products if self.form == "gram" else torch.float64)
        with full_precision(wide.device):
            energy = float(wide.square().sum(dtype=torch.float64))
            if energy != energy or energy == float("inf"):
                raise NumericalError(
                    f"features of shape {tuple(features.shape)} hold NaN or infinity; a second moment of them would "
                    "be NaN for good. Look for an overflow in half precision, or mask these rows out"
                )
            if self.form in ("gram", "diagonal"):
                product = (wide.T @ wide).to(torch.float64) if self.form == "gram" else wide.square().sum(0)
                self._matrix = product if self._matrix is None else self._matrix.to(product.device).add_(product)
            else:
                self._append(wide)
        self.count += flat.shape[0]
        self.trace += energy
        return self

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Add everything that ``other`` has seen (another batch, another process); ``other`` is left as it was.

        Raises:
            ConfigError: If dimensions, forms or product dtypes differ.
        """
        ours, theirs = ((m.form, m.dim, m.products) for m in (self, other))
        if ours != theirs:
            raise ConfigError(
                f"cannot merge a {other.form!r} moment of dimension {other.dim} ({other.products}) into a "
                f"{self.form!r} one of dimension {self.dim} ({self.products}): make both alike"
            )
        if other._matrix is not None:
            added = other._matrix
            self._matrix = added.clone() if self._matrix is None else self._matrix + added.to(self._matrix.device)
        for block in list(other._rows):  # a copy of the list: a moment may be merged into itself
            self._append(block)
        self.count += other.count
        self.trace += other.trace
        self.shrinkage += other.shrinkage
        return self

    # --- reading ------------------------------------------------------------------------------------------------

    def matrix(self) -> Tensor:
        """``C`` as a dense ``(d, d)`` float64 tensor (for a sketch, ``F^T F``, a lower bound of ``C``).

        Of ``"gram"`` it is the live tensor, not a copy: the next :meth:`update` adds to it.
        """
        if self.form == "gram":
            return torch.zeros(self.dim, self.dim, dtype=torch.float64) if self._matrix is None else self._matrix
        if self.form == "diagonal":
            return torch.diag(self._energies())
        factor = self.factor()
        return factor.T @ factor

    def factor(self) -> Tensor:
        """``F`` of shape ``(rows, d)``, float64, with ``F^T F = C`` (a lower bound of ``C`` for a sketch)."""
        if self.form == "gram":
            values, vectors = torch.linalg.eigh(self.matrix())
            root: Tensor = values.clamp_min(0).sqrt().unsqueeze(1) * vectors.T
            return root
        if self.form == "diagonal":
            return torch.diag(self._energies().sqrt())
        self._compact()
        return self._rows[0] if self._rows else torch.zeros(0, self.dim, dtype=torch.float64)

    @torch.no_grad()
    def top(self) -> float:
        """Largest eigenvalue of ``C``, from below, by ten power iterations: a scale, not a result."""
        if self.form == "diagonal":
            return float(self._energies().max())
        operator = self.matrix() if self.form == "gram" else self.factor()
        if operator.numel() == 0:
            return 0.0
        # a generic start: a coordinate axis, or a vector of one sign, may be orthogonal to the largest eigenvector
        vector = torch.arange(1.0, self.dim + 1, dtype=operator.dtype, device=operator.device).cos()
        vector /= vector.norm()
        value = 0.0
        for _ in range(10):
            moved = operator @ vector if self.form == "gram" else operator.mT @ (operator @ vector)
            value = float(moved.norm())
            if value == 0.0:
                break
            vector = moved / value
        return value

    @torch.no_grad()
    def residual_spectrum(self, subspace: Subspace | None = None) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of ``(I - U U^T) C (I - U U^T)``, largest first.

        Args:
            subspace: The protected space ``U``; ``None`` for the whole moment.

        Returns:
            Eigenvalues ``(q,)`` (energies, sigma squared, never negative) and orthonormal columns ``(d, q)``, both
            float64; ``q`` is the number of free directions, or fewer for a factor of fewer rows.
        """
        if self.form == "diagonal":
            return self._free_axes(subspace)
        if subspace is not None and self._thinner_than(subspace):
            # a few rows in a wide space: reject them (twice: a float32 basis is orthonormal to 1e-7 only) instead of
            # making the (d, d - k) basis of everything that is free
            factor, stored = self.factor(), subspace.stored
            stored = stored.to(factor)
            for _ in range(2):
                factor = factor - (factor @ stored) @ stored.mT
            _, sigma, right = torch.linalg.svd(factor, full_matrices=False)
            return sigma.square(), right.mT.contiguous()
        free = None if subspace is None or subspace.rank == 0 else subspace.free_basis()
        if self.form == "gram":
            core = self.matrix().to(self.products)  # float32 products carry no more, and it halves the time
            with full_precision(core.device):
                if free is not None:
                    part = free.to(core)
                    core = part.T @ core @ part
                values, vectors = torch.linalg.eigh(core)
            values, vectors = values.double().flip(0).clamp_min_(0), vectors.double().flip(1)
        else:
            factor = self.factor()
            if free is not None:
                free = free.to(factor)
                factor = factor @ free
            _, sigma, right = torch.linalg.svd(factor, full_matrices=False)
            values, vectors = sigma.square(), right.mT
        return values, (vectors if free is None else free @ vectors).contiguous()

    def _energies(self) -> Tensor:
        """Sums of squares ``(d,)`` of the diagonal form."""
        return torch.zeros(self.dim, dtype=torch.float64) if self._matrix is None else self._matrix

    def _free_axes(self, subspace: Subspace | None) -> tuple[Tensor, Tensor]:
        energies = self._energies()
        axes = torch.eye(self.dim, dtype=torch.float64, device=energies.device)
        if subspace is not None and subspace.rank:
            free = subspace.project(axes).diagonal() < 0.5  # a space grown from axes holds each wholly or not at all
            energies, axes = energies[free], axes[:, free]
        order = energies.argsort(descending=True, stable=True)
        return energies[order], axes[:, order]

    def _thinner_than(self, subspace: Subspace) -> bool:
        rows = self.factor().shape[0] if self.form != "gram" else self.dim
        return rows < subspace.free and not subspace.stores_complement

    # --- storing ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on, as tensors only; taking it changes nothing in what follows, bit for bit."""
        state = {
            "numbers": torch.tensor([self.trace, self.shrinkage], dtype=torch.float64),
            "sizes": torch.tensor([_FORMS.index(self.form), self.dim, self.sketch_rows, self.count]),
            "float32_products": torch.tensor(self.products == torch.float32),
        }
        if self._matrix is not None:
            state["matrix"] = self._matrix.clone()
        if self._rows:
            state["factor"] = torch.cat(self._rows)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> SecondMoment:
        """Rebuild a moment from :meth:`state_dict`."""
        form, dim, rows, count = (int(v) for v in state["sizes"])
        products = torch.float32 if bool(state["float32_products"]) else torch.float64
        moment = cls(dim, form=_FORMS[form], rows=rows, products=products)
        moment.count = count
        moment.trace, moment.shrinkage = (float(v) for v in state["numbers"])
        moment._matrix = state["matrix"].clone() if "matrix" in state else None
        moment._rows = [state["factor"].clone()] if "factor" in state else []
        return moment

    def __repr__(self) -> str:
        return f"SecondMoment(dim={self.dim}, form={self.form!r}, count={self.count})"

    # --- factors ------------------------------------------------------------------------------------------------

    def _append(self, rows: Tensor) -> None:
        """Stack rows under the factor and compact it whenever it holds twice what it may keep."""
        keep = self.dim if self.form == "root" else self.sketch_rows
        for block in torch.split(rows, keep):
            # a copy: a view of the batch would pin it, and follow when the caller writes over it
            self._rows.append(block.to(self._rows[0].device if self._rows else block.device, copy=True))
            if sum(r.shape[0] for r in self._rows) >= 2 * keep:
                self._compact()

    def _compact(self) -> None:
        keep = self.dim if self.form == "root" else self.sketch_rows
        if not self._rows or (len(self._rows) == 1 and self._rows[0].shape[0] <= keep):
            return
        stacked = torch.cat(self._rows)
        if stacked.shape[0] <= keep:
            self._rows = [stacked]
        elif self.form == "root":
            self._rows = [cast(Tensor, torch.linalg.qr(stacked, mode="r")[1]).contiguous()]
        elif stacked.shape[0] <= self.dim // 2:
            # few wide rows: turned by the eigenvectors of their products, a tenth of an SVD's time. The turn is
            # orthonormal, so what squaring blurs (energies below 1e-16 of the largest) only moves between small rows
            energies, turn = torch.linalg.eigh(stacked @ stacked.mT)
            energies, turn = energies.flip(0).clamp_min(0), turn.flip(1)[:, :keep]
            cut = energies[keep]
            self.shrinkage += float(cut)
            left = (1 - cut / energies[:keep]).nan_to_num(0.0).clamp_min(0).sqrt()
            self._rows = [(left.unsqueeze(1) * (turn.mT @ stacked)).contiguous()]
        else:
            _, sigma, right = torch.linalg.svd(stacked, full_matrices=False)
            cut = sigma[keep].square() if sigma.shape[0] > keep else sigma.new_zeros(())
            self.shrinkage += float(cut)
            shrunk = (sigma[:keep].square() - cut).clamp_min(0).sqrt()
            self._rows = [(shrunk.unsqueeze(1) * right[:keep]).contiguous()]
