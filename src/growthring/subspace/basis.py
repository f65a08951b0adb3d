"""``Subspace``: an orthonormal basis of what must be protected, and everything one does with it.

The energy of a direction is sigma squared, features are never centred, and the smallest rank that *reaches* the
threshold is kept (Saha et al. 2021, GPM, arXiv 2103.09762, with the threshold read as "at least").
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from growthring._io import write_with
from growthring.errors import ConfigError, DataError, NumericalError

from ._precision import full_precision, orthonormalise, solver_device, widen
from .moments import SecondMoment

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FORMAT_VERSION", "Growth", "Subspace"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Growth:
    """What one growth of a subspace did.

    Attributes:
        added: New directions.
        rank: Protected directions afterwards.
        free: Directions still free.
        energy: Share of the source's energy inside the subspace afterwards, 0..1.
        target: The threshold asked for, or ``None`` when a fixed number of directions was asked for.
    """

    added: int
    rank: int
    free: int
    energy: float
    target: float | None


class Subspace:
    """A ``rank``-dimensional subspace of R^d, held as an orthonormal basis of itself or of its complement.

    Vectors lie along the *last* axis, so a weight ``(out, d)`` is projected row by row: ``reject(delta)`` leaves
    ``delta @ x = 0`` for every ``x`` of the subspace. At most ``d * d / 2`` numbers are stored: once more than half of
    the directions are protected, the free ones are kept instead.

    Args:
        dim: Dimension ``d`` of the surrounding space.
        basis: Optional ``(d, k)`` columns to start from; re-orthonormalised. Default: the empty subspace.
        dtype: ``torch.float32`` (default) or ``torch.float64``. Narrower dtypes are refused: in bfloat16 a basis is
            off by 3.5e-4 and a projection leaves 3e-3 of what it should remove.
        device: Where the basis lives; default that of ``basis``, else the CPU.

    Raises:
        ConfigError: On a narrow dtype, ``dim < 1`` or a basis with more columns than rows.
        NumericalError: If ``basis`` is not finite or its columns are linearly dependent.
    """

    def __init__(
        self,
        dim: int,
        basis: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if dim < 1:
            raise ConfigError(f"Subspace(dim={dim}): the dimension must be at least 1")
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"Subspace(dtype={dtype}): allowed are torch.float32 and torch.float64")
        self.dim = dim
        self._complement = False
        where = torch.device("cpu" if basis is None else basis.device) if device is None else torch.device(device)
        self._stored = torch.zeros(dim, 0, dtype=dtype, device=where)
        if basis is None:
            return
        if basis.ndim != 2 or basis.shape[0] != dim or basis.shape[1] > dim:
            raise ConfigError(f"Subspace(dim={dim}): the basis must be ({dim}, k <= {dim}), got {tuple(basis.shape)}")
        if not bool(torch.isfinite(basis).all()):
            raise NumericalError("Subspace(basis=...): the basis holds NaN or infinity")
        wide = basis.detach().to(solver_device(where)).to(torch.float64)
        scale = wide.norm(dim=0)
        if bool((scale == 0).any()):
            raise NumericalError("Subspace(basis=...): a column is zero; drop it first")
        wide = wide / scale
        if wide.shape[1] and float(torch.linalg.svdvals(wide)[-1]) < 1e-6:
            raise NumericalError("Subspace(basis=...): the columns are linearly dependent; drop redundant ones first")
        self._keep(orthonormalise(wide))

    # --- what it is ---------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Number of protected directions, ``0..d``."""
        return self.dim - self._stored.shape[1] if self._complement else self._stored.shape[1]

    @property
    def free(self) -> int:
        """Number of directions left to learn in, ``d - rank``."""
        return self.dim - self.rank

    @property
    def stores_complement(self) -> bool:
        """True when the basis of the free directions is what is stored."""
        return self._complement

    @property
    def stored(self) -> Tensor:
        """The stored orthonormal columns ``(d, min(rank, free) or so)``; see :attr:`stores_complement`."""
        return self._stored

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored basis."""
        return self._stored.dtype

    @property
    def device(self) -> torch.device:
        """Device of the stored basis."""
        return self._stored.device

    def basis(self) -> Tensor:
        """Orthonormal columns ``(d, rank)`` of the protected space (computed when the complement is stored)."""
        return self._other() if self._complement else self._stored

    def free_basis(self) -> Tensor:
        """Orthonormal columns ``(d, free)`` of the free space, float64."""
        return self._stored.to(torch.float64) if self._complement else self._other(torch.float64)

    def to(self, device: torch.device | str) -> Subspace:
        """Move the basis to ``device`` in place; returns itself."""
        self._stored = self._stored.to(device)
        return self

    def clone(self) -> Subspace:
        """An independent copy."""
        twin = Subspace(self.dim)
        twin._stored, twin._complement = self._stored.clone(), self._complement
        return twin

    def __repr__(self) -> str:
        kept = "complement" if self._complement else "basis"
        return f"Subspace(dim={self.dim}, rank={self.rank}, free={self.free}, stores={kept})"

    # --- what one does with it ----------------------------------------------------------------------------------

    def project(self, x: Tensor) -> Tensor:
        """Component of ``x`` ``(..., d)`` inside the protected space, ``x U U^T``; a new tensor, dtype of ``x``."""
        return self._apply(x, inside=True).to(x.dtype)

    def reject(self, x: Tensor) -> Tensor:
        """Component of ``x`` ``(..., d)`` outside the protected space, ``x - x U U^T``; new, dtype of ``x``."""
        return self._apply(x, inside=False).to(x.dtype)

    @torch.no_grad()
    def project_(self, x: Tensor) -> Tensor:
        """In-place :meth:`project`; autograd does not record it, so ``x`` may be a parameter."""
        return x.copy_(self._apply(x, inside=True))

    @torch.no_grad()
    def reject_(self, x: Tensor) -> Tensor:
        """In-place :meth:`reject`; autograd does not record it, so ``x`` may be a parameter."""
        return x.copy_(self._apply(x, inside=False))

    def coordinates(self, x: Tensor) -> Tensor:
        """Coordinates ``x U`` ``(..., rank)`` of ``x`` ``(..., d)`` in :meth:`basis`, float32 or wider."""
        self._check(x)
        basis = self.basis().to(x.device)
        with full_precision(x.device):
            return widen(x).to(torch.promote_types(widen(x).dtype, basis.dtype)) @ basis

    def lift(self, coordinates: Tensor) -> Tensor:
        """Vectors ``(..., d)`` from coordinates ``(..., rank)``: the transpose of :meth:`coordinates`.

        Raises:
            DataError: If the last dimension is not ``rank``.
        """
        if coordinates.ndim == 0 or coordinates.shape[-1] != self.rank:
            raise DataError(f"lift of a rank-{self.rank} subspace got coordinates of shape {tuple(coordinates.shape)}")
        basis = self.basis().to(coordinates.device)
        wide = widen(coordinates)
        with full_precision(coordinates.device):
            return wide.to(torch.promote_types(wide.dtype, basis.dtype)) @ basis.mT

    def share(self, x: Tensor) -> float:
        """``||project(x)||_F / ||x||_F`` in float64: the leak of an update ``x``; 0 for ``x = 0``."""
        self._check(x)
        wide = x.detach().to(solver_device(x.device)).to(torch.float64)
        total = float(wide.norm())
        if total == 0.0 or self.rank == 0:
            return 0.0
        stored = self._stored.to(wide)
        inside = wide - (wide @ stored) @ stored.mT if self._complement else wide @ stored
        return float(inside.norm()) / total

    # --- growing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def grow(self, source: SecondMoment | Tensor, *, energy: float | None = None, rank: int | None = None) -> Growth:
        """Add the directions of ``source`` that this subspace lacks, strongest first.

        With ``energy`` the smallest number of new directions is taken such that ``||project(X)||_F^2 >= energy *
        ||X||_F^2``; with 1.0 every direction above rounding noise is. With ``rank`` exactly that many are taken, as
        far as the source has them. The old space stays inside the new one.

        Args:
            source: A :class:`SecondMoment`, or rows ``(..., d)``.
            energy: Threshold in (0, 1].
            rank: Number of directions to add, at least 0. Exactly one of the two must be given.

        Returns:
            What happened, as :class:`Growth`.

        Raises:
            ConfigError: If neither or both are given, or a value is out of range.
            DataError: If the source has another dimension or no rows.
            NumericalError: If the source is all zero.
        """
        if (energy is None) == (rank is None):
            raise ConfigError("Subspace.grow: give either energy= or rank=")
        if energy is not None and not 0.0 < energy <= 1.0:
            raise ConfigError(f"Subspace.grow(energy={energy}): must be in (0, 1]")
        if rank is not None and rank < 0:
            raise ConfigError(f"Subspace.grow(rank={rank}): must be at least 0")
        if isinstance(source, Tensor):
            self._check(source)
            form = "root" if source.shape[-1] <= 4096 else None
            source = SecondMoment(source.shape[-1], form=form).update(source)  # type: ignore[arg-type]
        if source.dim != self.dim:
            raise DataError(f"a source of dimension {source.dim} cannot grow a subspace of dimension {self.dim}")
        if source.count == 0:
            raise DataError("Subspace.grow: the source has seen no rows; run some batches through it first")
        if source.trace == 0.0:
            raise NumericalError("Subspace.grow: every feature row is zero; there is no direction to protect")
        if self.free == 0:
            return Growth(0, self.dim, 0, 1.0, energy)
        values, vectors = source.residual_spectrum(self)
        captured = max(0.0, 1.0 - float(values.sum() + self._lost(source)) / source.trace)
        usable = int((values > self._noise_floor(source, everything=rank is not None or energy == 1.0)).sum())
        if rank is not None:
            added = min(rank, usable)
        elif energy == 1.0:
            added = usable
        else:
            added = self._smallest(values[:usable], captured, float(energy or 0.0), source.trace)
        if added:
            self._extend(vectors[:, :added])
        share = min(1.0, captured + float(values[:added].sum()) / source.trace)
        return Growth(added, self.rank, self.free, share, energy)

    @staticmethod
    def _lost(source: SecondMoment) -> float:
        """Energy that a sketch holds no direction for: counted as not captured."""
        if source.form != "sketch":
            return 0.0
        return max(0.0, source.trace - float(source.factor().square().sum()))

    def _noise_floor(self, source: SecondMoment, *, everything: bool) -> float:
        """Energy below which a residual direction is rounding noise: of the basis, the products or the solver.

        Products of ``"gram"`` err by ``eps * trace`` in practice and by ``d * eps * top`` at worst. Where everything
        above noise is asked for the worst case counts, so that no noise is protected; a threshold stops by itself,
        and cutting a long flat tail at the worst case would keep it from being reached.
        """
        size = max(self.dim, 16)
        top = source.top()
        basis = (8 * torch.finfo(self.dtype).eps) ** 2 * top
        solver = (size * torch.finfo(torch.float64).eps) ** 2 * top
        if source.form != "gram":
            return max(basis, solver)
        eps = torch.finfo(source.products).eps
        return max(basis, solver, size * eps * top if everything else 4 * eps * source.trace)

    @staticmethod
    def _smallest(values: Tensor, captured: float, energy: float, trace: float) -> int:
        """Smallest count whose cumulative energy *reaches* the threshold; 1e-12 absorbs the order of sums."""
        need = energy * (1.0 - 1e-12)
        if captured >= need or values.numel() == 0:
            return 0
        cumulative = captured + values.cumsum(0) / trace
        reached = int((cumulative < need).sum()) + 1
        return min(reached, values.numel())

    def _extend(self, directions: Tensor) -> None:
        """Take in orthonormal columns ``(d, j)`` of the free space."""
        wide = directions.to(solver_device(directions.device)).to(torch.float64)
        if self._complement:
            free = self._stored.to(wide)
            inside = free.mT @ wide
            kept = torch.linalg.qr(inside, mode="complete")[0][:, inside.shape[1] :]
            self._keep(orthonormalise(free @ kept), complement=True)
        else:
            self._keep(orthonormalise(torch.cat([self._stored.to(wide), wide], dim=1)))

    def _keep(self, columns: Tensor, *, complement: bool = False) -> None:
        """Store float64 columns, switching to the complement when that is smaller."""
        if not complement and columns.shape[1] > self.dim / 2:
            columns = self._rest(columns)
            complement = True
        self._complement = complement
        self._stored = columns.to(device=self._stored.device, dtype=self._stored.dtype).contiguous().clone()

    @staticmethod
    def _rest(columns: Tensor) -> Tensor:
        """Orthonormal columns of the complement of orthonormal float64 columns ``(d, k)``: ``(d, d - k)``."""
        if columns.shape[1] == 0:
            return torch.eye(columns.shape[0], dtype=columns.dtype, device=columns.device)
        q: Tensor = torch.linalg.qr(columns, mode="complete")[0]
        return q[:, columns.shape[1] :].contiguous()

    def _other(self, dtype: torch.dtype | None = None) -> Tensor:
        wide = self._stored.to(solver_device(self.device)).to(torch.float64)
        return self._rest(wide).to(device=self.device, dtype=dtype or self.dtype)

    # --- storing ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The stored columns and two numbers, as tensors only."""
        return {
            "columns": self._stored.clone(),
            "shape": torch.tensor([self.dim, int(self._complement)], dtype=torch.long),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Subspace:
        """Rebuild a subspace from :meth:`state_dict`, bit for bit.

        Raises:
            DataError: If tensors are missing, do not fit each other, or the columns are not orthonormal (a torn file).
        """
        if missing := {"columns", "shape"} - set(state):
            raise DataError(f"the stored subspace lacks {', '.join(sorted(missing))}; the file is not whole")
        dim, complement = (int(v) for v in state["shape"])
        columns = state["columns"]
        if columns.ndim != 2 or columns.shape[0] != dim or columns.shape[1] > dim:
            raise DataError(f"the stored subspace says dimension {dim} but holds columns {tuple(columns.shape)}")
        wide = columns.to(solver_device(columns.device)).to(torch.float64)
        error = float((wide.mT @ wide - torch.eye(wide.shape[1]).to(wide)).norm())
        if not error < 1e-3:
            raise DataError(
                f"the stored subspace's columns are not orthonormal (off by {error:.1e}): the file is torn"
            )
        space = cls(dim, dtype=columns.dtype, device=columns.device)
        space._stored, space._complement = columns.clone().contiguous(), bool(complement)
        return space

    def save(self, path: str | Path) -> Path:
        """Write to a ``.safetensors`` file, atomically, with the format version in its header."""
        tensors = {k: v.cpu().contiguous() for k, v in self.state_dict().items()}
        meta = {"format": "growthring.subspace", "format_version": str(FORMAT_VERSION)}
        return write_with(path, lambda temporary: save_file(tensors, temporary, metadata=meta))

    @classmethod
    def load(cls, path: str | Path) -> Subspace:
        """Read a file written by :meth:`save`.

        Raises:
            DataError: If it is another kind of file or a newer format.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise DataError(f"{path} is not a whole safetensors file ({error})") from error
        if meta.get("format") != "growthring.subspace":
            raise DataError(f"{path} is not a growthring subspace (its header says {meta.get('format')!r})")
        version = meta.get("format_version", "")
        if not version.isdecimal() or not 1 <= int(version) <= FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version!r}; this growthring reads 1 to {FORMAT_VERSION}: upgrade it"
            )
        return cls.from_state_dict(state)

    # --- arithmetic ---------------------------------------------------------------------------------------------

    def _check(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise DataError(
                f"a subspace of R^{self.dim} got a tensor of shape {tuple(x.shape)}; vectors lie on the last axis"
            )
        if not x.is_floating_point():
            raise DataError(f"a subspace of R^{self.dim} got a tensor of {x.dtype}; a floating dtype is needed")

    def _apply(self, x: Tensor, *, inside: bool) -> Tensor:
        self._check(x)
        wide = widen(x)
        if wide.dtype != self.dtype:
            wide = wide.to(torch.promote_types(wide.dtype, self.dtype))
        if self._stored.shape[1] == 0:
            nothing = inside != self._complement
            return wide.masked_fill(wide.new_ones((), dtype=torch.bool), 0.0) if nothing else wide.clone()
        stored = self._stored.to(device=x.device, dtype=wide.dtype)
        with full_precision(x.device):
            part = (wide @ stored) @ stored.mT
            return part if inside != self._complement else wide - part
